"""What several files of the tests of MDCS use as fixtures."""

from pathlib import Path

import pytest
import torch

from mdcs import model as model_module
from mdcs import problem as problem_module
from mdcs.problem import Problem
from shared.config import dump
from tests.mdcs.listed_data import make_folder
from tests.mdcs.runs import synthetic


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A small data set of list files, as the data root."""
    base = make_folder(tmp_path / "data")
    monkeypatch.setenv("DATA_ROOT", str(base))
    return base


@pytest.fixture(scope="module")
def tiny_yaml(tmp_path_factory, mdcs_config) -> Path:
    """The configuration of a run of one epoch, as a file."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(dump(mdcs_config("mdcs", "epochs=1", "evaluate.batch_size=5000")))
    return path


@pytest.fixture
def on_synthetic(monkeypatch) -> Problem:
    """Runs of this test train on the synthetic problem."""
    problem = synthetic()
    monkeypatch.setattr(problem_module, "load_problem", lambda config, device: problem)
    return problem


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """The images of every step that is trained from here on."""
    found: list[torch.Tensor] = []
    real = model_module.forward_views

    def spy(model: torch.nn.Module, images: torch.Tensor, split: bool) -> torch.Tensor:
        found.append(images.clone())
        return real(model, images, split)

    monkeypatch.setattr(model_module, "forward_views", spy)
    return found
