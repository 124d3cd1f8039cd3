"""What FedROD, FedBABU and FedETF change against FedAvg, by its own formula, computed again here."""

import math

import pytest
import torch
from torch.nn import functional

from fedloge.eval import evaluate, global_features
from fedloge.federated import live_state, load_client, train_client
from fedloge.method import simplex_etf
from tests.fedloge.helpers import gradients, personal_accuracy, personal_states

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")


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
