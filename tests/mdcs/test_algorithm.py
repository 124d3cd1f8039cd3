"""Which network and which loss a configured method has: each is the pure function with the configuration's numbers."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from mdcs import baselines, config
from mdcs.algorithm import METHODS, architecture, build_method, of_all_views
from mdcs.method import diversity_loss, mdcs_loss
from mdcs.model import Architecture, forward_views
from mdcs.problem import load_problem
from mdcs.state import start

pytestmark = pytest.mark.usefixtures("small_sample")
CPU = torch.device("cpu")
COUNTS = [100, 31, 10, 3, 1]
LOG_COUNTS = torch.tensor(COUNTS).float().log()
LOG_PRIOR = (torch.tensor(COUNTS).float() / sum(COUNTS)).log()
TARGETS = torch.tensor([0, 2, 4, 1])


def logits(views: int = 1, experts: int = 3) -> Tensor:
    return 3 * torch.randn(views * len(TARGETS), experts, len(COUNTS), generator=torch.Generator().manual_seed(1))


def repeated(z: Tensor) -> Tensor:
    """The targets of rows of one view or two: weak ones, then strong ones."""
    return torch.cat([TARGETS] * (len(z) // len(TARGETS)))


def loss_of(configured: config.Config, z: Tensor, epoch: int = 1) -> float:
    return float(build_method(configured, COUNTS, CPU).loss(z, TARGETS, epoch))


def test_there_is_a_method_for_each_kind_that_the_configuration_knows():
    kinds = get_args(get_args(config.MethodConfig)[0])
    assert sorted(METHODS) == sorted(get_args(kind.model_fields["name"].annotation)[0] for kind in kinds)


@pytest.mark.parametrize("case", [
    *((method,) for method in METHODS), ("mdcs", "bn_views=split"), ("mdcs", "method.confident=raw"),
    ("mdcs", "method.confident=all"), ("ce", "method.classifier=linear"),
    *((method, "method.views=both") for method in METHODS if method != "mdcs"),
], ids=" ".join)  # fmt: skip
def test_a_step_of_every_method_has_a_finite_loss_and_gives_every_parameter_a_gradient(mdcs_config, case):
    configured = mdcs_config(*case)
    problem = load_problem(configured, CPU)
    state = start(configured, problem, CPU)
    method = build_method(configured, problem.class_counts, CPU)
    batches = [torch.arange(0, len(problem.train), 4)]
    images, targets = next(problem.train.epoch(batches, configured.views, 0, ("test",)))
    assert len(images) == len(targets) * (2 if configured.views == "both" else 1)
    z = forward_views(state.model, images, configured.bn_views == "split")
    assert z.shape == (len(images), configured.experts, 10)
    loss = method.loss(z, targets, 1)
    assert loss.ndim == 0
    assert math.isfinite(float(loss.detach()))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in state.model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradients[name].abs().sum() > 0 for name in gradients if name.startswith("heads."))
    before = [parameter.clone() for parameter in state.parameters()]
    state.update()
    assert any(not old.equal(new) for old, new in zip(before, state.parameters(), strict=True))


@pytest.mark.parametrize(("epoch", "ramp"), [(1, 0.125), (4, 0.5), (8, 1.0), (9, 1.0)])
@pytest.mark.parametrize("confident", ["adjusted", "raw", "all"])
def test_the_loss_of_mdcs_has_the_configured_numbers_and_the_ramp_of_the_epoch(mdcs_config, epoch, ramp, confident):
    configured = mdcs_config(
        f"{{name: mdcs, lambdas: [-1.0, 0.5, 2.0], alpha: 0.7, ramp_epochs: 8, temperature: 2.0, "
        f"confident: {confident}}}"
    )  # fmt: skip
    z = logits(2)
    expected = mdcs_loss(z, TARGETS, COUNTS, (-1.0, 0.5, 2.0), 0.7, ramp, 2.0, confident)
    assert loss_of(configured, z, epoch) == pytest.approx(float(expected), rel=1e-6)


def test_the_ramp_of_mdcs_is_twenty_epochs_where_nothing_is_said(mdcs_config):
    z = logits(2)
    configured = mdcs_config("{name: mdcs}")
    for epoch, ramp in ((1, 0.05), (10, 0.5), (20, 1.0), (400, 1.0)):
        expected = mdcs_loss(z, TARGETS, COUNTS, (-0.5, 1.0, 2.5), 0.6, ramp, 1.0)
        assert loss_of(configured, z, epoch) == pytest.approx(float(expected), rel=1e-6)


PURE = {
    "{name: dl, lambdas: [-1.0, 0.5, 2.0]}":
        lambda z: diversity_loss(z, repeated(z), LOG_COUNTS, torch.tensor([-1.0, 0.5, 2.0])),
    "{name: balanced_softmax, experts: 3}": lambda z: baselines.balanced_softmax_loss(z, repeated(z), LOG_COUNTS),
    "{name: sade, tau: 1.5}": lambda z: baselines.sade_loss(z, repeated(z), LOG_PRIOR, 1.5),
    "{name: balpoe, taus: [0.5, 1.0, 1.5]}":
        lambda z: baselines.balpoe_loss(z, repeated(z), LOG_PRIOR, (0.5, 1.0, 1.5)),
    "{name: ncl, hard_share: 0.4, weight: 0.9}":
        lambda z: baselines.ncl_loss(z, repeated(z), LOG_COUNTS, 0.4, 0.9),
}  # fmt: skip


@pytest.mark.parametrize("views", [1, 2], ids=["one view", "two views"])
@pytest.mark.parametrize("method", PURE)
def test_the_loss_of_a_method_is_its_formula_with_the_configured_numbers_on_all_views(mdcs_config, method, views):
    z = logits(views)
    configured = mdcs_config(method, *(["method.views=both"] if views == 2 else []))
    assert loss_of(configured, z, 7) == pytest.approx(float(PURE[method](z)), rel=1e-6)


@pytest.mark.parametrize(("data", "tau"), [("sample", 2.0), ("places_lt", 1.0), ("inaturalist18", 1.0)])
def test_the_loss_of_sade_has_the_tau_of_the_data_set_where_the_method_says_none(mdcs_config, data, tau):
    configured, z = mdcs_config("sade"), logits()
    configured = configured.model_copy(update={"data": configured.data.model_copy(update={"name": data})})
    assert loss_of(configured, z) == pytest.approx(float(baselines.sade_loss(z, TARGETS, LOG_PRIOR, tau)), rel=1e-6)
    assert loss_of(configured, z) != pytest.approx(float(baselines.sade_loss(z, TARGETS, LOG_PRIOR, 3 - tau)), rel=1e-3)


@pytest.mark.parametrize("views", [1, 2], ids=["one view", "two views"])
@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_cross_entropy_is_plain_whatever_the_counts(mdcs_config, classifier, views):
    z = logits(views, experts=1)
    expected = torch.nn.functional.cross_entropy(z[:, 0], repeated(z))
    assert loss_of(mdcs_config("ce", f"method.classifier={classifier}"), z) == pytest.approx(float(expected), rel=1e-6)


DEFERRED = [("method.deferred_epoch=3", 3), ("schedule={name: step, milestones: [2, 9]}", 2)]


@pytest.mark.parametrize(("override", "last"), DEFERRED, ids=["configured", "first milestone"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_ldam_has_class_weights_after_the_deferred_epoch_only(mdcs_config, override, last, after):
    configured = mdcs_config("{name: ldam_drw, largest_margin: 0.4, beta: 0.99}", override)
    z = logits(experts=1)
    weights = baselines.deferred_weights(COUNTS, 0.99) if after else None
    expected = baselines.ldam_loss(z, TARGETS, baselines.ldam_margins(COUNTS, 0.4), weights)
    assert loss_of(configured, z, last + after) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("override", "last"), DEFERRED, ids=["configured", "first milestone"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_ride_has_class_weights_and_temperatures_after_the_deferred_epoch_only(mdcs_config, override, last, after):
    settings = "{name: ride, diversity_weight: 0.3, largest_margin: 0.4, beta: 0.99, gamma: 0.2, views: both}"
    configured, z = mdcs_config(settings, override), logits(2)
    weights = baselines.deferred_weights(COUNTS, 0.99) if after else None
    temperatures = baselines.ride_temperatures(COUNTS, 0.2) if after else torch.ones(len(COUNTS))
    margins = baselines.ldam_margins(COUNTS, 0.4)
    expected = baselines.ride_loss(z, repeated(z), margins, weights, temperatures, 0.3)
    assert loss_of(configured, z, last + after) == pytest.approx(float(expected), rel=1e-5)


def test_the_deferred_weights_make_a_difference(mdcs_config):
    configured = mdcs_config("ldam_drw", "method.deferred_epoch=2", "method.beta=0.99")
    assert loss_of(configured, logits(experts=1), 2) != pytest.approx(
        loss_of(configured, logits(experts=1), 3), rel=1e-3
    )


def test_weak_and_strong_rows_have_the_targets_of_their_images():
    assert of_all_views(TARGETS, logits(1)).tolist() == [0, 2, 4, 1]
    assert of_all_views(TARGETS, logits(2)).tolist() == [0, 2, 4, 1, 0, 2, 4, 1]


@pytest.mark.parametrize(("case", "lambdas"), [
    (("mdcs",), [-0.5, 1.0, 2.5]), (("dl",), [-0.5, 1.0, 2.5]), (("dl", "method.lambdas=[0.0, 2.0]"), [0.0, 2.0]),
    (("balanced_softmax", "method.experts=2", "method.views=both"), [1.0, 1.0]), (("balanced_softmax",), None),
    (("ce",), None), (("sade",), None), (("balpoe",), None), (("ncl",), None), (("ride",), None), (("ldam_drw",), None),
])  # fmt: skip
def test_the_exponents_by_which_confidence_is_judged_are_those_that_the_experts_are_trained_with(
    mdcs_config, case, lambdas
):
    found = build_method(mdcs_config(*case), COUNTS, CPU).lambdas
    assert (None if found is None else found.tolist()) == lambdas


SMALL = {"depth": 8, "width": 2, "in_channels": 1}


@pytest.mark.parametrize(("case", "wanted"), [
    (("mdcs",), Architecture("resnet_cifar", 10, 3, reduced=True, **SMALL)),
    (("mdcs", "method.lambdas=[0.5, 1.5]"), Architecture("resnet_cifar", 10, 2, reduced=True, **SMALL)),
    (("mdcs", "method.lambdas=[1.0]"), Architecture("resnet_cifar", 10, 1, **SMALL)),
    (("mdcs", "model.reduced=false"), Architecture("resnet_cifar", 10, 3, **SMALL)),
    (("dl",), Architecture("resnet_cifar", 10, 3, reduced=True, **SMALL)),
    (("sade",), Architecture("resnet_cifar", 10, 3, reduced=True, **SMALL)),
    (("ride", "method.experts=4"), Architecture("resnet_cifar", 10, 4, reduced=True, **SMALL)),
    (("balpoe", "method.taus=[0.5, 1.5]"), Architecture("resnet_cifar", 10, 2, reduced=True, **SMALL)),
    (("balanced_softmax",), Architecture("resnet_cifar", 10, 1, **SMALL)),
    (("balanced_softmax", "method.experts=3"), Architecture("resnet_cifar", 10, 3, reduced=True, **SMALL)),
    (("ce",), Architecture("resnet_cifar", 10, 1, **SMALL)),
    (("ce", "model.reduced=true"), Architecture("resnet_cifar", 10, 1, reduced=True, **SMALL)),
    (("ce", "method.classifier=linear"), Architecture("resnet_cifar", 10, 1, classifier="linear", **SMALL)),
    (("ldam_drw",), Architecture("resnet_cifar", 10, 1, **SMALL)),
    (("ncl",), Architecture("resnet_cifar", 10, 3, classifier="linear", separate=True, **SMALL)),
])  # fmt: skip
def test_the_network_of_a_method_on_the_sample(mdcs_config, case, wanted):
    assert architecture(mdcs_config(*case), 10, 1) == wanted


def test_the_network_takes_the_channels_classes_and_sharing_that_it_is_told(mdcs_config):
    configured = mdcs_config("mdcs", "model={name: resnet152, reduced: false, share_stage3: true}")
    found = architecture(configured, 365, 3)
    assert found == Architecture("resnet152", 365, 3, in_channels=3, share_stage3=True)
