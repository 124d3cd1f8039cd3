"""Multi-expert networks: outputs, classifiers, precision, gradients, initialisation, views."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mdcs.model import (
    Architecture,
    BasicBlock,
    CosineClassifier,
    LinearClassifier,
    build_model,
    forward_views,
    frozen_buffers,
    laid_out,
    place,
)
from shared.errors import ConfigError

SMALL = Architecture("resnet_cifar", 5, experts=3, reduced=True, depth=8, width=4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def buffers_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("size", [14, 28, 32])
@pytest.mark.parametrize(("channels", "experts", "separate"), [(1, 1, False), (3, 3, False), (1, 2, True)])
def test_logits_are_of_n_images_e_experts_and_c_classes_and_every_parameter_is_used(size, channels, experts, separate):
    architecture = Architecture(
        "resnet_cifar", 7, experts, reduced=True, in_channels=channels, depth=8, width=8, separate=separate
    )
    model = build_model(architecture, seed=0)
    images = normal(4, channels, size, size)
    logits, features = model(images), model.features(images)
    assert logits.shape == (4, experts, 7)
    assert features.shape == (4, experts, 24)
    assert features.min() >= 0
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    with torch.no_grad():
        expected = torch.stack([head(model.eval().features(images)[:, e]) for e, head in enumerate(model.heads)], 1)
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    ("before", "after", "stride", "padding"),
    [(16, 24, 2, (4, 4)), (24, 48, 2, (12, 12)), (16, 32, 2, (8, 8)), (8, 12, 2, (2, 2)), (6, 9, 2, (1, 2))],
)
def test_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides(before, after, stride, padding):
    block, x = BasicBlock(before, after, stride), normal(2, before, 8, 8)
    y = block.shortcut(x)
    first, last = padding
    assert y.shape == (2, after, 4, 4)
    assert torch.equal(y[:, first : after - last], x[:, :, ::2, ::2])
    assert not y[:, :first].any()
    assert not y[:, after - last :].any()


def test_shortcut_has_no_parameters_and_is_added_before_the_last_relu():
    block = BasicBlock(16, 24, 2)
    assert {name for name, _ in block.named_children()} == {"conv1", "bn1", "conv2", "bn2"}
    assert sum(p.numel() for p in block.parameters()) == 9 * 16 * 24 + 9 * 24 * 24 + 4 * 24
    nn.init.zeros_(block.bn2.weight)
    x = normal(2, 16, 8, 8)
    assert torch.equal(block(x), block.shortcut(x).relu())
    same = BasicBlock(16, 16, 1)
    assert torch.equal(same.shortcut(x), x)


def test_a_block_is_its_definition_with_a_relu_between_the_convolutions():
    block, x = BasicBlock(16, 24, 2).eval(), normal(2, 16, 8, 8)
    with torch.no_grad():
        for norm in (block.bn1, block.bn2):
            norm.running_mean.normal_()
            norm.weight.uniform_(0.5, 2)
        y = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        torch.testing.assert_close(block(x), (y + block.shortcut(x)).relu())


def test_the_stem_of_a_small_network_has_a_relu_before_its_stages():
    trunk = build_model(SMALL, seed=0).trunk.eval()
    x = normal(2, SMALL.in_channels, 16, 16)
    seen = []
    trunk.layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        trunk(x)
        torch.testing.assert_close(seen[0], trunk.bn1(trunk.conv1(x)).relu())


def test_cosine_logits_are_at_most_30_and_blind_to_the_length_of_features_and_class_vectors():
    model = build_model(SMALL, seed=0)
    head, features = model.heads[0], normal(6, 12)
    logits = head(features)
    cosine = nn.functional.cosine_similarity(features[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(logits, 30 * cosine)
    aligned = head(head.weight)
    torch.testing.assert_close(aligned.diagonal(), torch.full((5,), 30.0))
    images = 100 * normal(4, 3, 8, 8)
    before = model.eval()(images)
    assert max(before.abs().max(), logits.abs().max(), aligned.abs().max()) <= 30 + 1e-4
    with torch.no_grad():
        head.weight[2] *= 7
    torch.testing.assert_close(head(0.01 * features), logits)
    torch.testing.assert_close(model(images), before)
    assert not head(torch.zeros(1, 12)).any()  # a dead feature vector is no NaN


def test_cosine_logits_are_computed_in_float32_under_autocast():
    head, features = CosineClassifier(48, 10), normal(6, 48).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(features.float()))


def test_linear_logits_are_computed_in_float32_under_autocast():
    head, features = LinearClassifier(48, 10), normal(6, 48).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(features.float()))
    torch.testing.assert_close(logits, features.float() @ head.weight.T + head.bias)
    assert set(head.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_a_network_gives_float32_logits_under_autocast_with_either_classifier(classifier):
    architecture = Architecture("resnet_cifar", 5, 2, depth=8, width=4, classifier=classifier)
    model, images = build_model(architecture, seed=0), normal(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.features(images).dtype == torch.bfloat16
        logits = model(images)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float()), "they are not rounded to bfloat16"
    logits.sum().backward()
    assert all(head.weight.grad.dtype == torch.float32 for head in model.heads)


@pytest.mark.parametrize(("precision", "wanted"), [("bfloat16", torch.channels_last), ("float32", None),
                                                   ("auto", None)])  # fmt: skip
def test_images_and_weights_lie_in_the_same_order_of_bytes_whatever_order_they_came_in(precision, wanted):
    cpu, images = torch.device("cpu"), normal(4, 3, 8, 8)
    plain = build_model(SMALL, seed=0)
    for order in (torch.contiguous_format, torch.channels_last):
        model = place(build_model(SMALL, seed=0).to(memory_format=order), precision, cpu)
        moved = laid_out(images.contiguous(memory_format=order), precision)
        for tensor in (moved, model.trunk.conv1.weight, model.experts[2].layer3[0].conv2.weight):
            assert tensor.is_contiguous(memory_format=wanted or torch.contiguous_format)
            assert tensor.is_contiguous() == (wanted is None)
        assert torch.equal(moved, images)
        assert equal(model.state_dict(), plain.state_dict())


def test_changing_one_expert_leaves_the_others_unchanged():
    model, images = build_model(SMALL, seed=0), normal(4, 3, 8, 8)
    before = model(images)
    with torch.no_grad():
        for parameter in (*model.experts[1].parameters(), *model.heads[1].parameters()):
            parameter += 0.1 * normal(*parameter.shape)
    after = model(images)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_gradient_of_the_trunk_is_the_sum_of_the_experts_gradients():
    model, images = build_model(SMALL, seed=0).double(), normal(4, 3, 8, 8).double()
    pull = normal(4, 3, 5).double()

    def gradients(*experts):
        loss = (model(images) * pull)[:, list(experts)].sum()
        return torch.autograd.grad(loss, list(model.trunk.parameters()))

    apart = zip(*(gradients(expert) for expert in range(3)), strict=True)
    for together, parts in zip(gradients(0, 1, 2), apart, strict=True):
        torch.testing.assert_close(together, sum(parts), rtol=1e-10, atol=1e-10)
        assert together.abs().max() > 0


def test_convolutions_start_from_the_papers_normal_and_class_vectors_at_unit_length():
    small = build_model(Architecture("resnet_cifar", 100, classifier="linear"), seed=0)
    conv = small.experts[0].layer3[1].conv1.weight  # 64 -> 64
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    changing = small.experts[0].layer3[0].conv1.weight  # 32 -> 64: fan-in
    assert changing.std().item() == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.02)
    assert small.heads[0].weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)

    large = build_model(Architecture("resnext50", 100, reduced=True), seed=0)
    block = large.experts[0].layer3[0]
    for conv in (block.conv1, block.conv2, block.conv3, block.downsample[0]):
        k, _ = conv.kernel_size
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (k * k * conv.out_channels)), rel=0.02)
    rows = large.heads[0].weight
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(100))
    # A uniform vector has few large entries: kurtosis 1.8, a normal one has 3.
    assert (rows**4).mean().item() / (rows**2).mean().item() ** 2 == pytest.approx(1.8, abs=0.05)
    for norm in (m for m in large.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.weight.eq(1).all()
        assert not norm.bias.any()


def test_initialisation_depends_on_the_seed_alone_and_leaves_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_model(SMALL, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (build_model(SMALL, seed=seed).state_dict() for seed in (7, 8))
    assert equal(first, again)
    weights = [key for key, value in first.items() if value.dim() > 1]
    assert all(not torch.equal(first[key], other[key]) for key in weights)
    own = [key for key in weights if "s.0." in key]  # no two experts start alike
    assert own
    assert all(not torch.equal(first[key], first[key.replace("s.0.", "s.1.", 1)]) for key in own)


def varied(model):
    """The model with running buffers of its own, and images of two distributions."""
    model(3 * normal(8, 3, 8, 8, seed=5) + 1)
    return model, torch.cat([normal(4, 3, 8, 8), 2 * normal(4, 3, 8, 8, seed=1) - 1])


def test_joint_views_are_one_forward_pass():
    model, views = varied(build_model(SMALL, seed=0))
    expected = copy.deepcopy(model)
    assert torch.equal(forward_views(model, views, split=False), expected(views))
    assert equal(buffers_of(model), buffers_of(expected))


def test_split_views_are_two_forward_passes_of_which_only_the_weak_one_moves_the_buffers():
    model, views = varied(build_model(SMALL, seed=0))
    weak, strong = copy.deepcopy(model), copy.deepcopy(model)
    logits = forward_views(model, views, split=True)
    assert torch.equal(logits, torch.cat([weak(views[:4]), strong(views[4:])]))
    assert equal(buffers_of(model), buffers_of(weak))
    assert not torch.allclose(logits, copy.deepcopy(model)(views), atol=1e-2)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_frozen_buffers_are_the_running_ones_again_afterwards_even_after_an_error():
    model, views = varied(build_model(SMALL, seed=0))
    before = buffers_of(model)

    def fail_within():
        with frozen_buffers(model):
            model(views)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_within()
    assert equal(buffers_of(model), before)
    model(views)
    assert all(not torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_views_in_evaluation_use_the_running_buffers_either_way():
    model, views = varied(build_model(SMALL, seed=0))
    model.eval()
    before = buffers_of(model)
    torch.testing.assert_close(forward_views(model, views, split=True), forward_views(model, views, split=False))
    assert equal(buffers_of(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 30}, "depth of 6n . 2 .* got 30"),
        ({"depth": 2}, "got 2"),
        ({"width": 0}, "at least 1"),
        ({"width": 5, "reduced": True}, "even one if it is reduced; got 5"),
        ({"share_stage3": True}, "no stage 4"),
        ({"name": "resnet50", "separate": True, "share_stage3": True}, "not both"),
        ({"experts": 0}, "at least 1 expert"),
    ],
)
def test_a_network_that_cannot_be_made_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_model(Architecture(**{"name": "resnet_cifar", "num_classes": 10, **settings}), seed=0)


def test_importing_the_models_does_not_import_torchvision():
    program = "import sys, mdcs.model, mdcs.pretrained; sys.exit('torchvision' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
