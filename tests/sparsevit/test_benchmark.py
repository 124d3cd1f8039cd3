"""The benchmark compares two ways to do the same work; its timings are not tested."""

import csv

import pytest
import torch

from sparsevit.method import attention_penalty

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(load_benchmark):
    """The benchmark as a module, on one thread."""
    module = load_benchmark("sparsevit_step")
    module.setup("cpu", 1)
    return module


def test_both_ways_give_the_same_loss_penalty_and_gradients(bench):
    assert bench.same_gradients(bench.QUICK, CPU) < 1e-2


@pytest.mark.parametrize("wrong", ["penalty", "logits"])
def test_ways_that_differ_are_not_timed(bench, monkeypatch, wrong):
    original = bench.published_forward

    def another(network, images):
        logits, penalty = original(network, images)
        return (logits, 1.1 * penalty) if wrong == "penalty" else (1.1 * logits, penalty)

    monkeypatch.setattr(bench, "published_forward", another)
    with pytest.raises(SystemExit, match="do not compute the same"):
        bench.same_gradients(bench.QUICK, CPU)


def test_the_published_penalty_is_the_last_blocks(bench):
    network, (images, _) = bench.network_of(bench.QUICK, CPU), bench.batch_of(bench.QUICK, CPU)
    with torch.no_grad():
        _, seen = network.observe(images, range(4))
        found = float(bench.published_forward(network, images)[1])
    penalties = [float(attention_penalty(s["attention"])) for s in seen]
    assert found == pytest.approx(penalties[-1], rel=1e-5)
    assert found != pytest.approx(penalties[0], rel=1e-5)


def test_both_ways_train(bench):
    for make in (bench.our_steps, bench.published_steps):
        network = bench.network_of(bench.QUICK, CPU)
        before = [parameter.clone() for parameter in network.parameters()]
        steps = make(network, bench.QUICK, CPU)
        assert [next(steps), next(steps)] == [1, 2]
        assert all(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_the_published_way_keeps_the_maps_of_all_blocks_for_the_backward_pass(bench):
    network, batch = bench.network_of(bench.QUICK, CPU), bench.batch_of(bench.QUICK, CPU)
    kept = {name: bench.kept_bytes(lambda way=way: way(network, *batch), network)
            for name, way in (("ours", bench.our_parts), ("published", bench.published_parts))}  # fmt: skip
    one_map = 4 * bench.QUICK.batch * 4 * 17 * 17  # float32, images, heads, tokens by tokens
    assert kept["published"] - kept["ours"] >= 3 * one_map


def test_the_quick_run_writes_its_rows(bench, tmp_path, capsys):
    out = tmp_path / "new" / "benchmarks.csv"
    assert bench.main(["--quick", "--device", "cpu", "--threads", "1", "--out", str(out)]) == 0
    assert "target 1.3" in capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    names = [row["benchmark"] for row in rows]
    assert {name: names.count(name) for name in names} == {"step": 3, "memory": 6, "removal": 2, "sweep": 1}
    for row in rows:
        assert row["threads"] == "1"
        assert float(row["ours"]) > 0
        assert float(row["ratio"]) > 0
    assert "**removal**" in out.with_suffix(".md").read_text()


def test_another_network_may_be_asked_for(bench, capsys):
    words = "--memory-of ours bfloat16 --device cpu --threads 1 --arch s0 --image 14 --batch 2"
    arguments = words.split()
    assert bench.main(arguments) == 0
    assert '"kept"' in capsys.readouterr().out
