"""Train one long-tailed classifier: `python -m mdcs.train --config mdcs/configs/smoke.yaml`."""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import run_main, train_command
from shared.errors import InterruptedRunError

if TYPE_CHECKING:
    import torch

    from mdcs.algorithm import Method
    from mdcs.config import Config, ScheduleConfig
    from mdcs.eval import Evaluation
    from mdcs.problem import Problem
    from mdcs.state import Training
    from shared.run import Run

SAVE_STEPS = 50  # between looks at the losses and at the clock; on a GPU each look waits for the queue


def train(config: "Config", run: "Run[Config]", previous: bool = False) -> dict[str, Any]:
    """Train one network; an interrupted run goes on exactly where it stopped, between any two steps."""
    import torch

    from mdcs.eval import evaluate
    from mdcs.model import forward_views, laid_out
    from mdcs.state import Forecast
    from shared.batches import epoch_order, split_batches
    from shared.gpu import NotFiniteError, autocast, stream

    device, problem, method, state = begin(config, run, previous)
    forecast, evaluation = Forecast(device), None
    split = config.bn_views == "split" and config.views == "both"
    counted = config.views == "both" and method.lambdas is not None  # whether there are confident images to count
    for epoch in range(state.epoch, config.epochs):
        began = time.monotonic()
        state.set_rate(learning_rate_factor(config.schedule, epoch, config.epochs))
        order = epoch_order(len(problem.train), stream(config.seed, "order", epoch))
        batches = split_batches(order, config.batch_size)
        state.model.train()
        views = problem.train.epoch(batches, config.views, config.seed, ("views", epoch), state.step)
        done, total = epoch * len(batches), config.epochs * len(batches)
        try:
            for images, targets in run.steps(views, total, "step", done + state.step):
                with autocast(device, config.precision):
                    logits = forward_views(state.model, laid_out(images, config.precision), split)
                loss = method.loss(logits.float(), targets, epoch + 1)
                state.meter.add(loss)
                torch.autograd.backward(loss)
                state.update()
                state.count_confident(logits, targets, method.lambdas)
                forecast.tick(total - done - state.step)
                if state.step % SAVE_STEPS == 0:
                    state.read_losses()
                    run.save(state.snapshot())
                try:
                    run.check()
                except InterruptedRunError:  # from here alone is it between two steps; a second signal saves nothing
                    state.read_losses()
                    run.save(state.snapshot(), force=True)
                    raise
            state.read_losses()
        except NotFiniteError as error:
            step = state.first_unread + error.step
            found = NotFiniteError(step, error.loss)  # the step of the epoch, not of the last look
            raise run.not_finite(found, epoch=epoch + 1, seed=config.seed, images=batches[step].tolist()) from None
        run.log("epoch", epoch=epoch + 1, **state.finish_epoch(counted), seconds=time.monotonic() - began)
        if (epoch + 1) % config.evaluate.every == 0 or epoch + 1 == config.epochs:
            evaluation = evaluate(state.model, problem, config)
            run.log("evaluate", epoch=state.epoch, figures=evaluation.figures)
        run.save(state.snapshot())

    return finish(run, state, problem, config, evaluation or evaluate(state.model, problem, config))


def begin(config: "Config", run: "Run[Config]", previous: bool) -> "tuple[torch.device, Problem, Method, Training]":
    """The device, the data, the loss and the network: a new one, or as an interrupted run left it."""
    from mdcs.algorithm import build_method
    from mdcs.problem import load_problem
    from mdcs.state import start
    from shared.gpu import setup

    device = setup(config.device, config.threads)
    problem = load_problem(config, device)
    method = build_method(config, problem.class_counts, device)
    state = start(config, problem, device)
    if saved := run.restore(previous):
        run.check_data(problem.digests)
        state.restore(saved)
        print(f"continuing in epoch {state.epoch + 1} of {config.epochs}", flush=True)
    else:
        run.log("start", **problem.facts(), pretrained=state.pretrained)
    return device, problem, method, state


def learning_rate_factor(schedule: "ScheduleConfig", epoch: int, epochs: int) -> float:
    """What multiplies the learning rate in an epoch (counted from 0): the paper's schedule."""
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    decay = schedule.factor ** sum(milestone <= epoch for milestone in schedule.milestones)
    warm = min(1.0, (epoch + 1) / schedule.warmup_epochs) if schedule.warmup_epochs else 1.0
    if schedule.warmup == "from_third" and schedule.warmup_epochs:
        warm = min(1.0, 1 / 3 + 2 / 3 * epoch / schedule.warmup_epochs)
    return decay * warm


def finish(
    run: "Run[Config]", state: "Training", problem: "Problem", config: "Config", final: "Evaluation"
) -> dict[str, Any]:
    """Write the model, its predictions and the results: the last epoch, and beside it the best one on the test set."""
    from shared.checkpoint import save_model
    from shared.gpu import resolve_precision
    from shared.run import read_metrics, state_digest

    logged = read_metrics(run.folder, "evaluate")
    best = max(logged, key=lambda e: e["figures"]["ensemble.accuracy"])
    beside = {name: value for name, value in best["figures"].items() if name.startswith("ensemble.")}
    figures = [
        {"at": at, "split": "test", "metric": name, "value": value}
        for at, values in ((config.headline, final.figures), ("best_on_test", beside))
        for name, value in values.items()
    ]
    tensors = dict(state.model.state_dict())
    description = {
        "paper": "mdcs", "method": config.method.name, "epoch": state.epoch, "classes": list(problem.classes),
        "class_order": problem.class_order, "channels": problem.channels, "config": config.model_dump(mode="json"),
    }  # fmt: skip
    save_model(run.folder / "model", tensors, description)
    save_model(run.folder / "predictions", {"predictions": final.predictions, "labels": problem.test.labels},
               {"columns": [*(f"expert{e + 1}" for e in range(config.experts)), "ensemble"]})  # fmt: skip
    epochs = read_metrics(run.folder, "epoch")
    device = problem.test.labels.device
    return run.finish(
        {
            "paper": "mdcs", "config": run.folder.name.partition(f"-{config.method.name}-")[0],
            "method": config.method.name, "seed": config.seed, "figures": figures, "data": problem.facts(),
            "details": final.details | {"best_epoch_on_test": best["epoch"], "pretrained": state.pretrained},
            "model_digest": state_digest(tensors),
            "images_per_second": round(sum(e["images"] for e in epochs) / sum(e["seconds"] for e in epochs), 1),
        },
        device, resolve_precision(config.precision, device),
    )  # fmt: skip


def show(config: "Config", results: dict[str, Any], folder: Path) -> None:
    """Print the headline figures of a finished run."""
    values = {row["metric"]: row["value"] for row in results["figures"] if row["at"] == config.headline}
    for who in ("ensemble", *(f"expert{e + 1}" for e in range(config.experts) if config.experts > 1)):
        found = {name: values[f"{who}.{name}"] for name in ("accuracy", "many", "medium", "few", "ece")}
        cells = "  ".join(f"{name} {'-' if v is None else f'{100 * v:.2f}'}" for name, v in found.items())
        print(f"{who:9} {cells}   (%, epoch {config.epochs}, test set)")
    print(f"{results['seconds']:.0f} s, {results['images_per_second']:.0f} training images/s on {results['device']}")
    print(f"results and model in {folder}")


def dry_run(config: "Config") -> None:
    """Print what would run, with its size; train nothing."""
    import torch

    from mdcs.problem import load_problem
    from mdcs.state import start
    from shared.batches import split_batches
    from shared.config import dump
    from shared.gpu import describe, setup

    print(dump(config), end="", flush=True)
    device = setup(config.device, config.threads)
    problem = load_problem(config, device)
    model = start(config, problem, device).model
    parameters = sum(p.numel() for p in model.parameters())
    images, rows = sum(problem.class_counts), 2 if config.views == "both" else 1
    steps = len(split_batches(torch.arange(images), config.batch_size))
    groups = ", ".join(f"{len(group)} {name}" for name, group in problem.groups._asdict().items())
    print(f"# device           {describe(device)}")
    print(f"# data             {images:,} images, {max(problem.class_counts):,} to {min(problem.class_counts)} a class "
          f"({groups}); {len(problem.test):,} to test")  # fmt: skip
    print(f"# parameters       {parameters:,} ({config.experts} expert{'s' if config.experts > 1 else ''})")
    print(f"# steps            {config.epochs * steps:,} of {config.batch_size} images, "
          f"{rows * config.batch_size} rows, in {config.epochs} epochs")  # fmt: skip
    rates = [
        config.optimizer.lr * learning_rate_factor(config.schedule, e, config.epochs) for e in range(config.epochs)
    ]
    print(f"# learning rate    {rates[0]:.4g} in epoch 1, {max(rates):.4g} at most, {rates[-1]:.4g} in the last")
    print(f"# memory           {4 * 4 * parameters / 2**20:.1f} MiB for the model in training, before activations")


def config_class() -> "type[Config]":
    """The configuration of this package's runs; imported late, for torch takes seconds."""
    from mdcs.config import Config

    return Config


def run_train(arguments: Sequence[str]) -> int:
    """The command."""
    return train_command(__file__, arguments, config_class, train, dry_run, show)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_train, arguments)


if __name__ == "__main__":
    sys.exit(main())
