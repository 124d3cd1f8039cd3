"""The oracles of pruning by rows and groups: Wanda, 2:4, neurons, heads."""

import math

import pytest
import torch

from shared.errors import ConfigError
from sparsevit import baselines
from sparsevit.baselines import (
    two_four_mask,
    wanda_masks,
)  # fmt: skip
from sparsevit.method import (
    head_scores,
    keep_count,
    keep_highest,
    neuron_scores,
)  # fmt: skip
from tests.sparsevit.draws import draw

# --- Wanda and 2:4 ----------------------------------------------------------------------------------------------------


def test_wanda_prunes_in_each_row_the_lowest_weight_times_input_norm():
    weight, norms = draw(6, 10), draw(10, seed=1).abs()
    mask = wanda_masks({"w": weight}, {"w": norms}, 0.3)["w"]
    assert (~mask).sum(1).tolist() == [3] * 6
    scores = weight.abs() * norms
    for row in range(6):
        assert set((~mask[row]).nonzero().flatten().tolist()) == set(scores[row].argsort()[:3].tolist())
    plain = wanda_masks({"w": weight}, {"w": torch.ones(10)}, 0.3)["w"]
    assert not torch.equal(plain, mask)


def test_two_four_keeps_the_two_largest_of_every_four_inputs():
    weight = draw(5, 12)
    mask = two_four_mask(weight)
    groups, kept = weight.abs().view(5, 3, 4), mask.view(5, 3, 4)
    assert bool((kept.sum(-1) == 2).all())
    smallest_kept = groups.masked_fill(~kept, math.inf).min(-1).values
    assert bool((smallest_kept > groups.masked_fill(kept, 0).max(-1).values).all())
    pruned = weight * mask
    assert torch.equal(pruned * two_four_mask(pruned), pruned)
    assert int((two_four_mask(torch.ones(2, 8)) == 0).sum()) == 8
    with pytest.raises(ConfigError, match="not a multiple of 4"):
        two_four_mask(draw(4, 6))


def test_two_four_kernels_are_refused_where_there_are_none(lab):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="NVIDIA"):
        baselines.to_two_four(lab.network())


@pytest.mark.skipif(not baselines.can_run_two_four(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
                    reason="no GPU with 2:4 tensor cores")  # fmt: skip
def test_a_semi_structured_network_computes_what_the_masked_one_does(lab):
    size = lab.small_size(width=128, heads=2, mlp=256, channels=3, image=16, patch=4)
    network = lab.network(size=size).half().cuda()
    images = lab.images(size=size).half().cuda()
    with torch.no_grad():
        for block in network.layers:
            for layer in (block.fc1, block.fc2):
                layer.weight.mul_(two_four_mask(layer.weight))
        wanted = network(images)
        assert baselines.to_two_four(network) == ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]
        assert torch.allclose(network(images), wanted, atol=1e-2, rtol=1e-2)


# --- scores of neurons and heads --------------------------------------------------------------------------------------


def test_a_neurons_score_is_its_deviation_times_the_length_of_its_column():
    hidden, fc2 = draw(4, 5, 6), draw(3, 6, seed=1)
    wanted = hidden.reshape(-1, 6).double().std(0, unbiased=False) * fc2.double().norm(dim=0)
    assert torch.allclose(neuron_scores(hidden, fc2), wanted)


def test_a_neuron_without_effect_or_of_constant_output_has_score_zero_and_goes_first():
    hidden, fc2 = draw(4, 5, 6), draw(3, 6, seed=1)
    fc2[:, 4], hidden[..., 1] = 0, 7.5
    scores = neuron_scores(hidden, fc2)
    assert float(scores[4]) == 0
    assert float(scores[1]) < 1e-6
    assert set(keep_highest(scores, 4).tolist()) == {0, 2, 3, 5}
    assert keep_highest(torch.zeros(5), 3).tolist() == [2, 3, 4]


def test_a_heads_score_is_the_mean_length_of_what_it_adds():
    mixed, out = draw(2, 5, 6), draw(4, 6, seed=1)
    scores = head_scores(mixed, out, heads=3)
    for h in range(3):
        part = slice(2 * h, 2 * h + 2)
        wanted = (mixed[..., part] @ out[:, part].T).norm(dim=-1).mean()
        assert float(scores[h]) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    ("total", "ratio", "multiple", "count"),
    [(256, 0.5, 1, 128), (256, 0.75, 64, 64), (256, 0.9, 64, 64), (256, 1.0, 64, 64), (3072, 0.5, 64, 1536),
     (100, 0.5, 64, 64), (50, 0.5, 64, 50), (3, 0.5, 1, 2), (4, 1.0, 1, 1), (256, 0.0, 64, 256), (250, 0.0, 64, 250)],
)  # fmt: skip
def test_kept_counts_are_multiples_never_none_and_never_too_many(total, ratio, multiple, count):
    assert keep_count(total, ratio, multiple) == count
