"""The engine of the rounds: who takes part, what moves, what is sent, how it is averaged, what stays in memory."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedloge.federated import (
    Phase,
    add_client,
    choose_clients,
    finish_round,
    live_state,
    load_client,
    set_trained,
    train_client,
)
from shared.checkpoint import load_state, save_state
from shared.gpu import NotFiniteError
from tests.fedloge.helpers import FEDLOGE

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")  # the frames here are repaired in a few steps


# --- who takes part ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "fraction", "wanted"),
    [(10, 0.3, 3), (10, 0.01, 1), (10, 1.0, 10), (5, 0.5, 3), (40, 0.3, 12), (1, 0.1, 1)],
)
def test_the_asked_share_of_clients_takes_part(lab, count, fraction, wanted):
    config = lab.configure("fedavg", f"clients.count={count}", f"clients.fraction={fraction}")
    for round in range(5):
        chosen = choose_clients(round, config)
        assert len(chosen) == wanted
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(range(count))


def test_the_choice_of_clients_depends_on_seed_and_round_alone(lab):
    def choices(method, seed):
        config = lab.configure(method, "clients.count=20", "clients.fraction=0.3", f"seed={seed}")
        return [choose_clients(round, config) for round in range(10)]

    first = choices("fedavg", 0)
    torch.manual_seed(5)
    assert choices("fedavg", 0) == choices("fedper", 0) == first
    assert choices("fedavg", 1) != first
    assert len({tuple(chosen) for chosen in first}) > 5


def test_every_client_and_every_pair_is_chosen_equally_often(lab):
    config = lab.configure("fedavg", "clients.count=6", "clients.fraction=0.5")
    rounds = 2000
    taken = torch.zeros(rounds, 6)
    for round in range(rounds):
        taken[round, choose_clients(round, config)] = 1
    deviation = math.sqrt(rounds * 0.25)
    assert (taken.sum(dim=0) - rounds / 2).abs().max() < 4 * deviation
    pairs = (taken.T @ taken)[~torch.eye(6, dtype=torch.bool)]
    assert (pairs - rounds * 0.2).abs().max() < 4.5 * math.sqrt(rounds * 0.2 * 0.8)


# --- the frozen frame -------------------------------------------------------------------------------------------------


def test_frame_is_a_buffer_that_no_gradient_and_no_optimiser_reaches(lab):
    server = lab.server(lab.configure(FEDLOGE), lab.problem())
    frame = server.network["etf"].weight
    assert "etf.weight" in dict(server.network.named_buffers())
    assert not any(name.startswith("etf") for name, _ in server.network.named_parameters())
    assert not isinstance(frame, nn.Parameter)
    assert not frame.requires_grad
    trained = set_trained(server.network, server.method.phases()[0])
    assert not any(parameter is frame for parameter in trained)


def test_frame_has_the_same_bits_at_every_client_and_after_training_with_weight_decay(lab):
    config, problem = lab.configure(FEDLOGE, "optimizer.weight_decay=0.1"), lab.problem()
    server = lab.server(config, problem)
    before = server.state["etf.weight"].clone()
    for k in range(3):
        load_client(server, k)
        assert torch.equal(server.network["etf"].weight, before)
        state, _ = lab.train_one(server, problem, config, k)
        assert torch.equal(state["etf.weight"], before)
    lab.play_round(server, problem, config)
    assert torch.equal(server.state["etf.weight"], before)
    assert torch.equal(server.network["etf"].weight, before)


def test_a_saved_server_is_restored_to_the_bit_with_its_frame(lab, tmp_path):
    problem = lab.problem()
    server = lab.play(lab.configure(FEDLOGE), problem)
    save_state(tmp_path / "state", server.snapshot())
    other = lab.server(lab.configure(FEDLOGE, "seed=1"), problem)
    assert not torch.equal(other.state["etf.weight"], server.state["etf.weight"])
    other.restore(load_state(tmp_path / "state"))
    assert lab.same(other.state, server.state)
    assert lab.same(other.private, server.private)
    assert other.round == server.round == 2


def test_a_run_stopped_between_two_clients_goes_on_to_the_same_bits(lab, any_method, tmp_path):
    config, problem = lab.configure(any_method), lab.problem()
    whole = lab.play(config, problem, rounds=2)

    def one(server, k):
        client = problem.clients[k]
        load_client(server, k)
        extra = server.method.extra_message(server.network, problem.train, client, torch.Generator())
        lab.train_one(server, problem, config, k)
        add_client(server, client, client.size / total, extra)

    total = sum(client.size for client in problem.clients)
    stopped = lab.play(config, problem, rounds=1)
    one(stopped, 0)
    save_state(tmp_path / "state", stopped.snapshot())
    resumed = lab.server(config, problem)
    resumed.restore(load_state(tmp_path / "state"))
    assert resumed.position == 1
    for k in range(resumed.position, 3):
        one(resumed, k)
    finish_round(resumed)
    assert lab.same(resumed.state, whole.state)
    assert lab.same(resumed.private, whole.private)


# --- a local step -----------------------------------------------------------------------------------------------------


def test_local_training_moves_theta_psi_and_the_own_phi_and_nothing_else(lab):
    config, problem = lab.configure(FEDLOGE), lab.problem()
    server = lab.server(config, problem)
    state, private = lab.copy(server.state), lab.copy(server.private)
    load_client(server, 1)
    before = lab.copy(live_state(server.network))
    after, _ = lab.train_one(server, problem, config, 1)
    assert lab.changed(before, after) == set(before) - {"etf.weight"}
    assert lab.same(server.state, state), "the server's own copy must wait for the average"
    assert lab.same(server.private, private), "a client's own head is kept when it reports, not before"
    add_client(server, problem.clients[1], 1.0, {})
    weight = server.private["personal.weight"]
    assert torch.equal(weight[1], after["personal.weight"])
    assert torch.equal(weight[[0, 2]], private["personal.weight"][[0, 2]])


def randomise(server, prefix, seed):
    generator = torch.Generator().manual_seed(seed)
    for states in (server.state, server.private):
        for entry, tensor in states.items():
            if entry.startswith(prefix):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize(
    ("varied", "untouched"), [(("classifier.", "personal."), "backbone."), (("personal.",), "classifier.")]
)
def test_theta_does_not_depend_on_the_heads_nor_psi_on_phi(lab, varied, untouched):
    config, problem = lab.configure("fedloge"), lab.problem()
    trajectories = []
    for seed in (1, 2):
        server = lab.server(config, problem)
        for prefix in varied:
            randomise(server, prefix, seed)
        trajectory = []
        for _ in range(3):
            lab.play_round(server, problem, config)
            trajectory.append(lab.copy(lab.part(server.state, untouched)))
        trajectories.append((trajectory, server.private["personal.weight"]))
    (first, first_phi), (second, second_phi) = trajectories
    assert all(lab.same(a, b) for a, b in zip(first, second, strict=True))
    assert lab.changed(first[0], first[2]), "it must have moved"
    assert not torch.equal(first_phi, second_phi)


def test_rows_of_absent_classes_keep_their_length_and_those_of_present_classes_double(lab):
    """40 classes of which the client has every other one; trained until it fits its images."""
    row = tuple(4 + c % 3 if c % 2 else 0 for c in range(40))
    config = lab.configure(FEDLOGE, "clients.count=2", "local_epochs=60", "optimizer.lr=0.02")
    problem = lab.problem((row, (1,) * 40), noise=20)
    server = lab.server(config, problem)
    before = server.private["personal.weight"][0].norm(dim=1).clone()
    losses = lab.play_round(server, problem, config, [0])
    assert losses[-1] < 0.1 * losses[0]
    growth, held = server.private["personal.weight"][0].norm(dim=1) / before, torch.tensor(row) > 0
    assert abs(float(growth[~held].median()) - 1) < 0.15
    assert growth[held].min() > 2
    load_client(server, 0)
    images, _ = problem.train.batch(problem.clients[0].images, torch.Generator())
    with torch.no_grad():
        logits = server.network.eval().features(images) @ server.private["personal.weight"][0].T
    assert logits[:, ~held].mean() < logits[:, held].amax(dim=1).mean() - 5


@pytest.mark.parametrize(("momentum", "equal"), [(0.0, True), (0.9, False)])
def test_momentum_starts_at_zero_in_every_round(lab, momentum, equal):
    """One client, full batches: two rounds of a step are one round of two steps exactly where there is no momentum."""
    problem = lab.problem(((5, 4, 3),))
    settings = ("model.name=mlp", "clients.count=1", "batch_size=12", f"optimizer.momentum={momentum}")
    two_rounds = lab.play(lab.configure(FEDLOGE, *settings), problem, rounds=2)
    one_round = lab.play(lab.configure(FEDLOGE, *settings, "local_epochs=2"), problem, rounds=1)
    entries = lab.part(two_rounds.state, ("backbone.", "classifier."))
    gaps = [float((one_round.state[e] - tensor).abs().max()) for e, tensor in entries.items()]
    assert (max(gaps) < 1e-6) == equal


def test_a_phase_moves_its_parameters_alone_and_parts_that_stand_still_keep_their_statistics(lab):
    config, problem = lab.configure("fedavg"), lab.problem()
    server = lab.server(config, problem)
    load_client(server, 0)
    before = lab.copy(live_state(server.network))
    phase = Phase(1, lambda entry: entry == "classifier.weight")
    train_client(server, problem.train, problem.clients[0], [phase], config, ("x",), server.method.loss)
    assert lab.changed(before, live_state(server.network)) == {"classifier.weight"}


def test_a_loss_that_is_not_finite_stops_before_the_update(lab):
    config, problem = lab.configure("fedavg"), lab.problem()
    server = lab.server(config, problem)
    load_client(server, 0)

    def broken(network, images, targets, client, received):
        return server.method.loss(network, images, targets, client, received) * math.nan

    before = lab.copy(dict(server.network.named_parameters()))
    with pytest.raises(NotFiniteError):
        train_client(server, problem.train, problem.clients[0], server.method.phases(), config, ("x",), broken)
    assert lab.same(before, lab.copy(dict(server.network.named_parameters())))


# --- degenerate clients -----------------------------------------------------------------------------------------------


def test_a_client_of_one_class_trains_to_finite_weights_and_predicts_that_class(lab):
    problem = lab.problem(((0, 12, 0), (6, 3, 3)), noise=20)
    config = lab.configure(FEDLOGE, "model.name=mlp", "clients.count=2", "local_epochs=15")
    server = lab.play(config, problem, rounds=2)
    assert all(tensor.isfinite().all() for tensor in (*server.state.values(), *server.private.values()))
    load_client(server, 0)
    features = server.network.eval().features(problem.train.batch(problem.clients[0].images, torch.Generator())[0])
    weight, _ = server.method.personal_heads(server)["phi"]
    assert (functional.linear(features, weight[0]).argmax(dim=1) == 1).all()


@pytest.mark.parametrize(("images", "steps"), [(9, 1), (10, 2), (17, 2), (2, 1), (8, 1)])
def test_a_last_batch_of_one_image_joins_the_batch_before_and_no_image_is_lost(lab, images, steps):
    config, problem = lab.configure("fedavg", "clients.count=1"), lab.problem(((images - 1, 1),))
    found = lab.batches(problem, config, 0)
    assert len(found) == steps
    assert min(len(targets) for _, targets in found) >= 2
    assert sum(len(targets) for _, targets in found) == images
    assert all(math.isfinite(loss) for loss in lab.train_one(lab.server(config, problem), problem, config, 0)[1])


def test_a_client_without_images_changes_nothing(lab, any_method):
    counts = ((9, 0, 3, 4, 1), (0, 0, 0, 0, 0), (4, 1, 9, 0, 2), (0, 6, 2, 8, 3))
    config, problem = lab.configure(any_method, "clients.count=4"), lab.problem(counts)
    with_it = lab.play(config, problem, clients=[0, 1, 2, 3])
    without = lab.play(config, problem, clients=[0, 2, 3])
    for entry, tensor in without.state.items():
        torch.testing.assert_close(with_it.state[entry], tensor, rtol=0, atol=1e-6)
    assert all(torch.equal(tensor[[0, 2, 3]], without.private[e][[0, 2, 3]]) for e, tensor in with_it.private.items())
    fresh = lab.server(config, problem)
    for entry, tensor in lab.part(with_it.private, ("personal.", "own_", "classifier.")).items():
        assert torch.equal(tensor[1], fresh.private[entry][1])
