"""Training that can stop between any two steps and go on to the same bits.

Every draw comes from the stream of (seed, purpose, epoch or step), so the state is: weights, optimiser, step, sums.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shared.batches import Batches, epoch_order, split_batches
from shared.gpu import LossMeter, NotFiniteError, Precision, autocast, stream
from sparsevit.algorithm import Term
from sparsevit.config import AuthorsRecipe, OursRecipe
from sparsevit.model import Vit
from sparsevit.schedule import build_optimizer, check_length, rates, set_rates

CHUNK = 16  # batches that share a stream of augmentation; what a resumed run prepares again is less than that
CHECK_EVERY = 50  # steps between looks at the losses on a GPU, each of which waits for it


@dataclass(frozen=True)
class Plan:
    """How long, with what and in which random streams a network is trained."""

    names: tuple[str, ...]  # of the streams: what this training is
    epochs: int
    batch_size: int
    recipe: AuthorsRecipe | OursRecipe
    seed: int
    precision: Precision = "float32"
    shuffle: bool = True


class Fit:
    """One training under way.

    `term` is added to the cross-entropy; `maps` are the blocks whose attention map it needs; weights that `masks` has
    False stay zero, and so does what the optimiser keeps of them.
    """

    def __init__(self, network: Vit, source: Batches, plan: Plan, term: Term | None = None,
                 maps: tuple[int, ...] = (), masks: Mapping[str, Tensor] | None = None) -> None:  # fmt: skip
        self.network, self.source, self.plan, self.term, self.maps = network, source, plan, term, maps
        self.device = source.labels.device
        self.steps_per_epoch = len(split_batches(torch.arange(len(source)), plan.batch_size, min_last=1))
        self.total = plan.epochs * self.steps_per_epoch
        check_length(plan.recipe, self.total)
        self.optimizer = build_optimizer(network, plan.recipe)
        parameters = dict(network.named_parameters())
        self.masks = [(parameters[name], mask) for name, mask in (masks or {}).items()]
        self.step, self.order_digest = 0, ""
        # of the epoch, over its images: cross-entropy and term
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._meter, self._metered_from = LossMeter(self.device), 0

    def steps(self) -> Iterator[int]:
        """Train to the end; gives the number of steps done after each, and lets the caller look, save or stop."""
        while self.step < self.total:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            for images, labels in self._batches(epoch, first):
                self._update(images, labels)
                yield self.step

    @property
    def epoch_ended(self) -> bool:
        """Whether the last step was the last of its epoch."""
        return self.step % self.steps_per_epoch == 0

    @property
    def checked(self) -> bool:
        """Whether all losses so far are known to be finite, so that the state may be saved."""
        return self.device.type == "cpu" or self._metered_from == self.step

    def check(self) -> None:
        """Look at all losses since the last look; NotFiniteError, with the step's number, for the first bad one."""
        try:
            self._meter.read()
        except NotFiniteError as error:
            raise NotFiniteError(self._metered_from + error.step, error.loss) from None
        self._metered_from = self.step

    def epoch_means(self) -> dict[str, float]:
        """Mean over images of cross-entropy and term in the epoch that ended; starts the next one's sums."""
        ce, term = (self.sums / len(self.source)).tolist()
        self.sums.zero_()
        return {"cross_entropy": ce, "term": term}

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        state = self.optimizer.state_dict()["state"]
        return {
            "network": self.network.state_dict(), "step": self.step, "sums": self.sums,
            "order_digest": self.order_digest, "optimizer": {str(k): dict(v) for k, v in state.items()},
        }  # fmt: skip

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up what `snapshot` gave."""
        self.network.load_state_dict(saved["network"])
        groups = self.optimizer.state_dict()["param_groups"]
        state = {int(k): v for k, v in saved["optimizer"].items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = self._metered_from = int(saved["step"])
        self.order_digest = str(saved["order_digest"])
        self.sums.copy_(saved["sums"])

    def order(self, epoch: int) -> Tensor:
        """The order of the training images in an epoch, int64 [n]."""
        if not self.plan.shuffle:
            return torch.arange(len(self.source))
        return epoch_order(len(self.source), stream(self.plan.seed, *self.plan.names, "order", epoch))

    def images_of_step(self, step: int) -> list[int]:
        """The training images of a step, to see again what a loss that is not finite came from."""
        epoch, place = divmod(step, self.steps_per_epoch)
        indices: list[int] = split_batches(self.order(epoch), self.plan.batch_size, min_last=1)[place].tolist()
        return indices

    def _batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from number `first` on."""
        order = self.order(epoch)
        batches = split_batches(order.to(self.device), self.plan.batch_size, min_last=1)
        if first == 0:
            boundaries = torch.tensor([len(batch) for batch in batches]).numpy().tobytes()
            digest = hashlib.sha256(self.order_digest.encode() + order.numpy().tobytes() + boundaries)
            self.order_digest = digest.hexdigest()
        for start in range(first - first % CHUNK, len(batches), CHUNK):
            draws = stream(self.plan.seed, *self.plan.names, "augment", epoch, start, device=self.device)
            for number, batch in enumerate(self.source.prefetch(batches[start : start + CHUNK], draws), start):
                if number >= first:
                    yield batch

    def _update(self, images: Tensor, labels: Tensor) -> None:
        plan, network = self.plan, self.network
        set_rates(self.optimizer, rates(plan.recipe, self.step, self.total))
        network.train()
        if network.dropout:  # torch's dropout draws from the global generator: give each step its own stream
            torch.manual_seed(stream(plan.seed, *plan.names, "dropout", self.step).initial_seed())
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, plan.precision):
            logits, seen = network.observe(images, self.maps)
            loss = cross_entropy = functional.cross_entropy(
                logits.float() if logits.dtype.itemsize < 4 else logits, labels
            )
            if self.term is not None:
                loss = cross_entropy + self.term(network, seen)
        self._look(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        if isinstance(plan.recipe, OursRecipe) and plan.recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), plan.recipe.clip)
        self.optimizer.step()
        self._keep_zeros()
        self.sums += len(labels) * torch.stack([cross_entropy.detach(), (loss - cross_entropy).detach()]).double()
        self.step += 1
        if self.device.type == "cpu" or self.step % CHECK_EVERY == 0 or self.epoch_ended:
            self.check()

    def _look(self, loss: Tensor) -> None:
        try:
            self._meter.add(loss)
        except NotFiniteError as error:
            raise NotFiniteError(self.step, error.loss) from None

    @torch.no_grad()
    def _keep_zeros(self) -> None:
        """Masked weights stay exactly zero, and momentum does not gather under the mask."""
        for parameter, mask in self.masks:
            kept = [v for v in self.optimizer.state[parameter].values()
                    if isinstance(v, Tensor) and v.shape == parameter.shape]  # fmt: skip
            for tensor in (parameter, *kept):
                tensor.masked_fill_(~mask, 0)
