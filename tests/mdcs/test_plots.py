"""The pictures are written for every kind of run, say what was measured, and are the same bytes when drawn again."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from mdcs import plots
from mdcs.plots import draw

matplotlib.use("Agg")
ALWAYS = {"arms", "accuracy_by_class", "groups_by_epoch", "confident_by_epoch", "reliability"}


def fabricated(
    folder: Path, experts: int = 3, classes: int = 10, few: bool = True, seed: int = 0, confident: bool = True,
    epochs: int = 4,
) -> Path:  # fmt: skip
    """A finished run with figures of chance."""
    draws = np.random.default_rng(seed)
    who = ["ensemble", *(f"expert{e + 1}" for e in range(experts))]
    third = classes // 3
    groups = {"many": list(range(third)), "medium": list(range(third, 2 * third)),
              "few": list(range(2 * third, classes))}  # fmt: skip
    if not few:
        groups["medium"], groups["few"] = groups["medium"] + groups["few"], []

    def figures() -> dict[str, float | None]:
        names = ("accuracy", "many", "medium", "few", "head", "middle", "tail", "ece")
        return {f"{w}.{n}": None if n == "few" and not few else float(draws.random()) for w in who for n in names}

    logged = [{"event": "evaluate", "epoch": epoch, "figures": figures()} for epoch in range(2, epochs + 1, 2)]
    shares = {"confident": draws.random(experts).tolist(), "confident_raw": [0.0] * experts} if confident else {}
    logged += [{"event": "epoch", "epoch": epoch, "loss": 1.0, **shares} for epoch in range(1, epochs + 1)]
    reliability = [(20, (k + 0.5) / 15, float(draws.random())) if k > 2 else (0, 0.0, 0.0) for k in range(15)]
    details: dict[str, Any] = {}
    for w in who:
        details[f"{w}.per_class"] = [None if c == 1 else float(draws.random()) for c in range(classes)]
        details[f"{w}.reliability"] = reliability
    results = {
        "figures": [{"at": "last_epoch", "split": "test", "metric": k, "value": v}
                    for k, v in logged[epochs // 2 - 1]["figures"].items()],
        "details": details,
        "data": {"class_counts": [int(500 * 0.01 ** (c / (classes - 1))) for c in range(classes)], "groups": groups},
        "device": "-", "precision": "-", "commit": "-", "command": "-", "seconds": 1.0, "seed": 0,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    return folder


def drawn(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def of_arms(root: Path, seeds: int = 2, **kind: Any) -> list[tuple[str, Path]]:
    """Runs of our method and two others."""
    return [
        *(("mdcs", fabricated(root / f"mdcs{s}", seed=s, **kind)) for s in range(seeds)),
        *(("ce", fabricated(root / f"ce{s}", experts=1, seed=9 + s, confident=False)) for s in range(seeds)),
        ("balpoe", fabricated(root / "balpoe", seed=5, confident=False)),
    ]


@pytest.mark.parametrize("kind", [
    {"experts": 1}, {"experts": 4, "few": False, "seeds": 1}, {"experts": 3, "classes": 100},
], ids=str)  # fmt: skip
def test_every_picture_is_written_as_png_and_svg(tmp_path, kind):
    draw(of_arms(tmp_path / "runs", **kind), tmp_path / "out")
    found = drawn(tmp_path / "out")
    assert set(found) == {f"{name}.{kind}" for name in ALWAYS for kind in ("png", "svg")}
    for name, data in found.items():
        assert data.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml"), name
        assert len(data) > 4000


def test_the_same_runs_give_the_same_bytes(tmp_path):
    runs = of_arms(tmp_path / "runs", seeds=1)
    for name in ("one", "other"):
        draw(runs, tmp_path / name)
    assert drawn(tmp_path / "one") == drawn(tmp_path / "other")


def test_other_figures_give_another_picture(tmp_path):
    for name, seed in (("one", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        plots.confident_by_epoch([fabricated(tmp_path / f"run{seed}", seed=seed)], tmp_path / name)
    one, other = drawn(tmp_path / "one"), drawn(tmp_path / "other")
    assert set(one) == set(other) == {"confident_by_epoch.png", "confident_by_epoch.svg"}
    assert not any(one[name] == other[name] for name in one)


def test_without_a_run_of_ours_the_arms_and_the_reliability_are_left(tmp_path):
    draw([("ce", fabricated(tmp_path / "ce", experts=1, confident=False))], tmp_path / "out")
    assert {name.partition(".")[0] for name in drawn(tmp_path / "out")} == {"arms", "reliability"}


def test_an_arm_that_no_picture_shows_alone_is_among_the_arms_only(tmp_path):
    draw([("ride", fabricated(tmp_path / "ride", confident=False))], tmp_path / "out")
    assert {name.partition(".")[0] for name in drawn(tmp_path / "out")} == {"arms"}


@pytest.fixture
def figures(monkeypatch) -> dict[str, Any]:
    """The figures by name, open, instead of files."""
    from matplotlib import pyplot

    found: dict[str, Any] = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: found.update({path.name: figure}))
    yield found
    pyplot.close("all")


def labels(axis: Any) -> list[str]:
    return axis.get_legend_handles_labels()[1]


def line(axis: Any, label: str) -> Any:
    (found,) = [item for item in axis.get_lines() if item.get_label() == label]
    return found


def test_accuracy_by_class_shows_each_expert_and_the_ensemble_from_the_largest_class_on(tmp_path, figures):
    runs = [fabricated(tmp_path / str(s), seed=s) for s in range(3)]
    plots.accuracy_by_class(runs, tmp_path)
    (axis,) = figures["accuracy_by_class"].axes
    assert labels(axis) == ["expert1", "expert2", "expert3", "ensemble"]
    x, y = line(axis, "expert2").get_data()
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    assert list(x) == results[0]["data"]["class_counts"]
    assert axis.xaxis_inverted()
    by_hand = 100 * np.mean([result["details"]["expert2.per_class"][4] for result in results])
    assert y[4] == pytest.approx(by_hand)
    assert np.isnan(y[1]), "a class without test images has no accuracy"


def test_groups_by_epoch_shows_shots_or_thirds_where_one_is_empty(tmp_path, figures):
    for few, wanted in ((True, ["many-shot", "medium-shot", "few-shot"]),
                        (False, ["head third", "middle third", "tail third"])):  # fmt: skip
        run = fabricated(tmp_path / str(few), few=few)
        plots.groups_by_epoch([run], tmp_path)
        (axis,) = figures["groups_by_epoch"].axes
        assert labels(axis) == ["all classes", *wanted]
        x, y = line(axis, wanted[0]).get_data()
        logged = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        name = "many" if few else "head"
        assert list(x) == [2, 4]
        assert list(y) == pytest.approx([100 * row["figures"][f"ensemble.{name}"] for row in logged[:2]])


def test_confident_shares_are_shown_for_each_expert_and_epoch(tmp_path, figures):
    plots.confident_by_epoch([fabricated(tmp_path / "run")], tmp_path)
    adjusted, raw = figures["confident_by_epoch"].axes
    assert labels(adjusted) == ["expert1", "expert2", "expert3"]
    assert list(line(adjusted, "expert1").get_xdata()) == [1, 2, 3, 4]
    assert set(line(raw, "expert3").get_ydata()) == {0.0}
    assert "adjusted" in adjusted.get_title()
    assert "raw" in raw.get_title()


def test_the_reliability_of_several_seeds_is_weighted_by_their_images(tmp_path, figures):
    folders = [fabricated(tmp_path / str(s), seed=s) for s in range(2)]
    for folder, images, right in ((folders[0], 30, 1.0), (folders[1], 10, 0.0)):
        path = folder / "results.json"
        results = json.loads(path.read_text())
        results["details"]["ensemble.reliability"] = [[images if k == 7 else 0, 0.5, right] for k in range(15)]
        path.write_text(json.dumps(results))
    plots.reliability({"mdcs": folders}, tmp_path)
    (axis,) = figures["reliability"].axes
    (bar,) = axis.patches
    assert (bar.get_x(), bar.get_height()) == (pytest.approx(7 / 15), pytest.approx(0.75))


def test_every_arm_has_a_line_of_the_first_picture_in_the_order_given(tmp_path, figures):
    runs = {arm: [fabricated(tmp_path / arm, confident=False)] for arm in ("mdcs", "dl_both", "ce")}
    plots.arms_by_third(runs, tmp_path)
    (axis,) = figures["arms"].axes
    places = dict(zip((text.get_text() for text in axis.get_yticklabels()), axis.get_yticks(), strict=True))
    assert places == {"mdcs": 2, "dl_both": 1, "ce": 0}


def test_the_deviation_over_seeds_is_the_sample_one_and_zero_for_a_single_run():
    values = np.array([[1.0, 4.0], [3.0, 4.0]])
    assert plots.deviation(values).tolist() == pytest.approx([2**0.5, 0.0])
    assert plots.deviation(values[:1]).tolist() == [0.0, 0.0]


def test_smoothing_is_the_mean_of_neighbours():
    assert plots.smoothed(np.array([1.0, 2.0, 6.0, 1.0]), 1).tolist() == [1, 2, 6, 1]
    assert plots.smoothed(np.array([1.0, 2.0, 6.0, 1.0]), 2).tolist() == [1.5, 4.0, 3.5]
