"""What a phase keeps and what the next one begins with: stage 1, stage 2, the notebook's folds (T10, T17)."""

from dataclasses import replace

import pytest
import torch

from lightcnn import fused, training
from lightcnn.algorithm import CARRY, final_point, plan
from lightcnn.feed import gather, live_levels
from lightcnn.method import lane_losses
from tests.lightcnn.stacks import largest_difference


@pytest.mark.parametrize(
    ("method", "phases"), [("two_stage", 2), ("two_stage", 3), ("two_stage", 4), ("literal", 2), ("notebook", 2)]
)
def test_the_next_phase_starts_where_the_kept_epoch_ended(config_of, problem_of, run_phases, method, phases):
    """The loss just after a transition is the one just before it: nothing but the kept weights goes over."""
    config = config_of("stage2.max_epochs=3", f"method={method}")
    problem = problem_of(config)
    points, states, _ = run_phases(config, problem, phases)
    before, step = plan(config, problem)[phases - 1 : phases + 1]
    after = training.begin(step, points, problem, config)
    assert largest_difference(after.weights, states[-1].kept) == 0
    assert largest_difference(points[before.phase.name], states[-1].kept) == 0
    assert not after.optimizer.state, "a fresh optimiser"
    state = states[-1]
    state.weights, state.active = state.kept, [0, 1]
    losses = validation_losses(state, problem)
    torch.testing.assert_close(validation_losses(after, problem), losses, atol=1e-6, rtol=0)
    assert training.validate(state, problem, config) == training.validate(after, problem, config)
    assert training.validate(after, problem, config) == [stop.kept for stop in state.stops]


def validation_losses(state, problem):
    """Cross-entropy of each network in evaluation mode; the frozen layers' outputs are taken where they are kept."""
    held = torch.stack([lane.validation for lane in state.lanes])
    with torch.no_grad():
        inputs = gather(state, problem, held)
        logits = state.step.network.forward(state.weights, inputs, live_levels(state))
    return lane_losses(logits, problem.labels[held])


def after_each_epoch(state, problem, config, accuracies):
    """Train a phase to its end with these validation accuracies; the weights after each epoch."""
    history, scripted = [], iter(accuracies)
    while not state.done:
        training.train_epoch(state, problem, config)
        history.append({n: t.detach().clone() for n, t in state.weights.items()})
        training.end_epoch(state, next(scripted))
    return history


def test_the_merged_model_carries_each_branch_from_its_own_best_epoch(config_of, problem_of, run_phases):
    config = config_of("seeds=1", "stage1.epochs=4")
    problem = problem_of(config)
    step = plan(config, problem)[0]
    state = training.begin(step, {}, problem, config)
    # Branch a is best in epoch 1, b in epoch 2; of equal ones the first.
    history = after_each_epoch(state, problem, config, [[0.1, 0.2], [0.4, 0.3], [0.2, 0.5], [0.4, 0.5]])
    assert [stop.best_epoch for stop in state.stops] == [1, 2]
    points = training.end_phase(state, {})
    for point, epoch, row in (("branch_a", 1, 0), ("branch_b", 2, 1)):
        assert all(torch.equal(points[point][n][0], history[epoch][n][row]) for n in history[0])
    merged = training.begin(plan(config, problem)[1], points, problem, config).weights
    for side, (epoch, row) in enumerate(((1, 0), (2, 1))):
        assert torch.equal(merged["conv1.weight"][0, side], history[epoch]["conv1.weight"][row])
        assert torch.equal(merged["head.weight"][0, side].flatten(1), history[epoch]["fc.weight"][row])


def test_stage_2_goes_on_from_what_early_stopping_keeps_not_from_the_last_epoch(config_of, problem_of, run_phases):
    config = config_of("seeds=1", "stage2.max_epochs=3")
    problem = problem_of(config)
    points, *_ = run_phases(config, problem, 1)
    step = replace(plan(config, problem)[1], best_point="best_epoch")
    state = training.begin(step, points, problem, config)
    history = after_each_epoch(state, problem, config, [[0.5], [0.6], [0.6005]])
    found = training.end_phase(state, points)
    assert largest_difference(found[CARRY], history[1]) == 0
    assert largest_difference(found["P1"], history[1]) == 0, "and that is what the phase reports"
    assert largest_difference(state.best, history[2]) == 0
    assert largest_difference(found["best_epoch"], history[2]) == 0


def test_a_fold_of_the_notebook_gives_its_best_epoch_and_the_next_fold_goes_on_from_the_kept_one(config_of, problem_of):
    """2c and F4: a file of the best epoch a fold, and one model that early stopping hands on through all of them."""
    config = config_of("method={name: two_stage, kfold: notebook, folds: 3}", "seeds=1", "stage2.max_epochs=3",
                       "data.train_images=40")  # fmt: skip
    problem = problem_of(config)
    *_, last, first, second, third = plan(config, problem)
    points = {CARRY: fused.stack([last.network.initial(0)])}
    for step, accuracies in ((first, [0.5, 0.6, 0.6005]), (second, [0.7, 0.7009, 0.6]), (third, [0.4, 0.5, 0.6])):
        state = training.begin(step, points, problem, config)
        assert largest_difference(state.weights, points[CARRY]) == 0
        assert not state.optimizer.state, "a fresh optimiser"
        history = after_each_epoch(state, problem, config, [[value] for value in accuracies])
        points = training.end_phase(state, points)
        best, kept = ((2, 1), (1, 0), (2, 2))[step.fold]
        assert largest_difference(points[f"fold{step.fold + 1}"], history[best]) == 0
        assert largest_difference(points[CARRY], history[kept]) == 0
    assert final_point([last, first, second, third]) == "fold3"
