"""Whole runs and `mdcs.eval`: what a run states is computed again from its model, and what cannot be is refused."""

import json
import shutil

import pytest
import torch

from mdcs import eval as evaluation
from mdcs import train
from mdcs.config import Config
from mdcs.problem import load_problem
from shared.checkpoint import load_model, save_model
from shared.config import load
from tests.mdcs.figures import DIVERSITY, NAMES

# --- the command ------------------------------------------------------------------------------------------------------

TINY = ("data.n_max=20", "epochs=1", "evaluate.batch_size=5000")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run on the embedded sample."""
    base = tmp_path_factory.mktemp("run")
    assert train.main(["--config", "smoke", "--out", str(base), *TINY]) == 0
    (folder,) = (base / "mdcs").iterdir()
    return folder


@pytest.fixture
def copy_of_run(run, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(run, tmp_path / "copy")


def edit(folder, change):
    path = folder / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))


def test_eval_recomputes_every_figure_from_the_saved_model(run, capsys):
    assert evaluation.main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert "the network after epoch 1" in printed
    assert f"all {4 * len(NAMES) + len(DIVERSITY)} figures of the last epoch are those of results.json" in printed
    assert "nan" not in printed


def test_a_run_states_the_predictions_of_its_test_images(run):
    config = load(run / "config.yaml", Config)
    problem = load_problem(config, torch.device("cpu"))
    tensors, description = load_model(run / "predictions")
    assert description["columns"] == ["expert1", "expert2", "expert3", "ensemble"]
    assert torch.equal(tensors["labels"], problem.test.labels)
    results = json.loads((run / "results.json").read_text())
    stated = {row["metric"]: row["value"] for row in results["figures"] if row["at"] == "last_epoch"}
    for column, who in enumerate(description["columns"]):
        right = (tensors["predictions"][:, column] == tensors["labels"]).double().mean()
        assert stated[f"{who}.accuracy"] == pytest.approx(float(right))


def test_eval_reports_a_stated_figure_that_was_changed(copy_of_run, capsys):
    def change(results):
        for row in results["figures"]:
            if (row["at"], row["metric"]) == ("last_epoch", "ensemble.head"):
                row["value"] += 1e-4

    edit(copy_of_run, change)
    assert evaluation.main([str(copy_of_run)]) == 1
    assert capsys.readouterr().out.count("results.json has") == 1


def test_eval_reports_an_empty_group_that_was_given_a_figure(copy_of_run, capsys):
    def change(results):
        for row in results["figures"]:
            if row["metric"] == "ensemble.many":
                assert row["value"] is None
                row["value"] = 0.5

    edit(copy_of_run, change)
    assert evaluation.main([str(copy_of_run)]) == 1
    assert "ensemble.many: results.json has 0.5, the model gives None" in capsys.readouterr().out


def test_eval_reports_a_model_that_does_not_give_the_stated_figures(copy_of_run, capsys):
    tensors, description = load_model(copy_of_run / "model")
    name = "heads.0.weight"
    save_model(copy_of_run / "model", tensors | {name: tensors[name].flip(0).contiguous()}, description)
    assert evaluation.main([str(copy_of_run)]) == 1
    assert "expert1.accuracy: results.json has" in capsys.readouterr().out


def other_network(folder, change):
    tensors, description = load_model(folder / "model")
    save_model(folder / "model", change(tensors), description)


def damage(folder, kind):
    weights = folder / "model" / "model.safetensors"
    if kind == "a changed bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif kind == "an expert less":
        other_network(folder, lambda t: {k: v for k, v in t.items() if not k.startswith(("experts.2.", "heads.2."))})
    elif kind == "an expert more":
        other_network(folder, lambda t: t | {"heads.3.weight": t["heads.2.weight"].clone()})
    elif kind == "other classes":
        other_network(folder, lambda t: {k: v[:9].clone() if k.startswith("heads.") else v for k, v in t.items()})
    elif kind == "another paper":
        edit(folder, lambda results: results.update(paper="fedloge"))
    elif kind == "other counts":
        edit(folder, lambda results: results["data"]["class_counts"].reverse())
    elif kind == "other images":
        edit(folder, lambda results: results["data"]["digests"].update(train="0"))
    elif kind == "another imbalance":
        path = folder / "config.yaml"
        text = path.read_text()
        assert "imbalance_factor: 10" in text
        path.write_text(text.replace("imbalance_factor: 10", "imbalance_factor: 5"))
    elif kind == "no model":
        weights.unlink()
    elif kind == "unfinished":
        (folder / "results.json").unlink()
    elif kind == "cut off":
        (folder / "results.json").write_text("{")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("a changed bit", "is damaged"),
        ("an expert less", "holds another network"),
        ("an expert more", "holds another network"),
        ("other classes", "holds another network"),
        ("another paper", "is a run of 'fedloge', not of mdcs"),
        ("other counts", "other class counts than the data has now"),
        ("another imbalance", "other class counts than the data has now"),
        ("other images", "not what the run was trained on"),
        ("no model", "model"),
        ("unfinished", "not a finished run"),
        ("cut off", "is damaged"),
    ],
)
def test_eval_refuses_what_it_cannot_check_in_one_line(copy_of_run, capsys, kind, words):
    damage(copy_of_run, kind)
    assert evaluation.main([str(copy_of_run)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_eval_of_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    assert evaluation.main([str(tmp_path / "nothing")]) == 2
    assert "not a finished run" in capsys.readouterr().err


def test_a_run_with_one_expert_is_evaluated_without_diversity(tmp_path, capsys):
    assert train.main(["--config", "smoke", "--out", str(tmp_path), *TINY, "method=ce"]) == 0
    (folder,) = (tmp_path / "mdcs").iterdir()
    assert evaluation.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "diversity" not in printed
    assert "expert1.accuracy" in printed


def test_a_run_with_four_experts_is_evaluated(tmp_path, capsys):
    four = "method={name: mdcs, lambdas: [-0.5, 0.5, 1.5, 2.5]}"
    assert train.main(["--config", "smoke", "--out", str(tmp_path), *TINY, four]) == 0
    (folder,) = (tmp_path / "mdcs").iterdir()
    assert evaluation.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "expert4.accuracy" in printed
    assert "diversity.kl" in printed
