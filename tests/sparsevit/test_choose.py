"""The choice of coefficients: its rule, the one figure that it sees, a whole one in small."""

import csv
import json

import pytest
import yaml

from shared.config import load, parse
from shared.errors import RunError
from shared.study import Outcome
from sparsevit import choose, reproduce, train
from sparsevit.choose import (
    GRID,
    SEEDS,
    Candidate,
    candidates,
    chosen,
    held_out_accuracy,
    lines_of,
    read_line,
    sentences,
    table,
    text_of,
)
from sparsevit.config import Config
from sparsevit.reproduce import ARMS, PLANS

SMALL = {"l1": (1e-9, 1.0), "group": (1e-9,)}


def found(**accuracies):
    """Candidate -> seed -> accuracy; the seeds differ far more than the candidates."""
    named = {Candidate("none"): 0.0} | {
        Candidate("l1", c): v for c, v in zip(GRID["l1"], accuracies["l1"], strict=True)
    }
    return {candidate: {s: 0.8 + 0.05 * k + value for k, s in enumerate(SEEDS)} for candidate, value in named.items()}


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [((0.3, -0.1, -0.4, -0.5, -0.51, -3), GRID["l1"][3]), ((-0.6, -1, -1, -1, -1, -1), None),
     ((0, 0, 0, 0, 0, 0.1), GRID["l1"][5]), ((0, -1, -1, -0.2, -1, -1), GRID["l1"][3])],
)  # fmt: skip
def test_the_largest_coefficient_that_costs_at_most_half_a_point_is_taken(losses, wanted):
    values = found(l1=[loss / 100 for loss in losses])
    lines = lines_of(values, dict.fromkeys(values, 0.1), "the command")
    assert chosen(lines) == {"l1": wanted}
    rows = table(lines)
    assert [row[1] for row in rows if row[-1] == "chosen"] == ([] if wanted is None else [f"{wanted:g}"])
    assert rows[2][4].startswith(f"{losses[0]:+.2f} ± 0.00")


def test_a_choice_at_the_end_of_the_grid_says_so():
    def said(*losses):
        values = found(l1=[loss / 100 for loss in losses])
        return sentences(lines_of(values, dict.fromkeys(values, 0.1), "the command"))

    assert said(0, 0, 0, 0, 0, 0) == [f"l1: {GRID['l1'][5]:g}, the largest of the grid, which may be too short."]
    assert "lower it" in said(-1, -1, -1, -1, -1, -1)[0]
    assert said(0, 0, -1, -1, -1, -1) == [f"l1: {GRID['l1'][1]:g}"]


def test_the_seeds_of_the_choice_are_not_reported_and_its_arms_are_those_with_a_free_coefficient():
    assert not set(SEEDS) & set(range(max(plan.seeds for plan in PLANS.values())))
    assert set(GRID) == {"l1", "group", "ffn_log", "attn_sparse"} < set(ARMS)
    assert all(list(values) == sorted(set(values)) for values in GRID.values())


def test_a_candidate_differs_from_the_study_in_its_coefficient_and_in_that_nothing_is_pruned(repository):
    path = repository / "sparsevit" / "configs" / "mini.yaml"
    study = load(path, Config)
    for candidate in candidates(GRID):
        config = load(path, Config, candidate.overrides(101))
        assert (config.method, config.seed) == (candidate.arm, 101)
        if candidate.arm != "none":
            assert getattr(config.coefficients, candidate.arm) == candidate.coefficient
        assert (config.prune.pruners, config.prune.removals, config.prune.recover) == ((), (), None)
        same = {"method": study.method, "seed": study.seed, "coefficients": study.coefficients, "prune": study.prune}
        assert config.model_copy(update=same) == study


def test_only_the_figure_of_the_held_out_images_is_read(tmp_path):
    rows = [{"at": "final", "split": "test", "metric": name, "value": value} for name, value in
            (("dense.accuracy", 0.1), ("global_l1.80.accuracy", 0.2), ("val.accuracy", 0.75))]  # fmt: skip
    finished = {"device": "-", "precision": "-", "commit": "-", "command": "-", "seconds": 1.0, "seed": 100}
    for test_value in (0.1, 0.9, float("nan"), None):
        rows[0]["value"] = rows[1]["value"] = test_value
        (tmp_path / "results.json").write_text(json.dumps({**finished, "figures": rows}))
        assert held_out_accuracy(tmp_path) == 0.75
    (tmp_path / "results.json").write_text(json.dumps({**finished, "figures": rows[:2]}))
    with pytest.raises(RunError, match=r"has no val\.accuracy"):
        held_out_accuracy(tmp_path)


@pytest.fixture
def tiny_file(tmp_path, tiny):
    text = yaml.safe_dump(tiny("paper").model_dump(mode="json"))
    (tmp_path / "tiny.yaml").write_text(text)
    assert parse(text, Config) == tiny("paper")
    return tmp_path / "tiny.yaml"


def test_a_whole_choice_prints_its_table_and_writes_it(tiny_file, tmp_path, monkeypatch, capsys):
    def run_jobs(module, jobs, workers):
        assert module == "sparsevit.train"
        return {job.name: Outcome(train.main(job.arguments), 0.0) for job in jobs}

    monkeypatch.setattr(choose, "run_jobs", run_jobs)
    folder, jobs = choose.choose(tiny_file, str(tiny_file), tmp_path / "runs", 1, "the command", SMALL)
    assert "held-out accuracy" in capsys.readouterr().out
    text = (folder / "choice.md").read_text()
    assert "seeds 100, 101, 102" in text
    assert "- group: 1e-09, the largest of the grid" in text
    with open(folder / "choice.csv", newline="", encoding="utf-8") as file:
        lines = [read_line(line) for line in csv.DictReader(file)]
    assert [(line.arm, line.coefficient) for line in lines] == [
        ("none", None),
        ("l1", 1e-9),
        ("l1", 1),
        ("group", 1e-9),
    ]
    assert text_of(lines) == text
    results = list((tmp_path / "runs" / "sparsevit").glob("*/results.json"))
    assert len(results) == 3 * 4
    assert {job.folder for job in jobs} == {path.parent for path in results}
    for path in results:
        metrics = {row["metric"] for row in json.loads(path.read_text())["figures"]}
        assert [m for m in metrics if m.startswith(("global", "neurons.2", "heads"))] == []
        assert not (path.parent / "pruned").exists()


def test_a_choice_that_cannot_be_made_is_refused_in_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert reproduce.main(["--study", "choose", "--config", "cifar10_authors", *out]) == 2
    assert "data.val_images is 0" in capsys.readouterr().err
    assert reproduce.main(["--study", "choose", "--scale", "mini", "--seeds", "2", *out]) == 2
    assert "arms and seeds of its own" in capsys.readouterr().err
