"""Evaluation: accuracy, calibration, sizes, the command that checks a run, timing, ONNX."""

import csv
import json
import math
import re
import shutil

import pytest
import torch

from shared.batches import Resident
from shared.checkpoint import load_model, save_model
from shared.config import dump
from sparsevit import eval as evaluation
from sparsevit import latency, measure
from sparsevit.baselines import wanda_masks
from sparsevit.latency import time_networks, variants_of
from sparsevit.measure import accuracies, calibrate, masked, observations, ratio_figures, sizes
from sparsevit.method import (
    attention_entropy,
    attention_penalty,
    global_magnitude_masks,
    head_scores,
    neuron_scores,
    prunable,
)
from sparsevit.model import arch_size, build, count_macs, uniform_size
from sparsevit.shrink import remove_heads, remove_neurons, save_network

CPU = torch.device("cpu")


def source(lab, count=53, size=None, seed=0):
    size = size or lab.small_size()
    draws = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, size.channels, size.image, size.image), generator=draws, dtype=torch.uint8)
    return Resident(images, torch.arange(count) % size.classes, [0.5] * size.channels, [0.25] * size.channels)


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_accuracy_counts_every_image_and_does_not_depend_on_the_batch_size_or_on_dropout(lab):
    data, network = source(lab), lab.lively(build(lab.small_size(), 0, dropout=0.9)).train()
    found = {accuracies([network], data, n, "float32")[0] for n in (1, 7, 53, 100)}
    assert len(found) == 1
    assert network.training
    network.eval()
    images, labels = next(data.evaluate(53))
    assert found == {float((network(images).argmax(1) == labels).double().mean())}


def test_many_networks_share_a_pass_and_get_what_each_gets_alone(lab):
    data, networks = source(lab), [lab.network(seed=s) for s in range(4)]
    reads = []
    original = data.prefetch
    data.prefetch = lambda batches, generator: reads.append(1) or original(batches, generator)
    together = accuracies(networks, data, 10, "float32")
    assert len(reads) == 1
    assert together == [accuracies([network], data, 10, "float32")[0] for network in networks]
    assert len(set(together)) > 1


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 10, 100])
def test_calibration_measures_what_the_formulas_take(lab, batch_size):
    network, data = lab.network(), source(lab)
    found = calibrate(network, data, 53, batch_size)
    images, _ = next(data.evaluate(53))
    with torch.no_grad():
        _, seen = network.observe(images)
    for i, block in enumerate(network.layers):
        hidden = seen[i]["hidden"].flatten(0, 1).double()
        assert torch.allclose(found.hidden_mean[i], hidden.mean(0), atol=1e-5)
        assert torch.allclose(found.hidden_var[i], hidden.var(0, unbiased=False), atol=1e-4)
        wanted = neuron_scores(seen[i]["hidden"], block.fc2.weight)
        assert torch.allclose(found.neuron_scores(network)[i], wanted, rtol=1e-3)
        assert torch.allclose(found.mixed_mean[i], seen[i]["mixed"].flatten(0, 1).double().mean(0), atol=1e-5)
        scores = head_scores(seen[i]["mixed"], block.attn.out.weight, block.attn.heads)
        assert torch.allclose(found.head_scores[i].float(), scores.float(), rtol=1e-4)
        for matrix, read in (("attn.q", "attn_in"), ("attn.k", "attn_in"), ("attn.v", "attn_in"), ("attn.out", "mixed"),
                             ("fc1", "mlp_in"), ("fc2", "hidden")):  # fmt: skip
            norms = seen[i][read].flatten(0, 1).double().norm(dim=0)
            assert torch.allclose(found.input_norms[f"blocks.{i}.{matrix}.weight"], norms, rtol=1e-4), matrix
    blocks = dict(prunable(network, "blocks"))
    assert set(found.input_norms) == set(blocks)
    masks = wanda_masks(blocks, found.input_norms, 0.5)
    assert all(int((~m).sum()) == m.shape[0] * round(0.5 * m.shape[1]) for m in masks.values())


def test_calibration_takes_evenly_spaced_images_of_a_set_in_class_order(lab):
    data, seen = source(lab, count=100), []
    original = data.prefetch
    data.prefetch = lambda batches, generator: seen.extend(batches) or original(batches, generator)
    calibrate(lab.network(), data, 10, 4)
    assert torch.cat(seen).tolist() == list(range(0, 100, 10))


def test_observations_take_evenly_spaced_images_of_a_set_in_class_order(lab, monkeypatch):
    data, seen = source(lab), []
    monkeypatch.setattr(measure, "OBSERVED_IMAGES", 10)
    original = data.prefetch
    data.prefetch = lambda batches, generator: seen.extend(batches) or original(batches, generator)
    observations(lab.network(), data, 4)
    assert torch.cat(seen).tolist() == [i * 53 // 10 for i in range(10)]


@pytest.mark.parametrize("at_once", [10**9, 60, 1])
def test_observations_are_those_of_the_maps_however_many_are_held_together(lab, monkeypatch, at_once):
    network, data, sizes_seen = lab.network(), source(lab), []
    monkeypatch.setattr(measure, "MAPS_AT_ONCE", at_once)
    whole = data.prefetch
    data.prefetch = lambda batches, generator: sizes_seen.extend(map(len, batches)) or whole(batches, generator)
    found = observations(network, data, 10)
    assert max(sizes_seen) == min(10, max(1, at_once // sum(b.heads * 25 for b in network.size.blocks)))
    images, _ = next(data.evaluate(53))
    with torch.no_grad():
        _, seen = network.observe(images, (0, 1))
    for i in range(2):
        assert found["entropy"][i] == pytest.approx(float(attention_entropy(seen[i]["attention"])), rel=1e-5)
        assert found["penalty"][i] == pytest.approx(float(attention_penalty(seen[i]["attention"])), rel=1e-5)
        assert found["silent"][i] == pytest.approx(float((seen[i]["hidden"].abs() < 0.05).double().mean()), rel=1e-5)
        assert math.log1p(1 / 25) <= found["penalty"][i] <= math.log(2) / 5


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_of_a_masked_and_of_a_smaller_network(lab):
    network = lab.network()
    before = {n: t.clone() for n, t in network.state_dict().items()}
    masks = global_magnitude_masks(dict(prunable(network, "authors")), 0.5)
    pruned, ranked = masked(network, masks), sum(m.numel() for m in masks.values())
    dense, sparse = sizes(network, "authors"), sizes(pruned, "authors")
    assert dense["nonzero"] - sparse["nonzero"] == round(0.5 * ranked)
    assert sparse["parameters"] == dense["parameters"]
    assert sparse["macs"] == dense["macs"]
    assert dense["csr_bytes"] - sparse["csr_bytes"] == 8 * round(0.5 * ranked)
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())
    small = remove_neurons(network, [range(5)] * 2)
    assert sizes(small, "authors")["parameters"] == sum(p.numel() for p in small.parameters())
    assert sizes(small, "authors")["macs"] == count_macs(small.size) < dense["macs"]


def test_what_a_curve_gives():
    figures = {f"a.{r}.accuracy": 0.9 - r / 1000 for r in range(10, 100, 10)} | {
        "b.50.accuracy": 0.5,
        "a.50.recovered": 0,
    }
    found = ratio_figures(figures, "a", 0.9)
    assert found["a.mean_10_50"] == pytest.approx(0.87)
    assert found["a.drop_10_50"] == pytest.approx(0.03)
    assert found["a.mean_10_90"] == pytest.approx(0.85)
    assert found["a.80.drop"] == pytest.approx(0.08)
    assert found["a.area"] == pytest.approx(0.855)
    assert ratio_figures(figures, "b", 0.9) == {"b.50.drop": pytest.approx(0.4), "b.area": pytest.approx(0.7)}


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / tiny_run.name)
    return tmp_path / tiny_run.name


def test_every_figure_of_a_run_is_computed_again(run_folder, capsys):
    assert evaluation.main([str(run_folder)]) == 0
    stated = len(json.loads((run_folder / "results.json").read_text())["figures"])
    assert f"all {stated} figures are those of results.json" in capsys.readouterr().out


CHANGED = ("dense.accuracy", "global_l1.50.accuracy", "global_l1.50.recovered", "dense.bytes", "attention.entropy_last",
           "neurons.75.bytes", "wanda.30.nonzero", "val.accuracy")  # fmt: skip


@pytest.mark.parametrize("metric", CHANGED)
def test_a_changed_figure_is_found(run_folder, capsys, metric):
    results = json.loads((run_folder / "results.json").read_text())
    (row,) = (row for row in results["figures"] if row["metric"] == metric)
    row["value"] += 0.02
    (run_folder / "results.json").write_text(json.dumps(results))
    assert evaluation.main([str(run_folder)]) == 1
    assert f"{metric}: results.json has" in capsys.readouterr().out


def test_a_changed_saved_network_is_found(run_folder, capsys):
    tensors, config = load_model(run_folder / "pruned" / "neurons.50")
    tensors["blocks.0.fc1.weight"] += 0.5
    save_model(run_folder / "pruned" / "neurons.50", tensors, config)
    assert evaluation.main([str(run_folder)]) == 1
    assert "pruned/neurons.50: is not what pruning" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "missing", "pruned", "other", "unfinished", "data"])
def test_what_cannot_be_evaluated_is_refused_in_one_line(run_folder, tiny, capsys, damage):
    weights = run_folder / "model" / "model.safetensors"
    if damage == "flip":
        raw = bytearray(weights.read_bytes())
        raw[-3] ^= 1
        weights.write_bytes(raw)
    elif damage == "missing":
        weights.unlink()
    elif damage == "pruned":
        shutil.rmtree(run_folder / "pruned" / "global_l1.50.recovered")
    elif damage == "unfinished":
        (run_folder / "results.json").unlink()
    elif damage == "other":
        text = (run_folder / "results.json").read_text().replace('"paper": "sparsevit"', '"paper": "x"')
        (run_folder / "results.json").write_text(text)
    else:
        (run_folder / "config.yaml").write_text(dump(tiny("paper", "data.train_images=130")))
    assert evaluation.main([str(run_folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("batch", [["0"], ["8", "-1"]])
def test_a_batch_of_no_image_is_refused_before_the_work(run_folder, capsys, batch):
    assert evaluation.main([str(run_folder), "--latency", "--batch", *batch]) == 2
    assert capsys.readouterr().err == f"error: --batch {' '.join(batch)}: each must be at least 1\n"


# --- speed ------------------------------------------------------------------------------------------------------------


def test_removing_neurons_makes_a_wide_network_faster_and_the_table_says_so(lab):
    dense = build(uniform_size(32, 3, 8, 64, 2, 4, 2048, 10), 0).eval()
    small = remove_neurons(dense, [range(512)] * 2)
    for attempt in range(3):
        dense_time, small_time = time_networks({"dense": dense, "small": small}, [16], CPU, repeats=15, warm_ups=3)
        if small_time.speedup > 1.2 or attempt == 2:
            break
    assert small_time.speedup > 1.2
    assert dense_time.speedup == 1
    assert small_time.low <= small_time.median <= small_time.high
    assert latency.table([dense_time, small_time])[2][:3] == ["small", "16", f"{small_time.parameters:,}"]


def test_the_variants_of_vit_b16_have_the_counts_of_the_brief():
    with torch.device("meta"):
        from sparsevit.model import Vit

        dense = Vit(arch_size("vit_b16", 224, 3, 100))
    half = [torch.arange(1536)] * 12, [torch.arange(6)] * 12
    narrow = remove_neurons(dense, half[0])
    networks = (narrow, remove_heads(dense, half[1]), remove_heads(narrow, half[1]))
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert [round(c / 1e6, 2) for c in counts] == [57.55, 71.71, 43.38]


def test_variants_made_of_random_values_are_saved_and_timed_in_another_process(tmp_path, python, lab):
    made = python("-m", "sparsevit.latency", "--make", str(tmp_path / "nets"), "--arch", "s0", "--image", "28")
    assert made.returncode == 0, made.stderr
    options = ("--batch", "2", "--repeats", "3", "--threads", "1", "--json", str(tmp_path / "t.json"),
               "--markdown", str(tmp_path / "latency.md"))  # fmt: skip
    timed = python("-m", "sparsevit.latency", str(tmp_path / "nets"), *options)
    assert timed.returncode == 0, timed.stderr
    written = json.loads((tmp_path / "t.json").read_text())
    names = [row["name"] for row in written["timings"]]
    assert names[0] == "dense"
    assert names[-1] == "50 % neurons and heads removed"
    assert written["timings"][0]["macs"] > written["timings"][-1]["macs"]
    assert "CPU" in written["where"]
    with open(tmp_path / "timings.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [vars(timing) for timing in latency.timings_of(lines)] == written["timings"]
    text = (tmp_path / "latency.md").read_text()
    assert text == latency.text_of(lines)
    assert re.match(r"CPU \(.*\), 1 thread, float32, torch \S+, commit \w+; 3 rounds in turn", text)


REFUSED = ([], ["a", "--make", "b"], ["{out}"], ["{out}", "--batch", "0"], ["{out}", "--threads", "-1"],
           ["--make", "{out}", "--arch", "x"], ["--make", "{out}", "--ratio", "1.5"])  # fmt: skip


@pytest.mark.parametrize("arguments", REFUSED)
def test_timing_what_cannot_be_timed_is_refused_in_one_line(tmp_path, arguments, capsys):
    assert latency.main([a.format(out=tmp_path / "out") for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "3"])
def test_a_damaged_description_of_a_saved_network_is_refused_in_one_line(tmp_path, lab, capsys, text):
    save_network(tmp_path / "nets" / "0", lab.network(), name="dense")
    (tmp_path / "nets" / "0" / "config.json").write_text(text)
    assert latency.main([str(tmp_path / "nets")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "config.json: is damaged" in error
    assert error.count("\n") == 1


def test_masking_to_zero_is_removing_without_means(lab):
    size = uniform_size(8, 2, 4, 16, 2, 4, 64, 5)
    variants, images = variants_of(lab.network(size=size), multiple=16), lab.images(size=size)
    with torch.no_grad():
        masked_out, removed = (variants[f"50 % neurons {how}"](images) for how in ("masked", "removed"))
    assert torch.allclose(masked_out, removed, atol=1e-5)
