"""SIGKILL at any moment leaves a run that goes on to the same bits, and never a state that does not load."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.checkpoint import load_state, previous_of
from shared.run import read_results

# A process with the libraries loaded; for each line [arguments, die_at, kill_after] it trains in a forked child.
# `die_at` is the number of the system call (of those that change files) before which the child kills itself.
SERVER = """
import contextlib, importlib, io, json, os, signal, sys, time
import torch
import shared.data, shared.run

train = importlib.import_module(sys.argv[1] + ".train")
main, load = train.main, shared.data.load
train.SAVE_STEPS = 1  # where a package looks at the clock now and then only

def few_test_images(name, split, **named):
    found = load(name, split, **named)
    return found if split == "train" else shared.data.take(found, range(0, len(found), 25))

if sys.argv[1] == "mdcs":
    shared.data.load = few_test_images

with contextlib.redirect_stdout(io.StringIO()):
    main(json.loads(sys.argv[2]))  # the first training of a process is slow; its children inherit that it is over
shared.run.SAVE_EVERY_SECONDS = 0

def kill_at(number):
    calls = iter(range(1, 10**9))
    for name in ("open", "fsync", "chmod", "replace", "link", "unlink", "mkdir", "truncate"):
        def counted(*arguments, real=getattr(os, name), **named):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)
        setattr(os, name, counted)

for line in sys.stdin:
    arguments, die_at, kill_after = json.loads(line)
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1), os.dup2(null, 2)
        kill_at(die_at)
        os._exit(main(arguments))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # it has not been waited for, so its number is still its own
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


STATE = {  # what a state counts, and how far the runs below go
    "fedloge": ("round", 4), "mdcs": ("epoch", 2), "lightcnn": ("step", 5), "sparsevit": ("step", 24),
}  # fmt: skip
KILLS = {"fedloge": 30, "mdcs": 8, "lightcnn": 6, "sparsevit": 6}
MOMENTS = {  # of the calls that change a file
    "fedloge": [*range(1, 15), *range(15, 81, 8)],  # each at the start, where a folder comes to be; then some of each
    "mdcs": [*range(20, 120, 17)], "lightcnn": [*range(15, 115, 25)], "sparsevit": [*range(15, 115, 25)],
}  # fmt: skip
TINY_LIGHTCNN = ("data={name: sample, val_images: 50, val_from: each_class, train_images: 130, test_images: 200}",
                 "stage1={epochs: 2, patience: 5}", "stage2={max_epochs: 2}", "seeds=2", "device=cpu")  # fmt: skip
TINY_SPARSEVIT = (
    "data.train_images=120", "data.test_images=50", "data.val_images=20", "batch_size=10", "eval_batch_size=25",
    "pretrain={epochs: 1, batch_size: 20}", "model={arch: s0, width: 8, depth: 2, heads: 2, mlp: 12, dropout: 0.1}",
    "prune={pruners: [global_l1], ratios: [0.5], removals: [neurons], removal_ratios: [0.5]}",
)  # fmt: skip


def test_every_paper_is_killed_here(papers):
    assert set(papers) == set(STATE) == set(KILLS) == set(MOMENTS)


class Trainer:
    """Starts trainings of a package in forked children and kills them."""

    def __init__(self, paper: str, process: subprocess.Popen[str]) -> None:
        self.paper, self.process = paper, process

    def run(self, arguments: list[str], die_at: int = 0, kill_after: float | None = None) -> int:
        """Train; returns the exit code (-9 if killed). `kill_after` seconds, or before the `die_at`-th call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([arguments, die_at, kill_after]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def folder_of(self, out: Path) -> Path:
        """The folder of the one run."""
        (folder,) = (out / self.paper).glob("smoke-*")
        return folder

    def assert_states_load(self, out: Path) -> bool:
        """Whether there is a state, that of a pre-training included; what there is must load."""
        key, end = STATE[self.paper]
        found = list(out.glob(f"{self.paper}/**/checkpoint/state.ckpt"))
        for path in found:
            state = load_state(path)["state"]
            assert state.get("fit", state)[key] <= end
            if previous_of(path).exists():
                load_state(previous_of(path))
        assert found or not list(out.glob(f"{self.paper}/**/checkpoint/previous*"))
        return bool(found)


@pytest.fixture(scope="module", params=STATE)
def trainer(request, repository, clean_environment, arguments_of, tmp_path_factory) -> Iterator[Trainer]:
    warm_up = arguments_of[request.param](tmp_path_factory.mktemp("warm"))
    command = [sys.executable, "-c", SERVER, request.param, json.dumps(warm_up)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=repository, env=clean_environment, text=True, **pipes) as process:
        yield Trainer(request.param, process)
        process.stdin.close()


@pytest.fixture(scope="module")
def arguments_of(tiny_arguments, mdcs_arguments) -> dict[str, Callable[..., list[str]]]:
    """Of a package: the arguments of a run below a folder, of so many rounds or epochs."""
    return {
        "fedloge": lambda out, *more: tiny_arguments(out, "fedloge", "rounds=4", *more),
        "mdcs": lambda out, *more: mdcs_arguments(out, "mdcs", *more),
        "lightcnn": lambda out, *more: ["--config", "smoke", "--out", str(out), *TINY_LIGHTCNN, *more],
        "sparsevit": lambda out, *more: ["--config", "smoke", "--out", str(out), *TINY_SPARSEVIT, *more],
    }


@pytest.fixture(scope="module")
def arguments(trainer, arguments_of) -> Callable[[Path], list[str]]:
    return arguments_of[trainer.paper]


@pytest.fixture(scope="module")
def expected(trainer, arguments, tmp_path_factory) -> tuple[str, float]:
    """The digest of a run that nobody kills, and the seconds that it takes."""
    out = tmp_path_factory.mktemp("whole")
    assert trainer.run(arguments(out / "first")) == 0  # it also waits for the libraries
    started = time.monotonic()
    assert trainer.run(arguments(out / "second")) == 0
    return read_results(trainer.folder_of(out / "second"))["model_digest"], time.monotonic() - started


def assert_nothing_left_over(out: Path) -> None:
    assert [path.name for path in out.rglob("*.tmp")] == []


def test_kills_at_random_moments_leave_states_that_load_and_runs_that_end_with_the_same_bits(
    tmp_path, trainer, arguments, expected
):
    digest, seconds = expected
    wanted = KILLS[trainer.paper]
    draws, kills, with_state, number = random.Random(0), 0, 0, 0
    while kills < wanted:
        out = tmp_path / str(number)
        number += 1
        for _ in range(draws.randint(1, 4)):  # the same run may be killed several times
            code = trainer.run(arguments(out), kill_after=draws.uniform(0, seconds))
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            with_state += trainer.assert_states_load(out)
        assert trainer.run(arguments(out)) == 0
        assert read_results(trainer.folder_of(out))["model_digest"] == digest
        assert_nothing_left_over(out)
    assert with_state > wanted / 6, "the kills must come when there is something to lose"


def test_a_kill_before_a_call_that_changes_a_file_leaves_a_run_that_ends_with_the_same_bits(
    tmp_path, trainer, arguments_of, tiny_arguments
):
    def arguments(name: str) -> list[str]:
        if trainer.paper == "fedloge":
            return tiny_arguments(tmp_path / name, "fedavg", "rounds=2")
        return arguments_of[trainer.paper](tmp_path / name)

    assert trainer.run(arguments("whole")) == 0
    digest = read_results(trainer.folder_of(tmp_path / "whole"))["model_digest"]
    for moment in MOMENTS[trainer.paper]:
        out = tmp_path / str(moment)
        assert trainer.run(arguments(out.name), die_at=moment) == -signal.SIGKILL, f"no call {moment}"
        trainer.assert_states_load(out)
        assert trainer.run(arguments(out.name)) == 0, f"killed before call {moment}"
        assert read_results(trainer.folder_of(out))["model_digest"] == digest
        assert_nothing_left_over(out)
