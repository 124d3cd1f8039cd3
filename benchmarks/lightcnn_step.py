"""What LightCNN's training costs, beside the usual ways to run it: `python benchmarks/lightcnn_step.py`.

28 x 28 grey images, batches of 32, five seeds (or one), float32. All sides are measured by turns (A B C A B C ...):
medians, and quartiles of the turns' ratios. Before, the sides are shown to agree to 1e-4: in their losses, or (merged
model) in the logits without dropout; PIL's warps draw for themselves, so "stage 1" compares the work alone.

seeds side by side  stage 1 of five seeds: as one run, against five runs of one seed one after the other with one thread
                    (as the configurations have it). "dealt to two processes" is one run of three seeds beside one of
                    two; "two at a time" is what `reproduce` does on two cores: two runs of five seeds each, its time
                    halved. These two have two cores and their reference one; what two cores give the five runs one
                    after the other is measured as well ("two threads")
step                one seed on one thread: ours against two plain branches (NCHW, torch's optimiser as it comes), in
                    stage 1 (our augmentation for both) and of the merged model with everything trainable
stage 1             images a second of stage 1, augmentation included, against a loader with two workers and PIL's warps
                    (`lightcnn_usual.py`): three interpolations as the paper has, and one for all maps. Each of our
                    images has two views, as theirs
frozen part cached  an epoch of phase P2 (10 epochs at most) with the frozen layers' outputs computed once, against
                    every step

The pixels are random but smooth, for no data is downloaded. Measure on an idle machine with two cores.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from bench_report import Report, now, timed
from lightcnn_ours import BATCH, FULL, QUICK, SEEDS, SIDE, Ours, Processes, Sizes
from lightcnn_usual import PlainBranches, PlainMerged, PlainTraining, loader
from torch import Tensor

from shared.gpu import setup


def by_turns(rounds: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    """The seconds of each side, turn by turn, after one that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            time = side()
            found[name] += [time] if turn else []
    return found


def with_threads(threads: int, side: Callable[[], Any]) -> Callable[[], float]:
    """The seconds of a side with so many threads of torch's."""

    def run() -> float:
        """Seconds of one pass, on so many threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        seconds, _ = timed(side)
        torch.set_num_threads(before)
        return seconds

    return run


def check(what: str, ours: Tensor, other: Tensor) -> None:
    """AssertionError where two sides' losses differ by more than 1e-4."""
    torch.testing.assert_close(ours.cpu(), other.cpu(), atol=1e-4, rtol=0, msg=lambda text: f"{what}: {text}")


def measure_seeds(report: Report, device: torch.device, sizes: Sizes, processes: Processes | None) -> None:
    """Five seeds as one run, and one after the other; in two processes on a CPU."""
    together = Ours(tuple(range(SEEDS)), sizes, device)
    alone = [Ours((seed,), sizes, device) for seed in range(SEEDS)]

    def one_after_the_other() -> Tensor:
        """The losses [seeds, ...] of the seeds trained each in its own run."""
        return torch.cat([run.run_pass() for run in alone])

    losses = one_after_the_other()
    check("five seeds as one run", together.run_pass(), losses)
    sides = {"as one run": with_threads(1, together.run_pass)}
    if processes is not None:
        check("dealt to two processes", processes.run_pass(0), losses)
        check("two runs of five seeds", processes.run_pass(1), losses.repeat(2))
        sides |= {
            "as one run, two threads": with_threads(sizes.threads, together.run_pass),
            "dealt to two processes, 3 + 2": with_threads(1, lambda: processes.run_pass(0)),
            "as one run, two at a time": lambda: with_threads(1, lambda: processes.run_pass(1))() / 2,
            "one after the other, two threads": with_threads(sizes.threads, one_after_the_other),
        }
    found = by_turns(sizes.rounds, **sides, alone=with_threads(1, one_after_the_other))
    reference = found.pop("alone")
    for name, times in found.items():
        torch.set_num_threads(sizes.threads if "two threads" in name else 1)
        setting = f"stage 1, {SEEDS} seeds, {sizes.steps} steps; {name}"
        report.add("seeds side by side", setting, "s", times, reference)
    torch.set_num_threads(1)


def measure_step(report: Report, device: torch.device, sizes: Sizes, processes: Processes | None) -> None:
    """Ours against plain branches, fed with the same batches."""
    five = Ours(tuple(range(SEEDS)), sizes, device)
    first, merged = Ours((0,), sizes, device), Ours((0,), sizes, device, 0, "method=scratch")
    branches = PlainTraining(PlainBranches(first.training.weights, 1, SIDE), device)
    plain = PlainTraining(PlainMerged(merged.training.weights, 1, SIDE), device)
    check("stage 1 and plain branches", torch.tensor(branches.run_pass(first.batches()) / sizes.steps),
          first.run_pass().sum())  # fmt: skip
    inputs, _ = next(merged.batches())
    with torch.no_grad():  # without dropout, whose draws are torch's own in the plain model
        network, weights = merged.training.step.network, merged.training.weights
        logits = network.forward(weights, inputs, network.levels)[0]
        check("merged model and plain branches", logits, plain.net.eval()(inputs))
        plain.net.train()

    def seconds_of(usual: PlainTraining, ours: Ours) -> Callable[[], float]:
        """Times a plain training on the very batches of ours."""

        def run() -> float:
            """Seconds of one pass."""
            began = now(device)
            usual.run_pass(ours.batches())
            return now(device) - began

        return run

    found = by_turns(
        sizes.rounds, stage1=first.seconds, five=lambda: five.seconds() / SEEDS, branches=seconds_of(branches, first),
        merged=merged.seconds, plain=seconds_of(plain, merged),
    )  # fmt: skip
    ms = {name: [1000 * time / sizes.steps for time in times] for name, times in found.items()}
    report.add("step", "stage 1, one seed", "ms", ms["stage1"], ms["branches"])
    report.add("step", f"stage 1, a seed of {SEEDS} side by side", "ms", ms["five"], ms["branches"])
    report.add("step", "merged model, everything trainable", "ms", ms["merged"], ms["plain"])


def measure_stage1(report: Report, device: torch.device, sizes: Sizes, processes: Processes | None) -> None:
    """Images a second of stage 1 against a loader's; theirs has this process and two workers, ours one core or two."""
    for warp in ("sequential", "combined"):
        ours = Ours((0,), sizes, device, 0, f"augment.warp={warp}")
        five = Ours(tuple(range(SEEDS)), sizes, device, 0, f"augment.warp={warp}")
        usual = PlainTraining(PlainBranches(ours.training.weights, 1, SIDE), device)
        ranges = ours.training.step.images[1].ranges
        assert ranges is not None
        count = sizes.steps * BATCH
        batches = loader(ours.problem.images[:count], ours.problem.labels[:count], BATCH, ranges, warp)

        def usual_seconds(usual: PlainTraining = usual, batches: Callable[[], Any] = batches) -> float:
            """Seconds of one pass of the loader's training."""
            return timed(lambda: usual.run_pass(batches()))[0]

        def each_of_five(five: Ours = five) -> float:
            """A seed's share of five side by side."""
            return five.seconds() / SEEDS

        def each_of_ten() -> float:
            """A seed's share of two runs of five, a run on each core."""
            assert processes is not None
            return timed(lambda: processes.run_pass(1))[0] / (2 * SEEDS)

        sides = {"one seed, one core": ours.seconds, f"{SEEDS} seeds side by side, one core": each_of_five}
        if processes is not None and warp == "sequential":  # what the processes run
            sides[f"{SEEDS} seeds side by side, two runs at a time on two cores"] = each_of_ten
        found = by_turns(sizes.rounds, **sides, usual=usual_seconds)
        rates = {name: [count / time for time in times] for name, times in found.items()}
        for name in sides:
            report.add("stage 1", f"{warp} warps; {name}", "images/s", rates[name], rates["usual"])


def measure_frozen(report: Report, device: torch.device, sizes: Sizes, processes: Processes | None) -> None:
    """Phase P2, with the frozen layers' outputs computed once and at every step."""
    cached = Ours((0,), sizes, device, 2)
    every_step = Ours((0,), sizes, device, 2, "stage2.cache_mib=0")
    assert cached.training.step.phase.name == "P2"
    assert cached.training.inputs is not None
    assert every_step.training.inputs is None
    check("frozen part cached", cached.run_pass(), every_step.run_pass())
    found = by_turns(sizes.rounds, cached=cached.seconds, every=every_step.seconds, once=lambda: timed(cached.begin)[0])
    tenth = [epoch + once / 10 for epoch, once in zip(found["cached"], found["once"], strict=True)]
    what = f"P2, one seed, {sizes.steps} steps"
    report.add("frozen part cached", f"{what}; an epoch", "s", found["cached"], found["every"])
    report.add("frozen part cached", f"{what}; an epoch of ten, with its tenth of what is computed once", "s", tenth,
               found["every"])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (what the configurations name), auto, cuda or cuda:1")
    parser.add_argument("--threads", type=int, default=1, help="of what does not state its own (default 1)")
    parser.add_argument("--quick", action="store_true", help="few steps: no figures to keep")
    parser.add_argument("--out", type=Path, default=Path("results/lightcnn/benchmarks.csv"))
    asked = parser.parse_args(arguments)
    sizes, device = QUICK if asked.quick else FULL, setup(asked.device, asked.threads)
    measures = (measure_seeds, measure_step, measure_stage1, measure_frozen)
    report, began = Report(device, ("seeds side by side", "step", "frozen part cached")), perf_counter()
    processes = Processes(sizes) if device.type == "cpu" else None
    for measure in measures:
        print(f"{perf_counter() - began:.0f} s: {measure.__name__} ...", file=sys.stderr)
        torch.set_num_threads(asked.threads)
        measure(report, device, sizes, processes)
    if processes is not None:
        processes.close()
    report.finish(asked.out)
    print(f"written: {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
