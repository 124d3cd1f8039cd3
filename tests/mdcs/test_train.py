"""Training: what a step sees, what a run learns, and what is counted."""

import math
from typing import Any

import pytest
import torch

import mdcs.algorithm as algorithm
import mdcs.model as model_module
from mdcs import eval as eval_module
from mdcs.algorithm import Method, build_method
from mdcs.augment import VIEWS
from mdcs.state import Training, start
from shared.gpu import LossMeter
from shared.run import read_metrics, read_results
from tests.mdcs.runs import CPU, STEPS, run_of, synthetic

pytestmark = pytest.mark.usefixtures("small_sample")


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


def test_logits_are_adjusted_by_the_logarithm_of_the_training_images(mdcs_config):
    problem = synthetic()
    found = start(mdcs_config("mdcs"), problem, CPU).log_counts
    assert found.tolist() == pytest.approx([math.log(count) for count in problem.class_counts])


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
