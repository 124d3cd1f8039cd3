"""Small networks and random maps for the oracles."""

from types import SimpleNamespace

import pytest
import torch

from sparsevit.model import BlockSize, Size, build, uniform_size
from tests.sparsevit.whole_runs import SHORT, whole


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def small_size(image=8, patch=4, width=12, depth=2, heads=3, mlp=20, classes=5, channels=2, layer_scale=False):
    return uniform_size(image, channels, patch, width, depth, heads, mlp, classes, layer_scale)


def uneven_size():
    """Blocks that differ in heads and MLP width, as a shrunk network has them."""
    return Size(8, 2, 4, 12, 5, (BlockSize(3, 4, 20), BlockSize(1, 4, 7), BlockSize(2, 4, 1)))


def lively(network, seed=0, std=0.3):
    """Give a network values at which every part matters: biases, norms and LayerScale too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return network.eval()


def network(seed=0, size=None, dtype=torch.float32, **sizes):
    return lively(build(size or small_size(**sizes), seed).to(dtype), seed)


def images(count=6, size=None, seed=1, dtype=torch.float32):
    size = size or small_size()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size.channels, size.image, size.image, generator=generator, dtype=dtype)


def random_map(*shape, seed=0, dtype=torch.float32, scale=1.0):
    """Softmax rows of random logits [*shape]."""
    logits = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.softmax(logits, dim=-1)


@pytest.fixture(scope="session")
def lab():
    return SimpleNamespace(
        small_size=small_size, uneven_size=uneven_size, lively=lively, network=network, images=images,
        random_map=random_map,
    )  # fmt: skip


TINY = (
    "data.train_images=120", "data.test_images=50", "data.val_images=20", "batch_size=10", "eval_batch_size=25",
    "pretrain={epochs: 1, batch_size: 20}", "model={arch: s0, width: 8, depth: 2, heads: 2, mlp: 12, dropout: 0.1}",
    "prune.calibration_images=40",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny(repository):
    """The configuration of a run of half a second: (method, *more overrides)."""
    from shared.config import load
    from sparsevit.config import Config

    def config(method="paper", *more):
        path = repository / "sparsevit" / "configs" / "smoke.yaml"
        return load(path, Config, [*TINY, f"method={method}", *more])

    config.overrides = TINY
    return config


@pytest.fixture(scope="session")
def tiny_run(tiny, tmp_path_factory):
    """A finished run, to look at and not to change."""
    from shared.run import Run
    from sparsevit.train import train

    folder = tmp_path_factory.mktemp("finished") / "smoke-paper-s0"
    config = tiny("paper")
    with Run(folder, config, "test") as run:
        train(config, run)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory, tiny):
    """The folder of a pre-training, so that not every run makes it."""
    folder = tmp_path_factory.mktemp("cache") / "run"
    whole(folder, tiny("none", *SHORT))
    return folder.parent / "pretrained"


@pytest.fixture
def place(tmp_path, cache):
    """A folder for runs that have the pre-training already."""
    (tmp_path / "pretrained").symlink_to(cache)
    return tmp_path
