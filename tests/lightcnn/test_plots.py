"""The pictures of a study show what was measured, where its axes and labels say: hand-made figures, no training."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightcnn import plots, problem
from shared.config import dump

STATED = {"device": "-", "precision": "-", "commit": "-", "command": "-", "seconds": 1.0, "config": "tiny"}


@pytest.fixture
def figures(monkeypatch):
    """The figures by name, open, instead of files."""
    from matplotlib import pyplot

    found: dict[str, Any] = {}
    plots.use_style("lightcnn")
    monkeypatch.setattr(plots, "save", lambda figure, path: found.update({path.name: figure}))
    yield found
    pyplot.close("all")


# --- training curves --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """Two seeds: two epochs of stage 1 (seed 1 stops after the first), two of P1, one of P2. Returns its folder."""

    def lane(seed, *train):
        return {"seed": seed, "fold": None, "loss": [1.0], "train": train, "validation": [t / 2 for t in train]}

    phases = (
        ("stage1", ("conv1", "conv2", "fc"), [[lane(0, 0.1, 0.2), lane(1, 0.3, 0.4)], [lane(0, 0.5, 0.6)]]),
        ("P1", ("fc1", "fc2"), [[lane(0, 0.7), lane(1, 0.8)], [lane(0, 0.72), lane(1, 0.82)]]),
        ("P2", ("head", "fc1", "fc2"), [[lane(0, 0.9), lane(1, 1.0)]]),
    )
    rows = [{"event": "epoch", "phase": phase, "epoch": epoch, "trains": trains, "lanes": lanes}
            for phase, trains, epochs in phases for epoch, lanes in enumerate(epochs)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "results.json").write_text(json.dumps({**STATED, "figures": [], "seeds": [0, 1]}))
    return tmp_path


def test_the_curves_shade_each_phase_and_name_what_it_unfreezes(run, figures):
    plots.training_curves(run, run)
    (axis,) = figures["training_curves"].axes
    edges = [(span.get_x(), span.get_x() + span.get_width()) for span in axis.patches]
    assert edges == [(0.5, 2.5), (2.5, 4.5), (4.5, 5.5)]
    shades = [span.get_facecolor() for span in axis.patches]
    assert shades[0] != shades[1] != shades[2], "neighbours are told apart"
    assert [(text.get_text(), text.get_position()[0]) for text in axis.texts] == [
        ("stage1\nconv1\nconv2\nfc", 1.5), ("P1\nfc1\nfc2", 3.5), ("P2\nhead\nfc1\nfc2", 5),
    ]  # fmt: skip


def test_the_curves_are_each_seeds_accuracies_in_percent_by_epoch(run, figures):
    plots.training_curves(run, run)
    (axis,) = figures["training_curves"].axes
    wanted = []
    for epochs, seeds in (
        ([1, 2], ([10, 50], [30, np.nan])), ([1, 2], ([20, 60], [40, np.nan])),  # branch a, branch b
        ([3, 4], ([70, 72], [80, 82])), ([5], ([90], [100])),
    ):  # fmt: skip
        for share, style in ((1, "--"), (0.5, "-")):  # train, validation
            wanted += [(epochs, pytest.approx([share * y for y in ys], nan_ok=True), style) for ys in seeds]
    assert [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in axis.lines] == wanted
    assert {line.get_marker() for line in axis.lines[12:]} == {"."}, "a phase of one epoch is not seen as a line"
    assert axis.get_legend_handles_labels()[1] == [
        "branch a, train", "branch a, validation", "branch b, train, augmented", "branch b, validation",
        "merged, train, with dropout", "merged, validation",
    ]  # fmt: skip
    colours = [line.get_color() for line in axis.lines]
    assert [len(set(part)) for part in (colours[:4], colours[4:8], colours[8:])] == [1, 1, 1]
    assert len(set(colours)) == 3, "a colour for either branch and for the merged network"


# --- augmented images -------------------------------------------------------------------------------------------------


def test_the_augmented_images_stand_below_their_originals(tmp_path, figures, monkeypatch, config_of):
    """Each image has a brightness of its own, which no warp changes, and a grain, which each interpolation blurs."""
    (tmp_path / "config.yaml").write_text(dump(config_of()))
    grain = torch.randint(0, 41, (6, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    images = (grain + torch.arange(0, 210, 35).view(6, 1, 1, 1)).to(torch.uint8)
    train = torch.tensor([5, 2, 0, 3, 1])  # image 4 validates
    hand_made = SimpleNamespace(images=images, lanes=[SimpleNamespace(train=train)])
    monkeypatch.setattr(problem, "load_problem", lambda config, device: hand_made)
    plots.augmented_images(tmp_path, tmp_path, count=3)
    axes = figures["augmented_images"].axes
    shown = np.array([axis.images[0].get_array() for axis in axes]).reshape(3, 3, 28, 28)
    assert np.allclose(shown[0], images[[5, 0, 1], 0] / 255), "the first, the middle and the last that are trained on"
    assert not np.isclose(shown[1:], shown[0]).all((2, 3)).any()
    assert np.abs(shown.mean((2, 3)) - shown[0].mean((1, 2))).max() < 10 / 255
    assert [axes[3 * row].get_title(loc="left") for row in range(3)] == ["original", "sequential", "combined"]
    rough = np.abs(np.diff(shown, axis=-1)).mean((1, 2, 3))
    assert rough[0] > rough[2] > rough[1], "three interpolations blur more than one"


# --- confusion --------------------------------------------------------------------------------------------------------


def test_the_confusion_matrix_has_a_row_a_class_with_its_images_and_their_shares(tmp_path, figures):
    table = [[1, 3, 0], [0, 2, 0], [0, 0, 0]]  # of class c there is no image
    results = {"details": {"confusion": table}, "data": {"classes": ["a", "b", "c"]}, "seeds": [4, 5]}
    plots.confusion_matrix(results, tmp_path)
    axis, bar = figures["confusion_matrix"].axes
    assert axis.images[0].get_array().tolist() == [[0.25, 0.75, 0], [0, 1, 0], [0, 0, 0]]
    assert axis.images[0].get_clim() == (0, 1)
    assert axis.yaxis_inverted(), "the first row is the upper one"
    assert {text.get_position(): text.get_text() for text in axis.texts} == {(0, 0): "1", (1, 0): "3", (1, 1): "2"}
    assert [text.get_text() for text in axis.get_xticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b", "c"]
    assert (axis.get_xlabel(), axis.get_ylabel(), bar.get_ylabel()) == ("predicted", "class", "share of the class")
    assert "seed 4" in axis.get_title()


# --- accuracy by size, and by arm -------------------------------------------------------------------------------------


def test_every_network_stands_at_its_size_and_only_equal_ones_side_by_side(tmp_path, figures, monkeypatch):
    sizes = {"two_stage": 14_862, "literal": 14_862, "submodel": 6_930, "scratch": 14_862, "bn_gap": 12_410}
    measured = {f"{method}/parameters": {0: size, 1: size} for method, size in sizes.items()}
    measured |= {f"{method}/accuracy": {0: 0.5, 1: 0.6, 2: 0.9 + k / 100} for k, method in enumerate(sizes)}
    published = {"squeezenet": (727_626.0, [90.0, 92.0])}
    monkeypatch.setattr(plots, "published_networks", lambda name, shown: published)
    plots.size_and_accuracy(measured, list(sizes), "mnist", tmp_path)
    (axis,) = figures["size_and_accuracy"].axes
    found = {}
    for bars in axis.containers:
        point, _, (spread,) = bars.lines
        found[bars.get_label()] = (*point.get_xydata()[0], *spread.get_segments()[0][:, 1])
    assert list(found) == [*sizes, "squeezenet"]
    for number, (method, size) in enumerate(sizes.items()):
        x, *heights = found[method]
        assert heights == pytest.approx([(200 + number) / 3, 50, 90 + number]), "mean, lowest and highest seed"
        assert x == (pytest.approx(size, rel=0.05) if size == 14_862 else size)
    equal = [found[method][0] for method in ("two_stage", "literal", "scratch")]
    assert len(set(equal)) == 3
    assert np.prod(equal) == pytest.approx(14_862**3), "none is on the average smaller or larger"
    assert found["squeezenet"] == (727_626, 91, 90, 92)
    crosses = [(*line.get_xydata()[0],) for line in axis.lines if line.get_marker() == "x"]
    assert crosses == [(size, accuracy) for size, accuracy, _ in plots.PUBLISHED["mnist"]]
    assert [text.get_text() for text in axis.texts] == [who for *_, who in plots.PUBLISHED["mnist"]]
    assert axis.get_xscale() == "log"


def test_a_published_study_is_drawn_anew_from_its_rows_with_what_others_have_published(tmp_path, monkeypatch):
    for study in ("mnist", "budget_mnist"):
        shutil.copytree(plots.REPOSITORY / "results" / "lightcnn" / study, tmp_path / "results" / "lightcnn" / study)
        shutil.rmtree(tmp_path / "results" / "lightcnn" / study / "plots")
    monkeypatch.setattr(plots, "REPOSITORY", tmp_path)
    assert plots.main() == 0
    drawn = {path.name for path in (tmp_path / "results").rglob("plots/*")}
    assert drawn == {"size_and_accuracy.png", "size_and_accuracy.svg"}
    text = (tmp_path / "results" / "lightcnn" / "mnist" / "plots" / "size_and_accuracy.svg").read_text()
    for name in ("two_stage", "bn_gap", "our budget track", "era-s7"):
        assert name in text


def test_the_ladder_has_a_step_an_arm_with_validation_and_test_of_each_seed(tmp_path, figures):
    measured = {"wide/validation": {0: 0.5, 1: 0.6}, "wide/accuracy": {0: 0.7}, "deep/accuracy": {0: 0.8, 1: 0.9}}
    plots.draw_ladder(measured, ["deep", "wide"], tmp_path)
    (axis,) = figures["ladder"].axes
    points = {
        (round(float(x)), line.get_marker(), round(float(y))) for line in axis.lines for x, y in line.get_xydata()
    }
    assert points == {(1, "o", 50), (1, "o", 60), (1, "s", 70), (0, "s", 80), (0, "s", 90)}
    assert [text.get_text() for text in axis.get_xticklabels()] == ["deep", "wide"]
    legend = zip(*axis.get_legend_handles_labels(), strict=True)
    assert [(line.get_marker(), label) for line, label in legend] == [("o", "validation"), ("s", "test")]
