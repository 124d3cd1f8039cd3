"""A run's folder: opening, saving, restoring, results and names."""

import json
import os
import shutil
import subprocess

import pytest
import torch

from shared import run as run_module
from shared.checkpoint import load_state
from shared.errors import CheckpointError, DataError, RunError
from shared.run import Run, folder_name, read_metrics, read_results, state_digest
from tests.shared.small_runs import Small, snapshot


def test_a_new_run_has_its_configuration_and_environment_and_no_results(opened):
    assert (opened.folder / "config.yaml").read_text().startswith("{seed: 0, rate: 0.5}")
    environment = json.loads((opened.folder / "environment.json").read_text())
    assert environment["command"] == "python -m x.train --config y"
    assert {"commit", "dirty", "python", "torch", "system"} <= set(environment)
    assert opened.results is None
    assert opened.restore() is None


def test_a_run_says_whether_its_code_is_in_a_commit_and_published_figures_are_no_code(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "shared" / "run.py"))
    assert (run_module.environment("-")["commit"], run_module.environment("-")["dirty"]) == ("unknown", None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("1")
    for words in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "code"]):
        subprocess.run([*git, *words], check=True)
    made = run_module.environment("-")
    assert (len(made["commit"]), made["dirty"]) == (40, False)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.csv").write_text("published a moment ago")
    assert run_module.environment("-")["dirty"] is False
    (tmp_path / "code.py").write_text("2")
    assert run_module.environment("-")["dirty"] is True


def test_a_run_that_other_code_goes_on_with_is_of_no_one_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "shared" / "run.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]

    def commit(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        for words in (["add", name], ["commit", "-q", "-m", "x"]):
            subprocess.run([*git, *words], check=True)
        return str(subprocess.check_output([*git, "rev-parse", "HEAD"]).decode().strip())

    def opened_again() -> tuple[str, bool | None]:
        with Run(tmp_path / "runs" / "a", Small(), "-"):
            made = json.loads((tmp_path / "runs" / "a" / "environment.json").read_text())
        return made["commit"], made["dirty"]

    subprocess.run([*git, "init", "-q"], check=True)
    commit(".gitignore", "runs")
    first = commit("code.py", "1")
    assert opened_again() == (first, False)
    commit("README.md", "words")
    assert opened_again() == (first, False)  # the same code
    (tmp_path / "code.py").write_text("2")
    assert opened_again() == (first, True)
    subprocess.run([*git, "checkout", "-q", "code.py"], check=True)
    assert opened_again() == (first, True)  # what was trained with other code stays so
    shutil.rmtree(tmp_path / "runs")
    second = commit("code.py", "3")
    assert opened_again() == (second, False)
    commit("code.py", "4")
    assert opened_again() == ("unknown", False)
    commit("code.py", "3")
    assert opened_again() == ("unknown", False)


def test_metrics_that_are_damaged_are_told_in_one_line(opened):
    opened.log("step", number=1)
    for damage in ("{", "[]", "{}", '"a"'):
        path = opened.folder / "metrics.jsonl"
        path.write_text(f'{{"event": "step"}}\n{damage}\n')
        with pytest.raises(RunError, match=r"metrics.jsonl: is damaged or gone; make the run again"):
            read_metrics(opened.folder, "step")
    path.unlink()
    with pytest.raises(RunError, match=r"metrics.jsonl: is damaged or gone"):
        read_metrics(opened.folder, "step")


@pytest.mark.parametrize(
    ("before", "now", "both"),
    [(False, False, False), (False, True, True), (True, False, True), (None, False, None), (False, None, None),
     (None, True, True)],
)  # fmt: skip
def test_a_run_is_clean_only_where_it_is_known_to_have_been_at_each_start(before, now, both):
    made = run_module.made_by_both({"commit": "a", "dirty": before}, {"commit": "a", "dirty": now})
    assert made["dirty"] is both
    assert run_module.made_by_both({"commit": "a"}, {"commit": "a", "dirty": False})["dirty"] is None


def test_a_run_that_began_on_other_data_is_refused_by_their_name(opened):
    opened.log("start", digests={"train": "1", "test": "2"})
    opened.check_data({"train": "1", "test": "2", "partition": "3"})
    with pytest.raises(DataError, match=r"began on other data \(test\); give it back"):
        opened.check_data({"train": "1", "test": "3"})


def test_the_same_configuration_opens_the_folder_again_and_another_is_refused_by_its_key(tmp_path):
    for _ in range(2):
        with Run(tmp_path / "run", Small(rate=0.25), "-"):
            pass
    before = snapshot(tmp_path)
    with (
        pytest.raises(RunError, match=r"another configuration \(rate: 0.25 -> 0.5\)"),
        Run(tmp_path / "run", Small(), "-"),
    ):
        pass
    assert snapshot(tmp_path) == before


def test_a_folder_that_is_no_run_is_refused_and_untouched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match=r"holds 'thesis\.tex' but is not a run"), Run(tmp_path / "run", Small(), "-"):
        pass
    assert snapshot(tmp_path) == before


def test_a_folder_with_a_strange_configuration_is_refused_and_its_files_stay(tmp_path):
    (tmp_path / "config.yaml").write_text("something: else\n")
    (tmp_path / ".lock").write_text("theirs")
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="another configuration"), Run(tmp_path, Small(), "-"):
        pass
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("left", [(".lock",), (".lock", "environment.json"), (".lock", ".environment.json.ab.tmp"),
                                  (".lock", "environment.json", ".config.yaml.ab.tmp")])  # fmt: skip
def test_what_a_run_leaves_that_was_killed_while_it_began_does_not_stop_the_next(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{")
    with Run(tmp_path, Small(), "again"):
        assert json.loads((tmp_path / "environment.json").read_text())["command"] == "again"
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.yaml", "environment.json"]


@pytest.mark.parametrize("folder", ["/proc/none", "file"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError) as caught, Run(tmp_path / folder, Small(), "-"):
        pass
    assert "cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_second_process_cannot_open_a_run_and_the_lock_goes_with_the_first(tmp_path):
    with (
        Run(tmp_path / "run", Small(), "-"),
        pytest.raises(RunError, match="another process is writing this run"),
        Run(tmp_path / "run", Small(), "-"),
    ):
        pass
    for _ in range(2):  # also a refusal lets go of the lock
        with pytest.raises(RunError, match="another configuration"), Run(tmp_path / "run", Small(seed=1), "-"):
            pass
    with Run(tmp_path / "run", Small(), "-"):
        pass


def test_restoring_cuts_the_metrics_back_to_the_saved_state(opened):
    opened.log("step", number=1)
    opened.save({"number": 1}, force=True)
    opened.log("step", number=2)
    opened.log("step", number=3)
    assert opened.restore() == {"number": 1}
    assert [row["number"] for row in read_metrics(opened.folder, "step")] == [1]
    opened.log("step", number=2)
    opened.save({"number": 2}, force=True)
    assert opened.restore(previous=True) == {"number": 1}
    assert [row["number"] for row in read_metrics(opened.folder, "step")] == [1]


def test_a_new_start_without_a_state_cuts_all_metrics(opened):
    opened.log("step", number=1)
    assert opened.restore() is None
    assert read_metrics(opened.folder, "step") == []


def test_a_half_written_line_of_metrics_is_cut_off(opened):
    opened.log("step", number=1)
    opened.save({}, force=True)
    with open(opened.folder / "metrics.jsonl", "a") as file:
        file.write('{"event": "st')
    opened.restore()
    opened.log("step", number=2)
    assert [row["number"] for row in read_metrics(opened.folder, "step")] == [1, 2]


def test_metrics_that_lost_what_the_state_counts_on_are_refused_not_padded(opened):
    opened.log("step", number=1)
    opened.save({}, force=True)
    for damage in (lambda path: os.truncate(path, 3), os.unlink):
        damage(opened.folder / "metrics.jsonl")
        with pytest.raises(RunError, match=r"metrics.jsonl: has \d bytes, but had"):
            opened.restore()


def test_a_damaged_state_does_not_take_the_place_of_the_good_one_before_it(opened):
    for number in (1, 2):
        opened.save({"number": number}, force=True)
    opened.state_path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"with --previous \(.*previous-state\.ckpt\)"):
        opened.restore()
    assert opened.restore(previous=True) == {"number": 1}
    assert opened.restore() == {"number": 1}  # killed before it saved, the run goes on from there
    opened.save({"number": 3}, force=True)
    assert [opened.restore(previous)["number"] for previous in (False, True)] == [3, 1]


def test_a_state_that_is_gone_is_no_new_start_while_there_is_one_before_it(opened):
    for number in (1, 2):
        opened.log("step", number=number)
        opened.save({"number": number}, force=True)
    opened.state_path.unlink()
    with pytest.raises(CheckpointError, match=r"state\.ckpt: cannot be read: .* --previous"):
        opened.restore()
    assert opened.restore(previous=True) == {"number": 1}
    assert [row["number"] for row in read_metrics(opened.folder, "step")] == [1]


def test_asking_for_the_previous_state_where_there_is_none_is_refused(opened):
    opened.save({}, force=True)
    with pytest.raises(CheckpointError, match=r"previous-state\.ckpt"):
        opened.restore(previous=True)


def test_saving_is_not_more_often_than_asked_unless_forced(opened, monkeypatch):
    opened.save({"number": 1})
    assert not opened.state_path.exists()
    monkeypatch.setattr(run_module, "SAVE_EVERY_SECONDS", 0)
    opened.save({"number": 2})
    assert load_state(opened.state_path)["state"] == {"number": 2}


def test_seconds_before_an_interruption_count(tmp_path):
    with Run(tmp_path, Small(), "-") as run:
        run._opened_at -= 100
        run.save({}, force=True)
    with Run(tmp_path, Small(), "-") as run:
        run.restore()
        assert 100 <= run.seconds < 160


def test_finished_results_are_read_back_with_where_they_were_measured(opened):
    figures = [{"at": "final", "split": "test", "metric": "accuracy", "value": value} for value in (1, None)]
    written = opened.finish({"figures": figures, "seed": 0}, torch.device("cpu"), "float32")
    assert opened.results == written
    assert {"device", "precision", "commit", "command", "seconds", "peak_memory_bytes"} <= set(written)
    assert written["device"].startswith("CPU")


@pytest.mark.parametrize("content", ["", "{", "[]", "1", "null"])
def test_damaged_results_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(RunError, match="is damaged"):
        read_results(tmp_path)


FIGURE = {"at": "final", "split": "test", "metric": "accuracy", "value": 0.5}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"figures": None}, "figures: Input should be a valid list"),
        ({"figures": [FIGURE, 3]}, r"figures\.1: "),
        ({"figures": [FIGURE, {**FIGURE, "value": "0.5"}]}, r"figures\.1\.value: "),
        ({"figures": [{key: FIGURE[key] for key in ("at", "split", "value")}]}, r"figures\.0\.metric: Field required"),
        ({"seed": "left out"}, r"figures\.0\.seed: Field required"),
        ({"device": 3}, "device: "),
        ({"seconds": "1"}, "seconds: "),
        ({"figures": "left out"}, "figures is missing"),
        ({"commit": "left out"}, "commit is missing"),
        ({"command": "left out"}, "command is missing"),
        ({"precision": "left out"}, "precision is missing"),
    ],
)
def test_results_that_lack_a_key_or_hold_something_else_there_are_refused_by_it(opened, changes, said):
    opened.finish({"figures": [FIGURE], "seed": 0}, torch.device("cpu"), "float32")
    path = opened.folder / "results.json"
    results = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in results.items() if value != "left out"}))
    with pytest.raises(RunError, match=rf"results\.json: is damaged \({said}.*\); delete it") as refused:
        read_results(opened.folder)
    assert "\n" not in str(refused.value)


def test_an_unfinished_run_has_no_results(tmp_path):
    with pytest.raises(RunError, match="is not a finished run"):
        read_results(tmp_path)


def test_the_name_of_a_folder_tells_other_runs_apart_and_only_them():
    assert folder_name("mini", "fedavg", 3, ["seed=3", "method=fedavg", "device=cpu"]) == "mini-fedavg-s3"
    one, two = folder_name("mini", "a", 0, ["rounds=1", "x=2"]), folder_name("mini", "a", 0, ["x=2", "rounds=1"])
    assert one == two != folder_name("mini", "a", 0, ["rounds=1"])


def test_a_state_digest_sees_each_bit_name_type_and_shape():
    base = torch.tensor([1.0, 0.0])
    others = [
        {"x": torch.tensor([1.0, -0.0])},
        {"y": base},
        {"x": base.double()},
        {"x": base.view(2, 1)},
        {"x": base, "e": torch.empty(0)},
    ]
    digests = {state_digest({"x": base}), *map(state_digest, others)}
    assert len(digests) == 6
    assert state_digest({"x": torch.stack([base, base]).T[:, 0]}) == state_digest({"x": base.clone()})
