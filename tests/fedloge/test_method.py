"""The method's frame and local objective: their properties, by the equations of the paper."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedloge import method
from fedloge.method import (
    etf_geometry,
    etf_repair_loss,
    local_objective,
    simplex_etf,
    sparse_etf,
)
from shared.errors import ConfigError
from tests.fedloge.helpers import gaussian

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")  # unfinished repairs are asked for on purpose


# --- the dense frame -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "c"), [(16, 4), (64, 10), (512, 100), (10, 10), (5, 2)])
def test_simplex_gram_lengths_sum_and_rank_are_those_of_an_etf(d, c):
    frame = simplex_etf(d, c, seed=0)
    assert frame.shape == (c, d)
    assert frame.dtype == torch.float32
    gram = c / (c - 1) * (torch.eye(c) - torch.ones(c, c) / c)
    torch.testing.assert_close(frame @ frame.T, gram, atol=1e-5, rtol=0)
    torch.testing.assert_close(frame.norm(dim=1), torch.ones(c), atol=1e-5, rtol=0)
    torch.testing.assert_close(frame.sum(dim=0), torch.zeros(d), atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(frame.double(), atol=1e-4) == c - 1


def test_simplex_is_bitwise_equal_for_a_seed_and_differs_for_another():
    assert torch.equal(simplex_etf(64, 10, seed=3), simplex_etf(64, 10, seed=3))
    assert not torch.allclose(simplex_etf(64, 10, seed=3), simplex_etf(64, 10, seed=4))


@pytest.mark.parametrize(("d", "c"), [(9, 10), (1, 2), (4, 1)])
def test_too_few_channels_or_classes_are_refused(d, c):
    with pytest.raises(ConfigError, match="at least"):
        simplex_etf(d, c, seed=0)


# --- the sparse frame ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "c", "zeros"), [(512, 10, 3072), (512, 100, 30_720), (64, 10, 384), (128, 10, 768)])
@pytest.mark.parametrize("prescale", [True, False])
def test_zeros_are_exactly_the_asked_number_and_do_not_move(d, c, zeros, prescale):
    before, after = (sparse_etf(d, c, 0.6, 0.1, seed=1, steps=steps, prescale=prescale) for steps in (0, 100))
    assert int((before == 0).sum()) == zeros
    assert torch.equal(before == 0, after == 0)
    assert not torch.equal(before, after)


@settings(max_examples=25, deadline=None)
@given(d=st.integers(40, 90), c=st.integers(2, 12), sparsity=st.floats(0, 0.5), norm=st.floats(0.05, 2))
def test_any_sparse_frame_has_the_floor_of_zeros_and_no_nan(d, c, sparsity, norm):
    frame = sparse_etf(d, c, sparsity, norm, seed=0, steps=20)
    assert frame.isfinite().all()
    assert not frame.requires_grad
    assert int((frame == 0).sum()) == math.floor(sparsity * d * c)


@pytest.mark.parametrize("norm", [0.1, 1.0, 0.3])
def test_sparsity_zero_is_the_scaled_simplex_to_the_bit(norm):
    assert torch.equal(sparse_etf(64, 10, 0.0, norm, seed=5), norm * simplex_etf(64, 10, seed=5))


def test_the_mask_alone_breaks_the_geometry():
    broken = etf_geometry(sparse_etf(64, 10, 0.6, 0.1, seed=0, steps=0))
    assert broken.min_angle < 85
    assert broken.mean_angle < 94
    assert broken.length_mean == pytest.approx(0.1, abs=1e-6)  # the start is scaled


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("d", "c", "norm", "length_error", "steps", "prescale"),
    [
        (64, 10, 0.1, 0.05, 1000, True),
        (64, 10, 1.0, 0.05, 1000, True),
        (128, 10, 0.1, 0.05, 1000, True),
        (512, 10, 0.1, 0.01, 1000, True),
        (512, 100, 0.1, 0.01, 1000, True),
        (512, 10, 0.1, 0.01, 10_000, False),
    ],
)
def test_the_repair_restores_angles_and_lengths(d, c, norm, length_error, steps, prescale, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = etf_geometry(sparse_etf(d, c, 0.6, norm, seed, steps, prescale=prescale))
    assert found.ideal_angle == pytest.approx({10: 96.379, 100: 90.579}[c], abs=1e-3)
    assert found.mean_angle == pytest.approx(found.ideal_angle, abs=0.05)
    assert found.min_angle > found.ideal_angle - 0.5
    assert found.length_mean == pytest.approx(norm, rel=length_error)
    assert found.length_var < 1e-5


@pytest.mark.parametrize(
    ("c", "at_start", "after_gaussian", "after_uniform"),
    [(10, (1.1, 1.4), (-1.65, -1.63), (-1.67, -1.65)), (100, (26, 28), (-1.28, -1.24), (-1.49, -1.45))],
)
def test_plain_repair_follows_the_loss_of_the_authors_logs(c, at_start, after_gaussian, after_uniform):
    """Logged after 1,000 steps: -1.6624, -1.4686. The authors start from uniform [0, 1) entries: repaired faster."""

    def plain(steps):
        return etf_repair_loss(sparse_etf(512, c, 0.6, 0.1, seed=0, steps=steps, prescale=False), 0.1).item()

    assert at_start[0] < plain(0) < at_start[1]
    assert after_gaussian[0] < plain(1000) < after_gaussian[1]

    mask = (sparse_etf(512, c, 0.6, 0.1, seed=0, steps=0) != 0).float()
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.rand(512, c, generator=generator, dtype=torch.float64))
    uniform = (math.sqrt(c / (c - 1)) * (basis - basis.mean(dim=1, keepdim=True))).T.float() * mask
    assert at_start[0] < etf_repair_loss(uniform, 0.1).item() < at_start[1]
    repaired = method._repair(uniform, mask, 0.1, steps=1000, learning_rate=1e-4)
    assert after_uniform[0] < etf_repair_loss(repaired, 0.1).item() < after_uniform[1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), c=st.integers(2, 12), spread=st.floats(0.01, 10))
def test_angle_term_never_beats_the_simplex(seed, c, spread):
    frame = spread * gaussian(c, 16, seed=seed)
    lengths_term = (frame.norm(dim=1) - 0.1).square().sum().item()
    bound = -math.acos(-1 / (c - 1)) if c > 2 else -math.pi
    assert etf_repair_loss(frame, 0.1).item() - lengths_term >= bound - 1e-3 - 1e-5 * lengths_term


def test_simplex_attains_the_bound_of_the_angle_term():
    assert etf_repair_loss(simplex_etf(64, 10, seed=0), 1.0).item() == pytest.approx(-math.acos(-1 / 9), abs=1e-4)


@pytest.mark.parametrize(("d", "c"), [(64, 10), (20, 3), (512, 100)])
def test_hand_written_repair_gradient_equals_autograd(d, c):
    frame = gaussian(c, d, seed=c).double().requires_grad_()
    etf_repair_loss(frame, 0.1).backward()
    torch.testing.assert_close(method._repair_gradient(frame.detach(), 0.1), frame.grad, atol=1e-12, rtol=1e-9)


def test_repair_is_torch_adam():
    mask = (gaussian(10, 64) > 0).float()
    start = simplex_etf(64, 10, seed=0) * mask
    reference = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([reference], lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        etf_repair_loss(reference, 0.5).backward()
        reference.grad.mul_(mask)
        optimizer.step()
    torch.testing.assert_close(method._repair(start, mask, 0.5, 30, 1e-3), reference.detach(), atol=1e-5, rtol=0)


def test_colliding_rows_have_a_finite_repair_gradient():
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert method._repair_gradient(twins, 1.0).isfinite().all()


def test_impossible_sparsity_warns_and_has_dead_channels():
    with pytest.warns(UserWarning, match="channels dead"):
        frame = sparse_etf(64, 10, 0.9, 0.1, seed=0)
    found = etf_geometry(frame)
    assert found.ideal_angle - found.mean_angle > 1
    assert found.dead_channels > 0
    assert frame.isfinite().all()


def test_a_class_without_channels_is_refused():
    with pytest.raises(ConfigError, match="without any of the 4 channels"):
        sparse_etf(4, 4, 0.9, 0.1, seed=0)


@pytest.mark.parametrize(
    "wrong",
    [{"sparsity": -0.1}, {"sparsity": 1.0}, {"sparsity": math.nan}, {"norm": 0.0}, {"norm": math.inf}, {"steps": -1}],
)
def test_arguments_of_the_sparse_frame_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        sparse_etf(**({"feature_dim": 16, "num_classes": 4, "sparsity": 0.5, "norm": 0.1, "seed": 0} | wrong))


def test_frames_are_deterministic_and_neither_read_nor_move_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sparse_etf(64, 10, 0.6, 0.1, seed=7, steps=50)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, sparse_etf(64, 10, 0.6, 0.1, seed=7, steps=50))
    assert not torch.equal(first == 0, sparse_etf(64, 10, 0.6, 0.1, seed=8, steps=50) == 0)


def test_frame_as_a_buffer_survives_state_dict_and_training_to_the_bit():
    net = nn.Linear(6, 8)
    net.register_buffer("etf", sparse_etf(8, 3, 0.4, 0.1, seed=0))
    frame = net.etf.clone()
    assert not frame.requires_grad
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        functional.cross_entropy(net(gaussian(4, 6)).relu() @ net.etf.T, torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    assert torch.equal(net.etf, frame)
    other = nn.Linear(6, 8)
    other.register_buffer("etf", torch.zeros(3, 8))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.etf, frame)


def test_row_length_of_the_frame_changes_gradients_but_no_prediction():
    frame = sparse_etf(64, 10, 0.6, 1.0, seed=0)
    features = gaussian(50, 64).relu()
    short = sparse_etf(64, 10, 0.6, 0.125, seed=0)
    torch.testing.assert_close(short, 0.125 * frame, atol=0.02, rtol=0)
    assert ((features @ short.T).argmax(dim=1) == (features @ frame.T).argmax(dim=1)).float().mean() > 0.95
    gradients = []
    for norm in (1.0, 0.125):  # a power of two scales without rounding
        h = features.clone().requires_grad_()
        logits = h @ (norm * frame).T
        assert torch.equal(logits.argmax(dim=1), (features @ frame.T).argmax(dim=1))
        functional.cross_entropy(logits, torch.arange(50) % 10).backward()
        gradients.append(h.grad)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.1)


# --- one local step --------------------------------------------------------------------------------------------------


def local_problem(bias=True, seed=0):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(7, 12), nn.ReLU())
    return backbone, nn.Linear(12, 4, bias=bias), nn.Linear(12, 4, bias=bias), sparse_etf(12, 4, 0.4, 1.0, seed=0)


@pytest.mark.parametrize("bias", [True, False])
def test_one_combined_step_equals_three_separate_ones_momentum_included(bias):
    backbone, psi, phi, etf = local_problem(bias)
    others = copy.deepcopy([backbone, psi, phi])
    together = torch.optim.SGD([p for m in (backbone, psi, phi) for p in m.parameters()], lr=0.1, momentum=0.5)
    apart = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5) for m in others]
    targets = torch.arange(16) % 4
    for step in range(6):
        x = gaussian(16, 7, seed=step)
        together.zero_grad()
        local_objective(backbone(x), targets, etf, (psi.weight, psi.bias), (phi.weight, phi.bias)).backward()
        together.step()

        h = others[0](x)
        losses = [functional.cross_entropy(h @ etf.T, targets)]
        losses += [functional.cross_entropy(head(h.detach()), targets) for head in others[1:]]
        for optimizer, loss in zip(apart, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for ours, theirs in zip((backbone, psi, phi), others, strict=True):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_heads_send_no_gradient_to_the_features_and_the_frame_none_to_the_heads():
    backbone, psi, phi, etf = local_problem()
    x, targets = gaussian(16, 7), torch.arange(16) % 4
    gradients = []
    for scale in (1.0, 100.0):
        backbone.zero_grad()
        heads = [(scale * head.weight, head.bias) for head in (psi, phi)]
        local_objective(backbone(x), targets, etf, *heads).backward()
        gradients.append(backbone[0].weight.grad.clone())
    assert torch.equal(*gradients)

    grads = []
    for frame in (etf, torch.zeros_like(etf)):
        psi.zero_grad()
        phi.zero_grad()
        local_objective(backbone(x), targets, frame, (psi.weight, psi.bias), (phi.weight, phi.bias)).backward()
        grads.append((psi.weight.grad.clone(), phi.bias.grad.clone()))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])
    assert etf.grad is None


def test_backbone_gradient_is_the_hand_formula_and_a_dead_channel_gets_exactly_zero():
    etf = sparse_etf(12, 4, 0.4, 1.0, seed=0)
    etf[:, 5] = 0
    _, psi, phi, _ = local_problem()
    h = gaussian(9, 12).relu().requires_grad_()
    targets = torch.arange(9) % 4
    local_objective(h, targets, etf, (psi.weight, psi.bias), (phi.weight, phi.bias)).backward()
    expected = ((h @ etf.T).softmax(dim=1) - functional.one_hot(targets, 4)) @ etf / 9
    torch.testing.assert_close(h.grad, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(h.grad[:, 5], torch.zeros(9))
