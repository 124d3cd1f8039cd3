"""Realignment of the heads and the personal rules: their properties, by the equations of the paper."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fedloge.method import (
    PERSONAL_RULES,
    class_mask,
    personal_heads,
    realign_global,
    realign_local,
)
from shared.errors import ConfigError, DataError
from tests.fedloge.helpers import gaussian

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")  # unfinished repairs are asked for on purpose


# --- realignment -----------------------------------------------------------------------------------------------------


def test_realigned_rows_have_length_one_keep_their_direction_and_stay():
    psi = gaussian(10, 64) * torch.linspace(0.01, 20, 10)[:, None]
    realigned = realign_global(psi)
    torch.testing.assert_close(realigned.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(realign_global(realigned), realigned)
    torch.testing.assert_close(functional.cosine_similarity(psi, realigned), torch.ones(10))
    torch.testing.assert_close(realign_global(psi, scale=1.7).norm(dim=1), torch.full((10,), 1.7))


def test_rows_of_equal_length_keep_their_predictions():
    psi, h = 3 * realign_global(gaussian(10, 64)), gaussian(100, 64, seed=1).relu()
    assert torch.equal((h @ psi.T).argmax(dim=1), (h @ realign_global(psi).T).argmax(dim=1))


@settings(max_examples=40, deadline=None)
@given(factors=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5))
def test_global_realignment_forgets_the_lengths(factors):
    psi = gaussian(5, 8)
    torch.testing.assert_close(realign_global(psi * torch.tensor(factors)[:, None]), realign_global(psi))


def test_scale_cannot_change_a_bias_free_prediction_but_can_change_a_biased_one():
    psi, bias, h = gaussian(10, 64), 5 * gaussian(10, seed=2), gaussian(300, 64, seed=1).relu()
    one, more = (h @ realign_global(psi, scale=scale).T for scale in (1.0, 1.7))
    assert torch.equal(one.argmax(dim=1), more.argmax(dim=1))
    assert not torch.equal((one + bias).argmax(dim=1), (more + bias).argmax(dim=1))


def test_norm_transfer_multiplies_the_lengths():
    psi, phi = gaussian(10, 64), gaussian(3, 10, 64, seed=1)
    moved = realign_local(psi, phi)
    assert moved.shape == (3, 10, 64)
    torch.testing.assert_close(moved.norm(dim=-1), psi.norm(dim=-1) * phi.norm(dim=-1))
    torch.testing.assert_close(realign_local(psi, realign_global(phi)), psi.expand(3, -1, -1))


def test_norm_transfer_keeps_predictions_under_equal_lengths_and_doubling_and_ignores_rotation():
    psi, phi, h = gaussian(10, 64), gaussian(10, 64, seed=1), gaussian(100, 64, seed=2).relu()

    def predictions(weight):
        return (h @ weight.T).argmax(dim=1)

    assert torch.equal(predictions(realign_local(psi, 7 * realign_global(phi))), predictions(psi))
    assert torch.equal(predictions(realign_local(psi, 2 * phi)), predictions(realign_local(psi, phi)))
    rotation, _ = torch.linalg.qr(gaussian(64, 64, seed=3))
    torch.testing.assert_close(realign_local(psi, phi @ rotation), realign_local(psi, phi))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(realign_local(psi[order], phi[order]), realign_local(psi, phi)[order])


def test_zero_rows_give_logit_zero_and_never_nan():
    psi, phi, h = gaussian(4, 8), gaussian(4, 8, seed=1), gaussian(5, 8, seed=2)
    psi[1], phi[2] = 0, 0
    assert torch.equal(h @ realign_global(psi).T[:, 1], torch.zeros(5))
    local = h @ realign_local(psi, phi).T
    assert torch.equal(local[:, 1:3], torch.zeros(5, 2))
    assert local.isfinite().all()
    assert realign_global(psi).isfinite().all()


def test_realignment_modifies_no_input_and_takes_no_data():
    psi, phi, bias, biases = gaussian(4, 8), gaussian(2, 4, 8, seed=1), gaussian(4, seed=2), gaussian(2, 4, seed=3)
    copies = [t.clone() for t in (psi, phi, bias, biases)]
    realign_global(psi, scale=1.7)
    realign_local(psi, phi)
    for rule in PERSONAL_RULES:
        weight, combined = personal_heads(rule, psi, bias, phi, biases)
        weight.zero_()
        combined.zero_()
    assert all(torch.equal(a, b) for a, b in zip((psi, phi, bias, biases), copies, strict=True))
    assert set(inspect.signature(realign_global).parameters) == {"weight", "scale"}


def test_lengths_follow_the_frequency_and_realignment_raises_tail_recall():
    """Six classes: with two, the rows move by opposite amounts, and their lengths say nothing about frequency."""
    counts, d = [600, 300, 150, 75, 38, 19], 16
    gained, head_minus_tail = [], []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.rand(6, d, generator=generator)

        def sample(sizes, centres=centres, generator=generator):
            y = torch.arange(6).repeat_interleave(torch.tensor(sizes))
            return torch.relu(centres[y] + 0.6 * torch.randn(len(y), d, generator=generator)), y

        x, y = sample(counts)
        test_x, test_y = sample([300] * 6)
        psi = torch.empty(6, d).uniform_(-0.25, 0.25, generator=generator).requires_grad_()
        optimizer = torch.optim.SGD([psi], lr=0.1, momentum=0.5)
        for _ in range(300):
            optimizer.zero_grad()
            functional.cross_entropy(x @ psi.T, y).backward()
            optimizer.step()
        psi = psi.detach()
        tail = test_y >= 3
        recalls = [((test_x @ w.T).argmax(1) == test_y)[tail].float().mean().item() for w in (psi, realign_global(psi))]
        gained.append(recalls[1] - recalls[0])
        lengths = psi.norm(dim=1)
        head_minus_tail.append((lengths[:3].mean() - lengths[3:].mean()).item())
    assert min(head_minus_tail) > 0
    assert min(gained) > 0
    assert sum(gained) / 5 > 0.03


# --- personal rules and the class mask -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False])
def test_each_personal_rule_is_its_sum_of_logits(with_bias):
    psi, phi, h = gaussian(4, 8), gaussian(3, 4, 8, seed=1), gaussian(5, 8, seed=2)
    b, bk = (gaussian(4, seed=3), gaussian(3, 4, seed=4)) if with_bias else (None, None)
    zero, zeros = torch.zeros(4), torch.zeros(3, 4)
    b_, bk_ = (b, bk) if with_bias else (zero, zeros)
    for k in range(3):
        moved = h @ (psi * phi[k].norm(dim=1, keepdim=True)).T + b_
        generic, own = h @ psi.T + b_, h @ phi[k].T + bk_[k]
        expected = {"paper": moved, "code": moved + own, "readme": moved + generic, "stage1_sum": generic + own}
        assert set(expected) == set(PERSONAL_RULES)
        for rule, logits in expected.items():
            weight, bias = personal_heads(rule, psi, b, phi, bk)
            assert weight.shape == (3, 4, 8)
            assert (bias is not None) == with_bias
            found = functional.linear(h, weight[k], None if bias is None else bias[k])
            torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


def test_unknown_personal_rule_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        personal_heads("papr", gaussian(4, 8), None, gaussian(3, 4, 8), None)
    with pytest.raises(ConfigError, match="choose from paper, code, readme, stage1_sum"):
        personal_heads("?", gaussian(4, 8), None, gaussian(3, 4, 8), None)


@pytest.mark.parametrize("features", [torch.zeros(6, 8), -gaussian(6, 8).abs(), gaussian(6, 8)])
def test_a_masked_class_is_never_predicted(features):
    counts = torch.tensor([[0, 3, 0, 9], [1, 0, 0, 0]])
    logits = features @ gaussian(2, 4, 8, seed=1).mT + torch.tensor([1e4, -1e4, 1e12, -1e12])
    masked = class_mask(logits, counts)
    for k in range(2):
        present = counts[k] > 0
        assert present[masked[k].argmax(dim=1)].all()
        assert torch.equal(masked[k][:, present], logits[k][:, present])
        assert torch.equal(class_mask(logits[k], counts[k]), masked[k])


def test_a_mask_that_leaves_no_class_is_refused():
    with pytest.raises(DataError, match="at least one training image"):
        class_mask(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
