"""A run that stops and goes on gives the bits of a run that did not stop: for each method, between any two clients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloge.algorithm import METHODS
from fedloge.train import train
from shared import run as run_module
from shared.checkpoint import load_state, previous_of
from shared.errors import DataError, InterruptedRunError
from shared.run import Run, read_metrics
from tests.shared.small_runs import began_elsewhere

CLIENTS = 3


class StoppedRun(Run[Any]):
    """A run that a signal reaches in the second step of the client after so many."""

    def __init__(self, folder: Path, config: Any, after_clients: int) -> None:
        super().__init__(folder, config, "test")
        self.left, self.steps_of_client = after_clients, 0

    def log(self, event: str, **values: Any) -> None:
        super().log(event, **values)
        self.left -= event == "client"
        self.steps_of_client = 0

    def check(self) -> None:
        self.steps_of_client += 1
        if self.left == 0 and self.steps_of_client == 2:
            raise InterruptedRunError(2, self.folder)


def figures_of(folder: Path) -> dict[str, Any]:
    """All that a run says of itself but the time."""
    results = json.loads((folder / "results.json").read_text())
    timed = ("seconds", "images_per_second", "peak_memory_bytes", "command", "commit")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "results": {key: value for key, value in results.items() if key not in timed},
        "metrics": [{key: value for key, value in row.items() if key not in timed} for row in rows],
        "model": (folder / "model" / "model.safetensors").read_bytes(),
    }


def whole(folder: Path, config: Any) -> dict[str, Any]:
    with Run(folder, config, "test") as run:
        train(config, run)
    return figures_of(folder)


def stop(folder: Path, config: Any, after_clients: int) -> dict[str, Any]:
    """Run until the signal; returns the saved state."""
    with pytest.raises(InterruptedRunError), StoppedRun(folder, config, after_clients) as run:
        train(config, run)
    assert not (folder / "results.json").exists()
    return load_state(run.state_path)["state"]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, tiny_config) -> Callable[[str], dict[str, Any]]:
    """What a run of a method gives that nothing stops; each method runs once."""
    known: dict[str, dict[str, Any]] = {}

    def figures(method: str) -> dict[str, Any]:
        if method not in known:
            known[method] = whole(tmp_path_factory.mktemp(method) / "run", tiny_config(method))
        return known[method]

    return figures


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "after_clients", [0, 2, CLIENTS, CLIENTS + 1], ids=["start", "mid round", "round end", "mid last round"]
)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, tiny_config, never_stopped, method, after_clients):
    config = tiny_config(method)
    saved = stop(tmp_path / "run", config, after_clients)
    assert (saved["round"], saved["position"]) == divmod(after_clients, CLIENTS)
    assert whole(tmp_path / "run", config) == never_stopped(method)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_the_state_before_the_last_to_the_same_bits(
    tmp_path, tiny_config, never_stopped, method, monkeypatch
):
    monkeypatch.setattr(run_module, "SAVE_EVERY_SECONDS", 0)
    config = tiny_config(method)
    stop(tmp_path / "run", config, CLIENTS + 1)
    with Run(tmp_path / "run", config, "test") as run:
        previous = load_state(previous_of(run.state_path))["state"]
        assert (previous["round"], previous["position"]) == (1, 1)  # the signal saved this state once more
        train(config, run, previous=True)
    assert figures_of(tmp_path / "run") == never_stopped(method)


def test_a_run_does_not_go_on_with_other_images(tmp_path, tiny_config):
    config = tiny_config("fedloge")
    stop(tmp_path / "run", config, 1)
    began_elsewhere(tmp_path / "run" / "metrics.jsonl")
    with Run(tmp_path / "run", config, "test") as run, pytest.raises(DataError, match=r"began on other data \(train\)"):
        train(config, run)


def test_a_run_that_is_stopped_before_every_client_gives_the_same_bits(tmp_path, tiny_config, never_stopped):
    config = tiny_config("fedloge")
    for _ in range(2 * CLIENTS - 1):
        stop(tmp_path / "run", config, 1)
    assert whole(tmp_path / "run", config) == never_stopped("fedloge")


def test_a_convolutional_network_with_batch_norm_and_augmentation_goes_on_to_the_same_bits(tmp_path, tiny_config):
    config = tiny_config("fedbn", "model.name=convnet", "data.augment=crop_flip")
    expected = whole(tmp_path / "whole" / "run", config)
    stop(tmp_path / "stopped" / "run", config, 4)
    assert whole(tmp_path / "stopped" / "run", config) == expected


def test_another_seed_gives_other_bits(tmp_path, tiny_config, never_stopped):
    other = whole(tmp_path / "run", tiny_config("fedavg", "seed=1"))
    assert other["results"]["model_digest"] != never_stopped("fedavg")["results"]["model_digest"]
    assert read_metrics(tmp_path / "run", "evaluate")
