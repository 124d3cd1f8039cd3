"""Seeds side by side as one network are the seeds alone, whatever the network, also when one stops early."""

import pytest

from lightcnn import training
from lightcnn.algorithm import plan
from lightcnn.state import narrow
from tests.lightcnn.stacks import largest_difference

SEEDS = (0, 1, 2)


def test_seeds_side_by_side_are_the_seeds_alone(config_of, problem_of, run_phases):
    config = config_of("seeds=3")
    together, _, epochs = run_phases(config, problem_of(config))
    for number, seed in enumerate(SEEDS):
        alone_config = config_of("seeds=1", f"seed={seed}")
        alone, _, own = run_phases(alone_config, problem_of(alone_config))
        assert alone.keys() == together.keys()
        for point, stacked in alone.items():
            mine = {n: t[number][None] for n, t in together[point].items()}
            assert largest_difference(stacked, mine) < 1e-4, point
        for phase, alone_phase in zip(epochs, own, strict=True):
            for epoch, alone_epoch in zip(phase, alone_phase, strict=True):
                found, wanted = epoch[number], alone_epoch[0]
                assert found.loss == pytest.approx(wanted.loss, abs=1e-4)
                assert found.validation == pytest.approx(wanted.validation, abs=0.021)  # of 50 images
    first, *others = [{n: t[k] for n, t in together["P4"].items()} for k in range(3)]
    assert min(largest_difference(first, other) for other in others) > 0.05, (
        "seeds have orders and weights of their own"
    )


@pytest.mark.slow
def test_seeds_side_by_side_are_the_seeds_alone_over_a_whole_epoch(config_of, problem_of, run_phases):
    settings = ("data.train_images=4000", "data.val_images=1000", "stage1.epochs=1")
    config = config_of("seeds=2", *settings)
    together, *_ = run_phases(config, problem_of(config), 1)
    for number in range(2):
        alone_config = config_of("seeds=1", f"seed={number}", *settings)
        alone, *_ = run_phases(alone_config, problem_of(alone_config), 1)
        for point in ("branch_a", "branch_b"):
            mine = {n: t[number][None] for n, t in together[point].items()}
            assert largest_difference(alone[point], mine) < 1e-4


@pytest.mark.parametrize("method", ["bn_gap", "scratch_mild", "{name: budget, layout: c4 P s6}"])
def test_seeds_of_every_kind_of_network_are_the_seeds_alone(method, config_of, problem_of, run_phases):
    config = config_of(f"method={method}", "seeds=2")
    together, _, _ = run_phases(config, problem_of(config))
    for number in range(2):
        alone_config = config_of(f"method={method}", "seeds=1", f"seed={number}")
        alone, _, _ = run_phases(alone_config, problem_of(alone_config))
        mine = {n: t[number][None] for n, t in together["train"].items()}
        assert largest_difference(alone["train"], mine) < 1e-4
    first, second = ({n: t[k] for n, t in together["train"].items()} for k in range(2))
    assert largest_difference(first, second) > 0.01


def test_a_lane_that_stops_keeps_its_weights_and_the_others_go_on_as_if_alone(
    config_of, problem_of, run_phases, scripted_validation, monkeypatch
):
    monkeypatch.setattr(training, "validate", scripted_validation)
    settings = ("stage1={epochs: 7, patience: 1}", "stage2.max_epochs=1")
    config = config_of("seeds=3", *settings)
    together, states, epochs = run_phases(config, problem_of(config), 1)
    ran = [max(states[0].stops[n].epochs for n in states[0].networks([lane])) for lane in range(3)]
    assert ran == [5, 6, 7], "the seeds stop one after the other"
    assert [sorted(e.lane for e in epoch) for epoch in epochs[0]] == [
        [lane for lane in range(3) if ran[lane] > n] for n in range(max(ran))
    ]
    for seed in SEEDS:
        alone_config = config_of("seeds=1", f"seed={seed}", *settings)
        alone, own, _ = run_phases(alone_config, problem_of(alone_config), 1)
        assert own[0].stops[0].epochs == ran[seed]
        for point in ("branch_a", "branch_b"):
            mine = {n: t[seed][None] for n, t in together[point].items()}
            assert largest_difference(alone[point], mine) < 1e-4


@pytest.mark.parametrize(("method", "cached"), [("two_stage", True), ("notebook", False)])
def test_a_seed_that_stops_in_stage_2_leaves_the_others_as_if_alone(
    config_of, problem_of, run_phases, stops_in_stage_2, method, cached
):
    """P1 and P2 on the frozen layers' outputs, computed once; 2a and 2b on images. All of them have dropout."""
    settings = (f"method={method}", "stage1.epochs=1", "stage2.max_epochs=4", "data.train_images=40")
    config = config_of("seeds=3", *settings)
    together, states, epochs = run_phases(config, problem_of(config))
    for state in states[1:]:
        assert [stop.epochs for stop in state.stops] == [2, 3, 4], "the seeds stop one after the other"
        assert (state.inputs is not None) == cached
    for seed in SEEDS:
        alone_config = config_of("seeds=1", f"seed={seed}", *settings)
        alone, _, own = run_phases(alone_config, problem_of(alone_config))
        for point, stacked in alone.items():
            mine = {n: t[seed][None] for n, t in together[point].items()}
            assert largest_difference(stacked, mine) < 1e-4, point
        for phase, alone_phase in zip(epochs, own, strict=True):
            losses = [e.loss for epoch in phase for e in epoch if e.lane == seed]
            assert losses == [pytest.approx(e.loss, abs=1e-4) for (e,) in alone_phase]


def test_folds_that_go_on_are_validated_on_their_own_images(config_of, problem_of):
    config = config_of("method={name: two_stage, kfold: honest, folds: 3}", "seeds=1")
    problem = problem_of(config)
    state = training.begin(plan(config, problem)[0], {}, problem, config)
    of_all = training.validate(state, problem, config)
    narrow(state, [0, 2])
    assert training.validate(state, problem, config) == of_all[:2] + of_all[4:]
    state.lanes = (state.lanes[0], *state.lanes[:2])
    assert training.validate(state, problem, config) != of_all[:2] + of_all[4:], "other images, other accuracies"
