"""The benchmarks of LightCNN compare ways to do the same work; their timings are not tested."""

import csv

import pytest
import torch

from lightcnn.augment import Ranges, augment, draw
from lightcnn.baselines import ImageShape

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def step(load_benchmark):
    """The benchmark of training."""
    module = load_benchmark("lightcnn_step")
    module.setup("cpu", 1)
    return module


@pytest.fixture(scope="module")
def latency(load_benchmark):
    """The benchmark of size and latency."""
    module = load_benchmark("lightcnn_latency")
    module.setup("cpu", 1)
    return module


@pytest.mark.parametrize("warp", ["sequential", "combined"])
def test_the_usual_way_warps_images_as_ours_does(step, warp):
    from bench_report import smooth_images
    from lightcnn_usual import change, pil

    images, ranges = smooth_images(20, "test", 1, 28), Ranges()
    draws = draw(len(images), ranges, torch.Generator().manual_seed(0))
    theirs = [
        pil.to_tensor(change(pil.to_pil_image(image), angle, (zx, zy), (28 * dx, 28 * dy), warp))
        for image, (angle, zx, zy, dx, dy, *_) in zip(images, draws.tolist(), strict=True)
    ]  # PIL rounds to whole numbers after each interpolation
    torch.testing.assert_close(augment(images / 255, draws, ranges, warp), torch.stack(theirs), atol=0.02, rtol=0)


def test_two_plain_branches_take_the_same_steps_as_ours(step):
    ours = step.Ours((0,), step.Sizes(6, 1), CPU)
    plain = step.PlainTraining(step.PlainBranches(ours.training.weights, 1, step.SIDE), CPU)
    before = ours.training.weights["conv1.weight"].detach().clone()
    total = plain.run_pass(ours.batches())
    assert float(ours.run_pass().sum()) == pytest.approx(total / 6, abs=1e-4)
    for number, branch in enumerate(plain.net.branches):
        for name, parameter in branch.named_parameters():
            torch.testing.assert_close(ours.training.weights[name][number], parameter, atol=2e-4, rtol=2e-3)
    assert not torch.equal(ours.training.weights["conv1.weight"], before)


def test_unequal_losses_stop_the_benchmark(step):
    with pytest.raises(AssertionError, match="five seeds"):
        step.check("five seeds", torch.tensor([2.3]), torch.tensor([2.3002]))


def test_the_quick_run_of_training_writes_its_rows(step, tmp_path, capsys):
    out = tmp_path / "new" / "benchmarks.csv"
    assert step.main(["--quick", "--out", str(out)]) == 0
    assert "dealt to two processes" in capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    names = [row["benchmark"] for row in rows]
    assert {name: names.count(name) for name in names} == {
        "seeds side by side": 5, "step": 3, "stage 1": 5, "frozen part cached": 2,
    }  # fmt: skip
    for row in rows:
        assert row["device"]
        assert row["threads"] == "1"
        quicker = float(row["ours"]) / float(row["reference"])
        expected = quicker if row["benchmark"] == "stage 1" else 1 / quicker  # images a second; else a time
        assert float(row["ratio"]) == pytest.approx(expected)  # one turn
    assert "**seeds side by side**" in out.with_suffix(".md").read_text()


def test_an_int8_network_holds_a_byte_a_weight_and_little_more(latency):
    shape = ImageShape(1, 28, 10)
    module = latency.networks(shape, "budget_mnist")["merged"]
    size = latency.quantised_bytes(module, torch.rand(8, 1, 28, 28))
    outputs = 2 * (10 + 20 + 10) + 32 + 10  # each with a bias of 4 bytes and a scale of 4
    assert 14_862 - outputs + 8 * outputs <= size <= 14_862 - outputs + 8 * outputs + 200


def test_the_quick_run_of_latency_writes_its_rows(latency, tmp_path, monkeypatch):
    few = ("lenet5", "mobilenet_v2_010")  # the others differ in nothing but their size
    monkeypatch.setattr(latency, "PEERS", few)
    out = tmp_path / "latency.csv"
    assert latency.main(["--quick", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["images"] for row in rows] == ["28 x 28 grey"] * 6 + ["32 x 32 colour"] * 6
    found = {(row["images"][:7], row["network"]): row for row in rows}
    for name in ("merged", "merged, fused"):
        assert found["28 x 28", name]["parameters"] == "14862"
        assert found["28 x 28", name]["multiply_adds"] == "568240"
        assert found["32 x 32", name]["parameters"] == "19622"
    assert found["28 x 28", "mobilenet_v2_010"]["parameters"] == "98890"
    for row in rows:
        assert int(row["bytes.int8"]) < int(row["bytes.weights"]) < int(row["bytes.safetensors"])
        for key in ("one", "batch"):
            assert row[f"{key}.layout"] in ("NCHW", "channels_last")
            assert 0 < float(row[f"{key}.ms_q1"]) <= float(row[f"{key}.ms"]) <= float(row[f"{key}.ms_q3"])
    text = out.with_suffix(".md").read_text()
    assert "| merged, fused | 14,862 |" in text
    assert "budget: " in text
