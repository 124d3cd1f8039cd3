"""What several files of the tests of `shared` use as fixtures."""

from collections.abc import Iterator

import pytest

from shared import data
from shared.run import Run
from tests.shared.small_runs import Small


@pytest.fixture
def no_data_but_the_tests_own(monkeypatch, tmp_path) -> None:
    """Data is looked for in the test's folder alone."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")  # the tests' own server is on this machine
    fashion = data._SOURCES["fashion_mnist"]
    monkeypatch.setitem(data._SOURCES, "fashion_mnist", fashion._replace(folders=fashion.folders[:2]))


@pytest.fixture
def opened(tmp_path) -> Iterator[Run]:
    """A new run of the small configuration."""
    with Run(tmp_path / "run", Small(), "python -m x.train --config y") as run:
        yield run
