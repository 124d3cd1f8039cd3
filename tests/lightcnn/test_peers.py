"""torchvision's small networks, as they are trained beside ours."""

import pytest
import torch

from lightcnn import plots
from lightcnn.baselines import BASELINES, ImageShape
from lightcnn.reproduce import PEERS
from shared.report import Row, figures_of, read_rows, write_rows

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


def test_the_plot_shows_what_other_studies_of_the_data_set_have_published(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "REPOSITORY", tmp_path)
    common = {"paper": "lightcnn", "seed": 0, "at": "final", "split": "test", "device": "CPU", "precision": "float32",
              "commit": "c", "seconds": 1.0, "command": "-"}  # fmt: skip
    for study, method, size in (
        ("budget_mnist", "distillation", 10), ("mnist", "two_stage", 20), ("mnist_peers", "squeezenet", 30),
        ("mnist_peers", "bn_gap", 40), ("cifar10", "two_stage", 50),
    ):  # fmt: skip
        path = tmp_path / "results" / "lightcnn" / study / "results.csv"
        rows = read_rows(path) if path.exists() else []
        rows += [Row(config=study, method=method, metric=metric, value=value, **common)
                 for metric, value in (("accuracy", 0.5), ("parameters", size))]  # fmt: skip
        write_rows(path, rows)
    wanted = {"our budget track": (10, [50]), "two_stage": (20, [50]), "squeezenet": (30, [50])}
    assert plots.published_networks("mnist", ["bn_gap"]) == wanted
    assert plots.published_networks("fashion_mnist", []) == {}
    plots.size_and_accuracy(figures_of(read_rows(path), "final"), ["two_stage"], "mnist", tmp_path)
    assert "our budget track" in (tmp_path / "size_and_accuracy.svg").read_text()
