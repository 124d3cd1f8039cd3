"""FedLoGe as a method: its parts, its frame, its heads; and the two controls that tell its ingredients apart."""

import pytest
import torch
from torch.nn import functional

from fedloge.algorithm import METHODS, DenseEtf, FedLoGe, build_method
from fedloge.config import Config
from fedloge.federated import live_state, load_client
from fedloge.method import PERSONAL_RULES, simplex_etf
from shared.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")  # the frames here are repaired in a few steps

FEDLOGE = "{name: fedloge, norm: 1.0, etf_steps: 50}"


def names_in_the_schema():
    return set(Config.model_json_schema()["properties"]["method"]["discriminator"]["mapping"])


def test_every_method_of_the_configuration_is_built_and_has_no_other_name(lab):
    assert set(METHODS) == names_in_the_schema() == set(lab.settings)
    shape = lab.problem().shape
    for name in METHODS:
        assert type(build_method(lab.configure(name), shape)) is METHODS[name]
        assert lab.configure(f"{{name: {name}}}").method == lab.configure("fedavg", f"method={name}").method


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("{name: fedprux}", "did you mean 'fedprox'"),
        ("{name: fedloge, sparsity: 1.0}", "must be below 1"),
        ("{name: fedloge, sparsity: -0.1}", "is below 0"),
        ("{name: fedloge, norm: 0}", "must be above 0"),
        ("{name: fedloge, personal_rule: papre}", "did you mean 'paper'"),
        ("{name: fedavg, mu: 0.1}", "method.mu: there is no such key"),
        ("{name: fedrep, head_epochs: 0}", "is below 1"),
    ],
)
def test_a_method_that_cannot_be_is_refused_by_name(lab, method, words):
    with pytest.raises(ConfigError, match=words):
        lab.configure(method)


def test_a_mask_that_leaves_a_class_without_channels_is_refused_when_the_network_is_built(lab):
    with pytest.raises(ConfigError, match="without any"):
        lab.server(lab.configure("{name: fedloge, sparsity: 0.999}"), lab.problem())


def test_all_methods_start_from_the_same_backbone_and_classifier(lab, any_method):
    problem = lab.problem()
    plain = lab.server(lab.configure("fedavg"), problem)
    server = lab.server(lab.configure(any_method), problem)
    assert lab.same(lab.part(live_state(server.network), "backbone."), lab.part(plain.state, "backbone."))
    load_client(server, 0)
    if any_method != "fedetf":
        start = live_state(server.network)["classifier.weight"]
        assert torch.equal(start, plain.state["classifier.weight"])


def test_the_seed_changes_every_random_part_and_torchs_generator_none(lab, any_method):
    problem = lab.problem()
    torch.manual_seed(1)
    first = live_state(lab.server(lab.configure(any_method), problem).network)
    torch.manual_seed(2)
    assert lab.same(first, live_state(lab.server(lab.configure(any_method), problem).network))
    other = live_state(lab.server(lab.configure(any_method, "seed=1"), problem).network)
    drawn = {entry for entry in first if first[entry].dim() > 1}
    assert drawn <= lab.changed(first, other)


# --- FedLoGe ----------------------------------------------------------------------------------------------------------


def test_loss_gives_each_part_the_gradient_of_its_own_term(lab):
    config, problem = lab.configure("fedloge"), lab.problem()
    server = lab.server(config, problem)
    network, client = server.network, problem.clients[0]
    load_client(server, 0)
    images, targets = lab.batches(problem, config, 0)[0]
    parameters = dict(network.named_parameters())
    server.method.loss(network, images, targets, client, server.state).backward()
    found = {name: p.grad.clone() for name, p in parameters.items()}
    features = network.features(images)
    terms = {
        "backbone.": functional.cross_entropy(features @ network["etf"].weight.T, targets),
        "classifier.": functional.cross_entropy(network["classifier"](features), targets),
        "personal.": functional.cross_entropy(network["personal"](features), targets),
    }
    for prefix, term in terms.items():
        own = lab.part(parameters, prefix)
        wanted = torch.autograd.grad(term, list(own.values()), retain_graph=True)
        for name, gradient in zip(own, wanted, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_frame_has_the_asked_zeros_and_length(lab):
    server = lab.server(lab.configure("{name: fedloge, sparsity: 0.5, norm: 0.3, etf_steps: 1000}"), lab.problem())
    frame = server.state["etf.weight"]
    assert frame.shape == (5, 64)
    assert int((frame == 0).sum()) == 160
    torch.testing.assert_close(frame.norm(dim=1), torch.full((5,), 0.3), rtol=0.05, atol=0)


def test_dense_control_has_norm_times_the_simplex_and_is_fedloge_without_zeros(lab):
    problem = lab.problem()
    dense = lab.play(lab.configure("{name: dense_etf, norm: 0.7}"), problem)
    assert isinstance(dense.method, DenseEtf)
    assert isinstance(dense.method, FedLoGe)
    simplex = simplex_etf(64, 5, dense.method.init_seed("etf"))
    assert torch.equal(dense.state["etf.weight"], 0.7 * simplex)
    sparse = lab.play(lab.configure("{name: fedloge, sparsity: 0, norm: 0.7}"), problem)
    assert lab.same(dense.state, sparse.state)
    assert lab.same(dense.private, sparse.private)


@pytest.mark.parametrize("bias", ["true", "false"])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_generic_heads_are_unit_psi_raw_psi_and_the_frame(lab, bias, scale):
    config = lab.configure(f"{{name: fedloge, norm: 1.0, etf_steps: 50, heads_bias: {bias}, scale: {scale}}}")
    server = lab.play(config, lab.problem())
    psi = server.state["classifier.weight"]
    heads = server.method.generic_heads(server)
    assert list(heads) == ["", "raw", "etf"]
    torch.testing.assert_close(heads[""][0], scale * psi / psi.pow(2).sum(dim=1, keepdim=True).sqrt())
    assert heads["raw"][0] is psi
    assert torch.equal(heads["etf"][0], server.state["etf.weight"])
    assert heads["etf"][1] is None
    own = server.state.get("classifier.bias")
    assert (own is None) == (bias == "false")
    assert heads[""][1] is own
    assert heads["raw"][1] is own


@pytest.mark.parametrize("bias", ["true", "false"])
@pytest.mark.parametrize("rule", PERSONAL_RULES)
def test_personal_heads_are_those_of_the_rule_for_every_client(lab, rule, bias):
    config = lab.configure(f"{{name: fedloge, norm: 1.0, etf_steps: 50, heads_bias: {bias}, personal_rule: {rule}}}")
    server = lab.play(config, lab.problem())
    psi, phi = server.state["classifier.weight"], server.private["personal.weight"]
    shared_bias = server.state.get("classifier.bias", torch.zeros(5))
    own_bias = server.private.get("personal.bias", torch.zeros(3, 5))
    heads = server.method.personal_heads(server)
    assert set(heads) == {"", *PERSONAL_RULES, "phi"}
    for k in range(3):
        moved = torch.stack([psi[c] * phi[k, c].pow(2).sum().sqrt() for c in range(5)])
        weights = {"paper": moved, "code": moved + phi[k], "readme": moved + psi, "stage1_sum": psi + phi[k]}
        biases = {"paper": shared_bias, "code": shared_bias + own_bias[k], "readme": 2 * shared_bias,
                  "stage1_sum": shared_bias + own_bias[k]}  # fmt: skip
        for name in ("", rule):
            torch.testing.assert_close(heads[name][0][k], weights[rule])
            found = heads[name][1]
            torch.testing.assert_close(torch.zeros(5) if found is None else found[k], biases[rule])
        torch.testing.assert_close(heads["phi"][0][k], phi[k])


def test_reading_the_heads_off_changes_no_bit_of_the_server(lab):
    server = lab.play(lab.configure(FEDLOGE), lab.problem())
    state, private = lab.copy(server.state), lab.copy(server.private)
    server.method.generic_heads(server)
    server.method.personal_heads(server)
    assert lab.same(server.state, state)
    assert lab.same(server.private, private)


# --- FedAvg + GLA-FR --------------------------------------------------------------------------------------------------


def test_realigned_fedavg_trains_fedavg_to_the_bit(lab):
    problem = lab.problem()
    plain = lab.play(lab.configure("fedavg"), problem)
    realigned = lab.play(lab.configure("{name: fedavg_gla, heads_bias: true}"), problem)
    assert lab.same(realigned.state, plain.state)
    fresh = lab.server(lab.configure("{name: fedavg_gla, heads_bias: true}"), problem)
    assert (realigned.private["personal.weight"] != fresh.private["personal.weight"]).any(dim=2).any(dim=1).all()


def test_realigned_fedavg_has_unit_rows_and_the_personal_rules_of_fedloge(lab):
    server = lab.play(lab.configure("{name: fedavg_gla, personal_rule: code}"), lab.problem())
    psi, phi = server.state["classifier.weight"], server.private["personal.weight"]
    heads = server.method.generic_heads(server)
    assert list(heads) == ["", "raw"]
    torch.testing.assert_close(heads[""][0], functional.normalize(psi, dim=1))
    assert heads[""][1] is None
    torch.testing.assert_close(server.method.personal_heads(server)[""][0], psi * phi.norm(dim=2, keepdim=True) + phi)


def test_private_head_of_realigned_fedavg_learns_on_detached_features(lab):
    config, problem = lab.configure("fedavg_gla"), lab.problem()
    server = lab.server(config, problem)
    images, targets = lab.batches(problem, config, 0)[0]
    gradients = []
    for factor in (1.0, -3.0):
        with torch.no_grad():
            server.network["personal"].weight.mul_(factor)
        server.network.zero_grad()
        server.method.loss(server.network, images, targets, problem.clients[0], server.state).backward()
        gradients.append({n: p.grad.clone() for n, p in server.network.named_parameters()})
    assert lab.changed(*gradients) == {"personal.weight"}
