"""A study: many runs side by side, one process a core, one display, one forecast, and no failure that stops the rest.

Each job is a training command in a process of its own, forked from a server that has the libraries loaded. It uses the
threads that its configuration names, whatever runs beside it: the number of workers changes the time, never a bit.
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Literal, cast, get_args

import torch

from shared.checkpoint import write_progress
from shared.errors import ConfigError, RunError, UserError

POLL_SECONDS = 0.2
HOPELESS = 3  # runs that end with the same error before one ends well: missing data, say. The rest is not started
PROGRESS = "progress.json"
Scale = Literal["smoke", "mini", "paper"]


@dataclass(frozen=True)
class Job:
    """One run of a study: `module.main(arguments)`, which writes `folder`; jobs of a `group` take about as long.

    `device` is the configuration's. The job waits until the one whose folder `after` names has ended, if that is one of
    the study: it begins with what that one leaves.
    """

    group: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    device: str = "auto"
    after: Path | None = None

    @property
    def name(self) -> str:
        """The run's name in the display and the report."""
        return self.folder.name


@dataclass
class Outcome:
    """How a job ended: its exit code, the seconds it took, and for a failure the last line that it printed."""

    code: int
    seconds: float
    message: str = ""


@dataclass
class _Running:
    process: BaseProcess
    job: Job
    started: float


def choose_scale(asked: str) -> tuple[Scale, str]:
    """Resolve `auto`; returns the scale and the sentence that says why. ConfigError for a scale that is none."""
    if asked in get_args(Scale):
        return cast(Scale, asked), f"scale {asked}, as asked"
    if asked != "auto":
        raise ConfigError(f"--scale {asked}: is not a scale; choose from auto, smoke, mini, paper")
    # On a GPU too: a paper's whole protocol is days to months of one, which nobody should start by a bare command.
    return "mini", "scale mini: no other was asked; SCALE=smoke takes seconds, SCALE=paper is the paper's protocol"


def run_jobs(module: str, jobs: Sequence[Job], workers: int = 0) -> dict[str, Outcome]:
    """Run all jobs, `workers` at a time (0: one a core, or one in all if they use a GPU); returns job name -> outcome.

    Ctrl-C or SIGTERM stops the running jobs, which save their states, and is raised again; the same command continues.
    """
    if workers < 0:
        raise ConfigError(f"--workers {workers}: give the number of runs side by side, or 0 for one a core")
    on_gpu = torch.cuda.is_available() and any(job.device != "cpu" for job in jobs)
    workers = min(len(jobs), workers or (1 if on_gpu else os.cpu_count() or 1))
    context = multiprocessing.get_context("forkserver")
    # A process that asks torch for determinism loads the compiler, a second each: load it once for all.
    context.set_forkserver_preload(["torch", "torch._inductor", module])
    waiting, running, outcomes = list(jobs), list[_Running](), dict[str, Outcome]()
    display = _Display(len(jobs), jobs[0].folder.parent if jobs else None)
    with _surroundings(), display.bar:
        try:
            while waiting or running:
                pending = {job.folder for job in (*waiting, *(item.job for item in running))}
                for job in [job for job in waiting if job.after not in pending][: workers - len(running)]:
                    waiting.remove(job)
                    running.append(_start(context, module, job))
                for item in [item for item in running if item.process.exitcode is not None]:
                    running.remove(item)
                    outcomes[item.job.name] = outcome = _outcome(item)
                    if outcome.code:
                        print(f"failed: {item.job.name}: {outcome.message}", file=sys.stderr)
                if waiting and hopeless(list(outcomes.values())):
                    print(f"failed: {len(waiting)} other runs are not started", file=sys.stderr)
                    outcomes |= {job.name: Outcome(1, 0.0, "not started") for job in waiting}
                    waiting.clear()
                display.show(outcomes, running, forecast(jobs, outcomes, running, waiting, workers))
                time.sleep(POLL_SECONDS)
        finally:
            for item in running:
                item.process.terminate()
            for item in running:
                item.process.join(60)
    return outcomes


def hopeless(outcomes: Sequence[Outcome]) -> bool:
    """Whether at least HOPELESS runs ended with one error of the user's (exit code 2), and none in another way."""
    same = {(outcome.code, outcome.message.rpartition(" (")[0]) for outcome in outcomes}  # without the log's name
    return len(outcomes) >= HOPELESS and len(same) == 1 and outcomes[0].code == 2


def run_study(module: str, name: str, jobs: Sequence[Job], workers: int) -> list[Job]:
    """`run_jobs` with a line before and a line after; returns the jobs that ended well.

    Only those belong in the report: what the folder of another holds may be a run of other settings.
    """
    there, arms = sum((job.folder / "results.json").exists() for job in jobs), len({job.group for job in jobs})
    print(f"{name}: {len(jobs)} runs, {arms} methods; {there} were finished before", flush=True)
    started = time.monotonic()
    outcomes = run_jobs(module, jobs, workers)
    good = [job for job in jobs if outcomes[job.name].code == 0]
    print(f"{name}: {len(good)} of {len(jobs)} runs, {time.monotonic() - started:.0f} s", flush=True)
    return good


def run_configurations(names: Sequence[str], one: Callable[[str], int]) -> int:
    """Run the study of each configuration, and report it; returns how many failures `one` counted in all.

    A configuration that cannot be reported or published is one more and does not stop the next; a single one raises.
    """
    failed = 0
    for name in names:
        try:
            failed += one(name)
        except (UserError, OSError) as error:
            if len(names) == 1 or isinstance(error, ConfigError):  # a wrong argument is as wrong for the next
                raise
            print(f"failed: {name}: {error}", file=sys.stderr, flush=True)
            failed += 1
    return failed


def finished(jobs: Sequence[Job]) -> list[Job]:
    """Those that have results; RunError if there are none."""
    if done := [job for job in jobs if (job.folder / "results.json").exists()]:
        return done
    raise RunError("no run of the study has finished; the lines above say why")


def forecast(
    jobs: Sequence[Job], outcomes: dict[str, Outcome], running: Sequence[_Running], waiting: Sequence[Job], workers: int
) -> float | None:
    """Seconds until the study ends, or None while nothing is known.

    A job is taken to last as long as its own progress says, else as the mean of its group's jobs whose length is
    known, else as the mean of all that is known.
    """
    elapsed = {item.job.name: time.monotonic() - item.started for item in running}
    shares = {item.job.name: progress_of(item.job.folder) for item in running}
    whole = {name: outcome.seconds for name, outcome in outcomes.items() if not outcome.code}
    whole |= {name: elapsed[name] / share for name, share in shares.items() if share > 0.02}
    groups: dict[str, list[float]] = {}
    for job in jobs:
        if job.name in whole:
            groups.setdefault(job.group, []).append(whole[job.name])
    if not groups:
        return None
    means = {group: fmean(values) for group, values in groups.items()}
    lengths = {job.name: whole.get(job.name, means.get(job.group, fmean(means.values()))) for job in jobs}
    left = [max(0.0, lengths[name] - seconds) for name, seconds in elapsed.items()]
    left += [lengths[job.name] for job in waiting]
    return max(sum(left) / workers, *left, 0.0)


def progress_of(folder: Path) -> float:
    """The share of a run that is done, from its `progress.json`; 0 where that cannot be read."""
    try:
        state = json.loads((folder / PROGRESS).read_bytes())
        share = float(state["done"]) / float(state["total"])
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return 0.0
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0


def log_of(job: Job) -> Path:
    """What a job printed."""
    return job.folder.parent / "logs" / f"{job.name}.txt"


def _start(context: multiprocessing.context.ForkServerContext, module: str, job: Job) -> _Running:
    log_of(job).parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # a progress of an earlier, interrupted try would spoil the forecast
        (job.folder / PROGRESS).unlink()
    process = context.Process(target=_work, args=(module, job.arguments, str(log_of(job))), name=job.name)
    process.start()
    return _Running(process, job, time.monotonic())


def _work(module: str, arguments: Sequence[str], log: str) -> None:
    file = open(log, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 (open to the end, for a traceback)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    sys.exit(importlib.import_module(module).main(arguments))


def _outcome(item: _Running) -> Outcome:
    code, last = item.process.exitcode or 0, ""
    if code:
        last = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        with contextlib.suppress(OSError):
            last = log_of(item.job).read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2] or last
        last += f" ({log_of(item.job)})"
    return Outcome(code, time.monotonic() - item.started, last)


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """One thread for the pools that imports start (a job then sets its own number); SIGTERM ends a study as Ctrl-C."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    with contextlib.ExitStack() as undo:
        undo.callback(os.environ.update, before)
        for name in names:
            os.environ[name] = "1"
            undo.callback(os.environ.pop, name, None)
        with contextlib.suppress(ValueError):  # not in the main thread
            handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            undo.callback(signal.signal, signal.SIGTERM, handler)
        yield


class _Display:
    """A bar on a terminal; elsewhere a line after five seconds and then every minute.

    The runs' folder has the same in `progress.json`, as each run has: for who runs several studies.
    """

    def __init__(self, total: int, folder: Path | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TimeElapsedColumn

        columns = ("runs", BarColumn(), "{task.completed:.0f}/{task.total}", TimeElapsedColumn(), "{task.description}")
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.task, self.total, self.next = self.bar.add_task("", total=total), total, time.monotonic() + 5
        self.file, self.written = folder / PROGRESS if folder else None, 0.0

    def show(self, outcomes: dict[str, Outcome], running: Sequence[_Running], left: float | None) -> None:
        """Say how far the study is."""
        done = len(outcomes) + sum(progress_of(item.job.folder) for item in running)
        failed = sum(outcome.code != 0 for outcome in outcomes.values())
        about = "" if left is None else f"about {left:.0f} s" if left < 90 else f"about {left / 60:.0f} min"
        text = (f"{about} left" if about else "measuring") + (f", {failed} failed" if failed else "")
        self.bar.update(self.task, completed=done, description=f"{text}; {', '.join(i.job.name for i in running)}")
        if self.file and (time.monotonic() > self.written + 1 or not running):
            self.written = time.monotonic()
            write_progress(self.file, {"done": done, "total": self.total, "text": text})
        if self.bar.disable and left is not None and time.monotonic() > self.next:
            self.next = time.monotonic() + 60
            print(f"{len(outcomes)} of {self.total} runs done, {text}", file=sys.stderr, flush=True)
