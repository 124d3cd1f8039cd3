"""torchvision's small networks, as they are trained beside ours."""

import pytest
import torch

from lightcnn.baselines import BASELINES, ImageShape
from lightcnn.reproduce import PEERS

# Parameters with ten classes, counted once from torchvision's own models.
SIZES = {
    "mobilenet_v2_010": 98_890,
    "mobilenet_v2_025": 250_922,
    "mobilenet_v2_035": 408_938,
    "squeezenet": 727_626,
    "shufflenet_v2": 352_042,
}


def module_of(name, shape, seed=0):
    network = BASELINES[name].build(shape)
    return network.to_module(network.initial(seed))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("shape", [ImageShape(1, 28, 10), ImageShape(3, 32, 10)])
def test_a_peer_is_torchvisions_network_at_the_resolution_of_small_images(name, shape):
    module = module_of(name, shape).eval()
    assert sum(p.numel() for p in module.parameters()) == SIZES[name]
    sides = []
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, output: sides.append(output.shape[-1]))
    images = torch.rand(2, shape.in_channels, shape.image_size, shape.image_size)
    assert module(images).shape == (2, 10)
    assert sides[0] == shape.image_size, "the first stride is dropped"
    assert sides[-1] >= 3, "the last convolution sees more than one point"


def test_a_peers_first_weights_come_from_its_seed_alone():
    shape = ImageShape(1, 28, 10)
    torch.manual_seed(1)
    first = module_of("shufflenet_v2", shape, 3).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = (module_of("shufflenet_v2", shape, seed).state_dict() for seed in (3, 4))
    assert torch.equal(torch.get_rng_state(), before), "nobody else's draws are moved"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["net.fc.weight"], other["net.fc.weight"])


def test_squeezenets_logits_are_not_cut_off_at_zero():
    logits = module_of("squeezenet", ImageShape(1, 28, 10)).eval()(torch.rand(8, 1, 28, 28))
    assert (logits < 0).any()


def test_peers_draw_nothing_that_no_seed_resumes():
    for name in PEERS:
        module = module_of(name, ImageShape(1, 28, 10)).train()
        assert all(layer.p == 0 for layer in module.modules() if isinstance(layer, torch.nn.Dropout))
