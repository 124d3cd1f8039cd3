"""Whole runs and `fedloge.eval`: what a run states is computed again from its model, and what cannot be is refused."""

import json
import math
import shutil

import pytest

from fedloge import eval as evaluation
from fedloge import train
from shared.checkpoint import load_model, save_model
from shared.run import changed_figures

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")


# --- a run end to end, and the command that checks it -----------------------------------------------------------------

RUN = """
paper: fedloge
data: {name: sample, imbalance_factor: 10, n_max: 120, image_size: 14, mean: [0.286], std: [0.353]}
clients: {count: 2, alpha: 0.5}
model: {name: mlp}
method: {name: fedloge, norm: 1.0, etf_steps: 200}
optimizer: {lr: 0.03, momentum: 0.5}
rounds: 3
local_epochs: 2
batch_size: 16
evaluate: {every: 1, last: 2}
device: cpu
precision: float32
threads: 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run on the embedded sample."""
    base = tmp_path_factory.mktemp("run")
    (base / "tiny.yaml").write_text(RUN)
    assert train.main(["--config", str(base / "tiny.yaml"), "--out", str(base / "runs")]) == 0
    (folder,) = (base / "runs" / "fedloge").iterdir()
    return folder


@pytest.fixture
def copy_of_run(run, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(run, tmp_path / "copy")


def events(folder, kind):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == kind]


def test_loss_falls_in_three_rounds_on_the_embedded_sample(run):
    clients = events(run, "client")
    losses = [sum(row["loss"] for row in clients if row["round"] == round) / 2 for round in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.75 * losses[0]
    final = events(run, "evaluate")[-1]["figures"]
    assert final["generic_etf.accuracy"] > 0.3, "chance is 0.1"
    assert final["personal.accuracy"] > 0.3


def test_headline_is_the_mean_of_the_last_rounds_and_final_the_last(run):
    results = json.loads((run / "results.json").read_text())
    evaluations = events(run, "evaluate")
    assert [e["round"] for e in evaluations] == [1, 2, 3]
    rows = {(row["at"], row["metric"]): row["value"] for row in results["figures"]}
    for name in ("generic.accuracy", "personal.accuracy", "generic.few"):
        last = [e["figures"][name] for e in evaluations[-2:]]
        assert rows["last2", name] == pytest.approx(sum(last) / 2)
        assert rows["final", name] == last[1]


def test_eval_recomputes_every_figure_from_the_saved_model(run, capsys):
    assert evaluation.main([str(run)]) == 0
    assert "figures of the last round are those of results.json" in capsys.readouterr().out


def test_eval_reports_a_model_that_does_not_give_the_stated_figures(copy_of_run, capsys):
    tensors, description = load_model(copy_of_run / "model")
    tensors["global.classifier.weight"] = tensors["global.classifier.weight"].flip(0).contiguous()
    save_model(copy_of_run / "model", tensors, description)
    assert evaluation.main([str(copy_of_run)]) == 1
    assert "generic.accuracy: results.json has" in capsys.readouterr().out


def test_eval_reports_a_stated_figure_that_was_changed(copy_of_run, capsys):
    path = copy_of_run / "results.json"
    results = json.loads(path.read_text())
    for row in results["figures"]:
        if (row["at"], row["metric"]) == ("final", "personal.accuracy"):
            row["value"] += 1e-4
    path.write_text(json.dumps(results))
    assert evaluation.main([str(copy_of_run)]) == 1
    assert "personal.accuracy: results.json has" in capsys.readouterr().out


def damage(folder, kind):
    weights, results = folder / "model" / "model.safetensors", folder / "results.json"
    if kind == "a changed bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif kind == "another network":
        tensors, description = load_model(folder / "model")
        del tensors["client.personal.weight"]
        save_model(folder / "model", tensors, description)
    elif kind == "other data":
        content = json.loads(results.read_text())
        content["data"]["digests"]["partition"] = "0"
        results.write_text(json.dumps(content))
    elif kind == "another paper":
        results.write_text(json.dumps({**json.loads(results.read_text()), "paper": "mdcs"}))
    elif kind == "unfinished":
        results.unlink()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("a changed bit", "is damaged"),
        ("another network", "holds another network"),
        ("other data", "not what the run was trained on"),
        ("another paper", "'mdcs'"),
        ("unfinished", "not a finished run"),
    ],
)
def test_eval_refuses_what_it_cannot_check_in_one_line(copy_of_run, capsys, kind, words):
    damage(copy_of_run, kind)
    assert evaluation.main([str(copy_of_run)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("stated", "found", "lines"),
    [
        ({"a": 0.5}, {"a": 0.5 + 1e-7}, 0),
        ({"a": 0.5}, {"a": 0.5 + 1e-5}, 1),
        ({"a": None}, {"a": None}, 0),
        ({"a": None}, {"a": 0.0}, 1),
        ({"a": 0.0}, {"a": None}, 1),
        ({"a": 0.5}, {}, 1),
        ({"a": 0.5}, {"a": math.nan}, 1),
        ({"a": 0.5, "b": 0.25}, {"a": 0.25, "b": 0.5}, 2),
    ],
)
def test_compare_names_each_figure_that_differs(stated, found, lines):
    assert len(changed_figures(stated, found)) == lines


@pytest.mark.parametrize("name", ["fedbn", "ditto", "fedetf", "creff"])
def test_a_run_of_a_method_with_state_of_its_own_is_checked_too(lab, tmp_path, name):
    (tmp_path / "tiny.yaml").write_text(RUN.replace("name: mlp", "name: convnet").replace("rounds: 3", "rounds: 1"))
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "runs")]
    assert train.main([*arguments, f"method={lab.settings[name]}", "data.n_max=40"]) == 0
    (folder,) = (tmp_path / "runs" / "fedloge").iterdir()
    assert evaluation.main([str(folder)]) == 0
