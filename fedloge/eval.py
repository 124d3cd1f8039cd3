"""Evaluate the generic and the personal models; as a command, recompute the figures of a finished run from its model.

One pass of the backbone over the test images serves the generic heads and all clients' heads.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloge.algorithm import build_method
from fedloge.config import Config, DenseEtfConfig, FedLoGeConfig
from fedloge.federated import Server, live_state, load_client, message, start, train_client
from fedloge.method import class_mask, etf_geometry, realign_global, realign_local
from fedloge.model import Head, Shape, average_clients
from fedloge.problem import Problem, load_problem
from shared import metrics
from shared.checkpoint import load_model
from shared.cli import check_shared, eval_parser, run_main
from shared.config import load
from shared.errors import CheckpointError, RunError
from shared.gpu import autocast, setup, stream
from shared.run import read_run, tell_changed

CLIENTS_AT_ONCE = 16  # whose heads are put together at once; bounds the memory, whatever the number of clients

Figures = dict[str, float | None]


def evaluate(
    server: Server, problem: Problem, config: Config, after_step: Callable[[], None] = lambda: None
) -> tuple[Figures, dict[str, Any]]:
    """All figures of the present models, and the details behind them (per class, per client).

    A figure is `<generic|personal>[_variant].<metric>`, a share in [0, 1]; a group without classes has None.
    `after_step` is called after each step of fine-tuning.
    """
    figures: Figures = {}
    details: dict[str, Any] = {}
    features = global_features(server, problem, config)
    for variant, head in server.method.generic_heads(server).items():
        add_generic(figures, details, named("generic", variant), features, head, problem)
    if server.method.whole_personal:
        add_personal(figures, details, [""], whole_predictions(server, problem, config, after_step), problem)
    else:
        variants = list(server.method.personal_heads(server, slice(1)))
        add_personal(figures, details, variants, head_predictions(features, server, problem, config), problem)
    return figures, details


def named(kind: str, variant: str) -> str:
    """`generic` for the headline, `generic_raw` for the variant called raw."""
    return f"{kind}_{variant}" if variant else kind


@torch.no_grad()
def load_generic(server: Server) -> None:
    """Put the generic model's entries into the resident network."""
    overriding = server.method.generic_state(server)
    for entry, tensor in live_state(server.network).items():
        if entry in overriding or entry in server.state:
            tensor.copy_(overriding[entry] if entry in overriding else server.state[entry])


@torch.no_grad()
def global_features(server: Server, problem: Problem, config: Config) -> Tensor:
    """Features [N, d] float32 of all test images, by the global backbone in eval mode."""
    load_generic(server)
    network = server.network.eval()
    device = problem.test.labels.device
    with autocast(device, config.precision):
        parts = [network.features(x).float() for x, _ in problem.test.evaluate(config.evaluate.batch_size)]
    return torch.cat(parts)


def add_generic(
    figures: Figures, details: dict[str, Any], name: str, features: Tensor, head: Head, problem: Problem
) -> None:
    """Accuracy on the whole test set, overall and by shot group; per class in the details."""
    predicted = torch.nn.functional.linear(features, *head).argmax(dim=1)
    labels = problem.test.labels
    per_class = metrics.per_class_accuracy(predicted, labels, len(problem.classes))
    figures[f"{name}.accuracy"] = metrics.accuracy(predicted, labels)
    for group, value in metrics.group_accuracy(per_class, problem.groups).items():
        figures[f"{name}.{group}"] = value
    details[f"{name}.per_class"] = [None if math.isnan(v) else round(v, 6) for v in per_class.tolist()]


def head_predictions(features: Tensor, server: Server, problem: Problem, config: Config) -> Iterator[Tensor]:
    """Each client's predictions [n_k, V] on its own test images, by the V variants of its head: one small product."""
    for first in range(0, len(problem.clients), CLIENTS_AT_ONCE):
        some = slice(first, first + CLIENTS_AT_ONCE)
        heads = server.method.personal_heads(server, some).values()
        weights = torch.stack([weight for weight, _ in heads], dim=1)  # [k, V, C, d]
        zero = weights.new_zeros(())
        biases = torch.stack(
            [(zero if b is None else b).expand(weights.shape[0], weights.shape[2]) for _, b in heads], 1
        )
        for client, weight, bias in zip(problem.clients[some], weights, biases, strict=True):
            own = features[problem.local_tests[client.index]]
            logits = torch.addmm(bias.flatten(), own, weight.flatten(0, 1).T).view(len(own), *bias.shape)
            yield masked(logits, client.counts, config).argmax(dim=-1)


def whole_predictions(
    server: Server, problem: Problem, config: Config, after_step: Callable[[], None] = lambda: None
) -> Iterator[Tensor]:
    """Predictions [n_k, 1] where a personal model has weights of its own: loaded and fine-tuned client by client."""
    method, device = server.method, problem.test.labels.device
    unused = torch.Generator()  # test images are not augmented
    for client, images in zip(problem.clients, problem.local_tests, strict=True):
        load_client(server, client.index)
        if phases := method.fine_tuning():
            names = ("fine tune", server.round, client.index)
            train_client(server, problem.train, client, phases, config, names, method.fine_tuning_loss, after_step)
        server.network.eval()
        parts = [part for part in torch.split(images, config.evaluate.batch_size) if len(part)]
        batches = problem.test.prefetch(parts, unused)
        with torch.no_grad(), autocast(device, config.precision):
            logits = [method.personal_logits(server.network, x).float() for x, _ in batches]
        together = torch.cat(logits) if logits else torch.empty(0, len(problem.classes), device=device)
        yield masked(together, client.counts, config).argmax(dim=1, keepdim=True)


def masked(logits: Tensor, counts: Tensor, config: Config) -> Tensor:
    """The class mask, where the configuration has it: for every method, from training counts."""
    return class_mask(logits, counts) if config.evaluate.class_mask else logits


def add_personal(
    figures: Figures, details: dict[str, Any], variants: list[str], predictions: Iterable[Tensor], problem: Problem
) -> None:
    """Unweighted mean over clients, their spread, the worst tenth, and the mean balanced over each client's classes.

    Args:
        predictions: for each client [n_k, V], one column a variant.
    """
    num_clients, num_classes = problem.shape.counts.shape
    labels = problem.test.labels[torch.cat(problem.local_tests)]
    sizes = torch.tensor([len(images) for images in problem.local_tests], device=labels.device)
    owner = torch.arange(num_clients, device=labels.device).repeat_interleave(sizes)
    right = (torch.cat(list(predictions)) == labels[:, None]).double()
    accuracy = group_means(right, owner, num_clients)
    by_class = group_means(right, owner * num_classes + labels, num_clients * num_classes)
    balanced = by_class.view(num_clients, num_classes, -1).nanmean(dim=1)
    for column, variant in enumerate(variants):
        name = named("personal", variant)
        values: list[float] = accuracy[sizes > 0, column].tolist()
        mean, deviation = metrics.mean_and_std(values)
        figures[f"{name}.accuracy"] = mean
        figures[f"{name}.spread"] = deviation if len(values) > 1 else None
        figures[f"{name}.worst_decile"] = worst_decile(values)
        figures[f"{name}.balanced"] = float(balanced[sizes > 0, column].mean())
        details[f"{name}.clients"] = [round(value, 6) for value in values]
    details["clients_without_test"] = int((sizes == 0).sum())


def worst_decile(values: Sequence[float]) -> float:
    """Mean of the lowest tenth of the values (rounded up to whole values); nan where there is none."""
    return metrics.mean_and_std(sorted(values)[: math.ceil(len(values) / 10)])[0]


def group_means(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Means of the rows [M, V] of each group [M]: [G, V]; NaN for an empty group."""
    sums = values.new_zeros(num_groups, values.shape[1]).index_add_(0, group, values)
    return sums / torch.bincount(group, minlength=num_groups)[:, None]


def geometry(server: Server, problem: Problem, config: Config) -> tuple[Figures, dict[str, Any]]:
    """Figures that need no test image: the frame's angles and zeros, the heads' lengths, what a client sends."""
    figures: Figures = {}
    details: dict[str, Any] = {}
    figures |= sent_figures(server, problem, config)
    if "etf.weight" in server.state:
        found = etf_geometry(server.state["etf.weight"].cpu())
        figures["etf.zero_share"] = found.zeros / server.state["etf.weight"].numel()
        figures["etf.angle_error"] = abs(found.mean_angle - found.ideal_angle)
        figures["etf.min_angle_error"] = found.ideal_angle - found.min_angle
        assert isinstance(config.method, FedLoGeConfig | DenseEtfConfig)
        norm = config.method.norm
        figures["etf.length_error"] = abs(found.length_mean / norm - 1)
        details["etf.cosines"] = cosines(server.state["etf.weight"])
    if "personal.weight" in server.private and "classifier.weight" in server.state:
        counts = torch.tensor(problem.class_counts)
        shared_lengths = server.state["classifier.weight"].norm(dim=-1).cpu()
        rank_correlation = spearman(shared_lengths.tolist(), counts.tolist())
        figures["psi.length_by_frequency"] = None if math.isnan(rank_correlation) else rank_correlation  # equal counts
        own = server.private["personal.weight"].norm(dim=-1).cpu()
        held = problem.shape.counts.cpu() > 0
        if bool((~held).any()):
            figures["phi.absent_over_present"] = float(own[~held].median() / own[held].median())
        if server.method.realigns:
            add_realignment(figures, server)
        details["psi.lengths"] = [round(v, 5) for v in shared_lengths.tolist()]
        details["phi.lengths"] = [round(v, 5) for v in average_clients(own, problem.shape.counts.cpu()).tolist()]
    return figures, details


def sent_figures(server: Server, problem: Problem, config: Config) -> Figures:
    """What the first client would send now: float values, those beyond the backbone, entries that are private."""
    client, draws = problem.clients[0], stream(config.seed, "message", device=problem.test.labels.device)
    load_client(server, client.index)
    extra = server.method.extra_message(server.network, problem.train, client, draws)
    values = {entry: tensor.numel() for entry, tensor in message(server).items() if tensor.is_floating_point()}
    backbone = sum(count for entry, count in values.items() if entry.startswith("backbone."))
    total = sum(values.values()) + sum(tensor.numel() for tensor in extra.values())
    private = sum(entry in server.private for entry in (*values, *extra))
    return {
        "sent.values": float(total),
        "sent.beyond_backbone": float(total - backbone),
        "sent.private": float(private),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation in -1..1 (ties share their mean rank); nan where either side is constant or has under 2 values.

    Raises ValueError where the two differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}")
    ranks = []
    for values in (a, b):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts + len(values)) / 2)[place])  # centred
    x, y = ranks
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / scale if scale else math.nan


def add_realignment(figures: Figures, server: Server) -> None:
    """The largest errors of the two identities of the realignment, on the trained heads."""
    shared_weight, own = server.state["classifier.weight"], server.private["personal.weight"]
    figures["gla.unit_row_error"] = float((realign_global(shared_weight).norm(dim=-1) - 1).abs().max())
    wanted = shared_weight.norm(dim=-1) * own.norm(dim=-1)
    moved = realign_local(shared_weight, own).norm(dim=-1)
    figures["gla.norm_transfer_error"] = float(((moved - wanted).abs() / wanted.clamp(min=1e-12)).max())


def cosines(weight: Tensor) -> list[list[float]]:
    """Pairwise cosines of the rows [C, C]."""
    unit = torch.nn.functional.normalize(weight.float(), dim=1)
    return [[round(v, 4) for v in row] for row in (unit @ unit.T).cpu().tolist()]


def load_server(folder: Path, config: Config, shape: Shape, device: torch.device) -> Server:
    """Build the server of a finished run from the model that the run saved.

    Raises:
        CheckpointError: the model is missing, damaged, or not that of the configuration.
    """
    tensors, description = load_model(folder / "model")
    server = start(build_method(config, shape), config.clients.count, device)
    wanted = {f"global.{e}": t for e, t in server.state.items()} | {f"client.{e}": t for e, t in server.private.items()}
    if set(wanted) != set(tensors) or any(wanted[name].shape != tensors[name].shape for name in wanted):
        raise CheckpointError(f"{folder / 'model'}: holds another network than the run's configuration describes")
    for name, tensor in tensors.items():
        wanted[name].copy_(tensor)
    server.round = int(description["round"])
    return server


def run_eval(arguments: Sequence[str]) -> int:
    """The command: 0 if every figure of the last round is what the run reported, 1 if not."""
    asked = eval_parser("fedloge", __doc__).parse_args(arguments)
    check_shared(__file__)
    results = read_run(asked.run, "fedloge", data={"digests": dict})
    config = load(asked.run / "config.yaml", Config)
    device = setup(asked.device if asked.device != "auto" else config.device, config.threads)
    problem = load_problem(config, device)
    if problem.digests != results["data"]["digests"]:
        raise RunError(f"{asked.run}: the data or its partition is not what the run was trained on")
    server = load_server(asked.run, config, problem.shape, device)
    figures = evaluate(server, problem, config)[0] | geometry(server, problem, config)[0]
    stated = {row["metric"]: row["value"] for row in results["figures"] if row["at"] in ("final", "once")}
    print(f"the models of the last round ({server.round}) alone; accuracies are shares in [0, 1]")
    if config.headline != "last1":
        print(f"(the training's summary is the mean of its {config.headline.replace('last', 'last ')} rounds, in %)")
    for name, value in figures.items():
        print(f"{name:32} {'-' if value is None else f'{value:.6g}'}")
    return tell_changed(stated, figures, " of the last round")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_eval, arguments)


if __name__ == "__main__":
    sys.exit(main())
