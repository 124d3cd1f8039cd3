"""Whole commands: stopped by a signal, finished, resumed, damaged."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from shared import run as run_module
from shared.checkpoint import load_state, previous_of
from shared.run import read_results
from tests.shared.small_runs import snapshot

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
