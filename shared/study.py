"""A study: many runs side by side, one process a core, one display, one forecast, and no failure that stops the rest.

Each job is a training command in a process of its own, forked from a server that has the libraries loaded, so a job
starts in a tenth of a second. A job uses the threads that its configuration names (studies say 1), whatever runs
beside it: the number of workers changes the time, never a bit.
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from shared.errors import ConfigError

POLL_SECONDS = 0.2
Scale = Literal["smoke", "mini", "paper"]


@dataclass(frozen=True)
class Job:
    """One run of a study: `module.main(arguments)`, which writes `folder`; jobs of a `group` take about as long."""

    group: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]

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
    """Resolve `auto`; returns the scale and the sentence that says why.

    Raises:
        ConfigError: there is no such scale.
    """
    scales: dict[str, Scale] = {"smoke": "smoke", "mini": "mini", "paper": "paper"}
    if asked in scales:
        return scales[asked], f"scale {asked}, as asked"
    if asked != "auto":
        raise ConfigError(f"--scale {asked}: is not a scale; choose from auto, smoke, mini, paper")
    if torch.cuda.is_available():
        return "paper", f"scale paper: a GPU is here ({torch.cuda.get_device_name()}); SCALE=mini for the small study"
    return "mini", "scale mini: no GPU is here; SCALE=smoke takes seconds, SCALE=paper is the paper's protocol"


def run_jobs(module: str, jobs: Sequence[Job], workers: int = 0) -> dict[str, Outcome]:
    """Run all jobs, `workers` at a time (0: one a core, or one in all on a GPU); returns job name -> outcome.

    Ctrl-C (or SIGTERM) stops the running jobs, which save their states, and is raised again: the same command
    continues.
    """
    workers = min(len(jobs), workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", module])
    waiting, running, outcomes = list(jobs), list[_Running](), dict[str, Outcome]()
    with _one_thread_each(), _stopped_by_sigterm(), _display(len(jobs)) as show:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(_start(context, module, waiting.pop(0)))
                for item in [item for item in running if item.process.exitcode is not None]:
                    running.remove(item)
                    outcomes[item.job.name] = outcome = _outcome(item)
                    if outcome.code:
                        print(f"failed: {item.job.name}: {outcome.message}", file=sys.stderr)
                show(outcomes, running, forecast(jobs, outcomes, running, waiting, workers))
                time.sleep(POLL_SECONDS)
        finally:
            for item in running:
                item.process.terminate()
            for item in running:
                item.process.join(60)
    return outcomes


def forecast(
    jobs: Sequence[Job], outcomes: dict[str, Outcome], running: Sequence[_Running], waiting: Sequence[Job], workers: int
) -> float | None:
    """Seconds until the study ends, or None while nothing is known.

    A job is taken to last as long as the mean of its group's finished jobs, else as its own progress says, else as
    long as the mean of all that is known.
    """
    known: dict[str, list[float]] = {}
    for job in jobs:
        if job.name in outcomes and outcomes[job.name].code == 0:
            known.setdefault(job.group, []).append(outcomes[job.name].seconds)
    left: list[float] = []
    for item in running:
        share, elapsed = progress_of(item.job.folder), time.monotonic() - item.started
        if share > 0.02:
            whole = elapsed / share
            known.setdefault(item.job.group, []).append(whole)
            left.append(whole - elapsed)
    if not known:
        return None
    means = {group: sum(values) / len(values) for group, values in known.items()}
    overall = sum(means.values()) / len(means)
    left += [means.get(job.group, overall) for job in waiting]
    left += [overall] * (len(running) - sum(progress_of(item.job.folder) > 0.02 for item in running))
    return max(sum(left) / workers, max(left, default=0.0))


def progress_of(folder: Path) -> float:
    """The share of a run that is done, from its `progress.json`; 0 where that cannot be read."""
    try:
        state = json.loads((folder / "progress.json").read_bytes())
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
        (job.folder / "progress.json").unlink()
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
    code, seconds = item.process.exitcode or 0, time.monotonic() - item.started
    if not code:
        return Outcome(code, seconds)
    try:
        printed = log_of(item.job).read_text(encoding="utf-8", errors="replace")
    except OSError:
        printed = ""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    last = lines[-1] if lines else f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return Outcome(code, seconds, f"{last} ({log_of(item.job)})")


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Thread pools that are started by import must not fill the machine; a job then sets its own number."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a study as Ctrl-C does: by an exception, so that its jobs are stopped too."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Show:
    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self.bar = Progress(*columns, disable=not sys.stderr.isatty())
        self.task = self.bar.add_task("", total=total)
        self.total = total
        self.started = self.told = time.monotonic()

    def __call__(self, outcomes: dict[str, Outcome], running: Sequence[_Running], left: float | None) -> None:
        done = len(outcomes) + sum(progress_of(item.job.folder) for item in running)
        failed = sum(outcome.code != 0 for outcome in outcomes.values())
        text = f"about {_minutes(left)} left" if left is not None else "measuring"
        text += f", {failed} failed" if failed else ""
        self.bar.update(self.task, completed=done, description=f"{text}; {', '.join(i.job.name for i in running)}")
        interval = 5 if self.told == self.started else 60
        if self.bar.disable and left is not None and time.monotonic() - self.told > interval:
            self.told = time.monotonic()
            print(f"{len(outcomes)} of {self.total} runs done, {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _display(total: int) -> Iterator[_Show]:
    show = _Show(total)
    with show.bar:
        yield show


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
