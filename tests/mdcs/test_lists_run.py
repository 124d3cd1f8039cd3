"""Whole runs on a data set of list files, and what ends them in one line."""

import json
from argparse import Namespace

import numpy as np
import pytest

from mdcs import eval as evaluation
from mdcs import export, train
from tests.mdcs.listed_data import LISTS, lose, make_folder

# --- from end to end --------------------------------------------------------------------------------------------------


def command(base, *overrides):
    (base / "tiny.yaml").write_text(LISTS)
    return ["--config", str(base / "tiny.yaml"), "--out", str(base / "runs"), *overrides]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of images, and the run that was trained on it, its classes numbered anew."""
    base = make_folder(tmp_path_factory.mktemp("lists") / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_ROOT", str(base))
        assert train.main(command(base, "data.relabel=true")) == 0
    (run,) = (base / "runs" / "mdcs").iterdir()
    return base, run


@pytest.fixture
def run(trained, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(trained[0]))
    return trained[1]


def test_a_run_on_image_files_trains_all_its_images_and_is_evaluated(run):
    results = json.loads((run / "results.json").read_text())
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (epoch,) = [e for e in events if e["event"] == "epoch"]
    assert epoch["images"] == 26
    assert np.isfinite(epoch["loss"])
    assert results["data"]["class_counts"] == [9, 7, 5, 5]
    assert results["data"]["class_order"] == [1, 3, 0, 2]
    values = {row["metric"]: row["value"] for row in results["figures"]}
    assert 0 <= values["ensemble.accuracy"] <= 1
    assert values["ensemble.many"] is values["ensemble.medium"] is None
    assert values["ensemble.few"] is not None


def test_the_exported_network_wants_pictures_prepared_as_its_test_images_were(run):
    taken = export.take(Namespace(run=run, expert=None))
    assert taken.description()["preparation"] == {"centre": 0.875, "resample": "bilinear"}


def test_the_command_for_evaluation_recomputes_the_figures_of_a_run_on_image_files(run, capsys):
    assert evaluation.main([str(run)]) == 0
    assert "are those of results.json" in capsys.readouterr().out


def damage(base, kind):
    """Change the folder of images; returns what the line on stderr must hold."""
    path = base / "lists" / "train.txt"
    lines = path.read_text().splitlines()
    if kind == "missing image":
        lose(base, "train", 6)
        return "train.txt:6: there is no"
    if kind == "label":
        path.write_text("\n".join([*lines[:2], lines[2][:-1] + "9", *lines[3:]]))
        return "train.txt:3: label 9 is outside 0..3"
    if kind == "class":
        path.write_text("\n".join(line for line in lines if not line.endswith(" 3")))
        return "class 3 has no training image"
    if kind == "no list":
        path.unlink()
        return "train.txt: no such list file"
    (base / "images" / lines[0].rpartition(" ")[0]).write_bytes(b"no image")
    return "not a readable image"


@pytest.mark.parametrize("kind", ["missing image", "label", "class", "no list", "damaged image"])
def test_a_run_on_a_bad_folder_ends_with_one_line_and_exit_code_2(folder, capsys, kind):
    words = damage(folder, kind)
    assert train.main(command(folder)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(folder.glob("runs/mdcs/*/results.json"))


def test_a_known_name_with_lists_of_ones_own_ends_with_one_line_and_exit_code_2(folder, capsys):
    assert train.main(command(folder, "data.name=inaturalist18")) == 2
    error = capsys.readouterr().err
    assert "inaturalist18: 4 classes" in error
    assert error.count("\n") == 1


def test_an_evaluation_after_the_list_changed_is_refused(trained, run, tmp_path, monkeypatch, capsys):
    base = make_folder(tmp_path / "data")
    monkeypatch.setenv("DATA_ROOT", str(base))
    path = base / "lists" / "train.txt"
    path.write_text("".join(path.read_text().splitlines(True)[1:]))
    assert evaluation.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert "other class counts" in error
    assert error.count("\n") == 1
