"""The sweep: every pruner at every ratio, each time from the dense weights, and what training after it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from sparsevit.baselines import local_magnitude_masks, random_masks, two_four_mask, wanda_masks
from sparsevit.config import Config, OursRecipe
from sparsevit.fit import Fit, Plan
from sparsevit.measure import Calibration, accuracies, calibrate, independent, masked, percent, sizes
from sparsevit.method import global_magnitude_masks, keep_count, keep_highest, prunable
from sparsevit.model import Vit
from sparsevit.problem import Problem
from sparsevit.shrink import remove_heads, remove_neurons

REMOVALS = ("neurons", "heads", "neurons_heads")
# Wanda knows the matrices of blocks only, and what it is compared with ranks the same ones; the kernels that make 2:4
# worth having take fc1 and fc2 only, and the accuracy must be of the network that is timed.
OWN_SETS = {"global_l1_blocks": "blocks", "local_l1": "blocks", "wanda": "blocks", "two_four": "mlp"}
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Group:
    """A part of a sweep that is done in one go: all ratios of a pruner, or one recovery after pruning."""

    pruner: str
    ratios: tuple[float, ...]
    recover: bool = False

    def name(self, ratio: float) -> str:
        """What a pruned network is called in figures and folders: `neurons.75`."""
        return f"{self.pruner}.{percent(ratio)}"


def groups_of(config: Config) -> list[Group]:
    """The sweep of a configuration, in order."""
    settings = config.prune
    groups = [Group(name, (0.5,) if name == "two_four" else settings.ratios) for name in settings.pruners]
    groups += [Group(name, settings.removal_ratios) for name in settings.removals]
    if settings.recover:
        for name in settings.recover.pruners:
            ratios = (0.5,) if name == "two_four" else settings.recover.ratios
            groups += [Group(name, (ratio,), recover=True) for ratio in ratios]
    return groups


@dataclass(frozen=True, eq=False)
class Sweep:
    """What pruning starts from: the dense network, which nothing here changes, and the images."""

    config: Config
    network: Vit
    problem: Problem
    check: Callable[[], None]  # called between steps and batches; raises when the run is to stop

    @cached_property
    def calibration(self) -> Calibration:
        """Scores and means on training images, measured when first asked for."""
        count = self.config.prune.calibration_images
        return calibrate(self.network, self.problem.train, count, self.config.eval_batch_size)

    def run(self, group: Group) -> tuple[dict[str, float], dict[str, Vit]]:
        """The figures of a group, and the networks that must be kept: recovered ones and smaller ones, by name."""
        networks = {group.name(ratio): self.pruned(group.pruner, ratio) for ratio in group.ratios}
        if group.recover:
            ((name, network),) = networks.items()
            recovered = self.recovered(name, network, self.masks(group.pruner, group.ratios[0]))
            return {f"{name}.recovered": self.accuracy([recovered])[0]}, {f"{name}.recovered": recovered}
        figures = {f"{name}.accuracy": value
                   for name, value in zip(networks, self.accuracy(list(networks.values())), strict=True)}  # fmt: skip
        for name, network in networks.items():
            found = sizes(network, self.set_of(group.pruner))
            kept: tuple[str, ...] = ("parameters", "macs") if group.pruner in REMOVALS else ("nonzero",)
            kept += ("csr_bytes",) if group.pruner == "global_l1" else ()
            figures |= {f"{name}.{what}": float(found[what]) for what in kept}
        return figures, networks if group.pruner in REMOVALS else {}

    def accuracy(self, networks: list[Vit]) -> list[float]:
        """On the test images, all networks in one pass."""
        config = self.config
        return accuracies(networks, self.problem.test, config.eval_batch_size, config.precision, self.check)

    def set_of(self, pruner: str) -> str:
        """The tensors that a pruner ranks."""
        return OWN_SETS.get(pruner, self.config.prune.set)

    def masks(self, pruner: str, ratio: float) -> Masks:
        """Which weights stay (True); none for what removes neurons or heads."""
        if pruner in REMOVALS:
            return {}
        tensors: Masks = dict(prunable(self.network, self.set_of(pruner)))
        if pruner in ("global_l1", "global_l1_blocks"):
            return global_magnitude_masks(tensors, ratio)
        if pruner == "local_l1":
            return local_magnitude_masks(tensors, ratio)
        if pruner == "random":
            return random_masks(tensors, ratio, self.config.seed)
        if pruner == "wanda":
            return wanda_masks(tensors, self.calibration.input_norms, ratio)
        return {name: two_four_mask(tensor) for name, tensor in tensors.items()}

    def pruned(self, pruner: str, ratio: float) -> Vit:
        """The dense network, pruned."""
        if pruner not in REMOVALS:
            return masked(self.network, self.masks(pruner, ratio))
        found, settings, network = self.calibration, self.config.prune, self.network
        if pruner != "heads":
            keep = [keep_highest(s, keep_count(len(s), ratio, settings.multiple)) for s in found.neuron_scores(network)]
            network = remove_neurons(network, keep, found.hidden_mean if settings.compensate else None)
        if pruner != "neurons":
            keep = [keep_highest(s, keep_count(len(s), ratio)) for s in found.head_scores]
            network = remove_heads(network, keep, found.mixed_mean if settings.compensate else None)
        return network

    def recovered(self, name: str, network: Vit, masks: Masks) -> Vit:
        """A pruned network after some epochs of plain cross-entropy; what is zero stays zero."""
        config, settings = self.config, self.config.prune.recover
        assert settings is not None
        plan = Plan(("recover", name), settings.epochs, config.batch_size, recovery_recipe(config),
                    config.seed, config.precision, config.data.shuffle)  # fmt: skip
        network = independent(network)
        for _ in Fit(network, self.problem.train, plan, masks=masks).steps():
            self.check()
        return network


def recovery_recipe(config: Config) -> OursRecipe:
    """The run's recipe at a share of its peak rate; the authors have none, and get ours with SGD."""
    recipe, settings = config.recipe, config.prune.recover
    assert settings is not None
    rate = recipe.lr * settings.lr_factor
    if isinstance(recipe, OursRecipe):
        return recipe.model_copy(update={"lr": rate})
    return OursRecipe(name="ours", lr=rate, weight_decay=recipe.weight_decay, clip=1.0)
