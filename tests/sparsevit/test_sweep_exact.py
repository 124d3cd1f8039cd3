"""The sweep to the number: which masks a pruner gives, what removal keeps, how a pruned network is trained on."""

import pytest
import torch

from sparsevit import prune
from sparsevit.baselines import local_magnitude_masks, random_masks, wanda_masks
from sparsevit.eval import described
from sparsevit.fit import Fit
from sparsevit.measure import calibrate, observations
from sparsevit.method import global_magnitude_masks, keep_highest, prunable
from sparsevit.problem import load_problem
from sparsevit.prune import Group, Sweep
from sparsevit.shrink import load_network, remove_heads, remove_neurons
from tests.sparsevit.small_fits import same

CPU = torch.device("cpu")


@pytest.fixture
def sweep_of(tiny, tiny_run):
    """The sweep of a finished run, under other settings of pruning."""

    def make(*overrides):
        config = tiny("paper", *overrides)
        return Sweep(config, load_network(tiny_run / "model"), load_problem(config.data, CPU), lambda: None)

    return make


def test_every_pruner_gives_the_masks_of_its_own_formula(sweep_of):
    sweep = sweep_of()
    authors, blocks = (dict(prunable(sweep.network, name)) for name in ("authors", "blocks"))
    wanted = {
        "global_l1": global_magnitude_masks(authors, 0.3),
        "global_l1_blocks": global_magnitude_masks(blocks, 0.3),
        "local_l1": local_magnitude_masks(blocks, 0.3),
        "random": random_masks(authors, 0.3, sweep.config.seed),
        "wanda": wanda_masks(blocks, sweep.calibration.input_norms, 0.3),
    }
    for pruner, masks in wanted.items():
        found = sweep.masks(pruner, 0.3)
        assert found.keys() == masks.keys()
        assert all(torch.equal(found[name], mask) for name, mask in masks.items()), pruner
    assert not all(torch.equal(wanted["wanda"][n], wanted["local_l1"][n]) for n in blocks)


@pytest.mark.parametrize(("overrides", "neurons", "means"), [
    ((), 6, True), (("prune.compensate=false",), 6, False), (("prune.multiple=8",), 8, True),
])  # fmt: skip
def test_removal_keeps_the_highest_scores_on_training_images_and_adds_the_means(sweep_of, overrides, neurons, means):
    sweep = sweep_of(*overrides)
    found = calibrate(sweep.network, sweep.problem.train, 40, 25)
    kept = [keep_highest(scores, neurons) for scores in found.neuron_scores(sweep.network)]
    heads = [keep_highest(scores, 1) for scores in found.head_scores]
    wanted = remove_neurons(sweep.network, kept, found.hidden_mean if means else None)
    assert same(sweep.pruned("neurons", 0.5).state_dict(), wanted.state_dict())
    wanted = remove_heads(wanted, heads, found.mixed_mean if means else None)
    assert same(sweep.pruned("neurons_heads", 0.5).state_dict(), wanted.state_dict())
    alone = remove_heads(sweep.network, heads, found.mixed_mean if means else None)
    assert same(sweep.pruned("heads", 0.5).state_dict(), alone.state_dict())


def test_a_pruned_network_is_trained_on_by_plain_cross_entropy_at_a_share_of_the_rate(sweep_of, monkeypatch):
    sweep, calls = sweep_of("prune.recover.epochs=2", "prune.recover.lr_factor=0.25"), []
    monkeypatch.setattr(prune, "Fit", lambda net, data, plan, **more: calls.append((data, plan, more))
                        or Fit(net, data, plan, **more))  # fmt: skip
    _, networks = sweep.run(Group("global_l1", (0.5,), recover=True))
    ((data, plan, more),) = calls
    assert data is sweep.problem.train
    assert set(more) == {"masks"}, "no penalty"
    assert plan.epochs == 2
    assert plan.recipe == sweep.config.recipe.model_copy(update={"lr": 0.25 * sweep.config.recipe.lr})
    ((name, network),) = networks.items()
    assert name == "global_l1.50.recovered"
    masks, state = sweep.masks("global_l1", 0.5), network.state_dict()
    assert all(not state[n][~mask].any() for n, mask in masks.items())
    assert not same(state, sweep.pruned("global_l1", 0.5).state_dict())


def test_what_is_told_of_the_last_map_is_of_the_last_block_over_evenly_spaced_images(sweep_of):
    sweep = sweep_of()
    found, (figures, _) = observations(sweep.network, sweep.problem.test, 25), described(sweep)
    for name in ("entropy", "penalty"):
        assert figures[f"attention.{name}_last"] == found[name][-1] != found[name][0]
