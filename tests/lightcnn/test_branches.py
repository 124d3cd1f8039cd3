"""Stage 2 from the branches of another run: what training stage 1 again would give, and nothing that does not fit."""

import json

import pytest

from lightcnn.eval import main as eval_main
from lightcnn.train import main
from shared.checkpoint import load_model
from shared.run import read_metrics

OVERRIDES = (
    "data={name: sample, val_images: 50, val_from: each_class, train_images: 130, test_images: 200}",
    "stage1={epochs: 2, patience: 5}", "stage2={max_epochs: 1}", "seeds=3", "device=cpu",
)  # fmt: skip


def trained(out, *overrides):
    """The folder of a finished run."""
    assert main(["--config", "lightcnn/configs/smoke.yaml", "--out", str(out), *OVERRIDES, *overrides]) == 0
    (folder,) = (path for path in (out / "lightcnn").iterdir() if (path / "results.json").is_file())
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of the paper's method with three seeds."""
    return trained(tmp_path_factory.mktemp("source"))


def figures(folder):
    rows = json.loads((folder / "results.json").read_text())["figures"]
    return {(row["seed"], row["metric"]): row["value"] for row in rows}


def test_a_variant_from_trained_branches_is_the_variant_trained_whole_to_the_bit(source, tmp_path):
    whole = trained(tmp_path / "whole", "method=a_only", "seeds=2")
    taken = trained(tmp_path / "taken", "method=a_only", "seeds=2", f"stage1.branches={source}")
    tensors = load_model(whole / "model" / "points")[0]
    again = load_model(taken / "model" / "points")[0]
    assert set(tensors) == set(again)
    assert all(tensors[name].equal(again[name]) for name in tensors)
    assert figures(whole) == figures(taken)
    (phase,) = (row for row in read_metrics(taken, "phase") if row["phase"] == "stage1")
    assert phase["epochs"] == [0, 0]
    assert all(row["phase"] != "stage1" for row in read_metrics(taken, "epoch"))
    assert eval_main([str(taken)]) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [("data.train_images=120", "not trained on this run's images"), ("seeds=4", "has no branches of seed 3"),
     ("stage1.epochs=3", "no branches of this stage 1"), ("method=two_clean", "no branches of this stage 1"),
     ("augment.zoom=0.1", "no branches of this stage 1"), ("precision=bfloat16", "no branches of this stage 1"),
     ("method={name: two_stage, kfold: honest, folds: 2}", "seed 0 saw other images (method.kfold, method.folds)"),
     ("method=scratch", "has no stage 1")],
)  # fmt: skip
def test_branches_that_do_not_fit_are_refused_in_one_line(source, tmp_path, capsys, override, message):
    command = ["--config", "lightcnn/configs/smoke.yaml", "--out", str(tmp_path), *OVERRIDES]
    assert main([*command, f"stage1.branches={source}", override]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_branches_of_other_folds_are_refused_for_they_saw_the_validation_images(tmp_path, capsys):
    thirds = trained(tmp_path / "thirds", "method={name: two_stage, kfold: honest, folds: 3}", "seeds=1")
    command = ["--config", "lightcnn/configs/smoke.yaml", "--out", str(tmp_path), *OVERRIDES, "seeds=1"]
    for method in ("method={name: two_stage, kfold: honest, folds: 2}", "method=two_stage"):
        assert main([*command, method, f"stage1.branches={thirds}"]) == 2
        error = capsys.readouterr().err
        assert "branches of seed 0 saw other images (method.kfold, method.folds)" in error
        assert error.count("\n") == 1


def test_branches_can_be_taken_from_a_run_that_took_them_itself(source, tmp_path):
    first = trained(tmp_path / "first", "method=a_only", f"stage1.branches={source}")
    second = trained(tmp_path / "second", "method=a_only", f"stage1.branches={first}")
    assert figures(first) == figures(second)


def test_the_epochs_of_folds_count_those_of_their_own_branches(tmp_path):
    settings = ("method={name: two_stage, kfold: honest, folds: 2}", "seeds=2", "stage1={epochs: 6, patience: 1}")
    whole = trained(tmp_path / "whole", *settings)
    taken = trained(tmp_path / "taken", *settings, f"stage1.branches={whole}")
    lanes = [sum(lane) for lane in zip(*(row["epochs"] for row in read_metrics(whole, "phase")), strict=True)]
    assert len(set(lanes)) > 1, "stage 1 stops at another epoch in each fold"
    assert figures(whole) == figures(taken)
    assert [figures(taken)[seed, "epochs.run"] for seed in (0, 1)] == [max(lanes[:2]), max(lanes[2:])]


def test_a_run_without_branches_is_refused(tmp_path, capsys):
    baseline = trained(tmp_path / "baseline", "method=scratch", "plain.epochs=1")
    command = ["--config", "lightcnn/configs/smoke.yaml", "--out", str(tmp_path), *OVERRIDES]
    assert main([*command, f"stage1.branches={baseline}"]) == 2
    assert "no branches" in capsys.readouterr().err
    assert main([*command, f"stage1.branches={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere" in capsys.readouterr().err
