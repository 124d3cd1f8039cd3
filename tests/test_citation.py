"""Who cites the code finds the papers in it: the four that the packages name, and the version that is released."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
ARXIV = {"fedloge": "2401.08977", "mdcs": "2308.09922", "lightcnn": "2501.15547", "sparsevit": "2307.11988"}


@pytest.fixture(scope="module")
def citation():
    return yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_version_is_that_of_the_project(citation):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
    assert citation["cff-version"] == "1.2.0"


def test_every_paper_is_cited_once(citation, papers):
    assert set(papers) == set(ARXIV)
    assert sorted(found["url"] for found in citation["references"]) == sorted(
        f"https://arxiv.org/abs/{number}" for number in ARXIV.values()
    )


@pytest.mark.parametrize("package", ARXIV)
def test_a_paper_is_cited_as_its_exported_networks_cite_it(citation, package):
    (found,) = [paper for paper in citation["references"] if paper["url"].endswith(ARXIV[package])]
    said = import_module(f"{package}.export").PAPER
    first = found["authors"][0]["family-names"]
    assert re.match(rf"{first}( et al\.|,)", said)
    assert f", {found['title']}, " in said
    assert str(found["year"]) in said
    named = said.partition(f", {found['title']}")[0]
    if "et al." not in named:
        assert named.split(", ") == [author["family-names"] for author in found["authors"]]
    assert all(author["given-names"] for author in found["authors"])
    assert ("collection-title" in found) == (found["type"] == "conference-paper")
    assert found["type"] in ("conference-paper", "article")
    assert ARXIV[package] in (REPOSITORY / package / "README.md").read_text(encoding="utf-8")
