"""What FedAvg, FedProx, FedBN, FedPer, FedRep and Ditto change, by its own formula, computed again here."""

import pytest
import torch
from torch.nn import functional

from fedloge.eval import evaluate, global_features
from fedloge.federated import live_state, load_client, train_client
from shared.errors import ConfigError
from tests.fedloge.helpers import gradients, personal_accuracy, personal_states

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")


RATE, MOMENTUM = 0.05, 0.5  # of the fixture's configuration


def away_from_received(server, seed=0, size=0.1):
    """Move the resident network's parameters off the received ones, so that a pull has a direction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in server.network.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


# --- FedAvg -----------------------------------------------------------------------------------------------------------


def test_fedavg_is_the_size_weighted_mean_of_plain_sgd_at_each_client(lab):
    """Two rounds by hand: own SGD with momentum, own average; an MLP, so that there is no batch norm."""
    config, problem = lab.configure("fedavg", "model.name=mlp", "local_epochs=2"), lab.problem()
    server = lab.server(config, problem)
    current = lab.copy(server.state)
    total = sum(client.size for client in problem.clients)
    for round in range(2):
        mean = {entry: torch.zeros_like(tensor) for entry, tensor in current.items()}
        for client in problem.clients:
            w = {entry: tensor.clone().requires_grad_() for entry, tensor in current.items()}
            velocity = {entry: torch.zeros_like(tensor) for entry, tensor in current.items()}
            for epoch in range(2):
                for images, targets in lab.batches(problem, config, client.index, round, 0, epoch):
                    hidden = images.flatten(1)
                    for layer in (1, 3):
                        hidden = hidden @ w[f"backbone.layers.{layer}.weight"].T + w[f"backbone.layers.{layer}.bias"]
                        hidden = hidden.clamp(min=0)
                    logits = hidden @ w["classifier.weight"].T + w["classifier.bias"]
                    loss = -logits.log_softmax(dim=1)[torch.arange(len(targets)), targets].mean()
                    found = torch.autograd.grad(loss, list(w.values()))
                    with torch.no_grad():
                        for entry, gradient in zip(w, found, strict=True):
                            velocity[entry] = MOMENTUM * velocity[entry] + gradient
                            w[entry] -= RATE * velocity[entry]
            for entry in mean:
                mean[entry] += client.size / total * w[entry].detach()
        current = mean
    for _ in range(2):
        lab.play_round(server, problem, config)
    for entry, tensor in current.items():
        torch.testing.assert_close(server.state[entry], tensor, rtol=1e-5, atol=1e-6)


def test_fedavg_has_one_model_for_all(lab):
    server = lab.play(lab.configure("fedavg"), lab.problem())
    assert server.private == {}
    weight, bias = server.method.personal_heads(server)[""]
    for k in range(3):
        assert torch.equal(weight[k], server.state["classifier.weight"])
        assert torch.equal(bias[k], server.state["classifier.bias"])


# --- FedAvg + fine-tuning ---------------------------------------------------------------------------------------------


def test_fine_tuned_fedavg_has_fedavgs_bits_and_evaluating_it_changes_none(lab):
    config, problem = lab.configure("fedavg_ft"), lab.problem()
    plain, tuned = lab.play(lab.configure("fedavg"), problem), lab.play(config, problem)
    assert lab.same(tuned.state, plain.state)
    figures, _ = evaluate(tuned, problem, config)
    assert lab.same(tuned.state, plain.state)
    generic, _ = evaluate(plain, problem, lab.configure("fedavg"))
    assert figures["generic.accuracy"] == generic["generic.accuracy"]
    assert evaluate(tuned, problem, config)[0] == figures


def test_a_signal_is_heard_while_personal_models_are_fine_tuned(lab):
    config, problem = lab.configure("fedavg_ft"), lab.problem()
    server, steps = lab.play(config, problem), []

    def stop() -> None:
        steps.append(1)
        if len(steps) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate(server, problem, config, stop)
    assert len(steps) == 2


def test_fine_tuned_fedavg_trains_everything_on_the_clients_own_training_images(lab):
    config, problem = lab.configure("{name: fedavg_ft, fine_tune_epochs: 3}"), lab.problem()
    server = lab.play(config, problem)
    states = personal_states(lab, server, problem, config)
    assert lab.changed(server.state, states[0]) == set(server.state)
    # the same by torch's own optimiser
    load_client(server, 1)
    network = server.network.train().requires_grad_()
    optimizer = torch.optim.SGD(network.parameters(), RATE, MOMENTUM)
    for epoch in range(3):
        order = lab.fine_tune_batches(problem, config, 1, server.round, 0, epoch)
        assert sum(len(targets) for _, targets in order) == problem.clients[1].size
        for images, targets in order:
            optimizer.zero_grad()
            functional.cross_entropy(network["classifier"](network.features(images)), targets).backward()
            optimizer.step()
    for entry, tensor in live_state(network).items():
        torch.testing.assert_close(states[1][entry], tensor, rtol=1e-5, atol=1e-6)
    figures, _ = evaluate(server, problem, config)
    assert figures["personal.accuracy"] == pytest.approx(personal_accuracy(server, problem, states), abs=1e-12)


# --- FedProx ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.01, 2.0])
def test_fedprox_adds_mu_times_the_way_from_the_received_model_to_every_gradient(lab, mu):
    config, problem = lab.configure(f"{{name: fedprox, mu: {mu}}}"), lab.problem()
    server = lab.play(config, problem, rounds=1)
    load_client(server, 0)
    away_from_received(server)
    batch = lab.batches(problem, config, 0)[0]
    network = server.network.train()
    plain = functional.cross_entropy(network["classifier"](network.features(batch[0])), batch[1])
    wanted = torch.autograd.grad(plain, list(network.parameters()))
    found = gradients(server, problem, batch)
    for (name, parameter), gradient in zip(network.named_parameters(), wanted, strict=True):
        pull = mu * (parameter.detach() - server.state[name])
        torch.testing.assert_close(found[name], gradient + pull, rtol=1e-4, atol=1e-6)


def test_fedprox_term_is_half_mu_times_the_squared_distance(lab):
    config, problem = lab.configure("{name: fedprox, mu: 3.0}"), lab.problem()
    server = lab.server(config, problem)
    network, batch = server.network.eval(), lab.batches(problem, config, 0)[0]
    plain = functional.cross_entropy(network["classifier"](network.features(batch[0])), batch[1])
    torch.testing.assert_close(server.method.loss(network, *batch, problem.clients[0], server.state), plain)
    with torch.no_grad():
        network["classifier"].bias.add_(2.0)  # the same for all classes: the cross-entropy does not move
    moved = server.method.loss(network, *batch, problem.clients[0], server.state)
    torch.testing.assert_close(moved - plain, torch.tensor(3.0 / 2 * 5 * 4))


def test_fedprox_without_its_term_is_fedavg_to_the_bit_and_with_it_is_not(lab):
    problem = lab.problem()
    plain = lab.play(lab.configure("fedavg"), problem)
    assert lab.same(lab.play(lab.configure("{name: fedprox, mu: 0}"), problem).state, plain.state)
    near = lab.play(lab.configure("{name: fedprox, mu: 5.0}"), problem, rounds=1)
    far = lab.play(lab.configure("fedavg"), problem, rounds=1)
    start = lab.server(lab.configure("fedavg"), problem).state["classifier.weight"]
    assert (near.state["classifier.weight"] - start).norm() < (far.state["classifier.weight"] - start).norm()


# --- FedBN ------------------------------------------------------------------------------------------------------------


def test_fedbn_keeps_exactly_the_batch_norms_at_the_clients(lab):
    server = lab.server(lab.configure("fedbn"), lab.problem())
    norms = {f"backbone.layers.{n}.{e}" for n in (1, 4, 7)
             for e in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
    assert set(server.private) == norms
    with pytest.raises(ConfigError, match="mlp has no batch norm"):
        lab.server(lab.configure("fedbn", "model.name=mlp"), lab.problem())


def test_fedbn_averages_the_rest_and_leaves_each_client_its_own_norms(lab):
    config, problem = lab.configure("fedbn"), lab.problem()
    server = lab.play(config, problem, rounds=1)
    own = {k: lab.train_one(server, problem, config, k)[0] for k in range(3)}
    before = lab.copy(server.private)
    lab.play_round(server, problem, config)
    sizes = torch.tensor([client.size for client in problem.clients])
    for entry, tensor in server.state.items():
        mean = sum(own[k][entry] * (sizes[k] / sizes.sum()) for k in range(3))
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)
    for entry, tensor in server.private.items():
        assert not torch.equal(tensor, before[entry])
        assert all(torch.equal(tensor[k], own[k][entry]) for k in range(3))


def test_fedbn_tests_a_client_with_its_own_norms_and_the_generic_model_with_their_mean(lab):
    config, problem = lab.configure("fedbn"), lab.problem()
    server = lab.play(config, problem)
    own = [{**server.state, **{e: t[k] for e, t in server.private.items()}} for k in range(3)]
    figures, _ = evaluate(server, problem, config)
    assert figures["personal.accuracy"] == pytest.approx(personal_accuracy(server, problem, own), abs=1e-12)
    sizes = torch.tensor([client.size for client in problem.clients])
    mean = {}
    for entry, tensor in server.private.items():
        weights = (sizes / sizes.sum()).view(-1, *[1] * (tensor.dim() - 1))
        mean[entry] = (tensor * weights).sum(dim=0) if tensor.is_floating_point() else tensor.max()
    server.network.load_state_dict({**server.state, **mean})
    with torch.no_grad():
        wanted = server.network.eval().features(next(problem.test.evaluate(500))[0])
    load_client(server, 0)  # no client's own norms may stay in the network
    torch.testing.assert_close(global_features(server, problem, config), wanted)


# --- FedPer and FedRep ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_classifier_is_private_and_the_generic_one_the_mean_by_size(lab, name):
    config, problem = lab.configure(name), lab.problem()
    server = lab.play(config, problem)
    assert set(server.private) == {"classifier.weight", "classifier.bias"}
    assert all(entry.startswith("backbone.") for entry in server.state)
    weight, bias = server.method.personal_heads(server)[""]
    assert torch.equal(weight, server.private["classifier.weight"])
    assert torch.equal(bias, server.private["classifier.bias"])
    sizes = [client.size for client in problem.clients]
    mean = sum(n * weight[k] for k, n in enumerate(sizes)) / sum(sizes)
    torch.testing.assert_close(server.method.generic_heads(server)[""][0], mean)
    mean = sum(n * bias[k] for k, n in enumerate(sizes)) / sum(sizes)
    torch.testing.assert_close(server.method.generic_heads(server)[""][1], mean)


def test_fedper_is_fedavg_locally_and_keeps_its_classifier(lab):
    config, problem = lab.configure("fedper"), lab.problem()
    server = lab.server(config, problem)
    plain = lab.server(lab.configure("fedavg"), problem)
    for k in range(3):
        own, _ = lab.train_one(server, problem, config, k)
        assert lab.same(own, lab.train_one(plain, problem, lab.configure("fedavg"), k)[0])
    lab.play_round(server, problem, config)
    assert torch.equal(server.private["classifier.weight"][2], own["classifier.weight"])


def test_fedrep_moves_first_the_head_alone_then_the_backbone_alone(lab):
    config, problem = lab.configure("{name: fedrep, head_epochs: 3}", "local_epochs=2"), lab.problem()
    server = lab.server(config, problem)
    head, body = server.method.phases()
    assert (head.epochs, body.epochs) == (3, 2)
    load_client(server, 0)
    client, loss = problem.clients[0], server.method.loss
    start = lab.copy(live_state(server.network))
    train_client(server, problem.train, client, [head], config, ("x",), loss)
    middle = lab.copy(live_state(server.network))
    assert lab.changed(start, middle) == {"classifier.weight", "classifier.bias"}, "nor do batch norm's statistics move"
    train_client(server, problem.train, client, [body], config, ("x",), loss)
    moved = lab.changed(middle, live_state(server.network))
    assert moved == set(lab.part(start, "backbone."))


def test_fedrep_round_is_head_epochs_then_body_epochs_by_hand(lab):
    config, problem = lab.configure("{name: fedrep, head_epochs: 2}"), lab.problem()
    server = lab.server(config, problem)
    trained, losses = lab.train_one(server, problem, config, 1)
    assert len(losses) == 3 * len(lab.batches(problem, config, 1))
    load_client(server, 1)
    network = server.network.requires_grad_()
    for phase, part, epochs in ((0, "classifier", 2), (1, "backbone", 1)):
        network["backbone"].train(part == "backbone")
        optimizer = torch.optim.SGD(network[part].parameters(), RATE, MOMENTUM)
        for epoch in range(epochs):
            for images, targets in lab.batches(problem, config, 1, 0, phase, epoch):
                network.zero_grad()
                functional.cross_entropy(network["classifier"](network.features(images)), targets).backward()
                optimizer.step()
    for entry, tensor in live_state(network).items():
        torch.testing.assert_close(trained[entry], tensor, rtol=1e-5, atol=1e-6)


# --- Ditto ------------------------------------------------------------------------------------------------------------


def test_dittos_global_branch_is_fedavg_to_the_bit_whatever_lambda(lab):
    problem = lab.problem()
    plain = lab.play(lab.configure("fedavg"), problem)
    for lam in (0, 0.5, 10.0):
        assert lab.same(lab.play(lab.configure(f"{{name: ditto, lam: {lam}}}"), problem).state, plain.state)


def test_dittos_own_model_is_pulled_to_the_received_one_by_lambda(lab):
    config, problem = lab.configure("{name: ditto, lam: 0.7}"), lab.problem()
    server = lab.play(config, problem, rounds=1)
    load_client(server, 0)
    away_from_received(server)
    network, batch = server.network.train(), lab.batches(problem, config, 0)[0]
    own = lab.part(dict(network.named_parameters()), "own_")
    plain = functional.cross_entropy(network["own_classifier"](network["own_backbone"](batch[0])), batch[1])
    wanted = torch.autograd.grad(plain, list(own.values()))
    found = gradients(server, problem, batch)
    for (name, parameter), gradient in zip(own.items(), wanted, strict=True):
        pull = 0.7 * (parameter.detach() - server.state[name.removeprefix("own_")])
        torch.testing.assert_close(found[name], gradient + pull, rtol=1e-4, atol=1e-6)
    ordinary = functional.cross_entropy(network["classifier"](network["backbone"](batch[0])), batch[1])
    rest = {n: p for n, p in network.named_parameters() if n not in own}
    for name, gradient in zip(rest, torch.autograd.grad(ordinary, list(rest.values())), strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_dittos_own_models_start_as_the_global_one_stay_private_and_are_what_is_tested(lab):
    config, problem = lab.configure("ditto"), lab.problem()
    server = lab.server(config, problem)
    for entry, tensor in server.private.items():
        assert entry.startswith("own_")
        assert all(torch.equal(tensor[k], server.state[entry.removeprefix("own_")]) for k in range(3))
    assert len(server.private) == len(server.state)
    for _ in range(2):
        lab.play_round(server, problem, config)
    weight = server.private["own_classifier.weight"]
    assert len({tuple(w.flatten().tolist()) for w in (*weight, server.state["classifier.weight"])}) == 4
    own = [{**server.state, **{e: t[k] for e, t in server.private.items()}} for k in range(3)]
    figures, _ = evaluate(server, problem, config)
    assert figures["personal.accuracy"] == pytest.approx(personal_accuracy(server, problem, own), abs=1e-12)
    network = server.network
    network.load_state_dict(own[0])
    images = next(problem.test.evaluate(4))[0]
    wanted = network["own_classifier"](network["own_backbone"](images))
    torch.testing.assert_close(server.method.personal_logits(network, images), wanted)
