"""CReFF: the messages, the fitted features and the classifier that is trained on them."""

import pytest
import torch
from torch.nn import functional

from fedloge.creff import class_gradients, fit_features, retrain
from fedloge.federated import load_client
from fedloge.model import Network

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")


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
    server.state["classifier.weight"].add_(torch.randn_like(server.state["classifier.weight"]))  # not the one in use
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
