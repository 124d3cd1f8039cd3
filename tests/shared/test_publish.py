"""A study is published from clean commits and enough seeds alone, and as a whole: the earlier report or this one."""

import ctypes
import json
import os
import shutil
from pathlib import Path

import pytest

from shared import publish
from shared.errors import RunError
from shared.publish import replace_folder
from shared.study import Job

COMMIT = "c" * 40
RESULTS = {
    "paper": "p", "config": "c", "device": "d", "precision": "float32", "commit": COMMIT, "seconds": 1.0,
    "command": "-", "seed": 0, "figures": [{"at": "final", "split": "test", "metric": "accuracy", "value": 0.5}],
}  # fmt: skip
OLD = {"results.csv": b"old", "plots/old.png": b"of another name"}
NEW = {"results.csv": b"new", "methods.md": b"table", "plots/new.png": b"picture"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_of(out: Path, arm: str, seed: int, **changes) -> Job:
    """A finished run, as far as publishing looks at it."""
    folder = out / f"c-{arm}-s{seed}"
    folder.mkdir(parents=True)
    results = {**RESULTS, "method": arm, "seed": seed, **changes.pop("results", {})}
    made = {"commit": COMMIT, "dirty": False, **changes}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "environment.json").write_text(json.dumps({k: v for k, v in made.items() if v != "left out"}))
    return Job(arm, seed, folder, ())


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where the study `p/c` is published, with an earlier report there; the new report is in `report`."""
    monkeypatch.setattr("shared.publish.REPOSITORY", tmp_path)
    write(tmp_path / "report", NEW)
    return write(tmp_path / "results" / "p" / "c", OLD)


def test_a_whole_study_takes_the_place_of_the_earlier_one_and_of_no_other(tmp_path, place):
    other = write(place.parent / "other", OLD)
    jobs = [run_of(tmp_path / "runs", arm, seed) for arm in "ab" for seed in range(3)]
    publish.publish(tmp_path / "report", "p", "c", jobs, failed=0)
    assert files_of(place) == files_of(tmp_path / "report") == NEW
    assert files_of(other) == OLD
    publish.publish(tmp_path / "report", "p", "first", jobs, failed=0)
    assert files_of(place.parent / "first") == NEW
    assert {path.name for path in place.parent.parent.iterdir()} == {"p"}, "nothing is left over"


@pytest.mark.parametrize(("last", "said"), [
    ({"dirty": True}, "c-a-s2 was made with changes that are in no commit; commit them"),
    ({"dirty": None}, "changes that are in no commit"),
    ({"dirty": "left out"}, "changes that are in no commit"),
    ({"commit": "d" * 40}, "does not say which one commit made it"),
    ({"commit": "left out"}, "does not say which one commit made it"),
    ({"commit": "unknown", "results": {"commit": "unknown"}}, "does not say which one commit made it"),
    ({"results": {"seed": 1}}, "a has 2 seeds, and a published figure has at least 3"),
    ({"results": {"figures": []}}, "a has 2 seeds"),
])  # fmt: skip
def test_one_run_that_may_not_be_published_keeps_the_whole_study_back(tmp_path, place, last, said):
    jobs = [*(run_of(tmp_path, "a", seed) for seed in range(2)), run_of(tmp_path, "a", 2, **last)]
    jobs += [run_of(tmp_path, "b", seed) for seed in range(3)]
    with pytest.raises(RunError, match=said) as refused:
        publish.publish(tmp_path / "report", "p", "c", jobs, failed=0)
    assert str(refused.value).startswith("--publish: ")
    assert str(refused.value).endswith(f"nothing was published, the report is in {tmp_path / 'report'}")
    assert "\n" not in str(refused.value)
    assert files_of(place) == OLD
    assert files_of(tmp_path / "report") == NEW


def test_a_study_with_a_failed_or_missing_run_is_refused(tmp_path, place):
    jobs = [run_of(tmp_path, "a", seed) for seed in range(5)]
    with pytest.raises(RunError, match="1 of 5 runs failed"):  # what its folder holds may be of other settings
        publish.publish(tmp_path / "report", "p", "c", jobs, failed=1)
    (jobs[3].folder / "results.json").unlink()
    for failed in (0, 1):
        with pytest.raises(RunError, match=r"1 of 5 runs failed \(c-a-s3 has no results\)"):
            publish.publish(tmp_path / "report", "p", "c", jobs, failed)
    assert files_of(place) == OLD


def test_seeds_that_are_trained_side_by_side_in_one_run_count_each(tmp_path):
    def run(arm: str, seeds: int) -> Job:
        figures = [{**RESULTS["figures"][0], "seed": seed} for seed in range(seeds)]
        job = run_of(tmp_path, arm, 0)
        results = {key: value for key, value in RESULTS.items() if key != "seed"} | {"method": arm, "figures": figures}
        (job.folder / "results.json").write_text(json.dumps(results))
        return job

    assert publish.problem_of([run("a", 3), run("b", 5)], 0) == ""
    assert publish.problem_of([run("c", 2)], 0).startswith("c has 2 seeds,")


def test_an_arm_may_have_one_seed_by_design_and_its_commit_is_looked_at_all_the_same(tmp_path):
    jobs = [*(run_of(tmp_path, "a", seed) for seed in range(3)), run_of(tmp_path, "teacher", 0)]
    assert publish.problem_of(jobs, 0, {"teacher"}) == ""
    assert publish.problem_of(jobs, 0).startswith("teacher has 1 seed,")
    jobs.append(run_of(tmp_path, "teacher", 1, dirty=True))
    assert "in no commit" in publish.problem_of(jobs, 0, {"teacher"})


# The swap

CALLS = ("open", "fsync", "rename", "mkdir", "unlink", "rmdir", "utime", "chmod", "scandir")


def killed_before(number: int, source: Path, target: Path) -> bool:
    """Replace a folder in a child that ends itself before so many calls on files; whether it came to that."""
    child = os.fork()
    if child == 0:
        calls = iter(range(1, 10**9))

        def counting(real):
            def counted(*arguments, **named):
                if next(calls) == number:
                    os._exit(9)
                return real(*arguments, **named)

            return counted

        for name in CALLS:
            setattr(os, name, counting(getattr(os, name)))
        replace_folder(source, target)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_process_killed_at_any_moment_leaves_the_old_report_or_the_new_one_whole(tmp_path):
    source, target = write(tmp_path / "report", NEW), tmp_path / "results" / "p" / "c"
    seen, number = [], 0
    while True:
        number += 1
        shutil.rmtree(target, ignore_errors=True)
        write(target, OLD)
        if not killed_before(number, source, target):
            break
        seen.append(files_of(target))
        assert seen[-1] in (OLD, NEW), f"killed before call {number}"
        assert not list(target.parent.glob(".*")), "what is left over is not beside the studies"
        replace_folder(source, target)
        assert files_of(target) == NEW
        assert {path.name for path in target.parent.parent.iterdir()} == {"p"}
    assert OLD in seen
    assert NEW in seen


@pytest.fixture
def no_exchange(monkeypatch) -> None:
    """A system that cannot give two folders each other's names."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())


@pytest.mark.usefixtures("no_exchange")
def test_without_an_exchange_of_names_the_old_report_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path, monkeypatch
):
    source, target = write(tmp_path / "report", NEW), write(tmp_path / "results" / "p" / "c", OLD)
    real = os.rename

    def failing(old, new):
        if str(old).endswith(".new"):
            raise OSError(5, "Input/output error")
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(RunError, match=r"results/p/c: cannot be written: Input/output error; the report is in"):
            replace_folder(source, target)
    assert files_of(target) == OLD
    target.rename(tmp_path / "results" / ".p-c.old")  # as a crash between the two renames leaves it
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RunError, match="No space left on device"):
            replace_folder(source, target)
    assert files_of(target) == OLD
    replace_folder(source, target)
    assert files_of(target) == NEW
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"p"}


def test_a_full_disk_leaves_the_old_report_and_nothing_else(tmp_path, monkeypatch):
    source, target = write(tmp_path / "report", NEW), write(tmp_path / "results" / "p" / "c", OLD)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "sync", full)
    with pytest.raises(RunError, match=r"results/p/c: cannot be written: No space left on device"):
        replace_folder(source, target)
    assert files_of(target) == OLD
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"p"}
