"""What a step of every method is fed with, how it moves, and which images choose the epoch: against plain formulas."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from lightcnn import feed, fused, training
from lightcnn.algorithm import CLEAN, Images, plan, settings_of, shifted
from lightcnn.augment import Ranges, augment, draw
from lightcnn.baselines import BASELINES, ImageShape
from lightcnn.eval import confusion, validation_accuracy
from lightcnn.method import unfreezing_schedule
from lightcnn.model import Submodel
from lightcnn.optim import one_cycle
from lightcnn.problem import folds_of
from lightcnn.state import lane_of_fold

MILD, SMALL = Ranges(rotation=10 / 360, zoom=0.0, shift=2 / 28), Ranges(0, 0, 2 / 28, flip=True)
SHIFTED = Images(SMALL, "whole_pixels")


@pytest.fixture
def begun(config_of, problem_of):
    """A phase of a method that has just begun, and its problem: (overrides) -> (state, problem, config)."""

    def begin(*overrides, step=0):
        config = config_of(*overrides)
        problem, points = problem_of(config), {}
        for number, one in enumerate(plan(config, problem)[: step + 1]):
            state = training.begin(one, points, problem, config)
            if number < step:
                while not state.done:
                    training.train_epoch(state, problem, config)
                    training.end_epoch(state, training.validate(state, problem, config))
                points = training.end_phase(state, points)
        return state, problem, config

    return begin


def module_of(state, row):
    """One network of a stack as a module of its own, which shares nothing with it."""
    weights = {name: tensor.clone() for name, tensor in fused.unstack(state.weights, row).items()}
    return state.step.network.to_module(weights)


# --- which images -----------------------------------------------------------------------------------------------------


def test_the_validation_images_and_no_others_choose_the_epoch(begun):
    state, problem, config = begun("method=scratch")
    training.train_epoch(state, problem, config)
    labels = problem.labels.clone()
    labels[problem.lanes[0].validation] = -1
    nobody_right = replace(problem, labels=labels)
    assert any(training.validate(state, problem, config))
    assert not any(training.validate(state, nobody_right, config))
    assert any(validation_accuracy(state.step.network, state.weights, problem, config))
    assert not any(validation_accuracy(state.step.network, state.weights, nobody_right, config))


@pytest.mark.parametrize(
    ("method", "ranges", "warp"),
    [("two_stage", Ranges(), "sequential"), ("combined_warp", Ranges(), "combined"),
     ("scratch_augmented", Ranges(), "sequential"), ("scratch_mild", MILD, "combined"),
     ("bn_gap", SMALL, "whole_pixels")],
)  # fmt: skip
def test_a_step_is_fed_with_the_images_as_the_method_changes_them(begun, method, ranges, warp):
    state, problem, _ = begun(f"method={method}", "seeds=1")
    last = state.members - 1
    batch = next(feed.batches(state, problem))
    count = batch.inputs.shape[1]
    images = problem.images[feed.orders(state)[0, :count]].float() / 255
    draws = draw(130, ranges, state.lanes[0].draws("augment", state.step.phase.name, 0, last))[:count]
    torch.testing.assert_close(batch.inputs[last], augment(images, draws, ranges, warp))
    assert not torch.equal(batch.inputs[last], images)
    if last:
        assert torch.equal(batch.inputs[0], images), "branch a sees them as they are"


def test_every_image_and_every_epoch_has_draws_of_its_own(begun):
    state, problem, _ = begun()
    first = feed.warps(state)[1]
    assert len(first.flatten(0, 1).unique(dim=0)) == 2 * 130
    state.epoch = 1
    assert not feed.warps(state)[1].equal(first)
    masks = begun(step=1)[0]
    drawn = [feed.dropout_masks(masks, 40, first, problem.images.device) for first in (0, 40)]
    assert not drawn[0].equal(drawn[1])
    masks.epoch = 1
    assert not feed.dropout_masks(masks, 40, 0, problem.images.device).equal(drawn[0])


def test_folds_hold_out_each_image_once_and_train_on_all_others(config_of, problem_of):
    config = config_of("method={name: two_stage, kfold: honest, folds: 3}", "seeds=1")
    lanes = problem_of(config).lanes
    assert [(len(lane.train), len(lane.validation)) for lane in lanes] == [(120, 60)] * 3
    assert len(torch.cat([lane.validation for lane in lanes]).unique()) == 180
    assert not any(set(lane.train.tolist()) & set(lane.validation.tolist()) for lane in lanes)
    notebook = config_of("method={name: two_stage, kfold: notebook, folds: 3}", "seeds=1")
    problem = problem_of(notebook)
    (lane,) = problem.lanes
    for step in plan(notebook, problem)[-3:]:
        train, validation = folds_of(0, lane.train, lane.validation, 3)[step.fold]
        found = lane_of_fold(lane, step, notebook)
        assert torch.equal(found.train, train)
        assert torch.equal(found.validation, validation)


def test_the_confusion_table_has_a_row_a_class():
    assert confusion(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1]), 2) == [[0, 2], [1, 0]]


# --- how it moves -----------------------------------------------------------------------------------------------------


def test_dropout_is_applied_to_the_hidden_layer_while_the_merged_model_trains(begun):
    state, problem, config = begun("seeds=1", "batch_size=130", "stage1.epochs=1", step=1)
    batch, network = next(feed.batches(state, problem)), module_of(state, 0)
    hidden = network.fc1(batch.inputs[0]).relu() * batch.kept[0] / 0.5
    wanted = functional.cross_entropy(network.fc2(hidden), batch.labels[0])
    training.train_epoch(state, problem, config)
    torch.testing.assert_close(state.loss_sums[0] / 130, wanted.detach())


def test_the_one_cycle_runs_over_all_steps_of_all_epochs(begun, monkeypatch):
    state, problem, config = begun("method=bn_gap", "seeds=1", "plain.epochs=3")
    rates = []
    monkeypatch.setattr(training, "set_rate", lambda optimizer, lr: rates.append(lr))
    for _ in range(3):
        training.train_epoch(state, problem, config)
        training.end_epoch(state, [0.5])
    steps = 3 * len(feed.batch_positions(state))
    assert rates == [one_cycle(step, steps, 0.1) for step in range(steps)]
    assert one_cycle(9, 20, 1.0) == pytest.approx(0.75025)  # half way down is not three quarters on a line


def test_batch_norm_keeps_the_statistics_of_what_each_network_was_trained_on(begun):
    state, problem, config = begun("method=bn_gap", "batch_size=130", "plain.epochs=1")
    modules = [module_of(state, row).train() for row in range(2)]
    for module, images in zip(modules, next(feed.batches(state, problem)).inputs, strict=True):
        module(images)
    training.train_epoch(state, problem, config)
    for row, module in enumerate(modules):
        for name, tensor in module.named_buffers():
            torch.testing.assert_close(state.weights[name][row], tensor)
    assert not torch.equal(state.weights["norm1.running_mean"][0], torch.zeros(16))


def test_both_branches_go_on_until_one_of_them_has_stopped(begun):
    state, problem, config = begun("seeds=1", "stage1={epochs: 8, patience: 1}")
    for pair in ([0.1, 0.1], [0.2, 0.2], [0.3, 0.3], [0.4, 0.4], [0.4, 0.5]):
        assert not state.done
        training.train_epoch(state, problem, config)
        training.end_epoch(state, pair)
    assert state.done, "branch a did not improve in its fifth epoch, branch b did"
    assert state.epoch == 5


# --- the arms ---------------------------------------------------------------------------------------------------------

# Parameters, training images, optimiser, batch size, highest rate, what is kept.
ARMS = {
    "submodel": (6_930, CLEAN, "nadam", 32, None),
    "scratch": (14_862, CLEAN, "nadam", 32, None),
    "scratch_augmented": (14_862, Images(Ranges(), "sequential"), "nadam", 32, None),
    "scratch_mild": (14_862, Images(MILD, "combined"), "nadam", 32, None),
    "wide": (14_232, CLEAN, "nadam", 32, None),
    "scratch_one_cycle": (14_862, CLEAN, "sgd", 128, 0.01),
    "wide_one_cycle": (14_232, CLEAN, "sgd", 128, 0.01),
    "lenet5": (61_706, CLEAN, "nadam", 32, None),
    "bn_gap": (12_410, SHIFTED, "sgd", 128, 0.1),
    "squeezenet": (727_626, SHIFTED, "nadam", 32, None),
    **{name: (count, SHIFTED, "sgd", 128, 0.1) for name, count in (
        ("shufflenet_v2", 352_042), ("mobilenet_v2_010", 98_890), ("mobilenet_v2_025", 250_922),
        ("mobilenet_v2_035", 408_938),
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", BASELINES)
def test_a_network_that_is_trained_in_one_go_has_its_own_size_images_and_recipe(config_of, problem_of, name):
    config = config_of(f"method={name}", "plain.batch_size=128", "seeds=1", "batch_size=32")
    (step,) = plan(config, problem_of(config))
    module = step.network.to_module(step.network.initial(0))
    count = sum(parameter.numel() for parameter in module.parameters())
    assert (count, step.images[0], step.phase.optimizer, step.batch_size, step.peak_lr) == ARMS[name]
    assert step.keep == "best"


def test_digits_are_not_flipped(config_of):
    shape = ImageShape(1, 28, 10)
    digits = config_of().model_copy(update={"data": config_of().data.model_copy(update={"name": "mnist"})})
    assert not shifted(digits, shape, 2).ranges.flip
    assert shifted(config_of(), shape, 2).ranges.flip


def test_the_variants_are_what_they_are_called(config_of):
    settings = {name: settings_of(config_of(f"method={name}")) for name in ("no_transfer", "a_only", "notebook")}
    assert [settings[name].head_transfer for name in settings] == ["none", "a_only", "a_only"]
    assert settings["notebook"].schedule == "notebook"
    assert settings_of(config_of("method=two_clean")).branch_b == "clean"
    assert settings_of(config_of("method=linear_head")).head_activation == "linear"
    assert [phase.optimizer for phase in unfreezing_schedule("all_at_once")] == ["nadam", "sgd"]
    assert [phase.optimizer for phase in unfreezing_schedule("literal")] == ["nadam", "nadam", "sgd", "sgd", "sgd"]


def test_a_submodels_first_weights_have_keras_distributions():
    network = Submodel(1, 28, seed=0)
    for layer, inputs in ((network.conv1, 9), (network.conv2, 90)):
        assert abs(float(layer.weight.detach().std()) / (2 / inputs) ** 0.5 - 1) < 0.2
        assert not layer.bias.any()
    bound = (6 / (500 + 10)) ** 0.5
    assert 0.99 * bound < float(network.fc.weight.detach().abs().max()) <= bound
