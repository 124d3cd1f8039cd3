"""SIGKILL at any moment of a run, its pre-training included, leaves a run that goes on to the same bits."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from shared.checkpoint import load_state
from shared.run import read_results

# A process with the libraries loaded; for each line [arguments, kill_after] it trains in a forked child.
SERVER = """
import contextlib, io, json, os, signal, sys, time
import torch
import shared.run
from sparsevit.train import main

with contextlib.redirect_stdout(io.StringIO()):
    main(json.loads(sys.argv[1]))  # the first training of a process is slow; its children inherit that it is over
shared.run.SAVE_EVERY_SECONDS = 0

for line in sys.stdin:
    arguments, kill_after = json.loads(line)
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1), os.dup2(null, 2)
        os._exit(main(arguments))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # it has not been waited for, so its number is still its own
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def train(repository, clean_environment, tiny, tmp_path_factory):
    """Train in a child: (out, kill_after) -> exit code."""

    def arguments(out):
        short = "prune={pruners: [global_l1], ratios: [0.5], removals: [neurons], removal_ratios: [0.5]}"
        return ["--config", "smoke", "--out", str(out), *tiny.overrides[:-1], short]

    command = [sys.executable, "-c", SERVER, json.dumps(arguments(tmp_path_factory.mktemp("warm")))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=repository, env=clean_environment, text=True, **pipes) as process:

        def run(out, kill_after=None):
            print(json.dumps([arguments(out), kill_after]), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


def digest_of(out):
    (results,) = out.glob("sparsevit/*/results.json")
    return read_results(results.parent)["model_digest"]


def test_kills_at_random_moments_leave_states_that_load_and_runs_that_end_with_the_same_bits(tmp_path, train):
    assert train(tmp_path / "first") == 0
    started = time.monotonic()
    assert train(tmp_path / "whole") == 0
    seconds, wanted = time.monotonic() - started, digest_of(tmp_path / "whole")
    draws, kills, states, number = random.Random(0), 0, 0, 0
    while kills < 6:
        out = tmp_path / str(number)
        number += 1
        for _ in range(3):
            code = train(out, draws.uniform(0, seconds))
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            for path in out.glob("sparsevit/**/state.ckpt"):
                load_state(path)
                states += 1
        assert train(out) == 0
        assert digest_of(out) == wanted
        assert [path.name for path in out.rglob("*.tmp")] == []
    assert states > 5, "the kills must come when there is something to lose"
