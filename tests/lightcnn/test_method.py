"""Losses, schedules and early stopping: oracles T6, T8, T9, T16, T20."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from lightcnn.fused import fuse, stack
from lightcnn.method import (
    GROUPS,
    STAGE1,
    EarlyStopping,
    dual_loss,
    fold_phases,
    lane_losses,
    unfreezing_schedule,
)
from lightcnn.model import MergedCNN, Submodel
from lightcnn.networks import Submodels
from lightcnn.optim import build_optimizer
from shared.errors import ConfigError

COUNTS = {
    ("paper", 1): [1002, 11022, 14662, 14862],
    ("paper", 3): [1002, 15422, 19062, 19622],
    ("literal", 1): [330, 1002, 11022, 14662, 14862],
    ("literal", 3): [330, 1002, 15422, 19062, 19622],
    ("notebook", 1): [14532, 14862],
    ("notebook", 3): [19292, 19622],
    ("all_at_once", 1): [14862, 14862],
    ("all_at_once", 3): [19622, 19622],
}


def test_the_dual_loss_is_the_sum_of_two_mean_cross_entropies():
    logits, targets = torch.randn(2, 8, 10), torch.randint(10, (8,))
    wanted = sum(-output.log_softmax(1)[range(8), targets].mean() for output in logits)
    torch.testing.assert_close(dual_loss(list(logits), targets), wanted)
    torch.testing.assert_close(lane_losses(logits, targets.expand(2, -1)).sum(), wanted)


def test_cross_entropy_on_logits_is_keras_sparse_cross_entropy_on_probabilities():
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(200, 10, dtype=torch.float64), torch.randint(10, (200,))
    p = logits.softmax(1)[range(200), targets]
    assert p.min() > 1e-7
    keras = -p.clamp(1e-7, 1 - 1e-7).log().mean()
    for ours in (lane_losses(logits[None], targets[None])[0], dual_loss([logits], targets)):
        torch.testing.assert_close(ours, keras, atol=1e-6, rtol=0)
    hopeless = torch.tensor(
        [[[-30.0, 0.0]]], dtype=torch.float64
    )  # below 1e-7 Keras stops at 16.1; ours has a gradient
    assert lane_losses(hopeless, torch.tensor([[0]])).item() == pytest.approx(30, abs=1e-6)


def test_stage_1_couples_nothing_a_joint_step_is_two_single_steps_to_the_bit(images, labels):
    clean, other, y = images[:32], images[32:64], labels[:32]

    def stepped(joint):
        nets = [Submodel(1, 28, seed=1), Submodel(1, 28, seed=2)]
        optimizers = (
            [build_optimizer("nadam", [p for n in nets for p in n.parameters()])]
            if joint
            else [build_optimizer("nadam", list(n.parameters())) for n in nets]
        )
        for _ in range(2):
            outputs = [nets[0](clean), nets[1](other)]
            if joint:
                dual_loss(outputs, y).backward()
            else:
                for output in outputs:
                    functional.cross_entropy(output, y).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach() for n in nets for p in n.parameters()]

    assert all(torch.equal(p, q) for p, q in zip(stepped(True), stepped(False), strict=True))


def test_the_loss_of_one_branch_moves_nothing_of_the_other_in_the_fused_form(images, labels):
    network = Submodels(1, 28, 10)
    weights = stack([network.initial(1), network.initial(2)])
    for tensor in weights.values():
        tensor.requires_grad_(True)
    logits = network.forward(weights, torch.stack([images[:32], images[32:64]]), network.levels)
    lane_losses(logits, labels[:32].expand(2, -1))[0].backward()
    for name, tensor in weights.items():
        assert tensor.grad is not None, name
        assert tensor.grad[0].abs().sum() > 0, name
        assert not tensor.grad[1].any(), name


@pytest.mark.parametrize(("name", "channels"), COUNTS)
def test_trainable_counts_by_phase(name, channels):
    state = fuse(MergedCNN(channels, 28 if channels == 1 else 32).state_dict())
    found = [
        sum(t.numel() for n, t in state.items() if n.partition(".")[0] in phase.trains)
        for phase in unfreezing_schedule(name)
    ]
    assert found == COUNTS[name, channels]


@pytest.mark.parametrize("name", ["paper", "literal"])
def test_each_phase_trains_all_that_the_one_before_did_from_the_top_down(name):
    phases = unfreezing_schedule(name)
    for phase in phases:
        assert phase.trains == GROUPS[-len(phase.trains) :]
    for before, after in pairwise(phases):
        assert set(before.trains) < set(after.trains)
    assert phases[-1].trains == GROUPS


def test_the_phases_are_those_of_the_brief():
    told = [(p.name, p.optimizer, p.epochs, p.patience) for p in unfreezing_schedule("paper")]
    assert told == [("P1", "nadam", 10, 5), ("P2", "sgd", 10, 5), ("P3", "sgd", 10, 5), ("P4", "sgd", 50, 10)]
    told = [(p.name, p.optimizer, p.epochs, p.patience) for p in unfreezing_schedule("notebook")]
    assert told == [("2a", "nadam", 10, 5), ("2b", "sgd", 50, 10)]
    assert (STAGE1.epochs, STAGE1.patience, STAGE1.start) == (20, 5, 3)
    assert [(p.epochs, p.patience) for p in fold_phases(6)] == [(10, 3)] * 6


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match="no unfreezing schedule 'papr'; choose from paper, literal"):
        unfreezing_schedule("papr")


VALUES = (0.90, 0.91, 0.9103, 0.9105, 0.9106, 0.9107, 0.9108)


def test_early_stopping_keeps_the_epoch_that_no_later_one_exceeds_by_min_delta():
    stop = EarlyStopping(patience=5)
    seen = [(*stop.update(epoch, value), stop.stopped) for epoch, value in enumerate(VALUES)]
    assert (stop.kept_epoch, stop.kept) == (1, 0.91)
    assert [stopped for *_, stopped in seen] == [False] * 6 + [True]
    assert [improved for _, improved, _ in seen] == [True, True] + [False] * 5
    assert [best for best, _, _ in seen] == [True] * 7  # the checkpoint has no min_delta
    assert (stop.best_epoch, stop.epochs) == (6, 7)


def test_epochs_before_the_start_are_ignored_by_early_stopping_but_not_by_the_checkpoint():
    stop = EarlyStopping(patience=5, start=3)
    for epoch, value in enumerate(VALUES):
        stop.update(epoch, value)
        assert stop.kept_epoch == (3 if epoch >= 3 else -1)
    assert not stop.stopped
    stop = EarlyStopping(patience=5, start=3)
    for epoch, value in enumerate([0.99, 0.5, 0.5, 0.6]):
        stop.update(epoch, value)
    assert (stop.best_epoch, stop.kept_epoch) == (0, 3)


def test_an_improvement_of_exactly_min_delta_is_none_and_an_equal_value_is_not_better():
    stop = EarlyStopping(patience=2, min_delta=0.25)
    assert [stop.update(e, v) for e, v in enumerate([0.5, 0.75, 0.75])] == [(True, True), (True, False), (False, False)]
    assert stop.stopped


def test_the_first_epoch_never_stops_and_patience_0_never_does():
    stop = EarlyStopping(patience=1)
    stop.update(0, float("nan"))
    assert not stop.stopped
    stop.update(1, float("nan"))
    assert stop.stopped
    stop = EarlyStopping(patience=0)
    for epoch in range(20):
        stop.update(epoch, 0.5)
    assert not stop.stopped
