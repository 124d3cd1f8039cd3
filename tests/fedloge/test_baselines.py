"""What each baseline changes against FedAvg, by its own formula, computed again here."""

import math

import pytest
import torch
from torch.nn import functional

from fedloge.creff import class_gradients, fit_features, retrain
from fedloge.eval import evaluate, global_features
from fedloge.federated import live_state, load_client, train_client
from fedloge.method import simplex_etf
from fedloge.model import Network
from shared.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")

RATE, MOMENTUM = 0.05, 0.5  # of the fixture's configuration


def gradients(server, problem, batch, k=0, loss=None):
    """The gradients of the method's loss on one batch, by parameter; the network as it stands."""
    network = server.network
    network.zero_grad()
    (loss or server.method.loss)(network, *batch, problem.clients[k], server.state).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}


def away_from_received(server, seed=0, size=0.1):
    """Move the resident network's parameters off the received ones, so that a pull has a direction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in server.network.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def personal_states(lab, server, problem, config):
    """The state of each client's fine-tuned network, as it is when the evaluation reads it."""
    states, method = [], server.method
    for client in problem.clients:
        load_client(server, client.index)
        names = ("fine tune", server.round, client.index)
        train_client(server, problem.train, client, method.fine_tuning(), config, names, method.fine_tuning_loss)
        states.append(lab.copy(live_state(server.network)))
    return states


def personal_accuracy(server, problem, states):
    """Mean accuracy of whole networks on the local tests, by hand."""
    found = []
    for state, local in zip(states, problem.local_tests, strict=True):
        server.network.load_state_dict(state)
        server.network.eval()
        images, labels = problem.test.batch(local, torch.Generator())
        with torch.no_grad():
            found.append(
                float((server.method.personal_logits(server.network, images).argmax(1) == labels).double().mean())
            )
    return sum(found) / len(found)


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


# --- FedROD -----------------------------------------------------------------------------------------------------------


def balanced_softmax(logits, targets, counts):
    """-log( n_y e^{z_y} / sum_c n_c e^{z_c} ), classes without images left out of the sum."""
    held = counts.nonzero()[:, 0]
    return torch.stack(
        [
            (counts[held] * (z[held] - z[y]).exp()).sum().log() - math.log(int(counts[y]))
            for z, y in zip(logits, targets, strict=True)
        ]
    ).mean()


@pytest.mark.parametrize("k", [0, 1, 2])
def test_fedrod_trains_its_generic_part_by_balanced_softmax_and_its_private_head_beside_it(lab, k):
    config, problem = lab.configure("fedrod"), lab.problem()
    server = lab.play(config, problem, rounds=1)
    load_client(server, k)
    network, batch = server.network.train(), lab.batches(problem, config, k)[0]
    found = gradients(server, problem, batch, k)
    features = network.features(batch[0])
    logits = network["classifier"](features)
    generic = {n: p for n, p in network.named_parameters() if not n.startswith("personal.")}
    counts = problem.clients[k].counts
    wanted = torch.autograd.grad(balanced_softmax(logits, batch[1], counts), list(generic.values()), retain_graph=True)
    for name, gradient in zip(generic, wanted, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    private = functional.cross_entropy(logits.detach() + network["personal"](features.detach()), batch[1])
    own = lab.part(dict(network.named_parameters()), "personal.")
    for name, gradient in zip(own, torch.autograd.grad(private, list(own.values())), strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    absent = counts == 0
    assert absent.any()
    assert torch.equal(found["classifier.weight"][absent], torch.zeros(int(absent.sum()), 64))
    assert torch.equal(found["classifier.bias"][absent], torch.zeros(int(absent.sum())))
    assert (found["classifier.weight"][~absent] != 0).any(dim=1).all()
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_fedrods_personal_head_is_the_sum_of_generic_and_private(lab):
    server = lab.play(lab.configure("fedrod"), lab.problem())
    assert set(server.private) == {"personal.weight", "personal.bias"}
    weight, bias = server.method.personal_heads(server)[""]
    features = torch.rand(7, 64)
    for k in range(3):
        generic = features @ server.state["classifier.weight"].T + server.state["classifier.bias"]
        own = features @ server.private["personal.weight"][k].T + server.private["personal.bias"][k]
        torch.testing.assert_close(features @ weight[k].T + bias[k], generic + own)
    assert server.method.generic_heads(server)[""][0] is server.state["classifier.weight"]


# --- FedBABU ----------------------------------------------------------------------------------------------------------


def test_fedbabus_classifier_keeps_its_first_bits_in_the_rounds_even_under_weight_decay(lab):
    config, problem = lab.configure("fedbabu", "optimizer.weight_decay=0.1"), lab.problem()
    first = lab.server(config, problem)
    server = lab.play(config, problem)
    assert lab.changed(first.state, server.state) == set(lab.part(first.state, "backbone."))
    plain = lab.server(lab.configure("fedavg"), problem)
    assert torch.equal(server.state["classifier.weight"], plain.state["classifier.weight"])


@pytest.mark.parametrize(("what", "moved"), [("head", "classifier."), ("all", "")])
def test_fedbabu_fine_tunes_the_head_or_everything_before_the_test(lab, what, moved):
    config, problem = lab.configure(f"{{name: fedbabu, fine_tune: {what}, fine_tune_epochs: 2}}"), lab.problem()
    server = lab.play(config, problem)
    before = lab.copy(server.state)
    states = personal_states(lab, server, problem, config)
    for state in states:
        assert lab.changed(server.state, state) == set(lab.part(server.state, moved))
    assert not torch.equal(states[0]["classifier.weight"], states[1]["classifier.weight"])
    figures, _ = evaluate(server, problem, config)
    assert figures["personal.accuracy"] == pytest.approx(personal_accuracy(server, problem, states), abs=1e-12)
    assert lab.same(server.state, before)


# --- FedETF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 16])
def test_fedetfs_logits_are_temperature_times_frame_times_unit_projection(lab, width):
    config, problem = lab.configure(f"{{name: fedetf, projection_dim: {width}, temperature: 3.0}}"), lab.problem()
    server = lab.server(config, problem)
    assert torch.equal(server.state["classifier.weight"], simplex_etf(width, 5, server.method.init_seed("etf")))
    assert "classifier.bias" not in server.state
    images = next(problem.test.evaluate(9))[0]
    network = server.network.eval()
    u = network.features(images) @ server.state["projection.weight"].T
    u = u / u.pow(2).sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(u.norm(dim=1), torch.ones(9))
    wanted = 3.0 * u @ server.state["classifier.weight"].T
    torch.testing.assert_close(server.method.personal_logits(network, images), wanted)
    batch, client = lab.batches(problem, config, 1)[0], problem.clients[1]
    with torch.no_grad():
        found = server.method.loss(network, *batch, client, server.state)
        logits = server.method.personal_logits(network, batch[0])
        torch.testing.assert_close(found, balanced_softmax(logits, batch[1], client.counts))
        plain = server.method.fine_tuning_loss(network, *batch, client, server.state)
        torch.testing.assert_close(plain, functional.cross_entropy(logits, batch[1]))


def test_fedetf_averages_backbone_projection_and_temperature_and_never_moves_the_frame(lab):
    config, problem = lab.configure("fedetf", "optimizer.weight_decay=0.01"), lab.problem()
    first, server = lab.server(config, problem), lab.play(config, problem)
    moved = lab.changed(first.state, server.state)
    assert moved == set(server.state) - {"classifier.weight"}
    assert {"projection.weight", "temperature.0"} <= moved
    assert server.private == {}


def test_fedetfs_one_generic_map_predicts_as_the_normalised_logits(lab):
    config, problem = lab.configure("fedetf"), lab.problem()
    server = lab.play(config, problem)
    features = global_features(server, problem, config)
    weight, bias = server.method.generic_heads(server)[""]
    assert bias is None
    load_client(server, 0)
    with torch.no_grad():
        logits = server.method.personal_logits(server.network.eval(), next(problem.test.evaluate(500))[0])
    assert torch.equal((features @ weight.T).argmax(dim=1), logits.argmax(dim=1))
    assert len(logits.argmax(dim=1).unique()) > 1


def test_fedetf_fine_tunes_the_projection_and_the_clients_copy_of_the_frame_in_turn(lab):
    config, problem = lab.configure("{name: fedetf, fine_tune_epochs: 2}"), lab.problem()
    server = lab.play(config, problem)
    before = lab.copy(server.state)
    projection, classifier, *again = server.method.fine_tuning()
    assert again == [projection, classifier]
    assert projection.epochs == classifier.epochs == 1
    for phase, moved in ((projection, {"projection.weight"}), (classifier, {"classifier.weight"})):
        load_client(server, 0)
        loss = server.method.fine_tuning_loss
        train_client(server, problem.train, problem.clients[0], [phase], config, ("x",), loss)
        assert lab.changed(server.state, live_state(server.network)) == moved
    states = personal_states(lab, server, problem, config)
    figures, _ = evaluate(server, problem, config)
    assert figures["personal.accuracy"] == pytest.approx(personal_accuracy(server, problem, states), abs=1e-12)
    assert lab.same(server.state, before)


# --- CReFF ------------------------------------------------------------------------------------------------------------

CREFF = "{name: creff, features_per_class: 6, match_steps: 40, retrain_steps: 40}"


def test_creffs_message_is_autograds_gradient_of_each_class(lab):
    config, problem = lab.configure(CREFF), lab.problem()
    server = lab.play(config, problem, rounds=1)
    load_client(server, 0)
    client = problem.clients[0]
    found = server.method.extra_message(server.network, problem.train, client, torch.Generator())
    network = server.network.eval()
    images, targets = problem.train.batch(client.images, torch.Generator())
    features = network.features(images).detach()
    weight, bias = (server.state[f"retrained.{e}"].clone().requires_grad_() for e in ("weight", "bias"))
    assert found["present"].tolist() == [1, 0, 1, 1, 1]
    for c in range(5):
        own = features[targets == c]
        if not len(own):
            assert not found["gradients"][c].any()
            continue
        loss = functional.cross_entropy(functional.linear(own, weight, bias), targets[targets == c])
        to_weight, to_bias = torch.autograd.grad(loss, (weight, bias))
        torch.testing.assert_close(found["gradients"][c], torch.cat([to_weight, to_bias[:, None]], dim=1))


def test_creffs_gradients_of_features_are_autograds_too():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(3, 7, 4, generator=generator)
    weight = torch.randn(3, 4, generator=generator).requires_grad_()
    bias = torch.randn(3, generator=generator).requires_grad_()
    found = class_gradients(features, (weight.detach(), bias.detach()))
    for c in range(3):
        loss = functional.cross_entropy(functional.linear(features[c], weight, bias), torch.full((7,), c))
        to_weight, to_bias = torch.autograd.grad(loss, (weight, bias))
        torch.testing.assert_close(found[c], torch.cat([to_weight, to_bias[:, None]], dim=1))


def test_creff_fits_the_features_of_seen_classes_to_the_gradients_and_leaves_the_others(lab):
    settings = lab.configure(CREFF).method
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 6, 8, generator=generator)
    head = torch.randn(4, 8, generator=generator), torch.zeros(4)
    wanted = class_gradients(torch.rand(4, 6, 8, generator=generator), head)
    seen = torch.tensor([True, True, False, True])
    moved = fit_features(features, wanted, seen, head, settings)

    def agreement(values):
        return functional.cosine_similarity(class_gradients(values, head), wanted, dim=-1)[seen].mean()

    assert agreement(moved) > agreement(features) + 0.1
    assert torch.equal(moved[2], features[2])
    assert (moved[seen] != features[seen]).flatten(1).any(dim=1).all()


def test_creff_retrains_a_copy_of_the_classifier_by_gradient_steps_on_all_features_alike(lab):
    settings = lab.configure("{name: creff, retrain_steps: 3, retrain_lr: 0.2}").method
    generator = torch.Generator().manual_seed(0)
    features, seen = torch.rand(2, 6, 8, generator=generator), torch.tensor([True, False, True])
    head = torch.randn(3, 8, generator=generator), torch.randn(3, generator=generator)
    kept = head[0].clone()
    weight, bias = (tensor.clone().requires_grad_() for tensor in head)
    for _ in range(3):
        # in balance: every class that is there has the same share of the loss, whatever its training images
        losses = [
            functional.cross_entropy(own @ weight.T + bias, torch.full((6,), c))
            for own, c in zip(features, (0, 2), strict=True)
        ]
        loss = torch.stack(losses).mean()
        steps = torch.autograd.grad(loss, (weight, bias))
        weight, bias = (t.detach().sub(0.2 * g).requires_grad_() for t, g in zip((weight, bias), steps, strict=True))
    found = retrain(features, seen, head, settings)
    torch.testing.assert_close(found[0], weight.detach())
    torch.testing.assert_close(found[1], bias.detach())
    assert torch.equal(head[0], kept)


def test_creffs_server_averages_over_the_clients_that_have_a_class(lab):
    config, problem = lab.configure(CREFF), lab.problem()
    server = lab.server(config, problem)
    messages = []
    for client in problem.clients:
        load_client(server, client.index)
        messages.append(server.method.extra_message(server.network, problem.train, client, torch.Generator()))
    summed = {name: sum(message[name] for message in messages) for name in messages[0]}
    head = server.state["retrained.weight"].clone(), server.state["retrained.bias"].clone()
    mean = torch.stack(
        [torch.stack([m["gradients"][c] for m in messages if m["present"][c]]).mean(dim=0) for c in range(5)]
    )
    features = server.state["synthetic.features"].clone()
    wanted = fit_features(features, mean, torch.ones(5, dtype=torch.bool), head, server.method.settings)
    server.method.server_step(server, summed)
    torch.testing.assert_close(server.state["synthetic.features"], wanted)


def test_creffs_server_changes_classifier_and_features_and_the_clients_get_them(lab):
    config, problem = lab.configure(CREFF), lab.problem()
    first, server = lab.server(config, problem), lab.play(config, problem, rounds=1)
    plain = lab.play(lab.configure("fedavg"), problem, rounds=1)
    assert {"retrained.weight", "retrained.bias", "synthetic.features"} <= lab.changed(first.state, server.state)
    assert lab.same({e: server.state[e] for e in plain.state}, plain.state), "theta and the averaged head are FedAvg's"
    load_client(server, 2)
    assert torch.equal(server.network["retrained"].weight, server.state["retrained.weight"])
    assert server.method.generic_heads(server)[""][0] is server.state["retrained.weight"]
    assert server.method.generic_heads(server)["raw"][0] is server.state["classifier.weight"]
    assert isinstance(server.network, Network)


def test_creff_retrains_on_the_features_of_classes_seen_in_earlier_rounds_too(lab):
    """Where few clients take part, a class that none of them has would else be unlearnt on the server."""
    counts = ((9, 0, 6, 4), (0, 6, 0, 8))
    config, problem = lab.configure(CREFF, "clients.count=2"), lab.problem(counts)
    server = lab.play(config, problem, rounds=1, clients=[0])
    fitted = server.state["synthetic.features"].clone()
    lab.play_round(server, problem, config, [1])
    features = server.state["synthetic.features"]
    assert torch.equal(features[[0, 2]], fitted[[0, 2]])
    assert not torch.equal(features[[1, 3]], fitted[[1, 3]])
    head = server.state["classifier.weight"], server.state["classifier.bias"]
    wanted = retrain(features, torch.ones(4, dtype=torch.bool), head, server.method.settings)
    torch.testing.assert_close(server.state["retrained.weight"], wanted[0])
