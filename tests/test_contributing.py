"""The recipes of CONTRIBUTING.md, followed: each change is applied to a copy, and its command trains there."""

import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAPERS = ("fedloge", "mdcs", "lightcnn", "sparsevit")


def recipe(title: str) -> tuple[str, list[str]]:
    """A section's change, and the command behind it."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", TEXT, re.DOTALL | re.MULTILINE)
    (change,) = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
    command = re.findall(r"```\n(python .*?)\n```", section)[0]
    return change, command.split()[1:]


def apply(change: str, root: Path) -> None:
    """Replace each hunk's old lines, which must stand exactly once, by its new ones."""
    for part in re.split(r"^--- a/.*\n", change, flags=re.MULTILINE)[1:]:
        head, *hunks = re.split(r"^@@\n", part, flags=re.MULTILINE)
        path = root / head.removeprefix("+++ b/").strip()
        text = path.read_text(encoding="utf-8")
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert text.count(old) == 1, f"{path.name} has not these lines: {old}"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")


def write_idx(folder: Path) -> None:
    """Training and test files of MNIST's format with 60 images a class."""
    folder.mkdir(parents=True)
    labels = np.arange(600, dtype=np.uint8) % 10
    images = np.random.default_rng(0).integers(0, 256, (600, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        pixels = struct.pack(">4I", 0x803, *images.shape) + images.tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(pixels)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 600) + labels.tobytes())


@pytest.mark.parametrize("title", ["Add a method", "Add a data set"])
def test_a_recipe_works_as_it_is_written(title, tmp_path, python, monkeypatch):
    for name in ("lightcnn", "shared"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    change, command = recipe(title)
    before = python(*command, "--dry-run", cwd=tmp_path)
    assert before.returncode == 2  # nothing of it is there without the change
    apply(change, tmp_path)
    write_idx(tmp_path / "data" / "KMNIST" / "raw")
    monkeypatch.delenv("DATA_ROOT", raising=False)
    done = python(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs" / "lightcnn").glob("*/results.json"))


def test_a_fifth_package_trains_and_exports_without_a_change_to_shared(tmp_path, python):
    shutil.copytree(REPOSITORY / "shared", tmp_path / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (REPOSITORY / "lightcnn").rglob("*"):
        if path.suffix in (".py", ".yaml", ".md"):
            place = tmp_path / "fifth" / path.relative_to(REPOSITORY / "lightcnn")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(path.read_text(encoding="utf-8").replace("lightcnn", "fifth"), encoding="utf-8")
    done = python("-m", "fifth.train", "--config", "smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "fifth").iterdir()
    assert python("-m", "fifth.export", str(run), "--out", "model", cwd=tmp_path).returncode == 0
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_every_package_has_the_files_that_a_fifth_paper_is_told_to_have():
    (section,) = re.findall(r"^## Add a fifth paper\n(.*?)(?=^## )", TEXT, re.DOTALL | re.MULTILINE)
    files = re.findall(r"`([\w/]+\.(?:py|yaml|md))`", section.partition("\n3.")[0])
    assert len(files) > 10
    for paper in PAPERS:
        assert [name for name in files if not (REPOSITORY / paper / name).exists()] == []


def test_every_path_that_is_named_exists():
    named = set(re.findall(r"`((?:tests|shared|results|benchmarks|schemas)/[\w./]*)`", TEXT))
    assert named
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
