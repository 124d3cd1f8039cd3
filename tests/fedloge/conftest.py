"""A small federated world: random images with a pattern a class, clients given by a table, rounds played by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedloge.algorithm import build_method
from fedloge.config import Config
from fedloge.federated import (
    Client,
    add_client,
    choose_clients,
    finish_round,
    live_state,
    load_client,
    local_batches,
    start,
    train_client,
)
from fedloge.model import Shape
from fedloge.problem import Problem
from shared.batches import Resident
from shared.config import parse
from shared.gpu import stream
from shared.longtail import shot_groups_by_share

CPU = torch.device("cpu")
# Rows are clients, columns classes. The second client lacks class 0, the first lacks class 1, the third class 3.
COUNTS = ((9, 0, 3, 4, 1), (0, 6, 2, 8, 3), (4, 1, 9, 0, 2))

# Every method with settings that make it do something in one short round.
SETTINGS = {
    "fedloge": "{name: fedloge, norm: 1.0, etf_steps: 50, heads_bias: true}",
    "dense_etf": "{name: dense_etf, norm: 1.0}",
    "fedavg_gla": "{name: fedavg_gla}",
    "fedavg": "{name: fedavg}",
    "fedavg_ft": "{name: fedavg_ft}",
    "fedprox": "{name: fedprox, mu: 0.5}",
    "fedbn": "{name: fedbn}",
    "fedper": "{name: fedper}",
    "fedrep": "{name: fedrep, head_epochs: 2}",
    "ditto": "{name: ditto, lam: 0.5}",
    "fedrod": "{name: fedrod}",
    "fedbabu": "{name: fedbabu}",
    "fedetf": "{name: fedetf}",
    "creff": "{name: creff, features_per_class: 4, match_steps: 3, retrain_steps: 3}",
}

TEXT = """
paper: fedloge
data: {{name: sample, mean: [0.5], std: [0.25]}}
clients: {{count: 3, alpha: 0.5, min_size: 1}}
model: {{name: convnet}}
method: {method}
optimizer: {{lr: 0.05, momentum: 0.5}}
rounds: 2
local_epochs: 1
batch_size: 8
evaluate: {{every: 1, last: 1}}
device: cpu
precision: float32
threads: 1
"""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    """An argument called `any_method` takes every method in turn."""
    if "any_method" in metafunc.fixturenames:
        metafunc.parametrize("any_method", SETTINGS)


def configure(method="fedavg", *overrides):
    """A configuration; `method` is a name or the YAML of a method's section, `overrides` as on the command line."""
    return parse(TEXT.format(method=SETTINGS.get(method, method)), Config, overrides)


def make_problem(counts=COUNTS, tests_of_class=6, noise=60, seed=0, same_images=False):
    """Images [1, 8, 8] of a pattern a class; client k holds counts[k][c] of class c; every local test is its mix."""
    random = np.random.default_rng(seed)
    table = torch.tensor(counts)
    classes = table.shape[1]
    patterns = random.integers(40, 216, (classes, 1, 8, 8))

    def draw(labels):
        images = patterns[labels] + random.normal(0, noise, (len(labels), 1, 8, 8))
        return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.tensor(labels)

    labels = [c for row in counts for c, n in enumerate(row) for _ in range(n)]
    images, targets = draw(labels)
    if same_images:
        images = images[: int(table[0].sum())].repeat(len(counts), 1, 1, 1)
    parts = torch.arange(len(labels)).split(table.sum(dim=1).tolist())
    clients = tuple(Client(k, part, table[k]) for k, part in enumerate(parts))
    test_images, test_targets = draw([c for c in range(classes) for _ in range(tests_of_class)])
    local = tuple(
        torch.cat([c * tests_of_class + torch.arange(min(int(n), tests_of_class)) for c, n in enumerate(row)])
        for row in table
    )
    totals = tuple(table.sum(dim=0).tolist())
    return Problem(
        Resident(images, targets, (0.5,), (0.25,)),
        Resident(test_images, test_targets, (0.5,), (0.25,)),
        clients,
        local,
        totals,
        tuple(str(c) for c in range(classes)),
        shot_groups_by_share(totals),
        Shape(1, 8, table),
        {},
    )


def make_server(config, problem):
    """A server before its first round."""
    return start(build_method(config, problem.shape), len(problem.clients), CPU)


def train_one(server, problem, config, k):
    """Load client k and train it as a round does; its network's state, copied."""
    client = problem.clients[k]
    load_client(server, k)
    method, names = server.method, ("train", server.round, k)
    losses = train_client(server, problem.train, client, method.phases(), config, names, method.loss)
    return {e: t.detach().clone() for e, t in live_state(server.network).items()}, losses


def play_round(server, problem, config, clients=None):
    """One round, as `fedloge.train` plays it, with the clients in any order."""
    chosen = choose_clients(server.round, config) if clients is None else clients
    total = sum(problem.clients[k].size for k in chosen)
    losses = []
    for k in chosen:
        client = problem.clients[k]
        load_client(server, k)
        draws = stream(config.seed, "message", server.round, k)
        extra = server.method.extra_message(server.network, problem.train, client, draws)
        losses += train_one(server, problem, config, k)[1]
        add_client(server, client, client.size / total, extra)
    finish_round(server)
    return losses


def play(config, problem, rounds=2, clients=None):
    """The server after some rounds."""
    server = make_server(config, problem)
    for _ in range(rounds):
        play_round(server, problem, config, clients)
    return server


def batches(problem, config, k, round=0, phase=0, epoch=0):
    """The batches that client k sees in an epoch."""
    draws = (config.seed, "train", round, k, phase, epoch)
    return list(local_batches(problem.train, problem.clients[k], config.batch_size, draws))


def fine_tune_batches(problem, config, k, round=0, phase=0, epoch=0):
    """The batches that client k sees in an epoch of its fine-tuning after so many rounds."""
    draws = (config.seed, "fine tune", round, k, phase, epoch)
    return list(local_batches(problem.train, problem.clients[k], config.batch_size, draws))


def with_prefix(state, prefix):
    """Entries below a prefix."""
    return {entry: tensor for entry, tensor in state.items() if entry.startswith(prefix)}


def same_bits(left, right):
    """Whether two states have the same entries with the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[e], right[e]) for e in left)


def changed(before, after):
    """The entries that differ."""
    return {entry for entry in before if not torch.equal(before[entry], after[entry])}


def copy_of(state):
    """The state as it is now."""
    return {entry: tensor.detach().clone() for entry, tensor in state.items()}


@pytest.fixture(scope="session")
def lab():
    """The functions above."""
    return SimpleNamespace(
        configure=configure,
        problem=make_problem,
        server=make_server,
        train_one=train_one,
        play_round=play_round,
        play=play,
        batches=batches,
        fine_tune_batches=fine_tune_batches,
        part=with_prefix,
        same=same_bits,
        changed=changed,
        copy=copy_of,
        settings=SETTINGS,
    )
