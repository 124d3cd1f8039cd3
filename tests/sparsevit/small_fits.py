"""Small trainings, step by step."""

import torch

from shared.batches import Resident, random_flip
from shared.config import parse
from sparsevit import algorithm
from sparsevit.algorithm import build_term, mapped_blocks
from sparsevit.config import AuthorsRecipe, Config, OursRecipe
from sparsevit.fit import Fit, Plan

SGD = OursRecipe(name="ours", lr=0.05, clip=1.0)
AUTHORS = AuthorsRecipe(name="authors", warmup_steps=2)
TEXT = """
paper: sparsevit
data: {name: sample, mean: [0.5], std: [0.25]}
model: {arch: s0}
recipe: {name: ours}
epochs: 1
batch_size: 8
device: cpu
threads: 1
"""


def configure(method, *overrides):
    return parse(TEXT, Config, [f"method={method}", *overrides])


def source(count=40, channels=2, classes=5, flip=True):
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, 8, 8), generator=draws, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    return Resident(images, labels, [0.5] * channels, [0.25] * channels, (random_flip,) if flip else ())


def make(lab, method="none", recipe=SGD, epochs=3, batch_size=8, seed=0, masks=None, dropout=0.0, overrides=(), **plan):
    network = lab.network()
    network.dropout = dropout
    for block in network.blocks:
        block.dropout = dropout
    config = configure(method, *overrides)
    algorithm.prepare(config, network)
    plan = Plan(("test",), epochs, batch_size, recipe, seed, **plan)
    return Fit(network, source(), plan, build_term(config), mapped_blocks(config, 2), masks)


def state_of(fit):
    return {name: tensor.clone() for name, tensor in fit.network.state_dict().items()}


def run(fit, steps=None):
    for done in fit.steps():
        if done == steps:
            break
    return state_of(fit)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
