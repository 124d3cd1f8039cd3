"""What a federated round costs, beside the usual way to write one: `python benchmarks/fedloge_round.py`.

Each figure is measured on both sides by turns (A B A B ...): medians, and quartiles of the pairs' ratios.

round       a round with its evaluation: ours (the calls of `fedloge.train`, without its log and checkpoints) against
            `Reference` below, same network, data, partition, batches and optimiser; and where our time goes
evaluation  all figures of FedLoGe for 40 clients against 1, over the same test images
memory      bytes of all tensors held at the end of a round, for 100 clients against 10 that share the same images

The reference is the plain way, not a slow one: its images are decoded beforehand, FedLoGe's three losses take one
backward pass, and only the headline heads are evaluated (ours: all variants). Measure on an idle machine.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from bench_report import Report, held_bytes, timed
from torch import Tensor
from torch.nn import functional
from torch.optim import optimizer
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms  # type: ignore[import-untyped]

from fedloge import federated
from fedloge.algorithm import build_method
from fedloge.config import Config
from fedloge.eval import evaluate
from fedloge.federated import Client, Server, State, train_client
from fedloge.model import Network
from fedloge.problem import Problem, load_problem
from shared.batches import Resident
from shared.cli import REPOSITORY
from shared.config import load
from shared.gpu import setup, stream

CPU = torch.device("cpu")
NETWORKS = {"mlp": (14, "none"), "convnet": (28, "crop_flip")}  # pixels a side, augmentation
Side = Callable[[], tuple[int, float, float]]  # plays a round: its steps, generic and personal accuracy
Mark = Callable[[str], None]  # books the time since the last mark to a part


@dataclass(frozen=True)
class Sizes:
    """How much is measured, on the data of configs/mini.yaml; `TINY` is for the test of this file."""

    clients: int = 20
    heads: tuple[int, int] = (1, 40)
    held: tuple[int, int] = (10, 100)
    threads: tuple[int, ...] = (2, 1)
    networks: tuple[str, ...] = tuple(NETWORKS)
    workers: tuple[int, ...] = (0,)
    tests: int | None = None
    overrides: tuple[str, ...] = ("clients.min_size=2",)
    frame: tuple[str, ...] = ()


FULL = Sizes()
FEW = ("clients.min_size=2", "data.n_max=40", "data.imbalance_factor=2", "local_epochs=1")
TINY = Sizes(3, (1, 4), (2, 4), (1,), ("mlp",), (0,), 100, FEW, ("method.sparsity=0.0",))


class Images(Dataset[tuple[Tensor, int]]):
    """The usual data set: PIL images, transformed one by one when asked for."""

    def __init__(self, source: Resident, config: Config, train: bool) -> None:
        self.images = [transforms.ToPILImage()(image) for image in source.images]
        self.labels = source.labels.tolist()
        side = source.images.shape[-1]
        crop_flip = [transforms.RandomCrop(side, padding=4), transforms.RandomHorizontalFlip()]
        augment = crop_flip if train and config.data.augment == "crop_flip" else []
        normalise = transforms.Normalize(config.data.mean, config.data.std)
        self.transform = transforms.Compose([*augment, transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


class Reference:
    """FedAvg and FedLoGe as they are usually written: a loader and a model a client, a pass of the test a client."""

    def __init__(self, server: Server, problem: Problem, config: Config, workers: int) -> None:
        """Start from the weights of `server`, which is not touched."""
        self.problem, self.config, self.workers = problem, config, workers
        self.train = Images(cast(Resident, problem.train), config, True)
        self.test = Images(cast(Resident, problem.test), config, False)
        self.network = copy.deepcopy(server.network)
        self.states: list[State] = [copy.deepcopy(self.network.state_dict()) for _ in problem.clients]

    def loader(self, images: Images, indices: Tensor, train: bool) -> DataLoader[tuple[Tensor, int]]:
        """Batches of the training's size. A last one of a single image is dropped: batch norm cannot train on it."""
        size = self.config.batch_size
        return DataLoader(
            Subset(images, indices.tolist()), size, shuffle=train, drop_last=train and len(indices) % size == 1,
            num_workers=self.workers, persistent_workers=self.workers > 0,
        )  # fmt: skip

    def round(self) -> tuple[int, float, float]:
        """Train all clients, average, evaluate: the steps taken, the generic and the mean personal accuracy."""
        steps, states = 0, []
        for client in self.problem.clients:
            model = copy.deepcopy(self.network)
            own = {e: t for e, t in self.states[client.index].items() if e.startswith("personal.")}
            model.load_state_dict(own, strict=False)
            steps += self.train_client(model, client)
            states.append(copy.deepcopy(model.state_dict()))
        self.states = states
        self.network.load_state_dict(average(states, [client.size for client in self.problem.clients]))
        return steps, *self.evaluate()

    def train_client(self, model: Network, client: Client) -> int:
        """Local epochs of SGD; returns the number of steps."""
        steps, settings = 0, self.config.optimizer
        loader = self.loader(self.train, client.images, True)
        sgd = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay)
        model.train()
        for _ in range(self.config.local_epochs):
            for images, targets in loader:
                sgd.zero_grad()
                loss = loss_of(model, images, targets)
                loss.backward()  # type: ignore[no-untyped-call]
                sgd.step()
                steps += 1
        return steps

    def evaluate(self) -> tuple[float, float]:
        """One pass for the generic model, and one for each personal model over the client's local test images."""
        weight = self.network.head("classifier")[0]
        realigns = "personal" in self.network
        generic = self.accuracy(functional.normalize(weight, dim=1) if realigns else weight, None)
        personal = []
        for client, images in zip(self.problem.clients, self.problem.local_tests, strict=True):
            own = self.states[client.index].get("personal.weight")
            personal.append(self.accuracy(weight if own is None else weight * own.norm(dim=1, keepdim=True), images))
        return generic, statistics.fmean(personal)

    @torch.no_grad()
    def accuracy(self, head: Tensor, indices: Tensor | None) -> float:
        """The accuracy of the global model with another classifier, in a model of its own."""
        model = copy.deepcopy(self.network).eval()
        model.head("classifier")[0].copy_(head)
        indices = torch.arange(len(self.test)) if indices is None else indices
        correct = 0
        for images, targets in self.loader(self.test, indices, False):
            predicted = model.logits("classifier", model.features(images)).argmax(dim=1)
            correct += int((predicted == targets).sum())
        return correct / len(indices)


def loss_of(model: Network, images: Tensor, targets: Tensor) -> Tensor:
    """FedAvg's loss, or the three of FedLoGe."""
    features = model.features(images)
    if "etf" not in model:
        return functional.cross_entropy(model.logits("classifier", features), targets)
    backbone = functional.cross_entropy(model.logits("etf", features), targets)
    heads = [functional.cross_entropy(model.logits(h, features.detach()), targets) for h in ("classifier", "personal")]
    return backbone + heads[0] + heads[1]


def average(states: Sequence[State], sizes: Sequence[int]) -> State:
    """The mean of the clients' states, weighted by their images; of integers the largest."""
    mean: State = {}
    for entry, first in states[0].items():
        stacked = torch.stack([state[entry] for state in states])
        weights = torch.tensor(sizes).view(-1, *[1] * first.dim()) / sum(sizes)
        mean[entry] = (weights * stacked).sum(dim=0) if first.is_floating_point() else stacked.amax(dim=0)
    return mean


def our_round(
    server: Server, problem: Problem, config: Config, mark: Mark = lambda part: None
) -> tuple[int, float, float]:
    """A round by the calls of `fedloge.train`; returns what `Reference.round` returns."""
    steps, method, chosen = 0, server.method, federated.choose_clients(server.round, config)
    total = sum(problem.clients[k].size for k in chosen)
    for k in chosen:
        client, names = problem.clients[k], ("train", server.round, k)
        federated.load_client(server, k)
        draws = stream(config.seed, "message", server.round, k)
        extra = method.extra_message(server.network, problem.train, client, draws)
        steps += len(train_client(server, problem.train, client, method.phases(), config, names, method.loss))
        federated.add_client(server, client, client.size / total, extra)
    federated.finish_round(server)
    mark("rest")
    figures = evaluate(server, problem, config)[0]
    mark("evaluation")
    return steps, figures["generic.accuracy"] or 0.0, figures["personal.accuracy"] or 0.0


def split_round(server: Server, problem: Problem, config: Config) -> dict[str, float]:
    """Shares of one of our rounds by part, in percent; the reading of the loss counts as "forward, backward"."""
    spent, last = dict.fromkeys(("data", "forward, backward", "optimiser", "evaluation", "rest"), 0.0), perf_counter()
    train, plain = copy.copy(problem.train), server.method.loss

    def mark(part: str) -> None:
        """Count the time since the last mark as this part's."""
        nonlocal last
        spent[part] += perf_counter() - last
        last = perf_counter()

    def loss(*arguments: Any) -> Tensor:
        """The method's loss; what came before it in the step is the rest."""
        mark("rest")
        return plain(*arguments)

    def prefetch(*arguments: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The source's batches, their making counted as data."""
        mark("rest")
        for batch in problem.train.prefetch(*arguments):
            mark("data")
            yield batch
            mark("rest")

    before = optimizer.register_optimizer_step_pre_hook(lambda *_: mark("forward, backward"))
    after = optimizer.register_optimizer_step_post_hook(lambda *_: mark("optimiser"))
    server.method.loss, train.prefetch = loss, prefetch  # type: ignore[method-assign,assignment]
    our_round(server, replace(problem, train=train), config, mark)
    server.method.loss = plain  # type: ignore[method-assign]
    before.remove()
    after.remove()
    return {part: 100 * seconds / sum(spent.values()) for part, seconds in spent.items()}


def begin(network: str, method: str, clients: int, seed: int, sizes: Sizes) -> tuple[Server, Problem, Config]:
    """A server before its first round, its data and configuration."""
    side, augment = NETWORKS[network]
    overrides = [f"model.name={network}", f"data.image_size={side}", f"data.augment={augment}", f"seed={seed}"]
    overrides += [f"clients.count={clients}", *sizes.overrides]
    overrides += sizes.frame if method == "fedloge" else ("method=fedavg",)
    config = load(REPOSITORY / "fedloge/configs/mini.yaml", Config, overrides)
    problem = load_problem(config, CPU)
    if sizes.tests:
        test, few = cast(Resident, problem.test), torch.randperm(len(problem.test))[: sizes.tests]
        test.images, test.labels = test.images[few], test.labels[few]
        problem = replace(problem, local_tests=(torch.arange(sizes.tests),) * clients)
    return federated.start(build_method(config, problem.shape), clients, CPU), problem, config


def measure_rounds(report: Report, network: str, method: str, rounds: int, repeats: int, sizes: Sizes) -> None:
    """Rounds of both sides by turns, after one round each that is not counted; each repeat is another seed."""
    names = ("ours", *(f"loader with {workers} workers" for workers in sizes.workers))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    reached: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    shares = []
    for repeat in range(repeats):
        server, problem, config = begin(network, method, sizes.clients, repeat, sizes)
        sides: list[Side] = [lambda: our_round(server, problem, config)]  # noqa: B023
        sides += [Reference(server, problem, config, workers).round for workers in sizes.workers]
        torch.manual_seed(repeat)
        steps: set[int] = set()
        for round in range(rounds + 1):
            for name, side in zip(names, sides, strict=True):
                time, (taken, generic, personal) = timed(side)
                steps.add(taken)
                if round:
                    seconds[name].append(time)
                if round == rounds:
                    reached[name].append((generic, personal))
        assert len(steps) == 1, "the sides differ in their steps"
        shares.append(split_round(server, problem, config))
    what = f"{network}, {method}, {sizes.clients} clients"
    for name in names[1:]:
        report.add("round", f"{what}; {name}", "s", seconds["ours"], seconds[name])
    for part in shares[0]:
        report.add("where our time goes", f"{what}: {part}", "%", [share[part] for share in shares])
    for i, kind in enumerate(("generic", "personal")):
        ours, other = ([end[i] for end in reached[name]] for name in names[:2])
        report.add("accuracy", f"{what}, {max(steps)} steps a round, {rounds + 1} rounds: {kind}", "share", ours, other)


def measure_heads(report: Report, network: str, repeats: int, sizes: Sizes) -> None:
    """The evaluation of many clients' heads (ours) against that of few, on the same test images, by turns."""
    cases = [begin(network, "fedloge", clients, 0, sizes) for clients in sizes.heads]
    times: list[list[float]] = [[], []]
    for turn in range(4 * repeats + 1):
        for case, kept in zip(cases, times, strict=True):
            time, _ = timed(lambda: evaluate(*case))  # noqa: B023
            kept += [time] if turn else []
    setting = f"{network}, {len(cases[0][1].test)} test images: {sizes.heads[1]} clients over {sizes.heads[0]}"
    report.add("evaluation of K heads", setting, "s", times[1], times[0])


def measure_memory(report: Report, sizes: Sizes) -> None:
    """What a round of many clients holds against one of few. The reference keeps its clients' states beside it."""
    held: dict[str, list[float]] = {"ours": [], "ours without the heads": [], "reference without the images": []}
    for clients in sizes.held:
        before = held_bytes()
        server, problem, config = begin("mlp", "fedloge", clients, 0, sizes)
        our_round(server, problem, config)
        held["ours"].append(ours := held_bytes() - before)
        heads = sum(tensor.numel() * tensor.element_size() for tensor in server.private.values())
        held["ours without the heads"].append(ours - heads)
        reference = Reference(server, problem, config, 0)
        reference.round()
        held["reference without the images"].append(held_bytes() - before - ours)
        del server, problem, reference
    for name, (few, many) in held.items():
        report.add("bytes held", f"mlp, {name}: {sizes.held[1]} clients over {sizes.held[0]}", "byte", [many], [few])


def main(arguments: Sequence[str] | None = None, sizes: Sizes = FULL) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds a repeat (default 3)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats, each with another seed (default 3)")
    parser.add_argument("--out", type=Path, default=Path("results/fedloge/benchmarks.csv"))
    asked = parser.parse_args(arguments)
    report = Report()
    for threads in sizes.threads:
        setup("cpu", threads)
        for network in sizes.networks:
            for method in ("fedavg", "fedloge"):
                print(f"measuring {network}, {method}, threads: {threads} ...", file=sys.stderr)
                measure_rounds(report, network, method, asked.rounds, asked.repeats, sizes)
            measure_heads(report, network, asked.repeats, sizes)
    measure_memory(report, sizes)
    report.finish(asked.out)
    print(f"written: {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
