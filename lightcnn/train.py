"""Train one method with all its seeds side by side: `python -m lightcnn.train --config lightcnn/configs/smoke.yaml`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import run_main, train_command
from shared.errors import InterruptedRunError

if TYPE_CHECKING:
    from lightcnn.algorithm import Points, Step
    from lightcnn.config import Config
    from lightcnn.problem import Problem
    from lightcnn.state import Training
    from lightcnn.training import Epoch
    from shared.run import Run


def train(config: "Config", run: "Run[Config]", previous: bool = False) -> dict[str, Any]:
    """Stage 1, the merge, stage 2 phase by phase; an interrupted run goes on exactly where it stopped, at any step.

    A lane is a seed (or a fold of it), a point a network kept under a name, as `branch_a`; a step trains one phase.
    """
    from lightcnn import state, training
    from lightcnn.algorithm import plan
    from lightcnn.eval import origin_of
    from lightcnn.problem import load_problem
    from shared.gpu import setup

    device = setup(config.device, config.threads)
    problem = load_problem(config, device)
    steps = plan(config, problem)
    saved = run.restore(previous)
    if saved is None:
        run.log("start", **problem.facts())
        if config.stage1.branches:
            run.log("branches", **origin_of(config.stage1.branches))
        saved = {"step": 0, "points": {}, "training": None}
    else:
        run.check_data({"train": problem.digest})
        print(f"continuing in phase {saved['step'] + 1} of {len(steps)}", flush=True)
    points = {p: {n: t.to(device) for n, t in stacked.items()} for p, stacked in saved["points"].items()}

    for number in run.steps(range(saved["step"], len(steps)), len(steps), "phase", saved["step"]):
        phase = training.begin(steps[number], points, problem, config)
        if saved["training"] is not None:
            state.restore(phase, saved["training"])
            saved["training"] = None
        while not phase.done:
            began = time.monotonic()
            train_one_epoch(phase, number, points, problem, config, run)
            epoch = phase.epoch
            report = training.end_epoch(phase, training.validate(phase, problem, config))
            log_epoch(run, phase, epoch, report, time.monotonic() - began)
            run.progress(number + phase.epoch / phase.step.phase.epochs, len(steps), "phase")
            run.save({"step": number, "points": points, "training": state.snapshot(phase)})
        points = training.end_phase(phase, points)
        log_phase(run, phase)
        run.save({"step": number + 1, "points": points, "training": None})

    return finish(run, steps, points, problem, config)


def train_one_epoch(
    phase: "Training", number: int, points: "Points", problem: "Problem", config: "Config", run: "Run[Config]"
) -> None:
    """To the end of the epoch; a signal saves the state between two steps, a loss that is not finite says where."""
    from lightcnn import feed, state, training
    from shared.gpu import LossMeter, NotFiniteError

    first = phase.batch

    def after_step(losses: LossMeter) -> None:
        """Leave where a signal has come, with the state of this step saved."""
        try:
            run.check()
        except InterruptedRunError:
            losses.read()  # weights after a loss that is not finite are no state to go on from
            run.save({"step": number, "points": points, "training": state.snapshot(phase)}, force=True)
            raise

    try:
        training.train_epoch(phase, problem, config, after_step)
    except NotFiniteError as error:
        batch = feed.batch_positions(phase)[first + error.step]
        images = problem.places[feed.orders(phase)[:, batch]].tolist()
        seeds = [phase.lanes[lane].seed for lane in phase.active]
        where = {"phase": phase.step.phase.name, "epoch": phase.epoch, "seeds": seeds, "images": images}
        raise run.not_finite(error, **where) from None


def log_epoch(run: "Run[Config]", phase: "Training", epoch: int, report: "Sequence[Epoch]", seconds: float) -> None:
    """One line an epoch, with every lane that trained."""
    lanes = [
        {"seed": phase.lanes[e.lane].seed, "fold": phase.lanes[e.lane].fold, "loss": e.loss, "train": e.train,
         "validation": e.validation}
        for e in report
    ]  # fmt: skip
    what = phase.step.phase
    run.log("epoch", phase=what.name, epoch=epoch, trains=what.trains, lanes=lanes, seconds=round(seconds, 3))


def log_phase(run: "Run[Config]", phase: "Training") -> None:
    """How many epochs each lane ran, and from which each network is kept."""
    best = phase.step.keep == "best"
    kept = [stop.best_epoch if best else stop.kept_epoch for stop in phase.stops]
    ran = [max(phase.stops[network].epochs for network in phase.networks([lane])) for lane in range(len(phase.lanes))]
    run.log("phase", phase=phase.step.phase.name, epochs=ran, kept=[1 + epoch for epoch in kept])


def finish(
    run: "Run[Config]", steps: "Sequence[Step]", points: "Points", problem: "Problem", config: "Config"
) -> dict[str, Any]:
    """Save the networks, read the test set once, write the results."""
    from lightcnn import eval as evaluation
    from lightcnn.problem import load_test
    from shared.gpu import resolve_precision
    from shared.run import state_digest

    device = problem.images.device
    tensors = evaluation.save_points(run.folder / "model", steps, points, problem, config)
    test = load_test(config)
    figures, details = evaluation.evaluate(steps, points, problem, test, config)
    figures += evaluation.once(evaluation.sizes(steps, points, problem), config.all_seeds)
    for seed, lanes in evaluation.epochs_of(run.folder, config).items():
        figures += evaluation.once({"epochs.run": max(map(sum, lanes))}, [seed])
    digests = {"train": problem.digest, "test": test.digest}
    return run.finish(
        {
            "paper": "lightcnn", "config": run.folder.name.partition(f"-{config.method.name}-")[0],
            "method": config.method.name, "seeds": config.all_seeds, "figures": figures, "details": details,
            "data": {**problem.facts(), "test_images": len(test), "digests": digests},
            "model_digest": state_digest(tensors),
        },
        device, resolve_precision(config.precision, device),
    )  # fmt: skip


def show(config: "Config", results: dict[str, Any], folder: Path) -> None:
    """Print the figures of a finished run, mean over seeds."""
    values: dict[str, list[float]] = {}
    for row in results["figures"]:
        if row["at"] == "final" and row["split"] == "test":
            values.setdefault(row["metric"], []).append(row["value"])
    n = len(results["seeds"])
    print(f"accuracy on {results['data']['test_images']} test images (%), mean of {n} seed{'s' if n > 1 else ''}")
    for name, found in values.items():
        point = name.removesuffix("accuracy").removesuffix(".") or "result"
        print(f"  {point:14} {100 * sum(found) / len(found):.2f}")
    print(f"{results['seconds']:.0f} s on {results['device']}")
    print(f"results and model in {folder}")


def dry_run(config: "Config") -> None:
    """Print what would run, with its size; train nothing."""
    from lightcnn.algorithm import plan, trained_names
    from lightcnn.fused import stack
    from lightcnn.problem import load_problem
    from shared.config import dump
    from shared.gpu import describe, setup

    print(dump(config), end="", flush=True)
    device = setup(config.device, config.threads)
    problem = load_problem(config, device)
    steps, lane = plan(config, problem), problem.lanes[0]
    total, lines = 0, []
    for step in steps:
        one = stack([step.network.initial(0)])
        names, per_epoch = trained_names(step, one), -(-len(lane.train) // step.batch_size)
        count, networks = sum(one[name].numel() for name in names), len(step.images)
        total += per_epoch * step.phase.epochs
        lines.append(f"# phase {step.phase.name:10} at most {step.phase.epochs} epochs of {per_epoch} steps; trains "
                     f"{' '.join(step.phase.trains)}: {networks * count:,} values")  # fmt: skip
    parameters = sum(p.numel() for p in steps[-1].network.to_module(steps[-1].network.initial(0)).parameters())
    memory = problem.images.numel() / 2**20 + config.stage2.cache_mib * (len(steps) > 1)
    print(f"# device           {describe(device)}")
    print(f"# data             {len(lane.train)} images to train, {len(lane.validation)} to validate")
    print(f"# parameters       {parameters:,}; {len(problem.lanes)} networks side by side")
    print("\n".join(lines))
    print(f"# steps            at most {total:,}")
    print(f"# memory           {memory:.0f} MiB at most for images and the frozen layers' outputs")


def config_class() -> "type[Config]":
    """The configuration of this package's runs; imported late, for torch takes seconds."""
    from lightcnn.config import Config

    return Config


def run_train(arguments: Sequence[str]) -> int:
    """The command."""
    return train_command(__file__, arguments, config_class, train, dry_run, show)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_train, arguments)


if __name__ == "__main__":
    sys.exit(main())
