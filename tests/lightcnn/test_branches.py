"""Stage 2 from the branches of another run: what training stage 1 again would give, and nothing that does not fit."""

import json
import shutil

import pytest

from lightcnn.eval import main as eval_main
from lightcnn.train import main, train
from shared.checkpoint import load_model
from shared.errors import InterruptedRunError
from shared.run import Run, read_metrics

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
     ("stage1.epochs=3", "another stage 1: stage1.epochs is 2 there, 3 here; leave stage1.branches out"),
     ("stage1.patience=2", "stage1.patience is 5 there, 2 here"), ("batch_size=16", "batch_size is 32 there, 16 here"),
     ("method=two_clean", "there, clean images and clean images here"), ("augment.zoom=0.1", "zoom=0.1, shift=0.2"),
     ("precision=bfloat16", "precision is float32 there, bfloat16 here"),
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


def test_three_seeds_take_the_branches_of_five_that_stopped_at_other_epochs(tmp_path):
    stage1 = "stage1={epochs: 6, patience: 1}"
    five = trained(tmp_path / "five", "seeds=5", stage1)
    whole = trained(tmp_path / "whole", "method=no_transfer", stage1)
    taken = trained(tmp_path / "taken", "method=no_transfer", stage1, f"stage1.branches={five}")
    (phase,) = (row for row in read_metrics(five, "phase") if row["phase"] == "stage1")
    assert len(set(phase["epochs"])) > 1
    tensors, again = (load_model(folder / "model" / "points")[0] for folder in (whole, taken))
    assert all(tensors[name].equal(again[name]) for name in tensors)
    assert figures(whole) == figures(taken)


def test_a_run_says_whose_branches_it_took_and_needs_them_no_more(source, tmp_path, config_of, monkeypatch):
    """Stopped in stage 2, it goes on to the same bits where the other run is gone."""
    there = shutil.copytree(source, tmp_path / "there")
    config = config_of("method=a_only", *OVERRIDES, f"stage1.branches={there}")
    with Run(tmp_path / "whole", config, "test") as run:
        train(config, run)
    steps = iter(range(7))  # of stage 2, five an epoch

    def stop(run):
        if next(steps, None) is None:
            raise InterruptedRunError(2, run.folder)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "check", stop)
        with pytest.raises(InterruptedRunError), Run(tmp_path / "stopped", config, "test") as run:
            train(config, run)
    shutil.rmtree(there)
    with Run(tmp_path / "stopped", config, "test") as run:
        train(config, run)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert figures(whole) == figures(stopped)
    tensors, again = (load_model(folder / "model" / "points")[0] for folder in (whole, stopped))
    assert all(tensors[name].equal(again[name]) for name in tensors)
    (origin,) = read_metrics(stopped, "branches")
    results = json.loads((source / "results.json").read_text())
    assert (origin["run"], origin["model_digest"]) == ("there", results["model_digest"])
    assert origin["epochs"] == {"0": [2], "1": [2], "2": [2]}


def test_a_run_without_branches_is_refused(tmp_path, capsys):
    baseline = trained(tmp_path / "baseline", "method=scratch", "plain.epochs=1")
    command = ["--config", "lightcnn/configs/smoke.yaml", "--out", str(tmp_path), *OVERRIDES]
    assert main([*command, f"stage1.branches={baseline}"]) == 2
    assert "has no branches, for its method is scratch; name another run" in capsys.readouterr().err
    assert main([*command, f"stage1.branches={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere" in capsys.readouterr().err
