"""Evaluation: figures by hand, the ensemble, any number of experts, batches and modes."""

import json
import math

import pytest
import torch
from torch import nn

from mdcs import eval as evaluation
from mdcs import measures
from mdcs.config import Config
from mdcs.eval import Outputs, figures_of, mean_of, run_network
from mdcs.model import Architecture, build_model
from mdcs.problem import Problem
from mdcs.views import ResidentViews
from shared.batches import Resident
from shared.config import load
from shared.longtail import ShotGroups
from shared.run import changed_figures
from tests.mdcs.figures import DIVERSITY, NAMES

THIRDS = {"head": (0,), "middle": (1,), "tail": (2, 3)}


def outputs(columns, confidence=1.0, kl=0.0):
    """What a network gives whose experts predict `columns`, the last one being the ensemble."""
    predictions = torch.tensor(columns, dtype=torch.int32).T
    experts = len(columns) - 1
    return Outputs(predictions, torch.full(predictions.shape, confidence), torch.full((experts, experts), kl))


# --- figures by hand --------------------------------------------------------------------------------------------------

# True class by predicted class: 3 of 4 right in class 0, 1 of 2 in class 1, none to test in class 2, 0 of 4 in class 3.
MATRIX = [[3, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [2, 0, 2, 0]]


LABELS = torch.tensor([c for c, row in enumerate(MATRIX) for n in row for _ in range(n)])


PREDICTED = [p for row in MATRIX for p, n in enumerate(row) for _ in range(n)]


def by_hand(groups=((0,), (1, 3), ()), thirds=THIRDS, columns=2, **kwargs):
    return figures_of(outputs([PREDICTED] * columns, **kwargs), LABELS, ShotGroups(*groups), thirds, 4)


def test_figures_of_a_hand_made_confusion_matrix():
    found = by_hand()
    figures, details = found.figures, found.details
    assert figures["ensemble.accuracy"] == pytest.approx(4 / 10)
    assert details["ensemble.per_class"] == [0.75, 0.5, None, 0.0]
    assert figures["ensemble.many"] == pytest.approx(0.75)
    assert figures["ensemble.medium"] == pytest.approx(0.25)
    assert figures["ensemble.few"] is None
    assert (figures["ensemble.head"], figures["ensemble.middle"], figures["ensemble.tail"]) == (0.75, 0.5, 0.0)
    assert figures["ensemble.ece"] == pytest.approx(6 / 10)


@pytest.mark.parametrize(
    "groups", [((), (), (0, 1, 2, 3)), ((0,), (1,), (3,)), ((3, 0), (), (1,)), ((2,), (0, 1), (3,))]
)
def test_shot_groups_are_those_that_are_given_and_average_classes_and_not_images(groups):
    per_class = {0: 0.75, 1: 0.5, 3: 0.0}
    figures = by_hand(groups).figures
    for name, classes in zip(("many", "medium", "few"), groups, strict=True):
        known = [per_class[c] for c in classes if c in per_class]
        assert figures[f"ensemble.{name}"] == (pytest.approx(sum(known) / len(known)) if known else None)


def test_an_empty_group_or_one_without_test_images_has_none_and_no_figure_is_nan():
    found = by_hand(((0, 1, 3), (), (2,)), {"head": (0, 1), "middle": (), "tail": (2,)}, columns=4)
    for who in ("ensemble", "expert1", "expert3"):
        assert found.figures[f"{who}.medium"] is found.figures[f"{who}.few"] is None
        assert found.figures[f"{who}.middle"] is found.figures[f"{who}.tail"] is None
    assert all(value is None or math.isfinite(value) for value in found.figures.values())
    json.dumps(found.figures | found.details, allow_nan=False)


def test_the_mean_of_a_third_leaves_out_classes_without_test_images():
    assert mean_of(torch.tensor([0.5, math.nan, 0.25])) == pytest.approx(0.375)
    assert mean_of(torch.tensor([math.nan])) is None
    assert mean_of(torch.tensor([])) is None


def test_calibration_is_that_of_each_ones_own_confidence():
    confidence = torch.tensor([[0.9, 0.6], [0.9, 0.6]])
    out = Outputs(torch.tensor([[0, 0], [0, 1]], dtype=torch.int32), confidence, torch.zeros(1, 1))
    found = figures_of(out, torch.tensor([0, 1]), ShotGroups((0,), (1,), ()), {"head": (0, 1)}, 2)
    assert found.figures["expert1.ece"] == pytest.approx(abs(0.5 - 0.9))
    assert found.figures["ensemble.ece"] == pytest.approx(abs(1 - 0.6))
    assert sum(n for n, _, _ in found.details["ensemble.reliability"]) == 2


def test_a_single_expert_has_no_diversity_and_the_same_figures_as_its_ensemble():
    figures = by_hand().figures
    assert set(figures) == {f"{who}.{name}" for who in ("ensemble", "expert1") for name in NAMES}
    assert all(figures[f"expert1.{name}"] == figures[f"ensemble.{name}"] for name in NAMES)


def test_figures_of_four_experts_by_hand():
    """Two images a class. The experts: always right, always class 0, always class 1, always wrong."""
    labels = torch.tensor([0, 0, 1, 1])
    out = outputs([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 0]])
    out.kl.copy_(torch.tensor([[0.0, 1, 2, 3], [4, 0, 5, 6], [7, 8, 0, 9], [10, 11, 12, 0]]))
    found = figures_of(out, labels, ShotGroups((0,), (), (1,)), {"head": (0,), "tail": (1,)}, 2)
    figures = found.figures
    assert [figures[f"expert{e}.accuracy"] for e in (1, 2, 3, 4)] == [1, 0.5, 0.5, 0]
    assert [figures[f"expert{e}.many"] for e in (1, 2, 3, 4)] == [1, 1, 0, 0]
    assert [figures[f"expert{e}.few"] for e in (1, 2, 3, 4)] == [1, 0, 1, 0]
    assert figures["ensemble.accuracy"] == 0.75
    assert figures["diversity.class_std"] == pytest.approx(0.5)
    assert figures["diversity.group_std_sum"] == pytest.approx(0.5 + 0.5)
    assert figures["diversity.kl"] == pytest.approx(78 / 12)
    assert figures["diversity.disagreement"] == pytest.approx((0.5 + 0.5 + 1 + 1 + 0.5 + 0.5) / 6)
    assert figures["diversity.ensemble_gain"] == pytest.approx(0.75 - 1)
    assert set(figures) == {
        *(f"{who}.{n}" for who in ("ensemble", *(f"expert{e}" for e in (1, 2, 3, 4))) for n in NAMES if n != "middle"),
        *(f"diversity.{name}" for name in DIVERSITY),
    }


def test_equal_experts_have_no_diversity_and_the_ensemble_gains_nothing():
    figures = by_hand(columns=4).figures
    assert [figures[f"diversity.{name}"] for name in DIVERSITY] == pytest.approx([0] * 5)


def test_the_gain_is_over_the_best_expert():
    out = outputs([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]])
    figures = figures_of(out, torch.tensor([0, 0, 1, 1]), ShotGroups((0, 1), (), ()), {"head": (0, 1)}, 2).figures
    assert figures["diversity.ensemble_gain"] == pytest.approx(1 - 0.75)


# --- the network's pass over the test set -----------------------------------------------------------------------------

CONFIG = """
paper: mdcs
data: {name: sample, mean: [0.5], std: [0.25], augment: grey}
model: {name: resnet_cifar, depth: 8, width: 4}
optimizer: {lr: 0.05}
schedule: cosine
epochs: 1
batch_size: 16
evaluate: {batch_size: %d}
device: cpu
precision: float32
"""


@pytest.fixture
def configure(tmp_path):
    def config(batch_size=500):
        (tmp_path / "run.yaml").write_text(CONFIG % batch_size)
        return load(tmp_path / "run.yaml", Config)

    return config


def problem_of(images, labels, classes, mean=(0.5,), std=(0.25,)):
    """A problem with these test images."""
    return Problem(
        ResidentViews(images, labels, mean, std, "none"), Resident(images, labels, mean, std), (9,) * classes,
        tuple(map(str, range(classes))), ShotGroups((), (), tuple(range(classes))), {"head": (0, 1)}, 1, None, {},
    )  # fmt: skip


class Table(nn.Module):
    """A network that gives image k the k-th logits [E, C] of a table; the image holds k as its pixel."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)
        self.heads = nn.ModuleList(nn.Identity() for _ in range(self.logits.shape[1]))

    def forward(self, images):
        return self.logits[images[:, 0, 0, 0].round().long()]


def outputs_of(logits, config):
    n = len(logits)
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    problem = problem_of(images, torch.zeros(n, dtype=torch.int64), len(logits[0][0]), (0.0,), (1 / 255,))
    return run_network(Table(logits), problem, config)


def test_the_ensemble_predicts_by_the_mean_of_raw_logits_not_by_votes_or_probabilities(configure):
    """Two experts are 91 % sure of class 0; the third's logit for class 1 outweighs them."""
    logits = [[[3.0, 0, 0], [3, 0, 0], [0, 10, 0]]]
    each = torch.tensor(logits)[0]
    assert each.argmax(dim=1).mode().values == 0
    assert each.softmax(dim=1).mean(dim=0).argmax() == 0
    out = outputs_of(logits, configure())
    assert out.predictions.tolist() == [[0, 0, 1, 1]]
    wanted = [*each.softmax(dim=1).max(dim=1).values.tolist(), float(each.mean(dim=0).softmax(dim=0).max())]
    assert out.confidence[0].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_predictions_are_the_experts_own_and_then_the_ensembles(configure, experts):
    logits = 5 * torch.rand(11, experts, 6, generator=torch.Generator().manual_seed(0))
    out = outputs_of(logits.tolist(), configure(4))
    assert torch.equal(out.predictions[:, :-1].long(), logits.argmax(dim=2))
    assert torch.equal(out.predictions[:, -1].long(), logits.mean(dim=1).argmax(dim=1))
    assert torch.allclose(out.kl, measures.pairwise_kl(logits) / 11, atol=1e-5)
    assert out.kl.shape == (experts, experts)


@pytest.mark.parametrize("experts", [1, 3, 4])
def test_outputs_of_a_network_do_not_depend_on_the_batch_size_or_on_its_mode(configure, experts):
    images = torch.randint(256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    problem = problem_of(images, torch.arange(40) % 5, 5)
    model = build_model(Architecture("resnet_cifar", 5, experts, experts > 1, in_channels=1, depth=8, width=4), seed=0)
    model(torch.rand(16, 1, 8, 8))  # statistics of their own, unlike any batch's
    found = []
    for size in (1, 7, 40, 500):
        model.train()
        found.append(run_network(model, problem, configure(size)))
    for other in found[1:]:
        assert torch.equal(other.predictions, found[0].predictions)
        assert torch.allclose(other.confidence, found[0].confidence, atol=1e-5)
        assert torch.allclose(other.kl, found[0].kl, atol=1e-4)
    evaluated = evaluation.evaluate(model, problem, configure())
    assert evaluated.predictions.shape == (40, experts + 1)
    right = (evaluated.predictions[:, -1] == problem.test.labels).double().mean()
    assert evaluated.figures["ensemble.accuracy"] == pytest.approx(float(right))
    assert ("diversity.kl" in evaluated.figures) == (experts > 1)


def test_evaluating_changes_no_bit_of_the_network(configure):
    images = torch.randint(256, (10, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = build_model(Architecture("resnet_cifar", 5, 3, True, in_channels=1, depth=8, width=4), seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_network(model.train(), problem_of(images, torch.arange(10) % 5, 5), configure())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- comparing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "found", "lines"),
    [
        ({"a": 0.5, "b": None}, {"a": 0.5 + 9e-7, "b": None}, 0),
        ({"a": 0.5}, {"a": 0.500002}, 1),
        ({"a": None}, {"a": 0.0}, 1),
        ({"a": 0.0}, {"a": None}, 1),
        ({"a": 0.5, "b": 0.5}, {"a": 0.5}, 1),
        ({"a": 0.5}, {"a": 0.5, "b": None}, 1),
        ({"a": 0.5, "b": 1.0}, {"a": 0.4, "b": 0.9}, 2),
    ],
)
def test_each_figure_that_differs_is_a_line(stated, found, lines):
    assert len(changed_figures(stated, found)) == lines
