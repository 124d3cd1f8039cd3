"""Every method as a list of steps: the two-stage method, its ablations, and the baselines in one go.

A step is a phase of training with its network, its first weights, its images and what it keeps.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightcnn.augment import AnyWarp, Ranges, Warp
from lightcnn.baselines import BASELINES, Baseline, ImageShape
from lightcnn.budget import LayoutNet, Recipe
from lightcnn.config import BaselineConfig, BudgetConfig, Config, MethodConfig, TwoStageConfig, VariantConfig
from lightcnn.fused import Stack, fuse, stack, unstack
from lightcnn.method import STAGE1, Phase, fold_phases, unfreezing_schedule
from lightcnn.model import merge
from lightcnn.networks import Merged, Modules, Network, Submodels
from lightcnn.problem import Lane, Problem
from shared.errors import RunError

Points = dict[str, Stack]  # the networks kept at each point of a run: name -> stack with one network a lane
BRANCHES = ("branch_a", "branch_b")  # the points of stage 1
CARRY = "carry"  # the point that the next step goes on from
BEST_EPOCH = "best_epoch"  # the best epoch of stage 2's last phase, kept by the baselines' rule for a level comparison


@dataclass(frozen=True)
class Images:
    """What the training images of one network go through; `ranges` None leaves them clean."""

    ranges: Ranges | None = None
    warp: AnyWarp = "sequential"


CLEAN = Images()
MIRRORED = ("sample", "fashion_mnist", "cifar10")  # data whose images keep their class when mirrored; digits do not


@dataclass(frozen=True)
class Step:
    """One phase of a run.

    Each lane trains as many networks as `images` has entries, on the same batches. `points` names what is kept of each:
    the best epoch on validation ("best": Keras' checkpoint) or the one that early stopping restores. The latter is also
    what the next step goes on from. `best_point` names the best epoch where it is kept too. `fold` chooses the
    notebook's fold instead of the lane's own images.
    """

    phase: Phase
    network: Network
    begin: Callable[[Points, Sequence[Lane]], Stack]
    images: tuple[Images, ...]
    points: tuple[str, ...]
    keep: Literal["best", "early_stopping"]
    batch_size: int
    peak_lr: float | None = (
        None  # one-cycle SGD with this highest rate; None: the phase's optimiser at its constant rate
    )
    fold: int | None = None
    best_point: str | None = None
    recipe: Recipe | None = None  # None: the paper's loss and decay

    @property
    def all_points(self) -> tuple[str, ...]:
        """Every name under which the step keeps a network."""
        return self.points if self.best_point is None else (*self.points, self.best_point)


VARIANTS: dict[str, dict[str, str]] = {
    "literal": {"schedule": "literal"},
    "notebook": {"schedule": "notebook", "head_transfer": "a_only"},
    "all_at_once": {"schedule": "all_at_once"},  # nothing is unfrozen step by step
    "two_clean": {"branch_b": "clean"},  # two seeds of one kind
    "a_only": {"head_transfer": "a_only"},  # the notebook's slip; then what is transferred, and how
    "no_transfer": {"head_transfer": "none"},
    "linear_head": {"head_activation": "linear"},
    "combined_warp": {},
}
METHODS: tuple[str, ...] = ("two_stage", *VARIANTS, *BASELINES, "budget")


def settings_of(config: Config) -> TwoStageConfig:
    """The two-stage method's choices under the configuration's method, which is not a baseline."""
    assert isinstance(config.method, TwoStageConfig | VariantConfig)
    return choices_of(config.method)


def choices_of(method: TwoStageConfig | VariantConfig) -> TwoStageConfig:
    """The two-stage method's choices under one of its names."""
    if isinstance(method, TwoStageConfig):
        return method
    return TwoStageConfig.model_validate({"name": "two_stage", **VARIANTS[method.name]})


def network_of(method: MethodConfig, shape: ImageShape) -> Network:
    """The kind of network that a method ends with."""
    if isinstance(method, BaselineConfig):
        return BASELINES[method.name].build(shape)
    if isinstance(method, BudgetConfig):
        merged = method.layout == "merged"
        return Merged(*shape, "relu") if merged else Modules(lambda seed: LayoutNet(method.layout, shape, seed))
    return Merged(*shape, choices_of(method).head_activation)


def plan(config: Config, problem: Problem) -> list[Step]:
    """The steps of a run, in order."""
    shape = ImageShape(problem.in_channels, problem.image_size, len(problem.classes))
    if isinstance(config.method, BaselineConfig):
        return [baseline_step(config, BASELINES[config.method.name], shape)]
    if isinstance(config.method, BudgetConfig):
        return [budget_step(config.method, shape)]
    return two_stage(config, settings_of(config), shape, problem)


def two_stage(config: Config, settings: TwoStageConfig, shape: ImageShape, problem: Problem) -> list[Step]:
    """Stage 1: two submodels on clean and on augmented images. The merge. Stage 2: unfreezing from the top."""
    warp: Warp = "combined" if config.method.name == "combined_warp" else config.augment.warp
    augmented = Images(paper_ranges(config), warp)
    pair = (CLEAN, augmented if settings.branch_b == "augmented" else CLEAN)
    submodels = Submodels(*shape)
    phase = replace(STAGE1, epochs=config.stage1.epochs, patience=config.stage1.patience)
    stage1 = Step(phase, submodels, first_submodels(submodels), pair, BRANCHES, "best", config.batch_size)
    steps = [stage1 if config.stage1.branches is None else trained_before(stage1, config, problem)]

    merged, begin = network_of(settings, shape), merge_branches(submodels, settings)
    for phase in stage2_phases(config, settings):
        steps.append(Step(phase, merged, begin, (CLEAN,), (phase.name,), "early_stopping", config.batch_size))
        begin = carry_on
    steps[-1] = replace(steps[-1], best_point=BEST_EPOCH)
    if settings.kfold == "notebook":
        for number, phase in enumerate(capped(fold_phases(settings.folds), config)):
            points = (phase.name,)
            steps.append(Step(phase, merged, carry_on, (CLEAN,), points, "best", config.batch_size, fold=number))
    return steps


def stage2_phases(config: Config, settings: TwoStageConfig) -> list[Phase]:
    """The schedule's phases, with the configuration's cap on their epochs."""
    return capped(unfreezing_schedule(settings.schedule), config)


def capped(phases: list[Phase], config: Config) -> list[Phase]:
    """The phases with `stage2.max_epochs`."""
    cap = config.stage2.max_epochs
    return [replace(phase, epochs=min(phase.epochs, cap or phase.epochs)) for phase in phases]


def first_submodels(network: Submodels) -> Callable[[Points, Sequence[Lane]], Stack]:
    """Two submodels a lane, each from its own seed."""
    return lambda points, lanes: stack([network.initial(lane.init_seed(side)) for lane in lanes for side in "ab"])


def trained_before(stage1: Step, config: Config, problem: Problem) -> Step:
    """Stage 1 without an epoch, which begins with the branches of another run: the same numbers, as if trained here.

    Raises, when it begins:
        CheckpointError, RunError: the run is missing or unfinished; its images, seeds or stage 1 are others.
    """
    folder = config.stage1.branches
    assert folder is not None

    def begin(points: Points, lanes: Sequence[Lane]) -> Stack:
        """The other run's branches, two networks a lane."""
        from lightcnn.eval import open_run

        run = open_run(folder, problem)
        own = run.config.model_copy(update={"stage1": run.config.stage1.model_copy(update={"branches": None})})
        theirs, wanted = what_trains(plan(own, run.problem)[0], own), what_trains(stage1, config)
        if "branches" not in theirs:
            raise RunError(f"{folder}: has no branches, for its method is {run.config.method.name}; name another run")
        if others := [
            f"{key} is {theirs[key]} there, {wanted[key]} here" for key in wanted if theirs[key] != wanted[key]
        ]:
            raise RunError(f"{folder}: has another stage 1: {'; '.join(others)}; leave stage1.branches out to train it")
        rows = {(lane.seed, lane.fold): row for row, lane in enumerate(run.problem.lanes)}
        if missing := {lane.seed for lane in lanes} - {lane.seed for lane in run.problem.lanes}:
            seeds = ", ".join(map(str, run.config.all_seeds))
            raise RunError(f"{folder}: has no branches of seed {min(missing)}; its seeds are {seeds}")
        for lane in lanes:
            row = rows.get((lane.seed, lane.fold))
            if row is None or not run.problem.lanes[row].train.equal(lane.train):
                raise RunError(
                    f"{folder}: its branches of seed {lane.seed} saw other images (method.kfold, method.folds)"
                )
        return stack([unstack(run.points[p], rows[lane.seed, lane.fold]) for lane in lanes for p in BRANCHES])

    return replace(stage1, phase=replace(stage1.phase, epochs=0), begin=begin)


def what_trains(step: Step, config: Config) -> dict[str, str]:
    """What the branches of a step depend on, beside seeds and training images, by the setting's name."""
    if step.points != BRANCHES:
        return {}
    changed = [images.ranges and f"{images.ranges}, {images.warp}" for images in step.images]
    found = {
        "stage1.epochs": step.phase.epochs, "stage1.patience": step.phase.patience, "batch_size": step.batch_size,
        "precision": config.precision, "branches": " and ".join(text or "clean images" for text in changed),
    }  # fmt: skip
    return {key: str(value) for key, value in found.items()}


def merge_branches(network: Submodels, settings: TwoStageConfig) -> Callable[[Points, Sequence[Lane]], Stack]:
    """The merged model of each lane's two branches."""

    def begin(points: Points, lanes: Sequence[Lane]) -> Stack:
        """Merge each lane's two branches."""
        states = []
        for number, lane in enumerate(lanes):
            a, b = (network.to_module(unstack(points[f"branch_{side}"], number)) for side in "ab")
            merged = merge(a, b, settings.head_transfer, settings.head_activation, lane.init_seed("merge"))
            states.append(fuse(merged.state_dict()))
        return stack(states)

    return begin


def carry_on(points: Points, lanes: Sequence[Lane]) -> Stack:
    """The weights with which the step before ended."""
    return points[CARRY]


def baseline_step(config: Config, baseline: Baseline, shape: ImageShape) -> Step:
    """One network in one go, for at most as many epochs as both stages have; its best epoch on validation is kept."""
    network = network_of(config.method, shape)
    epochs = min(config.plain.epochs or nominal_epochs(config), baseline.max_epochs or sys.maxsize)
    cycle = baseline.optimizer == "one_cycle"
    phase = Phase(
        "train", network.groups, "sgd" if cycle else "nadam", epochs, 0 if cycle else config.plain.patience, start=3
    )  # a cycle is not cut short: its end is what it is for
    images = {
        "clean": CLEAN,
        "paper": Images(paper_ranges(config), config.augment.warp),
        "mild": Images(Ranges(rotation=10 / 360, zoom=0.0, shift=2 / shape.image_size), "combined"),
        "shift": shifted(config, shape, 2),
    }[baseline.images]
    batch_size = (config.plain.batch_size if cycle else None) or config.batch_size

    peak = (baseline.peak_lr or config.plain.peak_lr) if cycle else None
    return Step(phase, network, from_scratch(network), (images,), (phase.name,), "best", batch_size, peak_lr=peak)


def budget_step(method: BudgetConfig, shape: ImageShape) -> Step:
    """One network in one go, with the recipe that the configuration states; its best epoch on validation is kept."""
    network, cycle = network_of(method, shape), method.optimizer == "one_cycle"
    ranges = Ranges(method.rotation, method.zoom, method.shift / shape.image_size, flip=method.flip)
    warped = method.rotation or method.zoom
    phase = Phase("train", network.groups, "sgd" if cycle else "nadam", method.epochs, patience=0)
    recipe = Recipe(method.decay, method.label_smoothing, method.teacher, method.teacher_share, method.temperature)
    return Step(
        phase, network, from_scratch(network), (Images(ranges, "combined" if warped else "whole_pixels"),),
        (phase.name,), "best", method.batch_size, peak_lr=method.peak_lr if cycle else None, recipe=recipe,
    )  # fmt: skip


def from_scratch(network: Network) -> Callable[[Points, Sequence[Lane]], Stack]:
    """One network a lane, each from its own seed."""
    return lambda points, lanes: stack([network.initial(lane.init_seed("a")) for lane in lanes])


def shifted(config: Config, shape: ImageShape, pixels: int) -> Images:
    """Shifts by whole pixels, and a flip left to right where that leaves the class what it is."""
    flip = config.data.name in MIRRORED
    return Images(Ranges(rotation=0.0, zoom=0.0, shift=pixels / shape.image_size, flip=flip), "whole_pixels")


def paper_ranges(config: Config) -> Ranges:
    """The configuration's augmentation."""
    return Ranges(**config.augment.model_dump(exclude={"warp"}))


def nominal_epochs(config: Config) -> int:
    """The most epochs that the two-stage method may take under this configuration."""
    return config.stage1.epochs + sum(phase.epochs for phase in stage2_phases(config, TwoStageConfig()))


def trained_names(step: Step, stacked: Stack) -> list[str]:
    """The tensors of a stack that a step trains: those of its groups; counters and statistics are no parameters."""
    buffers = {"running_mean", "running_var", "num_batches_tracked"}
    return [
        name
        for name in stacked
        if name.partition(".")[0] in step.phase.trains and name.rpartition(".")[2] not in buffers
    ]


def final_point(steps: Sequence[Step]) -> str:
    """The point whose network is the run's result."""
    return steps[-1].points[-1]
