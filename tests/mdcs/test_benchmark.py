"""The benchmark of a step compares two ways to do the same work; its timings are not tested."""

import csv
from dataclasses import replace

import pytest
import torch

from mdcs.eval import run_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(load_benchmark):
    """The benchmark as a module, on one thread."""
    module = load_benchmark("mdcs_step")
    module.setup("cpu", 1)
    return module


@pytest.fixture
def ours(bench):
    """Our way before its first step, in float32."""
    return bench.begin(CPU, "float32", bench.QUICK)


def views_of(ours):
    """The batches of an epoch."""
    return list(ours.problem.train.epoch(ours.batches, "both", 0, ("views", 0)))


@pytest.mark.parametrize("certain", [0, 5], ids=["untrained", "some images are confident"])
def test_both_ways_have_the_same_loss_and_gradient_on_the_same_views(bench, ours, certain):
    counts = torch.tensor(ours.problem.class_counts).float()
    for images, targets in views_of(ours):
        logits = ours.state.model(images).detach()
        weak = torch.arange(len(targets))
        logits[weak[:certain], :2, targets[:certain]] += 60
        logits[weak, 2, (targets + 1) % 100] += 100  # no image is confident for the third expert
        sides = [logits.clone().requires_grad_() for _ in range(2)]
        losses = ours.method.loss(sides[0], targets, bench.EPOCH), bench.usual_loss(sides[1], targets, counts)
        torch.testing.assert_close(*losses, atol=1e-4, rtol=0)
        torch.testing.assert_close(*torch.autograd.grad(losses, sides), atol=1e-5, rtol=1e-4)
    teaches = (logits[: len(targets)].argmax(dim=2) == targets[:, None]).any(dim=0).tolist()
    assert certain == 0 or teaches == [True, True, False]


def test_both_ways_reach_the_same_weights_in_a_pass_over_the_same_views(bench, ours, monkeypatch):
    usual = bench.Usual(ours, bench.begin(CPU, "float32", bench.QUICK).state.model)
    torch.testing.assert_close(dict(usual.network.named_parameters()), dict(ours.state.model.named_parameters()))
    before = [parameter.clone() for parameter in usual.network.parameters()]
    views = views_of(ours)
    monkeypatch.setattr(ours.problem.train, "epoch", lambda *_: iter(views))
    usual.loader = [(*images.chunk(2), targets) for images, targets in views]
    assert ours.run_pass(0) > 0
    assert usual.run_pass() > 0
    after = dict(usual.network.named_parameters())
    torch.testing.assert_close(after, dict(ours.state.model.named_parameters()), atol=2e-4, rtol=2e-3)
    assert all(not torch.equal(old, new) for old, new in zip(before, after.values(), strict=True))


def test_the_network_is_that_of_the_paper(bench):
    model = bench.begin(CPU, "bfloat16", replace(bench.FULL, steps=1, tests=1)).state.model
    assert sum(parameter.numel() for parameter in model.parameters()) == 783_856


def test_both_ways_make_views_of_the_same_kind(bench):
    images = bench.smooth_images(400, "test")
    assert images.amin() == 0
    assert images.amax() == 255
    resident = bench.ResidentViews(images, torch.zeros(400, dtype=torch.long), bench.MEAN, bench.STD, "cifar")
    pairs = bench.Pairs(resident)
    ours = next(resident.epoch([torch.arange(400)], "both", 0, ("views",)))[0]
    torch.manual_seed(0)
    usual = torch.cat([torch.stack(view) for view in list(zip(*(pairs[k] for k in range(400)), strict=True))[:2]])
    for mine, theirs in zip(ours.chunk(2), usual.chunk(2), strict=True):
        assert mine.shape == theirs.shape == (400, 3, 32, 32)
        torch.testing.assert_close(mine.mean((0, 2, 3)), theirs.mean((0, 2, 3)), atol=0.1, rtol=0)
        torch.testing.assert_close(mine.std((0, 2, 3)), theirs.std((0, 2, 3)), atol=0.1, rtol=0)


def test_a_pass_for_each_expert_predicts_what_our_one_pass_does(bench, ours):
    case = ours.state.model, ours.problem, ours.config
    passes, one = bench.expert_passes(*case), run_network(*case).predictions.long()
    assert passes.shape == one.shape == (100, 4)
    assert (passes == one).float().mean() > 0.99


def test_the_quick_run_writes_its_rows(bench, tmp_path, capsys):
    out = tmp_path / "new" / "benchmarks.csv"
    assert bench.main(["--quick", "--device", "cpu", "--threads", "1", "--out", str(out)]) == 0
    assert "bfloat16, channels_last" in capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    names = [row["benchmark"] for row in rows]
    sizes = {"step": 2, "where our time goes": 5, "throughput": 5, "evaluation": 1, "augmentation": 3}
    assert {name: names.count(name) for name in names} == sizes
    for row in rows:
        assert row["threads"] == "1"
        assert row["device"]
        assert float(row["ours"]) > 0
        quicker = row["benchmark"] in ("step", "evaluation", "augmentation")
        assert bool(row["ratio"]) == (quicker or row["unit"] == "images/s")
        if row["benchmark"] == "augmentation":  # one core does both, so the ratio is near that of the medians
            assert float(row["ratio"]) == pytest.approx(float(row["reference"]) / float(row["ours"]), rel=0.5)
    shares = [float(row["ours"]) for row in rows if row["benchmark"] == "where our time goes"]
    assert sum(shares) == pytest.approx(1, abs=0.2)  # medians of each
    assert "**step**" in out.with_suffix(".md").read_text()
