"""A run's results, read once from the test set, and recomputed from its saved model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lightcnn import eval as evaluation
from lightcnn.algorithm import plan
from lightcnn.eval import main as eval_main
from lightcnn.model import MergedCNN, Submodel
from lightcnn.problem import load_test
from lightcnn.train import main, train
from shared import data
from shared.checkpoint import load_model, save_model
from shared.report import figures_of, rows_of
from shared.run import Run, read_metrics, read_results


@pytest.fixture(scope="module")
def finished(tmp_path_factory, config_of):
    """A finished run of two seeds, and how often which split was read when."""
    folder, reads = tmp_path_factory.mktemp("eval") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        real, log = data.load, Run.log
        patch.setattr(data, "load", lambda name, split, **k: reads.append(split) or real(name, split, **k))
        patch.setattr(Run, "log", lambda self, event, **k: reads.append(event) or log(self, event, **k))
        config = config_of()
        with Run(folder, config, "test") as run:
            train(config, run)
    return folder, config, reads


def test_the_test_set_is_read_once_after_all_training(finished):
    _, _, reads = finished
    assert reads.count("test") == 1
    assert reads.count("train") == 1
    assert reads[-1] == "test"
    assert reads[0] == "train"
    assert "phase" in reads


def test_the_saved_networks_are_ordinary_modules_with_the_stated_accuracy(finished):
    folder, config, _ = finished
    stated = {(r["seed"], r["metric"]): r["value"] for r in read_results(folder)["figures"]}
    test = load_test(config)
    assert test.labels.bincount().tolist() == [20] * 10
    images = test.images.float() / 255
    points = load_file(folder / "model" / "points" / "model.safetensors")
    for number, seed in enumerate((0, 1)):
        net = MergedCNN(1, 28).eval()
        net.load_state_dict(load_file(folder / "model" / f"s{seed}" / "model.safetensors"))
        branches = []
        for side in "ab":
            branch = Submodel(1, 28)
            branch.load_state_dict({n: points[f"branch_{side}.{n}"][number] for n in branch.state_dict()})
            branches.append(branch)
        with torch.no_grad():
            parts = [torch.cat([net(x) for x in images.split(100)]) for net in (net, *branches)]
        outputs = {"accuracy": parts[0], "branch_a.accuracy": parts[1], "branch_b.accuracy": parts[2],
                   "branches_mean.accuracy": parts[1].softmax(1) + parts[2].softmax(1)}  # fmt: skip
        for metric, output in outputs.items():
            found = float((output.argmax(1) == test.labels).double().mean())
            assert found == pytest.approx(stated[seed, metric], abs=0.006), metric  # a tie of 200
        assert stated[seed, "accuracy"] == stated[seed, "P4.accuracy"]


def test_the_figures_that_need_no_test(finished):
    folder, *_ = finished
    stated = {r["metric"]: r["value"] for r in read_results(folder)["figures"] if r["at"] == "once"}
    assert (stated["parameters"], stated["bytes.weights"], stated["multiply_adds"]) == (14862, 59448, 568240)
    assert 59448 < stated["bytes.safetensors"] < 59448 + 4096
    assert (folder / "model" / "s0" / "model.safetensors").stat().st_size == stated["bytes.safetensors"]
    assert stated["epochs.run"] == 10
    assert [len(row["kept"]) for row in read_metrics(folder, "phase")] == [4, 2, 2, 2, 2]


def test_multiply_adds_of_the_cifar_network():
    assert evaluation.multiply_adds(MergedCNN(3, 32).eval(), torch.zeros(1, 3, 32, 32)) == 1_109_760


def test_the_rows_of_a_run_have_each_seed(finished):
    rows = rows_of(read_results(finished[0]))
    figures = figures_of(rows, "final")
    assert set(figures["two_stage/accuracy"]) == {0, 1}
    assert set(figures["two_stage/parameters"]) == {0, 1}
    table = torch.tensor(read_results(finished[0])["details"]["confusion"])
    assert table.sum() == 200
    assert float(table.diagonal().sum()) / 200 == figures["two_stage/accuracy"][0]


def test_eval_recomputes_every_figure(finished, capsys):
    assert eval_main([str(finished[0])]) == 0
    assert "are those of results.json" in capsys.readouterr().out


def test_eval_says_which_figure_the_model_does_not_give(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    results = json.loads((folder / "results.json").read_text())
    row = next(r for r in results["figures"] if r["metric"] == "P2.accuracy" and r["seed"] == 1)
    row["value"] += 0.01
    (folder / "results.json").write_text(json.dumps(results))
    assert eval_main([str(folder)]) == 1
    assert "seed 1: P2.accuracy: results.json has" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    ["bit", "missing", "other network", "other data set", "surplus", "other paper", "unfinished", "seed's bit",
     "seed's network"],
)  # fmt: skip
def test_eval_refuses_what_is_not_the_runs_model_in_one_line(finished, tmp_path, capsys, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    weights = folder / "model" / "points" / "model.safetensors"
    tensors, results = load_file(weights), json.loads((folder / "results.json").read_text())
    description = load_model(weights.parent)[1]
    if damage == "bit":
        raw = bytearray(weights.read_bytes())
        raw[-5] ^= 1
        weights.write_bytes(raw)
    elif damage == "missing":
        weights.unlink()
    elif damage == "other network":
        tensors["branch_a.conv1.weight"] = torch.zeros(2, 10, 3, 3, 3)
        save_model(folder / "model" / "points", tensors, description)
    elif damage == "other data set":  # of the same shapes
        save_model(folder / "model" / "points", tensors, {**description, "classes": [str(c) for c in range(10)]})
    elif damage == "surplus":
        save_model(folder / "model" / "points", {**tensors, "P9.fc1.weight": torch.zeros(2)}, description)
    elif damage == "seed's bit":
        own = folder / "model" / "s1" / "model.safetensors"
        own.write_bytes(own.read_bytes()[:-4])
    elif damage == "seed's network":
        shutil.copytree(folder / "model" / "s0", folder / "model" / "s1", dirs_exist_ok=True)
    elif damage == "other paper":
        (folder / "results.json").write_text(json.dumps({**results, "paper": "another"}))
    else:
        (folder / "results.json").unlink()
    assert eval_main([str(folder)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    wanted = {"bit": "damaged", "missing": "cannot be read", "other network": "another network",
              "other data set": "another data set",
              "seed's bit": "s1", "seed's network": f"s1: is not the network of {folder / 'model' / 'points'}",
              "surplus": "P9.fc1.weight", "other paper": "'another'", "unfinished": "not a finished run"}  # fmt: skip
    assert wanted[damage] in printed


def test_honest_folds_report_the_best_fold_on_validation_and_the_means(config_of, tmp_path):
    config = config_of("method={name: two_stage, kfold: honest, folds: 3}", "stage2.max_epochs=1", "stage1.epochs=1")
    with Run(tmp_path / "run", config, "test") as run:
        results = train(config, run)
    found = {(r["seed"], r["metric"]): r["value"] for r in results["figures"]}
    assert {m for _, m in found} >= {"accuracy", "kfold.accuracy", "kfold.validation"}
    assert sorted(p.name for p in (tmp_path / "run" / "model").iterdir()) == [
        "points", *(f"s{s}-fold{k}" for s in (0, 1) for k in (1, 2, 3))
    ]  # fmt: skip
    assert found[0, "validation"] >= found[0, "kfold.validation"]


def test_the_command_reports_a_finished_run_and_a_loss_that_is_not_finite(tmp_path, capsys, monkeypatch):
    arguments = ["--config", "smoke", "--out", str(tmp_path), "method=submodel", "plain.epochs=1", "seeds=1"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert "already finished; nothing was trained" in capsys.readouterr().out
    arguments[4:] = ["method=wide_one_cycle", "plain={epochs: 2, peak_lr: 1e30}"]
    assert main(arguments) == 2
    assert "the batch and the configuration are in" in capsys.readouterr().err
    (bundle,) = tmp_path.rglob("not_finite.json")
    found = json.loads(bundle.read_text())
    assert found["seeds"] == [0, 1]
    assert [len(row) for row in found["images"]] == [32, 32]


def test_the_plan_of_every_method_ends_in_one_point(config_of, problem_of):
    config = config_of()
    problem = problem_of(config)
    assert [p for step in plan(config, problem) for p in step.points] == [
        "branch_a",
        "branch_b",
        "P1",
        "P2",
        "P3",
        "P4",
    ]
