"""Fine-tune one vision transformer, prune it at every ratio: `python -m sparsevit.train --config smoke`."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import run_main, train_command
from shared.errors import InterruptedRunError

if TYPE_CHECKING:
    import torch

    from shared.run import Run
    from sparsevit.config import Config
    from sparsevit.fit import Fit
    from sparsevit.problem import Problem
    from sparsevit.prune import Group, Sweep


def train(config: "Config", run: "Run[Config]", previous: bool = False) -> dict[str, Any]:
    """Fine-tune, then sweep; an interrupted run goes on exactly where it stopped, between any two steps."""
    from shared.gpu import setup
    from sparsevit.problem import load_problem
    from sparsevit.prune import Sweep, groups_of
    from sparsevit.start import reported, save_or_stop

    device = setup(config.device, config.threads)
    problem = load_problem(config.data, device)
    fit, state = begin(config, run, problem, device, previous)
    total = fit.total + len(groups_of(config))

    with reported(run, fit):
        for _ in run.steps(fit.steps(), total, "step", fit.step):
            if fit.step == 1:
                ce, term = fit.sums.tolist()
                run.log("first_step", term_share=term / ce)  # how much the arm's term is beside the cross-entropy
            if fit.epoch_ended:
                end_epoch(config, run, problem, fit, state)
            save_or_stop(run, fit, {**state, "fit": fit.snapshot()})

    if config.select == "best":
        fit.network.load_state_dict(state["best"]["network"])
    finished, prunings = fit.snapshot(), Sweep(config, fit.network, problem, run.check)
    try:
        for _ in run.steps(sweep(run, prunings, state), total, "step", fit.total + state["groups"]):
            run.save({**state, "fit": finished})
    except InterruptedRunError:
        run.save({**state, "fit": finished}, force=True)
        raise
    return finish(run, fit, prunings, state["figures"])


def sweep(run: "Run[Config]", prunings: "Sweep", state: dict[str, Any]) -> "Iterator[Group]":
    """Prune in every way that the configuration names; `state` takes the figures of each group when it is done."""
    from sparsevit.prune import groups_of
    from sparsevit.shrink import save_network

    if not state["figures"]:
        state["figures"] = {"dense.accuracy": prunings.accuracy([prunings.network])[0]}
    for group in groups_of(prunings.config)[state["groups"] :]:
        figures, networks = prunings.run(group)
        for name, smaller in networks.items():
            save_network(run.folder / "pruned" / name, smaller, name=name)
        state["figures"] = state["figures"] | figures
        state["groups"] += 1
        run.log("pruned", pruner=group.pruner, recover=group.recover, figures=figures)
        yield group


def begin(
    config: "Config", run: "Run[Config]", problem: "Problem", device: "torch.device", previous: bool
) -> "tuple[Fit, dict[str, Any]]":
    """The training and what is known beside it, as new or as it was saved."""
    from sparsevit import algorithm
    from sparsevit.fit import Fit, Plan
    from sparsevit.start import empty_network, starting_network

    saved = run.restore(previous)
    network = empty_network(config, problem, device) if saved else starting_network(config, run, problem, device)
    plan = Plan(("fine-tune",), config.epochs, config.batch_size, config.recipe, config.seed, config.precision,
                config.data.shuffle)  # fmt: skip
    term, maps = algorithm.build_term(config), algorithm.mapped_blocks(config, len(network.layers))
    if saved is None:
        algorithm.prepare(config, network)
    fit = Fit(network, problem.train, plan, term, maps)
    if saved is None:
        run.log("start", **problem.facts())
        return fit, {"best": None, "figures": {}, "groups": 0}
    run.check_data(problem.digests)
    fit.restore(saved["fit"])
    print(f"continuing after step {fit.step} of {fit.total} and {saved['groups']} prunings", flush=True)
    return fit, {key: saved[key] for key in ("best", "figures", "groups")}


def end_epoch(config: "Config", run: "Run[Config]", problem: "Problem", fit: "Fit", state: dict[str, Any]) -> None:
    """Log the epoch; where images are held out, look at them and remember the best weights, if asked to."""
    from sparsevit.measure import accuracies

    values: dict[str, Any] = {**fit.epoch_means(), "order": fit.order_digest}
    if problem.val is not None:
        values["val_accuracy"] = accuracies([fit.network], problem.val, config.eval_batch_size, config.precision)[0]
        if config.select == "best" and (state["best"] is None or values["val_accuracy"] > state["best"]["accuracy"]):
            weights = {name: tensor.clone() for name, tensor in fit.network.state_dict().items()}
            state["best"] = {"accuracy": values["val_accuracy"], "step": fit.step, "network": weights}
    run.log("epoch", epoch=fit.step // fit.steps_per_epoch, **values)


def finish(run: "Run[Config]", fit: "Fit", prunings: "Sweep", figures: dict[str, float]) -> dict[str, Any]:
    """Save the dense network, and write the results with what follows from the sweep."""
    from shared.gpu import resolve_precision
    from shared.run import read_metrics, state_digest
    from sparsevit.eval import constants, derived, described
    from sparsevit.measure import accuracies
    from sparsevit.shrink import save_network

    config, network, problem = prunings.config, prunings.network, prunings.problem
    device = problem.test.labels.device
    save_network(run.folder / "model", network, method=config.method, classes=list(problem.classes),
                 config=config.model_dump(mode="json"))  # fmt: skip
    final, details = described(prunings)
    final |= figures | derived(figures, config)
    once = constants(config, network, run.folder)
    held_out = {}
    if problem.val is not None:
        held_out["val.accuracy"] = accuracies([network], problem.val, config.eval_batch_size, config.precision)[0]
    rows = [
        {"at": at, "split": split, "metric": name, "value": value}
        for at, split, values in (("final", "test", final), ("final", "validation", held_out), ("once", "-", once))
        for name, value in values.items()
    ]
    return run.finish(
        {
            "paper": "sparsevit", "config": run.folder.name.partition(f"-{config.method}-")[0],
            "method": config.method, "seed": config.seed, "figures": rows, "data": problem.facts(),
            "details": details, "order_digest": fit.order_digest, "start": read_metrics(run.folder, "weights")[0],
            "model_digest": state_digest(network.state_dict()),
        },
        device, resolve_precision(config.precision, device),
    )  # fmt: skip


def show(config: "Config", results: dict[str, Any], folder: Path) -> None:
    """Print the headline figures of a finished run."""
    values = {row["metric"]: row["value"] for row in results["figures"]}
    print(f"dense {100 * values['dense.accuracy']:.2f} %")
    curves: dict[str, list[str]] = {}
    for name, value in values.items():
        pruner, _, rest = name.partition(".")
        ratio, _, what = rest.rpartition(".")
        if what in ("accuracy", "recovered") and ratio:
            mark = " (recovered)" if what == "recovered" else ""
            curves.setdefault(pruner, []).append(f"{ratio} %: {100 * value:.2f}{mark}")
    for pruner, cells in curves.items():
        print(f"{pruner:14} {'  '.join(cells)}")
    print(f"{results['seconds']:.0f} s on {results['device']}; results and model in {folder}")


def dry_run(config: "Config") -> None:
    """Print what would run, with its size; train nothing."""
    from shared.config import dump
    from shared.data import data_root
    from shared.gpu import describe, setup
    from sparsevit.fit import Fit, Plan
    from sparsevit.measure import sizes
    from sparsevit.method import prunable
    from sparsevit.model import count_macs
    from sparsevit.problem import load_problem
    from sparsevit.prune import groups_of
    from sparsevit.start import empty_network
    from sparsevit.weights import load_weights

    print(dump(config), end="", flush=True)
    device = setup(config.device, config.threads)
    problem = load_problem(config.data, device)
    network = empty_network(config, problem, device)
    if config.weights:
        print(
            "#", load_weights(data_root() / Path(config.weights.path).expanduser(), network, config.weights.pos_resize)
        )
    plan = Plan(("fine-tune",), config.epochs, config.batch_size, config.recipe, config.seed, config.precision)
    fit = Fit(network, problem.train, plan)
    found, ranked = sizes(network, config.prune.set), prunable(network, config.prune.set)
    floats = found["parameters"] * 4 * 4  # weights, gradients, momentum and what AdamW keeps
    tokens = config.batch_size * network.size.tokens
    kept = 4 * tokens * sum(10 * network.size.width + 3 * b.heads * b.head_dim + 3 * b.mlp for b in network.size.blocks)
    print(f"# device           {describe(device)}")
    print(f"# data             {len(problem.train)} images to train, {len(problem.test)} to test, {problem.image} px")
    print(f"# parameters       {found['parameters']:,} ({sum(p.numel() for p in ranked.values()):,} in {len(ranked)} "
          f"tensors can be pruned)")  # fmt: skip
    print(f"# MACs an image    {count_macs(network.size):,} ({network.size.tokens} tokens)")
    print(f"# steps            {fit.total:,} of fine-tuning, then {len(groups_of(config))} groups of prunings")
    print(f"# memory           {(floats + kept) / 2**20:.0f} MiB for training, roughly")


def config_class() -> "type[Config]":
    """The configuration of this package's runs; imported late, for torch takes seconds."""
    from sparsevit.config import Config

    return Config


def run_train(arguments: Sequence[str]) -> int:
    """The command."""
    return train_command(__file__, arguments, config_class, train, dry_run, show)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_train, arguments)


if __name__ == "__main__":
    sys.exit(main())
