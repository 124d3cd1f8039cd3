"""Small real data and configurations for the tests of lightcnn."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightcnn import algorithm, training
from lightcnn.config import Config
from lightcnn.problem import Problem, load_problem
from shared import data
from shared.config import parse

CPU = torch.device("cpu")
TEXT = """
paper: lightcnn
data: {name: sample, val_images: 50, val_from: each_class, train_images: 130, test_images: 200}
stage1: {epochs: 2, patience: 5}
stage2: {max_epochs: 2}
plain: {epochs: 2}
seeds: 2
device: cpu
"""


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Config]:
    """A tiny configuration with overrides."""
    return lambda *overrides: parse(TEXT, Config, overrides, source="tiny")


@pytest.fixture(scope="session")
def problem_of() -> Callable[[Config], Problem]:
    """Its problem, on the CPU."""
    torch.set_num_threads(1)
    return lambda config: load_problem(config, CPU)


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """500 real images, mixed classes, in [0, 1]."""
    return data.load("sample", "test").images[::10].float() / 255


@pytest.fixture(scope="session")
def labels() -> torch.Tensor:
    """Their classes."""
    return data.load("sample", "test").labels[::10]


@pytest.fixture(scope="session")
def scripted_validation() -> Callable[..., list[float]]:
    """Takes the place of `training.validate`: seed s improves until epoch 3 + s, so the seeds stop one by one."""

    def scripted(state: Any, problem: Problem, config: Config) -> list[float]:
        seeds = [state.lanes[lane].seed for lane in state.active for _ in range(state.members)]
        return [0.05 * min(state.epoch, 3 + seed) for seed in seeds]

    return scripted


@pytest.fixture
def stops_in_stage_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 2 is its first two phases, which an epoch without an improvement ends; seed s has s + 2 epochs in each."""
    phases_of = algorithm.stage2_phases

    def scripted(state: Any, problem: Problem, config: Config) -> list[float]:
        seeds = [state.lanes[lane].seed for lane in state.active for _ in range(state.members)]
        return [0.05 * min(state.epoch, seed) for seed in seeds]

    monkeypatch.setattr(training, "validate", scripted)
    monkeypatch.setattr(
        algorithm, "stage2_phases", lambda *given: [replace(p, patience=1) for p in phases_of(*given)[:2]]
    )


@pytest.fixture(scope="session")
def run_phases() -> Callable[..., Any]:
    """Train all steps of a plan in memory; returns (points, the Training of each step, the epochs of each)."""
    from lightcnn.algorithm import plan

    def run(config: Config, problem: Problem, count: int | None = None) -> Any:
        points, states, epochs = {}, [], []
        for step in plan(config, problem)[:count]:
            state = training.begin(step, points, problem, config)
            reports = []
            while not state.done:
                training.train_epoch(state, problem, config)
                reports.append(training.end_epoch(state, training.validate(state, problem, config)))
            points = training.end_phase(state, points)
            states.append(state)
            epochs.append(reports)
        return points, states, epochs

    return run
