"""The mechanics of federated learning that all methods share: one resident network, local steps, streaming averages.

What a method changes is in `baselines.py` and `algorithm.py`; nothing here knows a method by name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedloge.config import Config
from fedloge.model import Head, Network
from shared.batches import Batches, epoch_order, split_batches
from shared.gpu import LossMeter, autocast, stream

State = dict[str, Tensor]


@dataclass(frozen=True)
class Client:
    """One client's training data: indices into the training set, and its images per class [C]."""

    index: int
    images: Tensor
    counts: Tensor

    @property
    def size(self) -> int:
        """Number of training images."""
        return len(self.images)

    @property
    def log_prior(self) -> Tensor:
        """log(n_{k,c} / n_k) [C]; minus infinity for a class that the client does not have."""
        return (self.counts / self.counts.sum()).log()


Loss = Callable[[Network, Tensor, Tensor, Client, State], Tensor]


@dataclass(frozen=True)
class Phase:
    """Some epochs of local training in which only the parameters that `trains` names move."""

    epochs: int
    trains: Callable[[str], bool]


class Method(Protocol):
    """What a method decides about a federated round; see `baselines.FedAvg`, the plainest one."""

    def network(self) -> Network:
        """Build the network; its state's entries are named `<part>.<...>`."""

    def is_private(self, entry: str) -> bool:
        """Whether an entry of the state stays at its client, with one value for each."""

    def is_fixed(self, entry: str) -> bool:
        """Whether an entry is the same for all and for ever: neither trained nor sent."""

    def phases(self) -> Sequence[Phase]:
        """The local training of a round."""

    def loss(self, network: Network, images: Tensor, targets: Tensor, client: Client, received: State) -> Tensor:
        """The scalar loss of a batch; `received` is the global state at the start of the round."""

    def extra_message(self, network: Network, source: Batches, client: Client, generator: torch.Generator) -> State:
        """What a client sends beside its state, from the received model; the server sums it over clients."""

    def server_step(self, server: "Server", message: State) -> None:
        """What the server does after averaging."""

    def generic_state(self, server: "Server") -> State:
        """Entries that the generic model needs and that the server does not average."""

    def generic_heads(self, server: "Server") -> dict[str, Head]:
        """The generic model's linear head, by name of the variant; the headline is called ""."""

    def personal_heads(self, server: "Server", clients: slice = slice(None)) -> dict[str, Head]:
        """Some clients' heads on the global features, [k, C, d], by name; not asked for if `whole_personal`."""

    @property
    def realigns(self) -> bool:
        """Whether the heads `classifier` and `personal` are psi and phi of a realignment."""

    @property
    def whole_personal(self) -> bool:
        """Whether personal models differ from the global one in more than the head."""

    def fine_tuning(self) -> Sequence[Phase]:
        """The training that makes a client's personal model before it is tested."""

    def fine_tuning_loss(
        self, network: Network, images: Tensor, targets: Tensor, client: Client, received: State
    ) -> Tensor:
        """The scalar loss of the fine-tuning."""

    def personal_logits(self, network: Network, images: Tensor) -> Tensor:
        """Logits [B, C] of the personal model in the resident network (`whole_personal`)."""


@dataclass
class Server:
    """All that persists between rounds. `state` is the global model, `private` has a leading dimension of clients.

    A round is taken client by client: `position` clients of the round are done and summed up in `total`, so that a run
    can stop and go on between any two clients.
    """

    network: Network
    method: Method
    state: State
    private: State
    round: int = 0
    position: int = 0
    total: State = field(default_factory=dict)
    extra: State = field(default_factory=dict)

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "state": self.state, "private": self.private, "round": self.round, "position": self.position,
            "total": self.total, "extra": self.extra,
        }  # fmt: skip

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up what `snapshot` gave, on this server's device."""
        for name, kept in (("state", self.state), ("private", self.private)):
            for entry, value in saved[name].items():
                kept[entry].copy_(value)
        device = next(iter(self.state.values())).device
        self.total = {entry: value.to(device) for entry, value in saved["total"].items()}
        self.extra = {entry: value.to(device) for entry, value in saved["extra"].items()}
        self.round, self.position = saved["round"], saved["position"]


def start(method: Method, num_clients: int, device: torch.device) -> Server:
    """Build the server: one network on the device, and each private entry once for every client."""
    network = method.network().to(device)
    state, private = State(), State()
    for entry, value in network.state_dict().items():
        if method.is_private(entry):
            private[entry] = value.detach().expand(num_clients, *value.shape).clone()
        else:
            state[entry] = value.detach().clone()
    return Server(network, method, state, private)


def choose_clients(round: int, config: Config) -> list[int]:
    """The clients of a round: a share of all, uniform without replacement, in ascending order."""
    count = max(1, round_half_up(config.clients.fraction * config.clients.count))
    order = torch.randperm(config.clients.count, generator=stream(config.seed, "clients", round))
    return sorted(order[:count].tolist())


def round_half_up(value: float) -> int:
    """Python rounds 2.5 to 2; a share of clients is rounded as a person would."""
    return int(value + 0.5)


def load_client(server: Server, index: int) -> None:
    """Put the global state and the client's private entries into the resident network."""
    with torch.no_grad():
        for entry, tensor in live_state(server.network).items():
            tensor.copy_(server.private[entry][index] if entry in server.private else server.state[entry])


def live_state(network: Network) -> State:
    """The network's own tensors by name (not copies)."""
    return dict(network.state_dict(keep_vars=True))


def train_client(
    server: Server,
    source: Batches,
    client: Client,
    phases: Sequence[Phase],
    config: Config,
    names: tuple[str | int, ...],
    loss_of: Loss,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train the resident network on one client's images; returns the loss of each step.

    The optimiser is new, so its momentum starts at zero. All
    draws come from the streams of (seed, *names), so what a client draws does not depend on who trained before it.
    """
    network, device = server.network, client.images.device
    meter = LossMeter(device)
    for number, phase in enumerate(phases):
        parameters = set_trained(network, phase)
        optimizer = torch.optim.SGD(
            parameters, config.optimizer.lr, config.optimizer.momentum, weight_decay=config.optimizer.weight_decay,
            foreach=device.type == "cuda", fused=device.type == "cpu",
        )  # fmt: skip
        for epoch in range(phase.epochs):
            draws = (config.seed, *names, number, epoch)
            for images, targets in local_batches(source, client, config.batch_size, draws):
                optimizer.zero_grad(set_to_none=True)
                with autocast(device, config.precision):
                    loss = loss_of(network, images, targets, client, server.state)
                meter.add(loss)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                after_step()
    return meter.read()


def set_trained(network: Network, phase: Phase) -> list[nn.Parameter]:
    """Switch gradients to the phase's parameters. A part that stands still is in eval mode: so do its statistics."""
    trained = []
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(phase.trains(name))
        if parameter.requires_grad:
            trained.append(parameter)
    for module in network.values():
        module.train(any(parameter.requires_grad for parameter in module.parameters()))
    return trained


def local_batches(
    source: Batches, client: Client, batch_size: int, draws: tuple[str | int, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch over a client's images in a new order."""
    seed, *names = draws
    batches = batches_of_epoch(client, batch_size, draws)
    return source.prefetch(batches, stream(int(seed), "augment", *names, device=client.images.device))


def batches_of_epoch(client: Client, batch_size: int, draws: tuple[str | int, ...]) -> list[Tensor]:
    """The indices of each batch of an epoch; a last batch of one image is joined to the one before."""
    seed, *names = draws
    order = epoch_order(client.size, stream(int(seed), "order", *names)).to(client.images.device)
    return [client.images[part] for part in split_batches(order, batch_size)]


def batch_of_step(
    client: Client, phases: Sequence[Phase], config: Config, names: tuple[str | int, ...], step: int
) -> list[int]:
    """The training images of one step of `train_client`, to see again what a loss that is not finite came from."""
    batches: list[Tensor] = []
    for number, phase in enumerate(phases):
        for epoch in range(phase.epochs):
            batches += batches_of_epoch(client, config.batch_size, (config.seed, *names, number, epoch))
    return [int(image) for image in batches[step]]


def add_client(server: Server, client: Client, share: float, extra: State) -> None:
    """Keep the client's private entries, and add the rest to the running sum with the client's share n_k / sum n."""
    with torch.no_grad():
        for entry, tensor in live_state(server.network).items():
            if entry in server.private:
                server.private[entry][client.index].copy_(tensor)
        for entry, tensor in message(server).items():
            accumulate(server.total, entry, tensor, share)
    for entry, tensor in extra.items():
        server.extra[entry] = server.extra[entry] + tensor if entry in server.extra else tensor.clone()
    server.position += 1


def message(server: Server) -> State:
    """What the client in the resident network sends of its state: nothing private, nothing fixed."""
    entries = live_state(server.network).items()
    return {e: tensor for e, tensor in entries if not (server.method.is_private(e) or server.method.is_fixed(e))}


def accumulate(total: State, entry: str, tensor: Tensor, share: float) -> None:
    """Add share * tensor to the running sum. Counters (integer entries) are not averaged: the largest is kept."""
    if not tensor.is_floating_point():
        total[entry] = torch.maximum(total[entry], tensor) if entry in total else tensor.detach().clone()
    elif entry in total:
        total[entry].add_(tensor.detach(), alpha=share)
    else:
        total[entry] = tensor.detach() * share


def finish_round(server: Server) -> None:
    """Make the average the new global state, then let the method's server do its part."""
    for entry, tensor in server.total.items():
        server.state[entry].copy_(tensor)
    message = server.extra
    server.total, server.extra, server.position = {}, {}, 0
    server.method.server_step(server, message)
    server.round += 1
