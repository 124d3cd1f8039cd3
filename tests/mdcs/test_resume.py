"""A run that stops and goes on gives the bits of a run that did not stop: for each method, between any two steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mdcs.train as train_module
from mdcs.algorithm import METHODS
from mdcs.train import train
from shared import run as run_module
from shared.checkpoint import load_state, previous_of
from shared.errors import DataError, InterruptedRunError
from shared.run import Run
from tests.shared.small_runs import began_elsewhere

pytestmark = pytest.mark.usefixtures("small_sample")
STEPS = 4  # an epoch of the tiny run, which has two
CASES = {
    **{method: (method,) for method in METHODS},
    "mdcs, split batch norm": ("mdcs", "bn_views=split"),
    "ce, linear": ("ce", "method.classifier=linear"),
    "dl, both views": ("dl", "method.views=both"),
}
each_case = pytest.mark.parametrize("case", CASES)
TIMED = ("seconds", "images_per_second", "peak_memory_bytes", "command", "commit")


class KilledError(Exception):
    """Stands for SIGKILL: nothing catches it, so nothing is saved after it."""


class StoppedRun(Run[Any]):
    """A run that a signal (or what is given) reaches in its n-th step."""

    def __init__(self, folder: Path, config: Any, steps: int, kill: bool = False) -> None:
        super().__init__(folder, config, "test")
        self.left, self.error = steps, KilledError() if kill else InterruptedRunError(2, folder)

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


def told(folder: Path) -> dict[str, Any]:
    """All that a run says of itself but times, and how much of an epoch this process did, which goes with them."""
    results = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "results": {key: value for key, value in results.items() if key not in TIMED},
        "metrics": [
            {k: v for k, v in row.items() if k not in TIMED and (row["event"], k) != ("epoch", "images")}
            for row in rows
        ],
        **{
            name: (folder / name / file).read_bytes()
            for name, file in (("model", "model.safetensors"), ("predictions", "model.safetensors"))
        },
    }  # fmt: skip


def whole(folder: Path, config: Any) -> dict[str, Any]:
    with Run(folder, config, "test") as run:
        train(config, run)
    return told(folder)


def stop(folder: Path, config: Any, steps: int) -> dict[str, Any]:
    """Run until the signal in that step; returns the saved state."""
    with pytest.raises(InterruptedRunError), StoppedRun(folder, config, steps) as run:
        train(config, run)
    assert not (folder / "results.json").exists()
    return load_state(run.state_path)["state"]


@pytest.fixture
def every_step_saved(monkeypatch) -> None:
    """A state after each step, as if ten seconds went by."""
    monkeypatch.setattr(train_module, "SAVE_STEPS", 1)
    monkeypatch.setattr(run_module, "SAVE_EVERY_SECONDS", 0)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, mdcs_config) -> Callable[[str], dict[str, Any]]:
    """What a run gives that nothing stops; each runs once."""
    known: dict[str, dict[str, Any]] = {}

    def figures(case: str) -> dict[str, Any]:
        if case not in known:
            known[case] = whole(tmp_path_factory.mktemp("whole") / "run", mdcs_config(*CASES[case]))
        return known[case]

    return figures


def test_the_tiny_run_has_the_steps_that_these_tests_count_on(tmp_path, mdcs_config):
    state = stop(tmp_path / "run", mdcs_config(), 2 * STEPS)
    assert (state["epoch"], state["step"]) == (1, STEPS)


@each_case
@pytest.mark.parametrize("steps", [2, STEPS, STEPS + 2], ids=["first epoch", "epoch's end", "mid second epoch"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, mdcs_config, never_stopped, case, steps):
    config = mdcs_config(*CASES[case])
    saved = stop(tmp_path / "run", config, steps)
    assert (saved["epoch"], saved["step"]) == ((steps - 1) // STEPS, (steps - 1) % STEPS + 1)
    assert whole(tmp_path / "run", config) == never_stopped(case)


@each_case
def test_a_killed_run_goes_on_from_the_state_before_the_last_to_the_same_bits(
    tmp_path, mdcs_config, never_stopped, every_step_saved, case
):
    config = mdcs_config(*CASES[case])
    with pytest.raises(KilledError), StoppedRun(tmp_path / "run", config, STEPS + 3, kill=True) as run:
        train(config, run)
    states = [load_state(path)["state"] for path in (run.state_path, previous_of(run.state_path))]
    assert [(state["epoch"], state["step"]) for state in states] == [(1, 3), (1, 2)]
    with Run(tmp_path / "run", config, "test") as run:
        train(config, run, previous=True)
    assert told(tmp_path / "run") == never_stopped(case)


def test_a_run_does_not_go_on_with_other_images(tmp_path, mdcs_config):
    config = mdcs_config()
    stop(tmp_path / "run", config, 2)
    began_elsewhere(tmp_path / "run" / "metrics.jsonl")
    with Run(tmp_path / "run", config, "test") as run, pytest.raises(DataError, match=r"began on other data \(train\)"):
        train(config, run)


@each_case
def test_a_run_that_is_stopped_before_every_step_gives_the_same_bits(tmp_path, mdcs_config, never_stopped, case):
    config = mdcs_config(*CASES[case])
    for _ in range(2 * STEPS - 1):
        stop(tmp_path / "run", config, 1)
    assert whole(tmp_path / "run", config) == never_stopped(case)


def test_a_run_with_other_rates_for_classifiers_and_backbone_goes_on_to_the_same_bits(tmp_path, mdcs_config):
    config = mdcs_config("mdcs", "optimizer={lr: 0.05, backbone_lr: 0.005, momentum: 0.8, nesterov: false}")
    expected = whole(tmp_path / "whole" / "run", config)
    stop(tmp_path / "stopped" / "run", config, STEPS + 1)
    assert whole(tmp_path / "stopped" / "run", config) == expected


def test_a_run_in_bfloat16_goes_on_to_the_same_bits(tmp_path, mdcs_config):
    config = mdcs_config("mdcs", "precision=bfloat16")
    expected = whole(tmp_path / "whole" / "run", config)
    stop(tmp_path / "stopped" / "run", config, STEPS + 1)
    assert whole(tmp_path / "stopped" / "run", config) == expected


def test_a_run_that_was_killed_when_all_epochs_were_saved_only_evaluates(
    tmp_path, mdcs_config, never_stopped, every_step_saved, monkeypatch
):
    config = mdcs_config()

    def killed(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "finish", killed)
        with pytest.raises(KilledError), Run(tmp_path / "run", config, "test") as run:
            train(config, run)
    with StoppedRun(tmp_path / "run", config, 1) as run:  # it would stop in a step
        train(config, run)
    assert told(tmp_path / "run") == never_stopped("mdcs")


def test_momentum_losses_and_confident_images_go_on_where_they_stood(tmp_path, mdcs_config, every_step_saved):
    config = mdcs_config()
    straight = stop(tmp_path / "straight", config, STEPS + 2)
    stop(tmp_path / "twice", config, STEPS + 1)
    twice = stop(tmp_path / "twice", config, 1)
    assert len(straight["losses"]) == straight["step"] == 2
    assert straight["images"] == 48
    assert all(buffer.abs().sum() > 0 for buffer in straight["momentum"])
    assert straight["confident"].sum() > 0
    for key in ("losses", "images", "epoch", "step"):
        assert straight[key] == twice[key]
    assert all(a.equal(b) for a, b in zip(straight["momentum"], twice["momentum"], strict=True))
    assert straight["confident"].equal(twice["confident"])
    assert all(value.equal(twice["model"][name]) for name, value in straight["model"].items())


def test_the_epoch_event_counts_the_images_that_this_process_trained_on(tmp_path, mdcs_config):
    config = mdcs_config()
    stop(tmp_path / "run", config, 3)
    whole(tmp_path / "run", config)
    first, second = run_module.read_metrics(tmp_path / "run", "epoch")
    assert first["images"] == second["images"] - 3 * 24


def test_a_state_is_not_written_more_often_than_the_clock_allows(tmp_path, mdcs_config, monkeypatch):
    monkeypatch.setattr(train_module, "SAVE_STEPS", 1)
    config = mdcs_config()
    with pytest.raises(KilledError), StoppedRun(tmp_path / "run", config, STEPS + 2, kill=True) as run:
        train(config, run)
    assert not run.state_path.exists()


def test_a_second_signal_amid_a_step_leaves_the_last_saved_state_alone(
    tmp_path, mdcs_config, never_stopped, every_step_saved, monkeypatch
):
    """Amid a step the model, its momentum and the step's number are not of one moment: nothing of it may be saved."""
    from mdcs.state import Training

    config, left = mdcs_config(), [STEPS + 2]

    def update(self: Training) -> None:
        left[0] -= 1
        self.optimizer.step()
        if left[0] == 0:
            raise InterruptedRunError(2, tmp_path)  # as Run's signal handler does, wherever the program is
        self.optimizer.zero_grad()
        self.step += 1

    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", update)
        with pytest.raises(InterruptedRunError), Run(tmp_path / "run", config, "test") as run:
            train(config, run)
    saved = load_state(run.state_path)["state"]
    assert (saved["epoch"], saved["step"], len(saved["losses"])) == (1, 1, 1)
    assert whole(tmp_path / "run", config) == never_stopped("mdcs")


def test_the_command_goes_on_with_resume_and_with_previous_and_with_itself(
    tmp_path, mdcs_arguments, every_step_saved, monkeypatch, capsys
):
    def stopped_at(name: str, step: int) -> tuple[list[str], Path]:
        arguments, left = mdcs_arguments(tmp_path / name), [step]

        def check(run: Run[Any]) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise InterruptedRunError(15, run.folder)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "check", check)
            assert train_module.main(arguments) == 143
        (folder,) = (tmp_path / name / "mdcs").iterdir()
        assert f"continue with: python -m mdcs.train --resume {folder}" in capsys.readouterr().err
        return arguments, folder

    digests = set()
    for name, how in (("itself", None), ("resumed", "--resume"), ("previous", "--previous")):
        arguments, folder = stopped_at(name, STEPS + 3)
        more = arguments if how is None else ["--resume", str(folder), *([how] if how == "--previous" else [])]
        assert train_module.main(more) == 0
        assert "continuing in epoch 2 of 2" in capsys.readouterr().out
        digests.add(run_module.read_results(folder)["model_digest"])
    assert train_module.main(mdcs_arguments(tmp_path / "whole")) == 0
    (folder,) = (tmp_path / "whole" / "mdcs").iterdir()
    assert digests == {run_module.read_results(folder)["model_digest"]}
