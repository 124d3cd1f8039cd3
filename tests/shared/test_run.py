import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shared import run as run_module
from shared.checkpoint import load_state, previous_of
from shared.config import Section
from shared.errors import CheckpointError, InterruptedRunError, RunError
from shared.gpu import NotFiniteError
from shared.run import Run, folder_name, read_metrics, read_results, state_digest


class Small(Section):
    """A configuration."""

    seed: int = 0
    rate: float = 0.5


@pytest.fixture
def opened(tmp_path):
    with Run(tmp_path / "run", Small(), "python -m x.train --config y") as run:
        yield run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(tmp_path, number):
    with Run(tmp_path, Small(), "-") as run:
        run.check()
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # the step goes on
        with pytest.raises(InterruptedRunError) as caught:
            run.check()
    assert caught.value.exit_code == 128 + number
    assert caught.value.folder == tmp_path


def test_the_same_signal_twice_leaves_at_once_but_two_different_ones_are_one_wish(tmp_path):
    with Run(tmp_path, Small(), "-"):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(InterruptedRunError):
            os.kill(os.getpid(), signal.SIGINT)
    with Run(tmp_path, Small(), "-") as run:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(InterruptedRunError) as caught:
            run.check()
    assert caught.value.exit_code == 130


def test_the_old_signal_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Run(tmp_path, Small(), "-"):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_full_disk_while_logging_is_one_line(opened, monkeypatch):
    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(RunError, match="No space left on device"):
        opened.log("step", number=1)


def test_progress_is_written_for_a_study_to_read(opened):
    assert list(opened.steps(range(3, 5), 5, "round", 3)) == [3, 4]
    assert json.loads((opened.folder / "progress.json").read_text()) == {"done": 5, "total": 5, "unit": "round"}


def test_a_reader_of_the_progress_finds_the_old_or_the_new_whole(opened, monkeypatch):
    opened.progress(1, 5, "round")
    found, real = [], os.replace

    def replace(source, target):
        found.append(progress_of(opened)["done"])
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        opened.progress(2, 5, "round")
    assert [*found, progress_of(opened)["done"]] == [1, 2]

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        opened.progress(3, 5, "round")  # no reason to end a run
    assert progress_of(opened)["done"] == 2
    assert not list(opened.folder.glob(".progress*"))


def progress_of(run: Run) -> dict[str, object]:
    return json.loads((run.folder / "progress.json").read_text())


def test_progress_is_the_number_of_items_that_have_ended(opened, monkeypatch):
    monkeypatch.setattr(run_module, "PROGRESS_EVERY_SECONDS", 0)
    seen = [progress_of(opened)["done"] for _ in opened.steps("abc", 7, "step", 4)]
    assert seen == [4, 5, 6], "the item at hand has not ended"
    assert progress_of(opened) == {"done": 7, "total": 7, "unit": "step"}


@pytest.mark.parametrize("items", [0, 1, 2])
@pytest.mark.parametrize("terminal", [False, True], ids=["in a file", "on a terminal"])
def test_items_that_end_early_are_not_all_done(opened, monkeypatch, items, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(opened.steps((k for k in range(items)), 9, "step", 4)) == list(range(items))
    assert progress_of(opened) == {"done": 4 + items, "total": 9, "unit": "step"}


def test_items_that_nobody_takes_to_the_end_are_not_all_done(opened, monkeypatch):
    monkeypatch.setattr(run_module, "PROGRESS_EVERY_SECONDS", 0)
    steps = opened.steps(range(5), 5, "step")
    assert [next(steps), next(steps)] == [0, 1]
    steps.close()
    assert progress_of(opened) == {"done": 1, "total": 5, "unit": "step"}


def test_the_bundle_of_a_loss_that_is_not_finite_says_where_it_was(opened):
    error = opened.not_finite(NotFiniteError(7, float("inf")), round=2, images=[4, 5], seed=0)
    bundle = json.loads((opened.folder / "not_finite.json").read_text())
    assert bundle == {
        "step": 7,
        "loss": "inf",
        "round": 2,
        "images": [4, 5],
        "seed": 0,
        "config": "{seed: 0, rate: 0.5}\n",
    }
    assert "step 7" in str(error)
    assert "not_finite.json" in str(error)


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


# The command itself


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_arguments):
    """The digest of the run that the signals below interrupt."""
    from fedloge.train import main

    out = tmp_path_factory.mktemp("uninterrupted")
    assert main(tiny_arguments(out, "fedavg", "rounds=25")) == 0
    return read_results(next((out / "fedloge").iterdir()))["model_digest"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_with_its_code_and_the_printed_command_goes_on_to_the_same_bits(
    tmp_path, tiny_arguments, clean_environment, repository, uninterrupted, number, code
):
    out = tmp_path / "a folder"
    command = [sys.executable, "-m", "fedloge.train", *tiny_arguments(out, "fedavg", "rounds=25")]
    with subprocess.Popen(command, cwd=repository, env=clean_environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("*/*/progress.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        printed = process.communicate(timeout=60)[1]
    assert process.returncode == code, printed
    (folder,) = (out / "fedloge").iterdir()
    assert load_state(folder / "checkpoint" / "state.ckpt")["state"]["round"] < 25
    assert not (folder / "results.json").exists()
    assert "Traceback" not in printed
    (resume,) = re.findall(r"continue with: python (.*)", printed)
    assert shlex.split(resume) == ["-m", "fedloge.train", "--resume", str(folder)]
    done = subprocess.run([sys.executable, *shlex.split(resume)], cwd=repository, env=clean_environment, check=False)
    assert done.returncode == 0
    assert read_results(folder)["model_digest"] == uninterrupted


def test_the_same_command_reports_a_finished_run_and_changes_nothing(tmp_path, tiny_arguments, capsys):
    from fedloge.train import main

    assert main(tiny_arguments(tmp_path, "fedavg")) == 0
    first, before = capsys.readouterr().out, snapshot(tmp_path)
    assert main(tiny_arguments(tmp_path, "fedavg")) == 0
    assert capsys.readouterr().out == f"already finished; nothing was trained\n{first}"
    assert snapshot(tmp_path) == before


def test_resuming_with_another_value_is_refused_by_its_key(tmp_path, tiny_arguments, capsys):
    from fedloge.train import main

    assert main(tiny_arguments(tmp_path, "fedavg")) == 0
    (folder,) = (tmp_path / "fedloge").iterdir()
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert main(["--resume", str(folder), "optimizer.lr=0.5"]) == 2
    message = capsys.readouterr().err
    assert "optimizer.lr: 0.05 -> 0.5" in message
    assert message.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_the_batch_and_the_configuration(
    tmp_path, tiny_arguments, capsys
):
    from fedloge.train import main

    assert main(tiny_arguments(tmp_path, "fedavg", "optimizer.lr=1e30")) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    (folder,) = (tmp_path / "fedloge").iterdir()
    bundle = json.loads((folder / "not_finite.json").read_text())
    assert bundle["loss"] in ("nan", "inf")
    assert bundle["step"] >= 1
    assert (bundle["round"], bundle["client"], bundle["seed"]) == (0, 0, 0)
    assert 0 < len(bundle["images"]) <= 9
    assert len(set(bundle["images"])) == len(bundle["images"])
    assert "lr: 1.0e+30" in bundle["config"]
    assert not (folder / "results.json").exists()


def test_the_images_of_the_bundle_are_those_that_the_step_saw(tiny_config):
    from fedloge.algorithm import build_method
    from fedloge.federated import batch_of_step, load_client, start, train_client
    from fedloge.problem import load_problem

    config = tiny_config("fedrep")
    problem = load_problem(config, torch.device("cpu"))
    method = build_method(config, problem.shape)
    server, client, seen = start(method, config.clients.count, torch.device("cpu")), problem.clients[1], []
    load_client(server, 1)

    def watched(network, images, targets, client, received):
        seen.append(targets.tolist())
        return method.loss(network, images, targets, client, received)

    names = ("train", 0, 1)
    train_client(server, problem.train, client, method.phases(), config, names, watched)
    for step, labels in enumerate(seen):
        images = batch_of_step(client, method.phases(), config, names, step)
        assert problem.train.labels[images].tolist() == labels


def test_a_damaged_state_names_the_way_back_and_it_works(tmp_path, tiny_arguments, capsys, monkeypatch):
    from fedloge.train import main

    monkeypatch.setattr(run_module, "SAVE_EVERY_SECONDS", 0)
    assert main(tiny_arguments(tmp_path, "fedavg")) == 0
    (folder,) = (tmp_path / "fedloge").iterdir()
    digest = read_results(folder)["model_digest"]
    (folder / "results.json").unlink()
    state = folder / "checkpoint" / "state.ckpt"
    state.write_bytes(state.read_bytes()[:-1])
    capsys.readouterr()
    assert main(tiny_arguments(tmp_path, "fedavg")) == 2
    message = capsys.readouterr().err
    assert "is damaged: sha256" in message
    assert "--previous" in message
    assert previous_of(state).exists()
    assert main(["--resume", str(folder), "--previous"]) == 0
    assert read_results(folder)["model_digest"] == digest
