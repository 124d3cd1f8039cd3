"""The server's average, what a client sends, and the memory of both."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedloge.federated import (
    accumulate,
    add_client,
    finish_round,
    live_state,
    load_client,
    message,
    train_client,
)
from tests.fedloge.helpers import FEDLOGE

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")  # the frames here are repaired in a few steps


# --- averaging --------------------------------------------------------------------------------------------------------


def fill(network, seed):
    """Random values everywhere: parameters, batch-norm statistics, counters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in live_state(network).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.fill_(10 * seed)
    return {entry: tensor.detach().clone() for entry, tensor in live_state(network).items()}


def test_clients_of_one_and_three_images_weigh_a_quarter_and_three_quarters(lab):
    config, problem = lab.configure("fedavg", "clients.count=2"), lab.problem(((1, 0), (2, 1)))
    server = lab.server(config, problem)
    sent = []
    for k, client in enumerate(problem.clients):
        sent.append(fill(server.network, seed=2 - k))
        add_client(server, client, client.size / 4, {})
    finish_round(server)
    averaged = {entry for entry, tensor in server.state.items() if tensor.is_floating_point()}
    assert {"backbone.layers.1.running_mean", "backbone.layers.1.running_var", "classifier.bias"} <= averaged
    for entry, tensor in server.state.items():
        if entry in averaged:
            torch.testing.assert_close(tensor, 0.25 * sent[0][entry] + 0.75 * sent[1][entry], rtol=1e-6, atol=1e-6)
        else:
            assert tensor.dtype == torch.int64
            assert int(tensor) == 20, "a counter is not averaged: the largest is kept"


def test_streaming_average_is_the_stacked_one():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 6, 5, generator=generator)
    sizes = torch.randint(1, 900, (40,), generator=generator)
    total = {}
    for value, size in zip(values, sizes, strict=True):
        accumulate(total, "w", value, int(size) / int(sizes.sum()))
    stacked = (values.double() * (sizes / sizes.sum()).double()[:, None, None]).sum(dim=0)
    torch.testing.assert_close(total["w"], stacked.float(), rtol=0, atol=1e-6)


def test_accumulating_leaves_what_was_sent_untouched():
    sent = {"w": torch.ones(3), "n": torch.tensor(4)}
    total = {}
    for _ in range(2):
        for entry, tensor in sent.items():
            accumulate(total, entry, tensor, 0.5)
    total["n"].add_(1)
    assert torch.equal(sent["w"], torch.ones(3))
    assert int(sent["n"]) == 4
    assert torch.equal(total["w"], torch.ones(3))


def test_the_order_of_the_clients_changes_nothing(lab, any_method):
    config, problem = lab.configure(any_method), lab.problem()
    one, other = (lab.play(config, problem, rounds=1, clients=order) for order in ([0, 1, 2], [2, 0, 1]))
    for entry, tensor in one.state.items():
        torch.testing.assert_close(other.state[entry], tensor, rtol=0, atol=1e-6)
    assert lab.same(one.private, other.private)


def test_identical_clients_average_to_what_one_of_them_reached(lab):
    config = lab.configure(FEDLOGE, "model.name=mlp", "batch_size=12")
    problem = lab.problem(((6, 4, 2),) * 3, same_images=True)
    server = lab.server(config, problem)
    alone, _ = lab.train_one(server, problem, config, 0)
    lab.play_round(server, problem, config)
    for entry, tensor in server.state.items():
        torch.testing.assert_close(tensor, alone[entry], rtol=0, atol=1e-6)


def test_one_client_is_centralised_training_through_the_frame(lab):
    """theta by a hand-written SGD on CE(h S^T), its momentum zero at the start of each round; no head in sight."""
    config = lab.configure(FEDLOGE, "clients.count=1", "local_epochs=2")
    problem = lab.problem(((9, 6, 3, 4, 1),))
    server = lab.server(config, problem)
    load_client(server, 0)
    backbone, frame = server.network["backbone"].train(), server.state["etf.weight"]
    parameters = list(backbone.parameters())
    for round in range(2):
        velocity = [torch.zeros_like(p) for p in parameters]
        for epoch in range(2):
            for images, targets in lab.batches(problem, config, 0, round, 0, epoch):
                loss = functional.cross_entropy(backbone(images) @ frame.T, targets)
                with torch.no_grad():
                    for p, v, g in zip(parameters, velocity, torch.autograd.grad(loss, parameters), strict=True):
                        v.mul_(0.5).add_(g)
                        p.sub_(0.05 * v)
    wanted = lab.copy(backbone.state_dict())
    for _ in range(2):
        lab.play_round(server, problem, config)
    for entry, tensor in wanted.items():
        torch.testing.assert_close(server.state[f"backbone.{entry}"], tensor, rtol=1e-5, atol=1e-6)


def test_clients_that_do_not_take_part_keep_their_bits(lab, any_method):
    config, problem = lab.configure(any_method), lab.problem()
    server = lab.play(config, problem, rounds=1)
    before = lab.copy(server.private)
    lab.play_round(server, problem, config, [0, 2])
    for entry, tensor in server.private.items():
        assert torch.equal(tensor[1], before[entry][1])
        if tensor.is_floating_point():
            assert not torch.equal(tensor[0], before[entry][0])


# --- the message ------------------------------------------------------------------------------------------------------


def test_a_client_sends_theta_and_psi_and_nothing_of_phi(lab):
    config, problem = lab.configure("fedloge"), lab.problem()
    server = lab.server(config, problem)
    parts = dict(server.network.items())
    wanted = {f"{part}.{entry}" for part in ("backbone", "classifier") for entry in parts[part].state_dict()}
    assert set(message(server)) == wanted
    lab.train_one(server, problem, config, 0)
    add_client(server, problem.clients[0], 0.5, {})
    assert set(server.total) == wanted
    assert server.extra == {}


def test_no_method_sends_a_private_or_a_fixed_entry(lab, any_method):
    server = lab.server(lab.configure(any_method), lab.problem())
    sent = set(message(server))
    assert not sent & set(server.private)
    assert not any(server.method.is_fixed(entry) or server.method.is_private(entry) for entry in sent)
    fixed = {entry for entry in server.state if server.method.is_fixed(entry)}
    assert sent | fixed | set(server.private) == set(live_state(server.network))


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(lab, config, problem, rounds=2):
    """The most bytes that live tensors hold at the end of any local step or client, those from before excluded."""
    gc.collect()
    gc.freeze()  # what exists already is not listed by gc.get_objects
    peak = 0

    def look():
        nonlocal peak
        live = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
        storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in live)}
        peak = max(peak, sum(storages.values()))

    try:
        server = lab.server(config, problem)
        for _ in range(rounds):
            for client in problem.clients:
                load_client(server, client.index)
                method = server.method
                names = ("train", server.round, client.index)
                train_client(server, problem.train, client, method.phases(), config, names, method.loss, look)
                add_client(server, client, 1 / len(problem.clients), {})
                look()
            finish_round(server)
    finally:
        gc.unfreeze()
    return peak, sum(tensor.nbytes for tensor in server.private.values())


@pytest.mark.parametrize("name", ["fedloge", "fedavg", "fedper"])
def test_ten_times_the_clients_cost_their_heads_and_less_than_five_per_cent_beside(lab, name):
    peaks = []
    for clients in (4, 40):
        problem = lab.problem(tuple((160 // clients // 2,) * 2 for _ in range(clients)))
        config = lab.configure(name, f"clients.count={clients}", "model.name=mlp", "optimizer.momentum=0.9")
        peaks.append(peak_bytes(lab, config, problem))
    (few, few_heads), (many, many_heads) = peaks
    model = 4 * (64 * 128 + 128 + 128 * 64 + 64)
    assert few > 4 * model, "network, state, sum and momentum must have been seen"
    assert many - few < 0.05 * few + (many_heads - few_heads)
