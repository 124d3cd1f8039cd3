"""A run that stops and goes on gives the bits of a run that did not stop: in every phase, amid it and at its end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightcnn import problem, training
from lightcnn.train import train
from shared import run as run_module
from shared.checkpoint import load_state
from shared.errors import DataError, InterruptedRunError
from shared.run import Run

STEPS = 5  # an epoch of 130 images in batches of 32
FOLD_STEPS = 3  # of the 90 images outside a fold
SETTINGS = ("stage1={epochs: 6, patience: 1}", "seeds=3")
pytestmark = pytest.mark.usefixtures("scripted")
KINDS = {
    "two_stage": "two_stage", "notebook": "{name: two_stage, kfold: notebook, folds: 2, schedule: notebook}",
    "honest": "{name: two_stage, kfold: honest, folds: 2}", "bn_gap": "bn_gap", "scratch_mild": "scratch_mild",
}  # fmt: skip


class StoppedRun(Run[Any]):
    """A run that a signal reaches in the step after so many."""

    def __init__(self, folder: Path, config: Any, after_steps: int) -> None:
        super().__init__(folder, config, "test")
        self.left = after_steps

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise InterruptedRunError(2, self.folder)


def figures_of(folder: Path) -> dict[str, Any]:
    """All that a run says of itself but the time."""
    timed = ("seconds", "peak_memory_bytes", "command", "commit", "config")
    results = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "results": {key: value for key, value in results.items() if key not in timed},
        "metrics": [{key: value for key, value in row.items() if key not in timed} for row in rows],
        "models": {p.relative_to(folder): p.read_bytes() for p in folder.glob("model/*/model.safetensors")},
    }


def whole(folder: Path, config: Any) -> dict[str, Any]:
    with Run(folder, config, "test") as run:
        train(config, run)
    return figures_of(folder)


def stop(folder: Path, config: Any, after_steps: int) -> dict[str, Any]:
    with pytest.raises(InterruptedRunError), StoppedRun(folder, config, after_steps) as run:
        train(config, run)
    assert not (folder / "results.json").exists()
    return load_state(run.state_path)["state"]


@pytest.fixture(scope="module")
def scripted(scripted_validation):
    """The validation accuracies are given, so that the seeds stop at different epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "validate", scripted_validation)
        yield


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, config_of, scripted):
    """What a run of each kind gives that nothing stops, and how many steps it has."""
    known: dict[str, Any] = {}

    def figures(kind: str) -> dict[str, Any]:
        if kind not in known:
            config = config_of(f"method={KINDS[kind]}", *SETTINGS)
            known[kind] = whole(tmp_path_factory.mktemp(kind) / "run", config)
        return known[kind]

    return figures


def steps_of(figures: dict[str, Any]) -> list[int]:
    """The number of steps taken at the end of each phase."""
    ends, steps = [], 0
    for row in figures["metrics"]:
        folds = figures["results"]["data"]["lanes"] > 3 or str(row.get("phase")).startswith("fold")
        steps += (FOLD_STEPS if folds else STEPS) * (row["event"] == "epoch")
        ends += [steps] if row["event"] == "phase" else []
    return ends


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, config_of, never_stopped, kind):
    """Stopped in the first step of a phase, in the middle of its first and of its last epoch: one run, many stops."""
    config, expected = config_of(f"method={KINDS[kind]}", *SETTINGS), never_stopped(kind)
    ends = steps_of(expected)
    moments = sorted({m for end, start in zip(ends, [0, *ends], strict=False)
                      for m in (start, start + 2, start + STEPS, end - 2)})  # fmt: skip
    done = 0
    for moment in moments if kind == "two_stage" else sorted({*moments[:2], *moments[-5:]}):
        saved = stop(tmp_path / "run", config, moment - done)
        assert saved["training"]["epoch"] >= 0
        done = moment + 1  # the step in which the signal came was taken
    assert whole(tmp_path / "run", config) == expected


def test_a_run_goes_on_to_the_same_bits_where_seeds_have_stopped_in_stage_2(tmp_path, config_of, stops_in_stage_2):
    """40 images are 2 steps an epoch: P1, whose frozen layers' outputs are kept, begins with step 2, P2 with 10."""
    settings = ("stage1.epochs=1", "stage2.max_epochs=4", "data.train_images=40", "data.test_images=10")
    config, done = config_of("seeds=3", *settings), 0
    for moment, phase, active in ((6, 1, [1, 2]), (16, 2, [2])):
        saved = stop(tmp_path / "run", config, moment - done)
        assert (saved["step"], saved["training"]["active"], saved["training"]["batch"]) == (phase, active, 1)
        done = moment + 1
    assert whole(tmp_path / "run", config) == whole(tmp_path / "whole", config)


def test_the_saved_state_says_where_the_run_stands(tmp_path, config_of, never_stopped):
    config = config_of("method=two_stage", *SETTINGS)
    first, second, *_ = steps_of(never_stopped("two_stage"))
    for moment, wanted in ((0, (0, 0, 1)), (STEPS + 2, (0, 1, 3)), (first, (1, 0, 1)), (second, (2, 0, 1))):
        saved = stop(tmp_path / str(moment), config, moment)
        assert (saved["step"], saved["training"]["epoch"], saved["training"]["batch"]) == wanted


def test_the_seeds_of_these_tests_stop_at_different_epochs(never_stopped):
    phases = [row for row in never_stopped("two_stage")["metrics"] if row["event"] == "phase"]
    assert phases[0]["epochs"] == [5, 6, 6]
    assert [row["lanes"][0]["seed"] for row in never_stopped("two_stage")["metrics"] if row["event"] == "epoch"][
        :6
    ] == [0] * 5 + [1]


@pytest.mark.parametrize("kind", ["two_stage", "bn_gap"])
def test_a_run_goes_on_from_any_saved_epoch_and_from_the_state_before_the_last(
    tmp_path, config_of, never_stopped, kind, monkeypatch
):
    monkeypatch.setattr(run_module, "SAVE_EVERY_SECONDS", 0)
    config = config_of(f"method={KINDS[kind]}", *SETTINGS)
    stop(tmp_path / "run", config, steps_of(never_stopped(kind))[0] - 2)
    with Run(tmp_path / "run", config, "test") as run:
        train(config, run, previous=True)
    assert figures_of(tmp_path / "run") == never_stopped(kind)


def test_a_run_that_ends_between_two_phases_goes_on_to_the_same_bits(tmp_path, config_of, never_stopped, monkeypatch):
    """Killed right after the state at the end of each phase was saved."""
    monkeypatch.setattr(run_module, "SAVE_EVERY_SECONDS", 0)
    config = config_of("method=two_stage", *SETTINGS)

    class Killed(Run[Any]):
        def save(self, state: Any, force: bool = False) -> None:
            super().save(state, force)
            if state["training"] is None:
                raise KeyboardInterrupt

    for phase in range(5):
        with pytest.raises(KeyboardInterrupt), Killed(tmp_path / "run", config, "test") as run:
            train(config, run)
        assert load_state(run.state_path)["state"]["step"] == phase + 1
    assert whole(tmp_path / "run", config) == never_stopped("two_stage")


def test_a_run_does_not_go_on_with_other_images(tmp_path, config_of, never_stopped, monkeypatch):
    config = config_of("method=two_stage", *SETTINGS)
    stop(tmp_path / "run", config, steps_of(never_stopped("two_stage"))[0] - 2)
    load = problem.load_problem
    monkeypatch.setattr(problem, "load_problem", lambda *given: replace(load(*given), digest="another"))
    with Run(tmp_path / "run", config, "test") as run, pytest.raises(DataError, match=r"began on other data \(train\)"):
        train(config, run)


def test_another_seed_gives_other_bits_and_the_same_seed_the_same(tmp_path, config_of, never_stopped):
    again = whole(tmp_path / "again", config_of("method=two_stage", *SETTINGS))
    assert again == never_stopped("two_stage")
    other = whole(tmp_path / "other", config_of("method=two_stage", *SETTINGS, "seed=5"))
    assert other["results"]["model_digest"] != again["results"]["model_digest"]


def test_a_run_of_one_phase_tells_how_far_it_is_after_each_epoch(config_of, tmp_path, monkeypatch):
    shares, written = [], Run.progress
    monkeypatch.setattr(Run, "progress", lambda run, done, total, unit: (
        shares.append(done / total), written(run, done, total, unit)))  # fmt: skip
    config = config_of("method=scratch", "plain={epochs: 4, patience: 0}", "seeds=1")
    with Run(tmp_path / "run", config, "test") as run:
        train(config, run)
    assert shares == [0, 0.25, 0.5, 0.75, 1, 1]
