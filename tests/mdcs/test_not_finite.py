"""A loss that is not finite stops a run before the update and leaves what is needed to see it again."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mdcs.algorithm as algorithm
import mdcs.problem as problem_module
import mdcs.train as train_module
from mdcs.algorithm import Method, build_method
from mdcs.state import Training
from mdcs.train import main, train
from shared import run as run_module
from shared.batches import epoch_order, split_batches
from shared.checkpoint import load_state
from shared.errors import InterruptedRunError, RunError
from shared.gpu import LossMeter, stream
from shared.run import Run, read_metrics, read_results
from tests.mdcs.runs import CPU, STEPS, run_of

pytestmark = pytest.mark.usefixtures("small_sample")


@pytest.fixture
def poisoned(monkeypatch) -> Callable[[int], None]:
    """Make the loss of the n-th step of this process NaN."""

    def poison(number: int) -> None:
        left = [number]

        def build(*arguments: Any) -> Method:
            method = build_method(*arguments)

            def loss(z: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
                left[0] -= 1
                return method.loss(z, y, epoch) * (math.nan if left[0] == 0 else 1.0)

            return Method(loss, method.lambdas)

        monkeypatch.setattr(algorithm, "build_method", build)

    return poison


@pytest.fixture
def late_looks(monkeypatch) -> None:
    """Losses are looked at when they are read, as on a GPU."""
    real = LossMeter.__init__

    def init(self: LossMeter, device: torch.device) -> None:
        real(self, device)
        self._eager = False

    monkeypatch.setattr(LossMeter, "__init__", init)


# A loss that is not finite


def test_a_loss_that_is_nan_stops_the_run_before_the_update_and_leaves_what_is_needed_to_see_it_again(
    tmp_path, mdcs_arguments, mdcs_config, poisoned, monkeypatch, capsys
):
    monkeypatch.setattr(train_module, "SAVE_STEPS", 1)
    monkeypatch.setattr(run_module, "SAVE_EVERY_SECONDS", 0)
    updates: list[int] = []
    update = Training.update
    monkeypatch.setattr(Training, "update", lambda self: (updates.append(1), update(self)))
    poisoned(STEPS + 3)
    arguments = mdcs_arguments(tmp_path, "mdcs", "seed=5")
    assert main(arguments) == 2
    printed = capsys.readouterr()
    (folder,) = (tmp_path / "mdcs").iterdir()
    assert printed.err.startswith(f"error: {folder.name}: the loss is nan at step 2")
    assert printed.err.count("\n") == 1
    assert len(updates) == STEPS + 2
    bundle = json.loads((folder / "not_finite.json").read_text())
    order = epoch_order(sum(read_metrics(folder, "start")[0]["class_counts"]), stream(5, "order", 1))
    assert bundle["images"] == split_batches(order, 24)[2].tolist()
    assert (bundle["step"], bundle["loss"], bundle["epoch"], bundle["seed"]) == (2, "nan", 2, 5)
    assert bundle["config"] == (folder / "config.yaml").read_text()
    assert not (folder / "results.json").exists()

    monkeypatch.setattr(algorithm, "build_method", build_method)
    saved = load_state(folder / "checkpoint" / "state.ckpt")["state"]
    assert (saved["epoch"], saved["step"]) == (1, 2)
    assert main(["--resume", str(folder)]) == 0
    expected = run_of(tmp_path / "whole", mdcs_config("mdcs", "seed=5"))
    assert read_results(folder)["model_digest"] == expected["model_digest"]


def test_the_step_of_a_nan_is_that_of_the_epoch_also_where_losses_were_not_looked_at_before(
    tmp_path, mdcs_config, poisoned
):
    poisoned(STEPS + 4)
    with pytest.raises(RunError, match="step 3"):
        run_of(tmp_path / "run", mdcs_config())
    assert json.loads((tmp_path / "run" / "not_finite.json").read_text())["step"] == 3


def test_on_a_device_that_looks_at_losses_late_the_images_are_those_of_the_first_nan(
    tmp_path, mdcs_config, poisoned, late_looks, monkeypatch
):
    """As on a GPU: the meter finds the NaN when it is read, some steps later; no state has it."""
    monkeypatch.setattr(train_module, "SAVE_STEPS", 2)
    monkeypatch.setattr(run_module, "SAVE_EVERY_SECONDS", 0)
    poisoned(STEPS + 3)
    with pytest.raises(RunError, match="step 2"), Run(tmp_path / "run", mdcs_config(), "test") as run:
        train(mdcs_config(), run)
    bundle = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    order = epoch_order(len(problem_module.load_problem(mdcs_config(), CPU).train), stream(0, "order", 1))
    assert bundle["images"] == split_batches(order, 24)[2].tolist()
    saved = load_state(run.state_path)["state"]
    assert (saved["epoch"], saved["step"]) == (1, 2)
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_signal_that_comes_with_a_nan_not_yet_looked_at_saves_no_state_and_tells_the_nan(
    tmp_path, mdcs_config, poisoned, late_looks, monkeypatch
):
    poisoned(2)
    steps = iter(range(1, 100))

    def check(run: Run[Any]) -> None:
        if next(steps) == 3:
            raise InterruptedRunError(2, run.folder)

    monkeypatch.setattr(Run, "check", check)
    with pytest.raises(RunError, match="step 1"), Run(tmp_path / "run", mdcs_config(), "test") as run:
        train(mdcs_config(), run)
    assert (tmp_path / "run" / "not_finite.json").exists()
    assert not run.state_path.exists()


def test_a_nan_after_going_on_within_an_epoch_is_told_with_the_step_and_images_of_that_epoch(
    tmp_path, mdcs_config, poisoned, monkeypatch
):
    config, steps = mdcs_config(), iter(range(1, 100))

    def check(run: Run[Any]) -> None:
        if next(steps) == STEPS + 1:
            raise InterruptedRunError(2, run.folder)

    monkeypatch.setattr(Run, "check", check)
    with pytest.raises(InterruptedRunError), Run(tmp_path / "run", config, "test") as run:
        train(config, run)
    poisoned(2)
    with pytest.raises(RunError, match="step 2"), Run(tmp_path / "run", config, "test") as run:
        train(config, run)
    bundle = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    order = epoch_order(len(problem_module.load_problem(config, CPU).train), stream(0, "order", 1))
    assert (bundle["epoch"], bundle["images"]) == (2, split_batches(order, 24)[2].tolist())
