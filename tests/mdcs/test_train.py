"""Training: rates of the paper, what a step sees, losses that are not finite, what is written, the command."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mdcs.algorithm as algorithm
import mdcs.model as model_module
import mdcs.problem as problem_module
import mdcs.train as train_module
from mdcs import eval as eval_module
from mdcs import state as state_module
from mdcs.algorithm import Method, build_method
from mdcs.augment import VIEWS
from mdcs.config import Config, CosineSchedule, StepSchedule
from mdcs.problem import Problem, thirds
from mdcs.state import Forecast, Training, start
from mdcs.train import learning_rate_factor, main, train
from mdcs.views import ResidentViews
from shared import run as run_module
from shared.batches import Resident, epoch_order, split_batches
from shared.checkpoint import load_model, load_state
from shared.cli import find_config
from shared.config import load
from shared.errors import InterruptedRunError, RunError
from shared.gpu import LossMeter, stream
from shared.longtail import shot_groups
from shared.run import Run, read_metrics, read_results

pytestmark = pytest.mark.usefixtures("small_sample")
CPU = torch.device("cpu")
STEPS = 4  # an epoch of the tiny run, which has two

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


def run_of(folder: Path, config: Config) -> dict[str, Any]:
    with Run(folder, config, "test") as run:
        return train(config, run)


def shipped(name: str) -> Config:
    return load(find_config(name, "mdcs"), Config)


def synthetic(counts: tuple[int, ...] = (100, 20, 4)) -> Problem:
    """Classes are bright bands in noise: easy, but not at once."""
    draws = stream(0, "synthetic")

    def images(labels: torch.Tensor) -> torch.Tensor:
        pixels = torch.randint(0, 160, (len(labels), 1, 14, 14), generator=draws)
        for k, label in enumerate(labels.tolist()):
            pixels[k, :, 4 * label : 4 * label + 4] += 20
        return pixels.byte()

    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    tests = torch.arange(len(counts)).repeat(40)
    return Problem(
        ResidentViews(images(labels), labels, (0.35,), (0.2,), "none"),
        Resident(images(tests), tests, (0.35,), (0.2,)),
        counts, tuple("abc"), shot_groups(counts), thirds(list(counts)), 1, None, {"train": "a", "test": "b"},
    )  # fmt: skip


@pytest.fixture
def on_synthetic(monkeypatch) -> Problem:
    """Runs of this test train on the synthetic problem."""
    problem = synthetic()
    monkeypatch.setattr(problem_module, "load_problem", lambda config, device: problem)
    return problem


@pytest.fixture
def poisoned(monkeypatch) -> Callable[[int], None]:
    """Make the loss of the n-th step of this process NaN."""

    def poison(number: int) -> None:
        left = [number]

        def build(*arguments: Any) -> Method:
            method = build_method(*arguments)

            def loss(z: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
                left[0] -= 1
                return method.loss(z, y, epoch) * (math.nan if left[0] == 0 else 1.0)

            return Method(loss, method.lambdas)

        monkeypatch.setattr(algorithm, "build_method", build)

    return poison


@pytest.fixture
def late_looks(monkeypatch) -> None:
    """Losses are looked at when they are read, as on a GPU."""
    real = LossMeter.__init__

    def init(self: LossMeter, device: torch.device) -> None:
        real(self, device)
        self._eager = False

    monkeypatch.setattr(LossMeter, "__init__", init)


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """The images of every step that is trained from here on."""
    found: list[torch.Tensor] = []
    real = model_module.forward_views

    def spy(model: torch.nn.Module, images: torch.Tensor, split: bool) -> torch.Tensor:
        found.append(images.clone())
        return real(model, images, split)

    monkeypatch.setattr(model_module, "forward_views", spy)
    return found


# The rate of learning


@pytest.mark.parametrize("name", TABLE)
def test_the_learning_rates_of_every_epoch_are_those_of_the_table(name):
    config = shipped(name)
    wanted = [rate for first, last, rate in TABLE[name] for _ in range(first, last + 1)]
    assert config.epochs == len(wanted)
    found = [config.optimizer.lr * learning_rate_factor(config.schedule, e, config.epochs) for e in range(len(wanted))]
    assert found == pytest.approx(wanted, rel=1e-12)


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


# What a run learns


def test_in_thirty_steps_the_loss_falls_and_the_experts_priors_are_ordered_as_their_exponents(
    tmp_path, mdcs_config, on_synthetic, capsys
):
    config = mdcs_config(
        "mdcs", "epochs=6", "batch_size=25", "model.width=4", "optimizer.lr=0.01", "schedule.milestones=[]"
    )
    run_of(tmp_path / "run", config)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run", "epoch")]
    assert losses[-1] < 0.5 * losses[0]
    model, epoch = eval_module.load_network(
        tmp_path / "run", config, len(on_synthetic.classes), on_synthetic.channels, CPU
    )
    model.eval()
    images = torch.cat([images for images, _ in on_synthetic.test.evaluate(500)])
    with torch.no_grad():
        prior = model(images).softmax(-1).mean(0)  # [E, C], what each expert predicts on balanced images
    towards_tail = (prior * torch.arange(3)).sum(1)  # from 0, all the largest class, to 2, all the rarest
    assert (towards_tail.diff() > 0.1).all(), prior
    assert epoch == 6
    assert capsys.readouterr().out.count("forecast: ") == 1


def test_the_same_seed_gives_the_same_model_and_another_seed_another(tmp_path, mdcs_config):
    digests = [
        run_of(tmp_path / name, mdcs_config("mdcs", f"seed={seed}", "data.subset_seed=0"))["model_digest"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_other_draws_of_torchs_own_generator_change_nothing(tmp_path, mdcs_config):
    torch.manual_seed(1)
    first = run_of(tmp_path / "a", mdcs_config("ncl"))["model_digest"]
    torch.manual_seed(2)
    assert run_of(tmp_path / "b", mdcs_config("ncl"))["model_digest"] == first


def test_all_methods_of_a_seed_see_the_same_images_in_the_same_order(tmp_path, mdcs_config, seen):
    """A difference between two methods is then paired: it is not one of order or of augmentation."""
    rows: dict[str, list[torch.Tensor]] = {}
    runs = {
        "mdcs": ("mdcs",), "dl": ("dl", "method.views=both"), "ce": ("ce",), "sade": ("sade",), "ncl": ("ncl",),
        "strong": ("dl", "method.views=strong"), "other": ("mdcs", "seed=1"),
    }  # fmt: skip
    for name, overrides in runs.items():
        seen.clear()
        run_of(tmp_path / name, mdcs_config(*overrides))
        rows[name] = list(seen)
    assert {len(images) for images in rows.values()} == {2 * STEPS}
    for both, dl, weak, sade in zip(*(rows[name] for name in ("mdcs", "dl", "ce", "sade")), strict=True):
        assert both.equal(dl)
        assert weak.equal(sade)
        assert both[: len(weak)].equal(weak)
        assert not both[len(weak) :].equal(weak)
    for strong, ncl in zip(rows["strong"], rows["ncl"], strict=True):
        assert strong.equal(ncl)
    assert not rows["mdcs"][0].equal(rows["other"][0])
    assert not rows["mdcs"][0].equal(rows["mdcs"][STEPS]), "each epoch has an order of its own"


def test_every_epoch_shows_each_image_once(tmp_path, mdcs_config, seen, monkeypatch):
    monkeypatch.setitem(VIEWS, "grey", (lambda images, _: images,) * 2)
    run_of(tmp_path / "run", mdcs_config("ce"))
    shown = torch.cat(seen[:STEPS]).flatten(1)
    again = torch.cat(seen[STEPS:]).flatten(1)
    assert len(shown) == sum(read_results(tmp_path / "run")["data"]["class_counts"])
    assert len(shown.unique(dim=0)) == len(shown)
    assert shown.sum(0).tolist() == pytest.approx(again.sum(0).tolist(), abs=1e-3)


@pytest.mark.parametrize(("overrides", "apart"), [
    (("mdcs", "bn_views=joint"), False), (("mdcs", "bn_views=split"), True), (("ce", "bn_views=split"), False),
    (("dl", "method.views=both", "bn_views=split"), True), (("dl", "method.views=strong", "bn_views=split"), False),
], ids=str)  # fmt: skip
def test_the_views_share_batch_statistics_or_not_as_configured(tmp_path, mdcs_config, monkeypatch, overrides, apart):
    asked = set()
    real = model_module.forward_views
    monkeypatch.setattr(
        model_module, "forward_views", lambda model, images, split: (asked.add(split), real(model, images, split))[1]
    )
    run_of(tmp_path / "run", mdcs_config(*overrides))
    assert asked == {apart}


@pytest.mark.parametrize(("overrides", "same"), [
    (("ce",), True), (("ncl",), True), (("dl", "method.views=strong"), True), (("mdcs",), False),
], ids=str)  # fmt: skip
def test_with_one_view_split_batch_statistics_are_the_joint_ones_to_the_bit(tmp_path, mdcs_config, overrides, same):
    joint, split = (
        run_of(tmp_path / how, mdcs_config(*overrides, f"bn_views={how}"))["model_digest"] for how in ("joint", "split")
    )
    assert (joint == split) == same


def test_the_loss_is_told_the_epoch_counted_from_one(tmp_path, mdcs_config, monkeypatch):
    epochs: list[int] = []

    def build(*arguments: Any) -> Method:
        method = build_method(*arguments)
        return Method(lambda z, y, epoch: (epochs.append(epoch), method.loss(z, y, epoch))[1], method.lambdas)

    monkeypatch.setattr(algorithm, "build_method", build)
    run_of(tmp_path / "run", mdcs_config("ride"))
    assert epochs == [1] * STEPS + [2] * STEPS


def test_networks_of_the_same_shape_start_from_the_same_weights_whatever_the_method(mdcs_config):
    one, other = (start(mdcs_config(m), synthetic(), CPU).model.state_dict() for m in ("mdcs", "sade"))
    third = start(mdcs_config("mdcs", "seed=1"), synthetic(), CPU).model.state_dict()
    assert all(one[name].equal(other[name]) for name in one)
    assert not one["trunk.conv1.weight"].equal(third["trunk.conv1.weight"])


# What is counted


def training_of(log_counts: list[float], experts: int = 2) -> Training:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    confident = torch.zeros(2, experts, dtype=torch.int64)
    return Training(model, optimizer, torch.tensor(log_counts), LossMeter(CPU), confident)


def test_confident_images_are_those_whose_weak_view_an_expert_gets_right_by_raw_and_by_adjusted_logits():
    state = training_of([2.0, 0.0])
    #                        expert 1     expert 2 (adjusted: + 2, + 0)
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]],  # weak, class 0: raw right, wrong; adjusted right, right
                           [[0.0, 1.0], [0.0, 1.0]],  # weak, class 1: raw right, right; adjusted right, wrong
                           [[0.0, 9.0], [0.0, 9.0]],  # the strong views do not count
                           [[9.0, 0.0], [9.0, 0.0]]])  # fmt: skip
    targets, lambdas = torch.tensor([0, 1]), torch.tensor([0.0, 1.0])
    state.count_confident(logits, targets, lambdas)
    assert state.confident.tolist() == [[2, 1], [2, 1]]
    state.count_confident(logits[:2].repeat(2, 1, 1)[[0, 0, 1, 1]], torch.tensor([0, 0]), lambdas)
    assert state.confident.tolist() == [[4, 1], [4, 3]]
    state.losses = [1.0, 2.0, 6.0]
    facts = state.finish_epoch(counted=True)
    assert facts == {"loss": 3.0, "lr": 0.1, "images": 4, "confident_raw": [1.0, 0.25], "confident": [1.0, 0.75]}
    assert (state.epoch, state.step, state.images, state.losses) == (1, 0, 0, [])
    assert not state.confident.any()


def test_where_no_image_is_confident_the_share_is_zero_and_not_missing():
    state = training_of([0.0, 0.0])
    logits, lambdas = torch.tensor([[[0.0, 1.0]] * 2] * 2), torch.tensor([0.0, 1.0])
    state.count_confident(logits, torch.tensor([0]), lambdas)
    state.losses = [1.0]
    assert state.finish_epoch(counted=True)["confident"] == [0.0, 0.0]


@pytest.mark.parametrize(("method", "more", "counted"), [
    ("mdcs", (), True), ("dl", ("method.views=both",), True), ("balanced_softmax", ("method.views=both",), True),
    ("dl", (), False), ("sade", ("method.views=both",), False), ("ce", (), False),
])  # fmt: skip
def test_confident_images_are_counted_where_there_are_two_views_and_exponents(
    tmp_path, mdcs_config, on_synthetic, method, more, counted
):
    config = mdcs_config(method, *more, "epochs=1", "batch_size=62")
    run_of(tmp_path / "run", config)
    (row,) = read_metrics(tmp_path / "run", "epoch")
    assert ("confident" in row, "confident_raw" in row) == (counted, counted)
    if counted:
        assert len(row["confident"]) == config.experts
        assert all(0 <= share <= 1 for share in row["confident"] + row["confident_raw"])


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps(tmp_path, mdcs_config, monkeypatch):
    losses: list[float] = []
    add = LossMeter.add
    monkeypatch.setattr(LossMeter, "add", lambda self, loss: (losses.append(loss.item()), add(self, loss))[1])
    run_of(tmp_path / "run", mdcs_config("balpoe"))
    logged = [row["loss"] for row in read_metrics(tmp_path / "run", "epoch")]
    assert logged == pytest.approx([sum(losses[:STEPS]) / STEPS, sum(losses[STEPS:]) / STEPS], rel=1e-12)


# A loss that is not finite


def test_a_loss_that_is_nan_stops_the_run_before_the_update_and_leaves_what_is_needed_to_see_it_again(
    tmp_path, mdcs_arguments, mdcs_config, poisoned, monkeypatch, capsys
):
    monkeypatch.setattr(train_module, "SAVE_STEPS", 1)
    monkeypatch.setattr(run_module, "SAVE_EVERY_SECONDS", 0)
    updates: list[int] = []
    update = Training.update
    monkeypatch.setattr(Training, "update", lambda self: (updates.append(1), update(self)))
    poisoned(STEPS + 3)
    arguments = mdcs_arguments(tmp_path, "mdcs", "seed=5")
    assert main(arguments) == 2
    printed = capsys.readouterr()
    (folder,) = (tmp_path / "mdcs").iterdir()
    assert printed.err.startswith(f"error: {folder.name}: the loss is nan at step 2")
    assert printed.err.count("\n") == 1
    assert len(updates) == STEPS + 2
    bundle = json.loads((folder / "not_finite.json").read_text())
    order = epoch_order(sum(read_metrics(folder, "start")[0]["class_counts"]), stream(5, "order", 1))
    assert bundle["images"] == split_batches(order, 24)[2].tolist()
    assert (bundle["step"], bundle["loss"], bundle["epoch"], bundle["seed"]) == (2, "nan", 2, 5)
    assert bundle["config"] == (folder / "config.yaml").read_text()
    assert not (folder / "results.json").exists()

    monkeypatch.setattr(algorithm, "build_method", build_method)
    saved = load_state(folder / "checkpoint" / "state.ckpt")["state"]
    assert (saved["epoch"], saved["step"]) == (1, 2)
    assert main(["--resume", str(folder)]) == 0
    expected = run_of(tmp_path / "whole", mdcs_config("mdcs", "seed=5"))
    assert read_results(folder)["model_digest"] == expected["model_digest"]


def test_the_step_of_a_nan_is_that_of_the_epoch_also_where_losses_were_not_looked_at_before(
    tmp_path, mdcs_config, poisoned
):
    poisoned(STEPS + 4)
    with pytest.raises(RunError, match="step 3"):
        run_of(tmp_path / "run", mdcs_config())
    assert json.loads((tmp_path / "run" / "not_finite.json").read_text())["step"] == 3


def test_on_a_device_that_looks_at_losses_late_the_images_are_those_of_the_first_nan(
    tmp_path, mdcs_config, poisoned, late_looks, monkeypatch
):
    """As on a GPU: the meter finds the NaN when it is read, some steps later; no state has it."""
    monkeypatch.setattr(train_module, "SAVE_STEPS", 2)
    monkeypatch.setattr(run_module, "SAVE_EVERY_SECONDS", 0)
    poisoned(STEPS + 3)
    with pytest.raises(RunError, match="step 2"), Run(tmp_path / "run", mdcs_config(), "test") as run:
        train(mdcs_config(), run)
    bundle = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    order = epoch_order(len(problem_module.load_problem(mdcs_config(), CPU).train), stream(0, "order", 1))
    assert bundle["images"] == split_batches(order, 24)[2].tolist()
    saved = load_state(run.state_path)["state"]
    assert (saved["epoch"], saved["step"]) == (1, 2)
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_signal_that_comes_with_a_nan_not_yet_looked_at_saves_no_state_and_tells_the_nan(
    tmp_path, mdcs_config, poisoned, late_looks, monkeypatch
):
    poisoned(2)
    steps = iter(range(1, 100))

    def check(run: Run[Any]) -> None:
        if next(steps) == 3:
            raise InterruptedRunError(2, run.folder)

    monkeypatch.setattr(Run, "check", check)
    with pytest.raises(RunError, match="step 1"), Run(tmp_path / "run", mdcs_config(), "test") as run:
        train(mdcs_config(), run)
    assert (tmp_path / "run" / "not_finite.json").exists()
    assert not run.state_path.exists()


def test_a_nan_after_going_on_within_an_epoch_is_told_with_the_step_and_images_of_that_epoch(
    tmp_path, mdcs_config, poisoned, monkeypatch
):
    config, steps = mdcs_config(), iter(range(1, 100))

    def check(run: Run[Any]) -> None:
        if next(steps) == STEPS + 1:
            raise InterruptedRunError(2, run.folder)

    monkeypatch.setattr(Run, "check", check)
    with pytest.raises(InterruptedRunError), Run(tmp_path / "run", config, "test") as run:
        train(config, run)
    poisoned(2)
    with pytest.raises(RunError, match="step 2"), Run(tmp_path / "run", config, "test") as run:
        train(config, run)
    bundle = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    order = epoch_order(len(problem_module.load_problem(config, CPU).train), stream(0, "order", 1))
    assert (bundle["epoch"], bundle["images"]) == (2, split_batches(order, 24)[2].tolist())


# The forecast


def test_the_forecast_is_of_the_steps_after_the_first_ten_and_comes_once(monkeypatch, capsys):
    for steps, said in ((620, "5 min for the 600"), (220, "100 s for the 200"), (20, "0 s for the 0"),
                        (5020, "42 min for the 5,000")):  # fmt: skip
        clock = iter([100.0, 105.0])
        monkeypatch.setattr(state_module.time, "monotonic", lambda clock=clock: next(clock))
        forecast, printed = Forecast(CPU), []
        for step in range(1, min(steps, 100) + 1):
            forecast.tick(steps - step)
            printed.append(capsys.readouterr().out)
        assert printed[19] == f"forecast: 500 ms a step, {said} steps left\n"
        assert "".join(printed) == printed[19]


def test_the_forecast_counts_the_steps_that_are_left_also_where_a_run_goes_on_within_an_epoch(
    tmp_path, mdcs_config, on_synthetic, monkeypatch, capsys
):
    monkeypatch.setattr(state_module, "FORECAST_STEPS", 4)
    config = mdcs_config("ce", "epochs=6", "batch_size=25", "schedule.milestones=[]", "evaluate.every=6")  # 30 steps
    left = iter(range(13, 0, -1))

    def check(run: Run[Any]) -> None:
        if next(left, 0) == 1:
            raise InterruptedRunError(2, run.folder)

    monkeypatch.setattr(Run, "check", check)
    with pytest.raises(InterruptedRunError):
        run_of(tmp_path / "run", config)
    assert "for the 26 steps left" in capsys.readouterr().out
    left = iter(())
    run_of(tmp_path / "run", config)
    assert f"for the {30 - 13 - 4} steps left" in capsys.readouterr().out


# The progress


def test_the_progress_of_a_run_grows_with_each_step_within_an_epoch_and_goes_on_where_it_stood(
    tmp_path, mdcs_config, monkeypatch
):
    """A study reads it: an epoch of the paper's takes a minute, one of ImageNet-LT hours."""
    monkeypatch.setattr(run_module, "PROGRESS_EVERY_SECONDS", 0)
    seen: list[Any] = []

    def check(run: Run[Any]) -> None:
        seen.append(json.loads((run.folder / "progress.json").read_text()))
        if len(seen) == STEPS + 3:
            raise InterruptedRunError(2, run.folder)

    monkeypatch.setattr(Run, "check", check)
    with pytest.raises(InterruptedRunError):
        run_of(tmp_path / "run", mdcs_config("ce"))
    assert seen == [{"done": n, "total": 2 * STEPS, "unit": "step"} for n in range(STEPS + 3)]
    run_of(tmp_path / "run", mdcs_config("ce"))
    assert [row["done"] for row in seen[STEPS + 3 :]] == [STEPS + 3]
    last = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert last == {"done": 2 * STEPS, "total": 2 * STEPS, "unit": "step"}


# The file of a pretrained network


@pytest.fixture
def from_file(tmp_path, mdcs_config) -> tuple[Config, str]:
    """A run that starts from a file of weights, as the large networks do, and the file's sha256."""
    config, path = mdcs_config("mdcs", "epochs=1"), tmp_path / "weights.pth"
    model = start(mdcs_config("mdcs", "seed=9"), problem_module.load_problem(config, CPU), CPU).model
    torch.save({**model.trunk.state_dict(), **model.experts[0].state_dict()}, path)
    named = config.model.model_copy(update={"pretrained": str(path)})
    return config.model_copy(update={"model": named}), hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_sha256_of_the_pretrained_file_is_in_the_start_event_and_in_the_results(tmp_path, from_file, mdcs_config):
    config, sha256 = from_file
    results = run_of(tmp_path / "run", config)
    assert read_metrics(tmp_path / "run", "start")[0]["pretrained"] == sha256
    assert results["details"]["pretrained"] == read_results(tmp_path / "run")["details"]["pretrained"] == sha256
    assert results["model_digest"] != run_of(tmp_path / "other", mdcs_config("mdcs", "epochs=1"))["model_digest"]


def test_a_run_without_a_pretrained_file_says_so(finished):
    assert read_metrics(finished, "start")[0]["pretrained"] is None
    assert read_results(finished)["details"]["pretrained"] is None


def test_the_file_of_a_pretrained_network_is_found_below_the_data_root(mdcs_config, monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    asked: list[Path] = []
    monkeypatch.setattr(state_module, "load_pretrained", lambda model, path: (asked.append(path), "of it")[1])
    config = mdcs_config("ce")
    named = config.model.model_copy(update={"pretrained": "nets/a.pth"})
    state = start(config.model_copy(update={"model": named}), synthetic(), CPU)
    assert (asked, state.pretrained) == ([tmp_path / "nets" / "a.pth"], "of it")


def test_a_run_of_fewer_steps_has_no_forecast(tmp_path, mdcs_config, capsys):
    run_of(tmp_path / "run", mdcs_config("ce"))
    assert "forecast" not in capsys.readouterr().out


# What a run leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mdcs_config, small_sample) -> Path:
    """A run of five epochs."""
    folder = tmp_path_factory.mktemp("finished") / "smoke-mdcs-s0"
    run_of(folder, mdcs_config("mdcs", "epochs=5", "evaluate.every=2", "model.width=4"))
    return folder


def test_the_test_set_is_looked_at_every_so_many_epochs_and_after_the_last(finished):
    assert [row["epoch"] for row in read_metrics(finished, "evaluate")] == [2, 4, 5]
    assert [row["epoch"] for row in read_metrics(finished, "epoch")] == [1, 2, 3, 4, 5]


def test_the_headline_is_the_last_epoch_and_the_best_on_the_test_set_stands_beside_it(finished):
    results, logged = read_results(finished), read_metrics(finished, "evaluate")
    figures = {(row["at"], row["metric"]): row["value"] for row in results["figures"]}
    assert {metric: value for (at, metric), value in figures.items() if at == "last_epoch"} == logged[-1]["figures"]
    best = max(logged, key=lambda row: row["figures"]["ensemble.accuracy"])
    beside = {metric: value for (at, metric), value in figures.items() if at == "best_on_test"}
    assert beside == {name: value for name, value in best["figures"].items() if name.startswith("ensemble.")}
    assert results["details"]["best_epoch_on_test"] == best["epoch"]
    assert {row["split"] for row in results["figures"]} == {"test"}


def test_results_name_the_run_and_its_data(finished):
    results = read_results(finished)
    assert (results["paper"], results["config"], results["method"], results["seed"]) == ("mdcs", "smoke", "mdcs", 0)
    assert results["data"]["images"] == sum(results["data"]["class_counts"])
    assert results["data"]["test_images"] == 200
    assert results["images_per_second"] > 0
    assert results["precision"] == "float32"


def test_the_predictions_are_those_whose_accuracy_is_reported(finished):
    tensors, description = load_model(finished / "predictions")
    figures = {row["metric"]: row["value"] for row in read_results(finished)["figures"] if row["at"] == "last_epoch"}
    assert description["columns"] == ["expert1", "expert2", "expert3", "ensemble"]
    right = (tensors["predictions"] == tensors["labels"][:, None]).double().mean(0).tolist()
    assert right == pytest.approx([figures[f"{who}.accuracy"] for who in description["columns"]], abs=1e-9)


def test_the_saved_model_gives_the_reported_figures_again(finished, capsys):
    assert eval_module.main([str(finished)]) == 0
    assert "figures of the last epoch are those of results.json" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["mdcs", "ce"])
def test_a_run_in_bfloat16_wide_enough_to_show_the_order_of_bytes_is_evaluated_to_the_same_figures(
    tmp_path, mdcs_arguments, capsys, method
):
    """oneDNN sums in another order over images that lie otherwise: in bfloat16 confidences then differ by percents."""
    wide = ("model.depth=14", "model.width=16", "precision=bfloat16", "epochs=1")
    assert main(mdcs_arguments(tmp_path, method, *wide)) == 0
    (folder,) = (tmp_path / "mdcs").iterdir()
    capsys.readouterr()
    assert eval_module.main([str(folder)]) == 0
    assert "figures of the last epoch are those of results.json" in capsys.readouterr().out
    tensors, _ = load_model(folder / "model")
    config = load(folder / "config.yaml", Config)
    model, _ = eval_module.load_network(folder, config, 10, 1, CPU)
    assert all(value.equal(tensors[name]) for name, value in model.state_dict().items())


def test_the_model_is_saved_with_what_is_needed_to_use_it(finished):
    _, description = load_model(finished / "model")
    assert (description["paper"], description["method"], description["epoch"]) == ("mdcs", "mdcs", 5)
    assert (description["channels"], description["class_order"], len(description["classes"])) == (1, None, 10)
    assert description["config"] == json.loads(load(finished / "config.yaml", Config).model_dump_json())


# The command


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path, mdcs_config, mdcs_arguments, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*mdcs_arguments(tmp_path / "out", "mdcs", "model.depth=14"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    config = mdcs_config("mdcs", "model.depth=14")
    problem = problem_module.load_problem(config, CPU)
    parameters = sum(p.numel() for p in start(config, problem, CPU).model.parameters())
    images = sum(problem.class_counts)
    assert f"# parameters       {parameters:,} (3 experts)\n" in printed
    assert f"# data             {images} images, 16 to 4 a class (0 many, 0 medium, 10 few); 200 to test\n" in printed
    assert f"# steps            {2 * STEPS} of 24 images, 48 rows, in 2 epochs\n" in printed
    assert "# learning rate    0.05 in epoch 1, 0.05 at most, 0.005 in the last\n" in printed
    assert "lambdas: [-0.5, 1.0, 2.5]" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_the_steps_of_a_last_batch_that_is_too_small_for_batch_norm(tmp_path, mdcs_arguments, capsys):
    images = len(problem_module.load_problem(load(find_config("smoke", "mdcs"), Config,
                                                  mdcs_arguments(tmp_path)[4:]), CPU).train)  # fmt: skip
    assert main([*mdcs_arguments(tmp_path, "ce", f"batch_size={images - 1}"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"# steps            2 of {images - 1} images, {images - 1} rows, in 2 epochs\n" in printed
    assert "(1 expert)" in printed


def test_the_networks_of_the_paper_have_its_parameters_in_a_dry_run(tmp_path, capsys, monkeypatch, small_sets):
    colour = {
        split: type(images)(images.images.repeat(1, 3, 1, 1), images.labels, images.classes, "cifar10", split, "")
        for split, images in small_sets.items()
    }
    monkeypatch.setattr("shared.data.load", lambda name, split, **_: colour[split])
    assert main(["--config", "cifar10_lt_if100", "--dry-run", "device=cpu", "threads=1", "data.n_max=100",
                 "data.download=false"]) == 0  # fmt: skip
    assert "# parameters       770,896 (3 experts)\n" in capsys.readouterr().out


def test_the_schema_is_json_and_lists_every_method(capsys):
    assert main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "lambdas" in schema["$defs"]["MdcsConfig"]["properties"]
    assert set(schema["properties"]["method"]["discriminator"]["mapping"]) == set(algorithm.METHODS)


@pytest.mark.parametrize(("overrides", "said"), [
    (["model.experts=2"], "model.experts is 2, but method mdcs has 3"),
    (["method=balpoe", "method.taus=[0.0, 1.0]"], "has mean 0.5; the ensemble is balanced only where it is 1"),
    (["method.lambdas=[]"], "lambdas"),
    (["method=mdcss"], "did you mean 'mdcs'?"),
    (["data.imbalance_factor=0.5"], "data.imbalance_factor"),
    (["model.depth=9"], "not 6 n + 2"),
    (["data.mean=[0.1, 0.2]"], "mean has 2 channels and std 1"),
    (["device=tpu"], "is not a device"),
    (["data.n_max=99999"], "99999"),
])  # fmt: skip
def test_a_configuration_that_cannot_run_is_refused_with_exit_code_2(tmp_path, mdcs_arguments, capsys, overrides, said):
    assert main([*mdcs_arguments(tmp_path / "out"), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [[], ["--config", "smoke", "--resume", "x"], ["--config", "nothing"],
                                       ["--resume", "nothing"]])  # fmt: skip
def test_a_command_line_that_names_no_run_is_refused_in_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_figures_and_does_not_train_a_finished_run_again(tmp_path, mdcs_arguments, capsys):
    arguments = mdcs_arguments(tmp_path, "dl")
    assert main(arguments) == 0
    first = capsys.readouterr().out
    (folder,) = (tmp_path / "mdcs").iterdir()
    before = (folder / "results.json").read_bytes()
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert again.startswith("already finished; nothing was trained\n")
    lines = [line for line in first.splitlines() if line.startswith(("ensemble", "expert"))]
    assert [line.split()[0] for line in lines] == ["ensemble", "expert1", "expert2", "expert3"]
    assert "many -  medium -  few " in lines[0]
    assert all(line in again for line in lines)
    assert (folder / "results.json").read_bytes() == before


def test_a_run_folder_of_another_configuration_is_not_continued(tmp_path, mdcs_arguments, capsys):
    arguments = mdcs_arguments(tmp_path, "ce")
    assert main(arguments) == 0
    (folder,) = (tmp_path / "mdcs").iterdir()
    assert main(["--resume", str(folder), "batch_size=12"]) == 2
    assert "batch_size: 24 -> 12" in capsys.readouterr().err
