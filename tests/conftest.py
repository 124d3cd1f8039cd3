"""Helpers of all tests: tiny runs that take a tenth of a second, and commands in processes of their own."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAPERS = tuple(
    name for name in ("fedloge", "mdcs", "lightcnn", "sparsevit") if (REPOSITORY / name / "train.py").exists()
)
TINY = (
    "model.name=mlp", "data.n_max=30", "data.imbalance_factor=5", "clients={count: 3, alpha: 1.0, min_size: 5}",
    "optimizer={lr: 0.05, momentum: 0.5}", "rounds=2", "batch_size=8", "threads=1", "device=cpu",
    "evaluate={every: 1, last: 2, batch_size: 2000}",
)  # fmt: skip
TINY_MDCS = (
    "data.n_max=16", "data.imbalance_factor=4", "model.width=2", "batch_size=24", "epochs=2",
    "schedule={name: step, warmup_epochs: 1, milestones: [1]}", "evaluate={every: 1, batch_size: 5000}",
)  # fmt: skip
SMALL_METHODS = {
    "fedloge": "{name: fedloge, norm: 1.0, sparsity: 0.2, etf_steps: 50}",
    "creff": "{name: creff, features_per_class: 2, match_steps: 2, retrain_steps: 2}",
    "fedrep": "{name: fedrep, head_epochs: 1}",
}


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def papers() -> tuple[str, ...]:
    """The packages that are there, one a paper."""
    return PAPERS


@pytest.fixture(scope="session")
def tiny_overrides() -> Callable[..., list[str]]:
    """Overrides of `smoke` that make a run of a tenth of a second: (method, *more)."""

    def overrides(method: str = "fedloge", *more: str) -> list[str]:
        network = ["model.name=convnet"] if method == "fedbn" else []  # it needs a batch norm
        return [*TINY, f"method={SMALL_METHODS.get(method, method)}", *network, *more]

    return overrides


@pytest.fixture(scope="session")
def tiny_config(tiny_overrides: Callable[..., list[str]]) -> Callable[..., Any]:
    """The configuration of such a run: (method, *more)."""
    from fedloge.config import Config
    from shared.config import load

    def config(method: str = "fedloge", *more: str) -> Config:
        return load(REPOSITORY / "fedloge" / "configs" / "smoke.yaml", Config, tiny_overrides(method, *more))

    return config


@pytest.fixture(scope="session")
def tiny_arguments(tiny_overrides: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Arguments of `fedloge.train` for such a run: (out, method, *more)."""

    def arguments(out: Path, method: str = "fedloge", *more: str) -> list[str]:
        return ["--config", "smoke", "--out", str(out), *tiny_overrides(method, *more)]

    return arguments


@pytest.fixture(scope="session")
def mdcs_config() -> Callable[..., Any]:
    """The configuration of a run of mdcs in eight steps: (method, *more)."""
    from mdcs.config import Config
    from shared.config import load

    def config(method: str = "mdcs", *more: str) -> Config:
        overrides = [*TINY_MDCS, f"method={method}", *more]
        return load(REPOSITORY / "mdcs" / "configs" / "smoke.yaml", Config, overrides)

    return config


@pytest.fixture(scope="session")
def mdcs_arguments() -> Callable[..., list[str]]:
    """Arguments of `mdcs.train` for such a run: (out, method, *more)."""

    def arguments(out: Path, method: str = "mdcs", *more: str) -> list[str]:
        return ["--config", "smoke", "--out", str(out), *TINY_MDCS, f"method={method}", *more]

    return arguments


@pytest.fixture(scope="session")
def small_sets() -> dict[str, Any]:
    """The embedded sample, read once, with every 25th of its test images: split -> images."""
    from shared import data

    test = data.load("sample", "test")
    return {"train": data.load("sample", "train"), "test": data.take(test, range(0, len(test), 25))}


@pytest.fixture(scope="module")
def small_sample(small_sets: dict[str, Any]) -> Iterator[None]:
    """In this module the embedded sample has 200 test images: evaluating them costs nothing."""
    from shared import data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda name, split, **_: small_sets[split])
        yield


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """The environment of a user's shell: nothing of the test run's PYTHONPATH, one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PYTEST", "COV"))}
    return {**kept, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def python(clean_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run this Python with arguments in a process of its own: (*arguments, cwd)."""

    def run(*arguments: str, cwd: Path = REPOSITORY, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command: Sequence[str] = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=cwd, env=clean_environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


@pytest.fixture(scope="module")
def load_benchmark() -> Iterator[Callable[[str], Any]]:
    """Imports a benchmark by name as a module, as its own processes do."""
    folder = REPOSITORY / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)

        def load(name: str) -> Any:
            spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            return module

        yield load
