import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shared import study
from shared.checkpoint import load_state
from shared.errors import ConfigError
from shared.run import folder_name, read_results
from shared.study import HOPELESS, Job, Outcome, choose_scale, forecast, hopeless, log_of, progress_of, run_jobs


def job(name: str, group: str = "a", folder: Path = Path("/nowhere"), arguments: tuple[str, ...] = ()) -> Job:
    return Job(group, 0, folder / name, arguments)


def running(item: Job, seconds: float) -> study._Running:
    return study._Running(None, item, time.monotonic() - seconds)  # type: ignore[arg-type]


def tiny_jobs(out: Path, tiny_arguments, methods: tuple[str, ...]) -> list[Job]:
    jobs = []
    for seed, method in enumerate(methods):
        arguments = tiny_arguments(out, method, f"seed={seed}")
        name = folder_name("smoke", method, seed, arguments[4:])
        jobs.append(Job(method, seed, out / "fedloge" / name, tuple(arguments)))
    return jobs


@pytest.fixture
def broken_module(tmp_path, monkeypatch) -> str:
    """A module whose jobs end in every way."""
    (tmp_path / "broken_job.py").write_text(
        "import os, signal, sys, time\n"
        "def main(arguments):\n"
        "    how = arguments[0]\n"
        "    if how == 'raises': raise ZeroDivisionError('by nothing')\n"
        "    if how == 'says': print('first'); print('error: the disk is full', file=sys.stderr); return 2\n"
        "    if how == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    if how == 'leaves': time.sleep(0.5); open(arguments[1], 'w').close()\n"
        "    if how == 'takes': return 0 if os.path.exists(arguments[1]) else 4\n"
        "    if how == 'junk': os.write(1, b'\\xff\\xfe bad bytes\\n'); return 3\n"
        "    return 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "broken_job"


def test_the_bits_of_a_run_do_not_depend_on_how_many_run_beside_it(tmp_path, tiny_arguments, python):
    methods = ("fedloge", "fedavg", "ditto")
    digests = {}
    for workers in (1, 2):
        jobs = tiny_jobs(tmp_path / str(workers), tiny_arguments, methods)
        outcomes = run_jobs("fedloge.train", jobs, workers)
        assert [outcomes[item.name].code for item in jobs] == [0, 0, 0], [o.message for o in outcomes.values()]
        assert "results and model in" in log_of(jobs[0]).read_text()
        digests[workers] = [read_results(item.folder)["model_digest"] for item in jobs]
    alone = tiny_jobs(tmp_path / "alone", tiny_arguments, methods[:1])[0]
    done = python("-m", "fedloge.train", *alone.arguments)
    assert done.returncode == 0, done.stderr
    assert digests[1] == digests[2]
    assert read_results(alone.folder)["model_digest"] == digests[1][0]
    assert len(set(digests[1])) == 3


def test_a_failing_job_is_reported_with_its_last_line_and_the_others_finish(tmp_path, broken_module, capsys):
    jobs = [job(how, folder=tmp_path, arguments=(how,)) for how in ("says", "raises", "killed", "junk", "ends")]
    outcomes = run_jobs(broken_module, jobs, 2)
    assert {name: outcome.code for name, outcome in outcomes.items()} == {
        "says": 2, "raises": 1, "killed": -9, "junk": 3, "ends": 0,
    }  # fmt: skip
    assert outcomes["says"].message.startswith("error: the disk is full (")
    assert outcomes["raises"].message.startswith("ZeroDivisionError: by nothing")
    assert outcomes["killed"].message.startswith("ended by signal 9")
    assert "bad bytes" in outcomes["junk"].message
    assert outcomes["ends"].message == ""
    assert "failed: says: error: the disk is full" in capsys.readouterr().err


def test_a_study_whose_first_runs_all_end_with_one_error_starts_no_others(tmp_path, broken_module, capsys):
    jobs = [job(f"says{i}", folder=tmp_path, arguments=("says",)) for i in range(9)]
    outcomes = run_jobs(broken_module, jobs, 1)
    assert [outcomes[item.name].code for item in jobs] == [2] * HOPELESS + [1] * (9 - HOPELESS)
    assert outcomes["says8"].message == "not started"
    said = capsys.readouterr().err
    assert said.count("the disk is full") == HOPELESS
    assert "failed: 6 other runs are not started" in said


@pytest.mark.parametrize("first", ["ends", "raises"])
def test_a_study_goes_on_where_not_all_runs_end_with_the_same_error(tmp_path, broken_module, first):
    hows = (first, "says", "says", "says", "ends")
    jobs = [job(f"{number}", folder=tmp_path, arguments=(how,)) for number, how in enumerate(hows)]
    assert run_jobs(broken_module, jobs, 1)["4"].code == 0


def test_the_environment_and_the_signals_are_as_before_after_a_study(tmp_path, broken_module, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    run_jobs(broken_module, [job("ends", folder=tmp_path, arguments=("ends",))], 1)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_study_without_jobs_ends_at_once():
    assert run_jobs("fedloge.train", []) == {}


STUDY = """
import json, signal, sys
from pathlib import Path
from shared.study import Job, run_jobs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that a shell runs in the background ignores it
jobs = [Job("a", 0, Path(folder), tuple(arguments)) for folder, arguments in json.loads(sys.argv[1])]
try:
    run_jobs("fedloge.train", jobs, 2)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("number", "to_group", "code"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)])
def test_stopping_a_study_stops_its_jobs_and_saves_their_states(
    tmp_path, tiny_arguments, clean_environment, repository, number, to_group, code
):
    jobs = []
    for seed in (0, 1):
        arguments = tiny_arguments(tmp_path, "fedavg", f"seed={seed}", "rounds=100000")
        folder = tmp_path / "fedloge" / folder_name("smoke", "fedavg", seed, arguments[4:])
        jobs.append((str(folder), arguments))
    command = [sys.executable, "-c", STUDY, json.dumps(jobs)]
    with subprocess.Popen(command, cwd=repository, env=clean_environment, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not all((Path(f) / "progress.json").exists() for f, _ in jobs) and time.monotonic() < deadline:
            time.sleep(0.02)
        if to_group:  # as a terminal does with Ctrl-C
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(60) == code
    for folder, _ in jobs:
        state = load_state(Path(folder) / "checkpoint" / "state.ckpt")["state"]
        assert state["round"] < 100000
        assert "the state is saved" in log_of(Job("a", 0, Path(folder), ())).read_text()
        assert "Traceback" not in log_of(Job("a", 0, Path(folder), ())).read_text()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"1", b"null", b"\xff\xfe", b"{}", b'{"done": 1}', b'{"done": 1, "total": 0}',
     b'{"done": "x", "total": 2}', b'{"done": NaN, "total": 2}', b'{"done": 1, "total": NaN}',
     b'{"done": Infinity, "total": Infinity}', b'{"done": null, "total": 1}', b'{"done": [], "total": 1}',
     b'{"done": 1' + b"0" * 400 + b', "total": 1}', b"[" * 100000],
    ids=range(17),
)  # fmt: skip
def test_a_progress_that_is_junk_is_no_progress(tmp_path, content):
    (tmp_path / "progress.json").write_bytes(content)
    assert progress_of(tmp_path) == 0.0


def test_a_progress_is_a_share_between_nothing_and_all(tmp_path):
    assert progress_of(tmp_path / "none") == 0.0
    for done, share in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0), (-3, 0.0)):
        (tmp_path / "progress.json").write_text(json.dumps({"done": done, "total": 4}))
        assert progress_of(tmp_path) == share


def test_a_forecast_is_unknown_before_anything_is_known():
    jobs = [job("1"), job("2")]
    assert forecast(jobs, {}, [], jobs, 2) is None
    assert forecast(jobs, {}, [running(jobs[0], 5)], jobs[1:], 2) is None


def test_a_forecast_takes_the_mean_of_a_group_and_shares_it_among_the_workers():
    jobs = [job("1"), job("2"), job("3"), job("4", "slow"), job("5", "slow")]
    done = {"1": Outcome(0, 10.0), "4": Outcome(0, 100.0)}
    waiting = [jobs[1], jobs[2], jobs[4]]
    assert forecast(jobs, done, [], waiting, 1) == pytest.approx(10 + 10 + 100)
    assert forecast(jobs, done, [], waiting, 2) == pytest.approx(100)  # never less than the longest job
    assert forecast(jobs, done, [], [], 2) == 0


def test_a_forecast_of_an_unknown_group_is_the_mean_of_what_is_known():
    jobs = [job("1", "a"), job("2", "b"), job("3", "c")]
    done = {"1": Outcome(0, 10.0), "2": Outcome(0, 30.0)}
    assert forecast(jobs, done, [], jobs[2:], 1) == pytest.approx(20)


def test_a_forecast_does_not_learn_from_a_job_that_failed():
    jobs = [job("1"), job("2")]
    assert forecast(jobs, {"1": Outcome(2, 0.1)}, [], jobs[1:], 1) is None


def test_a_forecast_uses_the_progress_of_what_is_running(tmp_path):
    item = job("1", folder=tmp_path)
    item.folder.mkdir()
    (item.folder / "progress.json").write_text('{"done": 1, "total": 4}')
    other = job("2", folder=tmp_path)
    assert forecast([item, other], {}, [running(item, 10)], [], 1) == pytest.approx(30, abs=1)
    assert forecast([item, other], {}, [running(item, 10)], [other], 1) == pytest.approx(70, abs=2)


def test_only_mistakes_of_the_user_make_the_rest_hopeless():
    for code, wanted in ((2, True), (1, False), (130, False), (0, False)):
        assert hopeless([Outcome(code, 0.1, "no data (a.log)"), *[Outcome(code, 0.1, "no data (b.log)")] * 2]) is wanted
    assert not hopeless([Outcome(2, 0.1, "no data (a.log)")] * 2)
    assert not hopeless([*[Outcome(2, 0.1, "no data (a.log)")] * 2, Outcome(2, 0.1, "another (c.log)")])


@pytest.mark.parametrize(("on_gpu", "workers"), [(True, 1), (False, 3)])
def test_runs_on_a_gpu_go_one_at_a_time(broken_module, tmp_path, monkeypatch, on_gpu, workers):
    seen = set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(study, "forecast", lambda *given: seen.add(given[-1]))
    run_jobs(broken_module, [Job("a", 0, tmp_path / str(number), (), "auto") for number in range(3)])
    assert seen == {workers}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_job_waits_for_the_one_that_it_begins_with_and_for_no_other(broken_module, tmp_path, workers):
    left, folders = str(tmp_path / "left"), [tmp_path / name for name in "abc"]
    jobs = [Job("a", 0, folders[0], ("takes", left), after=folders[2]),
            Job("a", 0, folders[1], ("says",), after=tmp_path / "no run of this study"),
            Job("a", 0, folders[2], ("leaves", left))]  # fmt: skip
    outcomes = run_jobs(broken_module, jobs, workers)
    assert [outcomes[name].code for name in "abc"] == [0, 2, 0]
    assert list(outcomes) == ["b", "c", "a"]


def test_what_waits_for_a_job_is_run_also_when_that_fails(broken_module, tmp_path):
    jobs = [Job("a", 0, tmp_path / "b", ("takes", "nowhere"), after=tmp_path / "a"),
            Job("a", 0, tmp_path / "a", ("raises",))]  # fmt: skip
    assert {name: outcome.code for name, outcome in run_jobs(broken_module, jobs, 2).items()} == {"a": 1, "b": 4}


@pytest.mark.parametrize("workers", [-1, -8])
def test_a_number_of_workers_below_none_is_refused_before_anything_runs(broken_module, workers, monkeypatch):
    monkeypatch.setattr(study, "_start", lambda *_: pytest.fail("a job was started"))
    with pytest.raises(ConfigError, match=rf"--workers {workers}: .*, or 0 for one a core$"):
        run_jobs(broken_module, [job("1")], workers)
    with pytest.raises(ConfigError, match=rf"--workers {workers}: "):
        run_jobs(broken_module, [], workers)


def test_a_scale_is_what_was_asked_and_auto_is_small_also_on_a_gpu(monkeypatch):
    assert [choose_scale(name)[0] for name in ("smoke", "mini", "paper")] == ["smoke", "mini", "paper"]
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_scale("auto")[0] == "mini"
        assert "SCALE=paper" in choose_scale("auto")[1]
    with pytest.raises(ConfigError, match="choose from auto, smoke, mini, paper"):
        choose_scale("huge")
