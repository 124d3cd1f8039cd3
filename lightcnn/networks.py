"""Networks as the training loop sees them: L of one kind side by side, their states in one stack (`fused.Stack`)."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightcnn import fused
from lightcnn.fused import Stack
from lightcnn.method import GROUPS
from lightcnn.model import FILTERS, HIDDEN, HeadActivation, MergedCNN, Submodel


class Network(Protocol):
    """A kind of network. A tensor of its state is named `<group>.<...>`."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of layers, bottom to top."""

    @property
    def levels(self) -> tuple[str, ...]:
        """The groups after which `forward` can be cut, to compute the frozen ones once; or one for all."""

    @property
    def steady(self) -> tuple[str, ...]:
        """The levels from the bottom on that draw nothing: those below dropout."""

    @property
    def dropout(self) -> int:
        """The width of the layer with dropout, 0 where there is none of ours."""

    def initial(self, seed: int) -> dict[str, Tensor]:
        """The state of one network, initialised from `seed` alone."""

    def forward(
        self, stacked: Stack, inputs: Tensor, levels: Sequence[str], kept: Tensor | None = None, training: bool = False
    ) -> Tensor:
        """Run some consecutive levels: [L, B, ...] -> [L, B, ...]; all of them make logits of images in [0, 1]."""

    def to_module(self, state: dict[str, Tensor]) -> nn.Module:
        """One network as an ordinary module."""


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by name."""
    return dict(module.state_dict())


class Submodels:
    """Submodels of any two widths, as grouped convolutions."""

    groups = ("conv1", "conv2", "fc")
    levels = ("all",)
    steady = ()
    dropout = 0

    def __init__(self, in_channels: int, image_size: int, num_classes: int, filters: tuple[int, int] = FILTERS) -> None:
        self.make: Callable[[int], Submodel] = lambda seed: Submodel(
            in_channels, image_size, num_classes, filters, seed
        )

    def initial(self, seed: int) -> dict[str, Tensor]:
        """The state of one submodel."""
        return state_of(self.make(seed))

    def forward(
        self, stacked: Stack, inputs: Tensor, levels: Sequence[str], kept: Tensor | None = None, training: bool = False
    ) -> Tensor:
        """Logits [L, B, K] of images [L, B, C, H, H]; the one level is the whole network."""
        return fused.submodel_logits(stacked, inputs)

    def to_module(self, state: dict[str, Tensor]) -> Submodel:
        """One submodel with this state."""
        module = self.make(0)
        module.load_state_dict(state)
        return module


class Merged:
    """Merged models, as grouped convolutions over branches and networks; states are those of `fused.fuse`."""

    groups = GROUPS
    levels = GROUPS
    steady = GROUPS[: GROUPS.index("fc1")]
    dropout = HIDDEN

    def __init__(self, in_channels: int, image_size: int, num_classes: int, activation: HeadActivation) -> None:
        self.activation = activation
        self.make: Callable[[int], MergedCNN] = lambda seed: MergedCNN(
            in_channels, image_size, num_classes, activation, seed
        )

    def initial(self, seed: int) -> dict[str, Tensor]:
        """The fused state of one merged model."""
        return fused.fuse(state_of(self.make(seed)))

    def forward(
        self, stacked: Stack, inputs: Tensor, levels: Sequence[str], kept: Tensor | None = None, training: bool = False
    ) -> Tensor:
        """The asked groups in turn, as `fused.merged_layer` has their shapes, a few networks at a time."""
        outputs = []
        for part in fused.parts_of(inputs, branches=2):
            hidden = inputs[part]
            some = {name: tensor[part] for name, tensor in stacked.items()}
            for group in levels:
                masks = None if kept is None else kept[part]
                hidden = fused.merged_layer(some, group, hidden, self.activation, masks)
            outputs.append(hidden)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def to_module(self, state: dict[str, Tensor]) -> MergedCNN:
        """One merged model, its branches apart again."""
        module = self.make(0)
        module.load_state_dict(fused.unfuse(state))
        return module


class Modules:
    """Any module, buffers included: a loop over the networks, no faster than one after the other."""

    levels = ("all",)
    steady = ()
    dropout = 0

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        """Args: make: builds one network from a seed."""
        self.make, self.template = make, make(0)
        names = [name.partition(".")[0] for name, _ in self.template.named_parameters()]
        self.groups = tuple(dict.fromkeys(names))

    def initial(self, seed: int) -> dict[str, Tensor]:
        """Parameters and buffers of one module."""
        return state_of(self.make(seed))

    def forward(
        self, stacked: Stack, inputs: Tensor, levels: Sequence[str], kept: Tensor | None = None, training: bool = False
    ) -> Tensor:
        """Logits [L, B, K] of images [L, B, C, H, H], one network after the other."""
        self.template.train(training)
        inputs = inputs.flatten(0, 1).to(memory_format=torch.channels_last).view(inputs.shape)
        lanes = range(len(inputs))
        parts = {name: tensor.unbind() if tensor.requires_grad else [tensor[i] for i in lanes]
                 for name, tensor in stacked.items()}  # fmt: skip
        states = [{name: part[i] for name, part in parts.items()} for i in lanes]
        return torch.stack([functional_call(self.template, states[i], (inputs[i],)) for i in lanes])

    def to_module(self, state: dict[str, Tensor]) -> nn.Module:
        """One module with this state."""
        module = self.make(0)
        module.load_state_dict(state)
        return module
