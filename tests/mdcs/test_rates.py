"""The rates of the paper, epoch by epoch, and the optimiser that has them."""

import pytest

from mdcs.config import Config, CosineSchedule, StepSchedule
from mdcs.state import Training, start
from mdcs.train import learning_rate_factor
from shared.cli import find_config
from shared.config import load
from shared.run import read_metrics
from tests.mdcs.runs import CPU, run_of, synthetic

pytestmark = pytest.mark.usefixtures("small_sample")


# Section 3 of the brief, and section 5 for the baselines: (first epoch, last epoch, rate of the classifiers)
CIFAR_400 = [(e, e, 0.005 * e) for e in range(1, 21)] + [
    (21, 200, 0.1), (201, 320, 0.01), (321, 380, 0.001), (381, 400, 0.0001)
]  # fmt: skip


CIFAR_200 = [(1, 1, 0.02), (2, 2, 0.04), (3, 3, 0.06), (4, 4, 0.08), (5, 160, 0.1), (161, 180, 0.01), (181, 200, 0.001)]


NCL = [(e, e, 0.1 * (5 + 2 * (e - 1)) / 15) for e in range(1, 6)] + [
    (6, 320, 0.1), (321, 360, 0.01), (361, 400, 0.001)
]  # fmt: skip


RIDE = [*CIFAR_200[:5], (161, 180, 0.001), (181, 200, 0.00001)]


INAT_400 = [(e, e, 0.04 * e) for e in range(1, 6)] + [
    (6, 200, 0.2), (201, 300, 0.02), (301, 380, 0.002), (381, 400, 0.0002)
]  # fmt: skip


INAT_100 = [(e, e, 0.04 * e) for e in range(1, 6)] + [(6, 60, 0.2), (61, 80, 0.02), (81, 100, 0.002)]


PLACES = [(1, 10, 0.01), (11, 20, 0.001), (21, 30, 0.0001)]


TABLE = {
    "cifar100_lt_if100": CIFAR_400, "cifar10_lt_if100": CIFAR_400, "cifar100_lt_if100_200_epochs": CIFAR_200,
    "cifar100_lt_if100_ncl": NCL, "cifar100_lt_if100_ride": RIDE, "inaturalist18_400": INAT_400,
    "inaturalist18_100": INAT_100, "places_lt": PLACES,
}  # fmt: skip


def shipped(name: str) -> Config:
    return load(find_config(name, "mdcs"), Config)


# The rate of learning


@pytest.mark.parametrize("name", TABLE)
def test_the_learning_rates_of_every_epoch_are_those_of_the_table(name):
    config = shipped(name)
    wanted = [rate for first, last, rate in TABLE[name] for _ in range(first, last + 1)]
    assert config.epochs == len(wanted)
    found = [config.optimizer.lr * learning_rate_factor(config.schedule, e, config.epochs) for e in range(len(wanted))]
    assert found == pytest.approx(wanted, rel=1e-12)


CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INATURALIST = ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))
# Pairs a batch (single images for one view), weight decay, the backbone's own rate, mean and deviation of the pixels.
SETTINGS = {
    **{f"{name}_lt_if{factor}": (64, 5e-4, None, *CIFAR, 400)
       for name in ("cifar10", "cifar100") for factor in (10, 50, 100, 200)},
    "cifar100_lt_if100_200_epochs": (64, 5e-4, None, *CIFAR, 200),
    "cifar100_lt_if100_baselines": (128, 5e-4, None, *CIFAR, 200),
    "cifar100_lt_if100_ncl": (64, 2e-4, None, *CIFAR, 400),
    "cifar100_lt_if100_ride": (128, 5e-4, None, *CIFAR, 200),
    **{f"imagenet_lt_{net}_{epochs}": (256, 5e-4, None, *IMAGENET, epochs)
       for net in ("resnet50", "resnext50") for epochs in (180, 400)},
    "inaturalist18_100": (512, 2e-4, None, *INATURALIST, 100),
    "inaturalist18_400": (512, 2e-4, None, *INATURALIST, 400),
    "places_lt": (64, 4e-4, 0.001, *IMAGENET, 30),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_configurations_have_the_papers_settings(name):
    config = shipped(name)
    optimizer = config.optimizer
    found = (config.batch_size, optimizer.weight_decay, optimizer.backbone_lr, config.data.mean, config.data.std)
    assert (*found, config.epochs) == SETTINGS[name]
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, True)
    if "_if" in name:
        data, _, factor = name.split("_")[:3]
        assert (config.data.name, config.data.imbalance_factor) == (data, int(factor[2:]))
    if config.method.name == "mdcs":
        method = config.method
        assert (method.lambdas, method.alpha, method.ramp_epochs, method.temperature) == (
            (-0.5, 1.0, 2.5),
            0.6,
            20,
            1.0,
        )
    if name.startswith("cifar") and config.epochs == 400 and config.method.name == "mdcs":
        assert config.schedule.milestones == (200, 320, 380)


@pytest.mark.parametrize("name", ["imagenet_lt_resnet50_180", "imagenet_lt_resnext50_180"])
def test_the_cosine_falls_from_the_full_rate_almost_to_zero(name):
    config = shipped(name)
    rates = [
        config.optimizer.lr * learning_rate_factor(config.schedule, e, config.epochs) for e in range(config.epochs)
    ]
    assert [round(rates[epoch - 1], 6) for epoch in (1, 45, 91, 180)] == [0.1, 0.085967, 0.05, 0.000008]
    assert rates == sorted(rates, reverse=True)


def test_the_cosine_runs_over_all_epochs_however_many():
    assert learning_rate_factor(CosineSchedule(name="cosine"), 200, 400) == pytest.approx(0.5)


def test_a_milestone_within_the_warm_up_multiplies_it():
    schedule = StepSchedule(name="step", milestones=(2,), warmup_epochs=4)
    assert [learning_rate_factor(schedule, e, 5) for e in range(5)] == pytest.approx([0.25, 0.5, 0.075, 0.1, 0.1])


@pytest.mark.parametrize("warmup", ["linear", "from_third"])
def test_without_warm_up_epochs_the_rate_is_whole_from_the_start(warmup):
    schedule = StepSchedule(name="step", milestones=(), warmup=warmup)
    assert learning_rate_factor(schedule, 0, 5) == 1.0


def test_classifiers_and_backbone_keep_their_own_rates_through_warm_up_and_milestones(
    tmp_path, mdcs_config, on_synthetic, monkeypatch
):
    seen: list[tuple[float, ...]] = []
    real = Training.update

    def update(self: Training) -> None:
        seen.append(tuple(group["lr"] for group in self.optimizer.param_groups))
        real(self)

    monkeypatch.setattr(Training, "update", update)
    schedule = "schedule={name: step, warmup_epochs: 2, milestones: [3, 4]}"
    run_of(tmp_path / "run", mdcs_config(
        "mdcs", "optimizer={lr: 0.01, backbone_lr: 0.001}", schedule, "epochs=5", "batch_size=200"
    ))  # fmt: skip
    assert seen == [pytest.approx((f * 0.01, f * 0.001)) for f in (0.5, 1.0, 1.0, 0.1, 0.01)]
    assert [row["lr"] for row in read_metrics(tmp_path / "run", "epoch")] == [rate for rate, _ in seen]


def test_the_classifiers_are_one_group_and_everything_else_is_the_other(mdcs_config):
    config = mdcs_config("mdcs", "optimizer={lr: 0.1, backbone_lr: 0.01}")
    state = start(config, synthetic(), CPU)
    heads, rest = (group["params"] for group in state.optimizer.param_groups)
    names = {id(p): name for name, p in state.model.named_parameters()}
    assert sorted(names[id(p)] for p in heads) == [f"heads.{e}.weight" for e in range(3)]
    assert {names[id(p)] for p in rest} == {name for name in names.values() if not name.startswith("heads.")}
    assert [group["base_lr"] for group in state.optimizer.param_groups] == [0.1, 0.01]


def test_without_a_rate_of_its_own_the_backbone_has_that_of_the_classifiers(mdcs_config):
    state = start(mdcs_config("mdcs", "optimizer={lr: 0.3}"), synthetic(), CPU)
    assert [group["base_lr"] for group in state.optimizer.param_groups] == [0.3, 0.3]


def test_the_optimiser_is_sgd_with_the_configured_momentum_and_decay_on_all_parameters(mdcs_config):
    config = mdcs_config("ce", "optimizer={lr: 0.1, momentum: 0.7, nesterov: false, weight_decay: 0.003}")
    for group in start(config, synthetic(), CPU).optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.7, False, 0.003)
    for group in start(mdcs_config("ce"), synthetic(), CPU).optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
