"""The sweep: which tensors a pruner ranks, and that the dense network is looked at once."""

import pytest
import torch

from shared.gpu import autocast
from sparsevit import prune
from sparsevit.baselines import two_four_mask
from sparsevit.eval import described
from sparsevit.method import prunable
from sparsevit.problem import load_problem
from sparsevit.prune import Sweep
from sparsevit.shrink import load_network

CPU = torch.device("cpu")


@pytest.fixture
def sweep(tiny, tiny_run):
    config = tiny("paper")
    return Sweep(config, load_network(tiny_run / "model"), load_problem(config.data, CPU), lambda: None)


def test_the_pruners_that_are_compared_rank_the_same_tensors(sweep):
    blocks = set(prunable(sweep.network, "blocks"))
    for pruner in ("global_l1_blocks", "local_l1", "wanda"):
        masks = sweep.masks(pruner, 0.5)
        assert set(masks) == blocks
        assert sum(int((~m).sum()) for m in masks.values()) == sum(m.numel() for m in masks.values()) // 2
    assert set(sweep.masks("global_l1", 0.5)) == set(prunable(sweep.network, "authors")) > blocks
    assert set(sweep.masks("random", 0.5)) == set(prunable(sweep.network, "authors"))


def test_two_four_masks_what_its_kernels_multiply_and_nothing_else(sweep):
    pruned, dense = sweep.pruned("two_four", 0.5).state_dict(), sweep.network.state_dict()
    changed = {name for name in dense if not torch.equal(pruned[name], dense[name])}
    assert changed == {f"blocks.{block}.{name}.weight" for block in range(2) for name in ("fc1", "fc2")}
    for name in changed:
        assert torch.equal(pruned[name] != 0, two_four_mask(dense[name]))


def test_the_dense_network_is_calibrated_once_for_the_sweep_and_the_report(sweep, monkeypatch):
    calls, original = [], prune.calibrate
    monkeypatch.setattr(prune, "calibrate", lambda *a: calls.append(1) or original(*a))
    sweep.pruned("neurons", 0.5), sweep.masks("wanda", 0.5), sweep.pruned("heads", 0.5), described(sweep)
    assert calls == [1]


def test_the_softmax_of_a_map_is_taken_in_float32_under_autocast(lab):
    network, images = lab.network(), lab.images()
    with autocast(CPU, "bfloat16"), torch.no_grad():
        _, seen = network.observe(images, (1,))
    attention = seen[1]["attention"]
    assert attention.dtype == torch.float32
    assert seen[1]["mixed"].dtype == torch.bfloat16
    assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-6), "in bfloat16 rows sum to 1 within 1e-2 only"
    double = lab.network(dtype=torch.float64)
    assert double.observe(images.double(), (1,))[1][1]["attention"].dtype == torch.float64
