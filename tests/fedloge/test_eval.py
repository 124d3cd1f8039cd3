"""Evaluation: generic and personal figures by hand, masks, clients without tests."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fedloge import eval as evaluation
from fedloge.eval import add_personal, evaluate, geometry, global_features, head_predictions, worst_decile
from fedloge.federated import load_client
from shared.batches import Resident
from shared.longtail import ShotGroups

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")


# --- the generic model ------------------------------------------------------------------------------------------------


def test_generic_accuracy_is_the_mean_over_classes_and_the_size_weighted_mean_over_groups(lab, any_method):
    problem = replace(lab.problem(tests_of_class=20), groups=ShotGroups((0, 2), (3,), (1, 4)))
    config = lab.configure(any_method)
    server = lab.play(config, problem)
    figures, details = evaluate(server, problem, config)
    for name in {key.partition(".")[0] for key in figures if key.startswith("generic")}:
        per_class = details[f"{name}.per_class"]
        assert figures[f"{name}.accuracy"] == pytest.approx(sum(per_class) / 5, abs=1e-6)
        groups = problem.groups._asdict()
        weighted = sum(len(c) * figures[f"{name}.{group}"] for group, c in groups.items())
        assert figures[f"{name}.accuracy"] == pytest.approx(weighted / 5, abs=1e-6)
        for group, classes in groups.items():
            wanted = sum(per_class[c] for c in classes) / len(classes)
            assert figures[f"{name}.{group}"] == pytest.approx(wanted, abs=1e-6)


def test_a_group_without_classes_has_no_figure(lab):
    config, problem = lab.configure("fedavg"), replace(lab.problem(), groups=ShotGroups((0, 1, 2), (), (3, 4)))
    figures, _ = evaluate(lab.server(config, problem), problem, config)
    assert figures["generic.medium"] is None
    assert figures["generic.few"] is not None


def test_generic_model_is_the_averaged_one_in_eval_mode(lab):
    config, problem = lab.configure("fedavg"), lab.problem(tests_of_class=20)
    server = lab.play(config, problem)
    figures, _ = evaluate(server, problem, config)
    other = lab.server(config, problem).network
    other.load_state_dict(server.state)
    images, labels = next(problem.test.evaluate(500))
    with torch.no_grad():
        predicted = other["classifier"](other.eval().features(images)).argmax(dim=1)
    assert figures["generic.accuracy"] == pytest.approx(float((predicted == labels).double().mean()))


@pytest.mark.parametrize("name", ["fedloge", "fedbn", "fedavg_ft", "ditto", "fedetf"])
def test_figures_do_not_depend_on_the_batch_size(lab, name):
    problem = lab.problem(tests_of_class=20)
    server = lab.play(lab.configure(name), problem)
    found = [evaluate(server, problem, lab.configure(name, f"evaluate.batch_size={n}")) for n in (1, 7, 500)]
    assert found[0] == found[1] == found[2]


def test_figures_do_not_depend_on_the_order_of_the_test_images(lab):
    config, problem = lab.configure("fedloge"), lab.problem(tests_of_class=20)
    server = lab.play(config, problem)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    test = Resident(problem.test.images[order], problem.test.labels[order], (0.5,), (0.25,))
    shuffled = replace(problem, test=test, local_tests=tuple(place[local] for local in problem.local_tests))
    assert evaluate(server, shuffled, config) == evaluate(server, problem, config)


def test_evaluating_changes_no_bit_and_no_later_round(lab, any_method):
    config, problem = lab.configure(any_method), lab.problem()
    watched, plain = lab.server(config, problem), lab.server(config, problem)
    for _ in range(2):
        evaluate(watched, problem, config)
        lab.play_round(watched, problem, config)
        lab.play_round(plain, problem, config)
    evaluate(watched, problem, config)
    assert lab.same(watched.state, plain.state)
    assert lab.same(watched.private, plain.private)


# --- personal models --------------------------------------------------------------------------------------------------


def personal(problem, predictions):
    figures, details = {}, {}
    add_personal(figures, details, [""], [predicted[:, None] for predicted in predictions], problem)
    return figures, details


def with_local_tests(problem, labels):
    """Clients whose local tests have these labels; test images do not matter."""
    flat = torch.tensor([label for own in labels for label in own])
    test = Resident(torch.zeros(len(flat), 1, 8, 8, dtype=torch.uint8), flat, (0.5,), (0.25,))
    local = torch.arange(len(flat)).split([len(own) for own in labels])
    return replace(problem, test=test, local_tests=tuple(local))


def test_personal_accuracy_is_the_unweighted_mean_over_clients(lab):
    problem = with_local_tests(lab.problem(((1, 1),) * 2), [[0] * 10, [1] * 90])
    figures, details = personal(problem, [torch.zeros(10), torch.zeros(90)])
    assert figures["personal.accuracy"] == 0.5
    assert details["personal.clients"] == [1.0, 0.0]


def test_spread_worst_decile_and_balanced_accuracy_by_hand(lab):
    """Accuracies 3/4, 1/2, 1; balanced (2/2 + 1/2) / 2, (1/1 + 0/1) / 2, 1."""
    problem = with_local_tests(lab.problem(((1, 1, 1),) * 3), [[0, 0, 1, 1], [2, 1], [2, 2, 2]])
    figures, _ = personal(problem, [torch.tensor(p) for p in ([0, 0, 1, 2], [2, 0], [2, 2, 2])])
    assert figures["personal.accuracy"] == pytest.approx((0.75 + 0.5 + 1) / 3)
    assert figures["personal.spread"] == pytest.approx(0.25)
    assert figures["personal.worst_decile"] == 0.5
    assert figures["personal.balanced"] == pytest.approx((0.75 + 0.5 + 1) / 3)
    skewed = with_local_tests(lab.problem(((1, 1),)), [[0] * 9 + [1]])
    figures, _ = personal(skewed, [torch.zeros(10)])
    assert figures["personal.accuracy"] == 0.9
    assert figures["personal.balanced"] == 0.5
    assert figures["personal.spread"] is None


def test_worst_decile_is_the_mean_of_the_lowest_tenth():
    assert worst_decile([float(i) for i in range(20, 0, -1)]) == 1.5
    assert worst_decile([3.0, 1.0, 2.0]) == 1.0
    assert worst_decile([float(i) for i in range(11)]) == 0.5
    assert math.isnan(worst_decile([]))


def test_worst_decile_of_twenty_clients_is_the_mean_of_the_two_worst(lab):
    labels = [[0] * 20] * 20
    problem = with_local_tests(lab.problem(((1, 1),) * 20), labels)
    predictions = [torch.tensor([0] * (k + 1) + [1] * (19 - k)) for k in range(20)]
    assert personal(problem, predictions)[0]["personal.worst_decile"] == pytest.approx((1 / 20 + 2 / 20) / 2)


@pytest.mark.parametrize("name", ["fedavg", "ditto", "fedavg_ft"])
def test_clients_without_a_local_test_are_left_out_and_counted(lab, name):
    config, problem = lab.configure(name), lab.problem()
    server = lab.play(config, problem)
    _, all_details = evaluate(server, problem, config)
    assert all_details["clients_without_test"] == 0
    first, second, third = problem.local_tests
    figures, details = evaluate(server, replace(problem, local_tests=(first, second[:0], third)), config)
    assert details["clients_without_test"] == 1
    accuracies = all_details["personal.clients"]
    assert details["personal.clients"] == [accuracies[0], accuracies[2]]
    assert figures["personal.accuracy"] == pytest.approx((accuracies[0] + accuracies[2]) / 2, abs=1e-6)


def test_heads_of_all_clients_on_shared_features_predict_as_one_network_a_client(lab):
    config, problem = lab.configure("fedper"), lab.problem(tests_of_class=20)
    server = lab.play(config, problem)
    features = global_features(server, problem, config)
    together = [predicted[:, 0] for predicted in head_predictions(features, server, problem, config)]
    for client, local, predicted in zip(problem.clients, problem.local_tests, together, strict=True):
        load_client(server, client.index)
        images, _ = problem.test.batch(local, torch.Generator())
        with torch.no_grad():
            alone = server.method.personal_logits(server.network.eval(), images).argmax(dim=1)
        assert torch.equal(predicted, alone)


def test_a_client_that_sat_out_is_tested_with_the_new_theta_and_its_old_phi(lab):
    config, problem = lab.configure("fedloge"), lab.problem(tests_of_class=20)
    server = lab.play(config, problem, rounds=1)
    old_theta, old_phi = lab.copy(server.state), server.private["personal.weight"][1].clone()
    old_bias = server.private["personal.bias"][1].clone()
    for _ in range(3):
        lab.play_round(server, problem, config, [0, 2])
    figures, details = evaluate(server, problem, config)
    images, labels = problem.test.batch(problem.local_tests[1], torch.Generator())
    accuracies = []
    for state in (server.state, old_theta):
        server.network.load_state_dict({**state, "personal.weight": old_phi, "personal.bias": old_bias})
        with torch.no_grad():
            logits = functional.linear(server.network.eval().features(images), old_phi, old_bias)
        accuracies.append(round(float((logits.argmax(dim=1) == labels).double().mean()), 6))
    assert details["personal_phi.clients"][1] == accuracies[0] != accuracies[1]
    assert "personal_phi.accuracy" in figures
    psi = server.state["classifier.weight"] * old_phi.norm(dim=1, keepdim=True)
    server.network.load_state_dict({**server.state, "personal.weight": old_phi, "personal.bias": old_bias})
    with torch.no_grad():
        logits = server.network.eval().features(images) @ psi.T + server.state["classifier.bias"]
    wanted = float((logits.argmax(dim=1) == labels).double().mean())
    assert details["personal.clients"][1] == pytest.approx(wanted, abs=1e-6)


# --- the class mask ---------------------------------------------------------------------------------------------------


def predicted_classes(lab, monkeypatch, server, problem, config):
    """For each variant and client the set of predicted classes."""
    seen = {}

    def spy(figures, details, variants, predictions, problem):
        columns = [predicted.T.tolist() for predicted in predictions]
        seen.update({name: [set(client[v]) for client in columns] for v, name in enumerate(variants)})

    monkeypatch.setattr(evaluation, "add_personal", spy)
    evaluate(server, problem, config)
    return seen


def test_mask_is_off_by_default_and_with_it_no_method_predicts_a_class_without_training_image(
    lab, any_method, monkeypatch
):
    """The local tests hold all classes, also those the client has not: a mask from test labels would not bite here."""
    problem = lab.problem(((8, 0, 3, 0, 0), (0, 0, 4, 6, 0), (0, 7, 0, 0, 9)), noise=90)
    problem = replace(problem, local_tests=(torch.arange(30),) * 3)
    plain, masked = lab.configure(any_method), lab.configure(any_method, "evaluate.class_mask=true")
    assert not plain.evaluate.class_mask
    server = lab.server(plain, problem)
    held = [set(client.counts.nonzero()[:, 0].tolist()) for client in problem.clients]
    free = predicted_classes(lab, monkeypatch, server, problem, plain)
    bound = predicted_classes(lab, monkeypatch, server, problem, masked)
    assert free.keys() == bound.keys()
    for found in bound.values():
        assert all(classes <= own for classes, own in zip(found, held, strict=True))
    if server.method.fine_tuning() == []:  # an untrained model does predict other classes
        assert any(not classes <= own for found in free.values() for classes, own in zip(found, held, strict=True))


def test_mask_holds_for_features_of_zero_and_leaves_the_generic_model_alone(lab):
    problem = lab.problem(((0, 9, 2), (4, 4, 4)))
    config = lab.configure("{name: fedloge, etf_steps: 20}", "evaluate.class_mask=true", "clients.count=2")
    features = torch.zeros(len(problem.test), 64)
    server = lab.server(config, problem)
    first, _ = head_predictions(features, server, problem, config)
    assert (first == 1).all(), "of equal logits the first that is allowed"
    unmasked = lab.configure("{name: fedloge, etf_steps: 20}", "clients.count=2")
    generic = [
        {k: v for k, v in evaluate(server, problem, c)[0].items() if k.startswith("generic")}
        for c in (config, unmasked)
    ]
    assert generic[0] == generic[1]


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_what_a_client_sends_is_counted_and_fedloge_sends_one_head_beyond_the_backbone(lab):
    problem = lab.problem()
    backbone = sum(t.numel() for t in lab.server(lab.configure("fedavg"), problem).network["backbone"].parameters())
    statistics = 2 * (16 + 32 + 64)
    for name, beyond in (
        ("fedavg", 65 * 5),
        ("{name: fedloge, etf_steps: 20}", 64 * 5),
        ("fedper", 0),
        ("fedbabu", 0),
        ("ditto", 65 * 5),
    ):
        config = lab.configure(name)
        figures, _ = geometry(lab.server(config, problem), problem, config)
        assert figures["sent.beyond_backbone"] == beyond
        assert figures["sent.values"] == backbone + statistics + beyond
        assert figures["sent.private"] == 0


def test_lengths_of_the_heads_are_compared_with_frequency_and_presence(lab):
    config, problem = lab.configure("{name: fedloge, etf_steps: 20}"), lab.problem()
    server = lab.server(config, problem)
    order = torch.tensor(problem.class_counts).argsort().argsort()
    psi, phi = server.state["classifier.weight"], server.private["personal.weight"]
    psi.copy_(functional.normalize(psi, dim=1) * (order + 1)[:, None])
    phi.copy_(functional.normalize(phi, dim=2) * torch.where(problem.shape.counts > 0, 4.0, 1.0)[:, :, None])
    figures, details = geometry(server, problem, config)
    assert figures["psi.length_by_frequency"] == pytest.approx(1)
    assert figures["phi.absent_over_present"] == pytest.approx(0.25)
    assert details["psi.lengths"] == pytest.approx((order + 1).tolist(), abs=1e-4)
    assert figures["etf.zero_share"] == pytest.approx(192 / 320)


def test_figures_are_numbers_or_none_never_nan_where_all_classes_are_as_frequent(lab, any_method):
    problem = lab.problem(((6, 6, 6),) * 3)
    config = lab.configure(any_method)
    server = lab.server(config, problem)
    figures = evaluate(server, problem, config)[0] | geometry(server, problem, config)[0]
    assert all(value is None or math.isfinite(value) for value in figures.values())
