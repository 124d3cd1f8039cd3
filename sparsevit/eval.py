"""Recompute every reported figure of a finished run from its saved models; with `--latency`, time them.

python -m sparsevit.eval runs/sparsevit/smoke-paper-s0
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shared import report
from shared.checkpoint import load_model
from shared.cli import check_shared, eval_parser, run_main
from shared.config import load
from shared.errors import CheckpointError, ConfigError, RunError
from shared.gpu import describe, setup
from shared.run import read_run, tell_changed
from sparsevit.config import Config
from sparsevit.measure import accuracies, observations, percent, ratio_figures, sizes
from sparsevit.method import prunable
from sparsevit.model import Vit
from sparsevit.problem import Problem, load_problem
from sparsevit.prune import Sweep, groups_of
from sparsevit.shrink import load_network

HISTOGRAM = (-4.0, 1.5, 55)  # of log10(score / mean score of the block): from, to, bins


def described(sweep: Sweep) -> tuple[dict[str, float], dict[str, Any]]:
    """What attention and neurons of the dense network do on real images: figures, and details block by block."""
    network = sweep.network
    found = observations(network, sweep.problem.test, sweep.config.eval_batch_size)
    scores = torch.cat([s / s.mean().clamp(min=1e-12) for s in sweep.calibration.neuron_scores(network)]).cpu()
    low, high, bins = HISTOGRAM
    logs = scores.clamp(min=10**low).log10().clamp(max=high)
    figures = {
        "attention.entropy_last": found["entropy"][-1],
        "attention.entropy_mean": sum(found["entropy"]) / len(found["entropy"]),
        "attention.penalty_last": found["penalty"][-1],
        "attention.uniform_gap": math.log(network.size.tokens) - found["entropy"][-1],
        "neurons.silent": sum(found["silent"]) / len(found["silent"]),
    }
    details: dict[str, Any] = {key: [round(v, 8) for v in values] for key, values in found.items()}
    details["neuron_scores"] = torch.histc(logs.float(), bins, low, high).long().tolist()
    return figures, details


def derived(figures: Mapping[str, float], config: Config) -> dict[str, float]:
    """Means over ratios, drops and areas, for every pruner."""
    dense, result = figures["dense.accuracy"], dict[str, float]()
    for pruner in (*config.prune.pruners, *config.prune.removals):
        result |= ratio_figures(figures, pruner, dense)
    return result


def constants(config: Config, network: Vit, folder: Path) -> dict[str, float]:
    """Counts of the dense network, and bytes on disk of it and of the networks that pruning made smaller."""
    found = sizes(network, config.prune.set)
    figures = {f"dense.{name}": float(value) for name, value in found.items() if name != "csr_bytes"}
    figures["dense.prunable"] = float(sum(p.numel() for p in prunable(network, config.prune.set).values()))
    figures["dense.bytes"] = float((folder / "model" / "model.safetensors").stat().st_size)
    for name in config.prune.removals:
        for ratio in config.prune.removal_ratios:
            path = folder / "pruned" / f"{name}.{percent(ratio)}" / "model.safetensors"
            figures[f"{name}.{percent(ratio)}.bytes"] = float(path.stat().st_size)
    return figures


def recompute(config: Config, folder: Path, problem: Problem) -> tuple[dict[str, float], list[str]]:
    """Every figure of the run from its saved networks, and one line for each saved network that pruning does not give.

    Pruned networks are made anew from the dense one; those that were trained after pruning are read.
    """
    network = load_network(folder / "model").to(problem.test.labels.device)
    sweep, wrong = Sweep(config, network, problem, lambda: None), list[str]()
    figures = {"dense.accuracy": sweep.accuracy([network])[0]}
    for group in groups_of(config):
        if group.recover:
            name = f"{group.name(group.ratios[0])}.recovered"
            recovered = load_network(folder / "pruned" / name).to(problem.test.labels.device)
            figures[name] = sweep.accuracy([recovered])[0]
            continue
        found, networks = sweep.run(group)
        figures |= found
        for name, made in networks.items():
            saved, _ = load_model(folder / "pruned" / name)
            ours = made.state_dict()
            same = saved.keys() == ours.keys() and all(
                saved[n].shape == t.shape and torch.allclose(saved[n], t.cpu(), atol=1e-6) for n, t in ours.items()
            )
            wrong += [] if same else [f"pruned/{name}: is not what pruning the saved model gives"]
    figures |= derived(figures, config) | described(sweep)[0] | constants(config, network, folder)
    if problem.val is not None:
        figures["val.accuracy"] = accuracies([network], problem.val, config.eval_batch_size, config.precision)[0]
    return figures, wrong


def run_eval(arguments: Sequence[str]) -> int:
    """The command: 0 if every figure is what the run reported, 1 if not."""
    parser = eval_parser("sparsevit", __doc__)
    parser.add_argument("--latency", action="store_true", help="time the dense, masked and smaller networks as well")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="batch sizes to time (1 64)")
    asked = parser.parse_args(arguments)
    check_shared(__file__)
    if min(asked.batch) < 1:
        raise ConfigError(f"--batch {' '.join(map(str, asked.batch))}: each must be at least 1")
    results = read_run(asked.run, "sparsevit", data={"digests": dict})
    config = load(asked.run / "config.yaml", Config)
    device = setup(asked.device if asked.device != "auto" else config.device, config.threads)
    problem = load_problem(config.data, device)
    if problem.digests != results["data"]["digests"]:
        raise RunError(f"{asked.run}: the data is not what the run was trained on")
    try:
        figures, wrong = recompute(config, asked.run, problem)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None
    stated = {row["metric"]: row["value"] for row in results["figures"]}
    for name, value in figures.items():
        print(f"{name:32} {value:.6g}")
    if asked.latency:
        report.show(f"latency on {describe(device)}", latency_rows(asked.run, config, device, asked.batch))
    return tell_changed(stated, figures, wrong=wrong)


def latency_rows(folder: Path, config: Config, device: torch.device, batches: Sequence[int]) -> list[list[str]]:
    """A table of the run's dense network, masked ones and the smaller ones it saved."""
    from sparsevit.latency import table, time_networks, variants_of_run

    variants = variants_of_run(folder, config, device)
    return table(time_networks(variants, batches, device))


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_eval, arguments)


if __name__ == "__main__":
    sys.exit(main())
