"""What happens while a run goes on: signals, a full disk, progress, a loss that is not finite."""

import errno
import json
import os
import signal
import sys
import time

import pytest

from shared import run as run_module
from shared.errors import InterruptedRunError, RunError
from shared.gpu import NotFiniteError
from shared.run import Run
from tests.shared.small_runs import Small


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(tmp_path, number):
    with Run(tmp_path, Small(), "-") as run:
        run.check()
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # the step goes on
        with pytest.raises(InterruptedRunError) as caught:
            run.check()
    assert caught.value.exit_code == 128 + number
    assert caught.value.folder == tmp_path


def test_the_same_signal_twice_leaves_at_once_but_two_different_ones_are_one_wish(tmp_path):
    with Run(tmp_path, Small(), "-"):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(InterruptedRunError):
            os.kill(os.getpid(), signal.SIGINT)
    with Run(tmp_path, Small(), "-") as run:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(InterruptedRunError) as caught:
            run.check()
    assert caught.value.exit_code == 130


def test_the_old_signal_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Run(tmp_path, Small(), "-"):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_full_disk_while_logging_is_one_line(opened, monkeypatch):
    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(RunError, match="No space left on device"):
        opened.log("step", number=1)


def test_progress_is_written_for_a_study_to_read(opened):
    assert list(opened.steps(range(3, 5), 5, "round", 3)) == [3, 4]
    assert json.loads((opened.folder / "progress.json").read_text()) == {"done": 5, "total": 5, "unit": "round"}


def test_a_reader_of_the_progress_finds_the_old_or_the_new_whole(opened, monkeypatch):
    opened.progress(1, 5, "round")
    found, real = [], os.replace

    def replace(source, target):
        found.append(progress_of(opened)["done"])
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        opened.progress(2, 5, "round")
    assert [*found, progress_of(opened)["done"]] == [1, 2]

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        opened.progress(3, 5, "round")  # no reason to end a run
    assert progress_of(opened)["done"] == 2
    assert not list(opened.folder.glob(".progress*"))


def progress_of(run: Run) -> dict[str, object]:
    return json.loads((run.folder / "progress.json").read_text())


def test_progress_is_the_number_of_items_that_have_ended(opened, monkeypatch):
    monkeypatch.setattr(run_module, "PROGRESS_EVERY_SECONDS", 0)
    seen = [progress_of(opened)["done"] for _ in opened.steps("abc", 7, "step", 4)]
    assert seen == [4, 5, 6], "the item at hand has not ended"
    assert progress_of(opened) == {"done": 7, "total": 7, "unit": "step"}


@pytest.mark.parametrize("items", [0, 1, 2])
@pytest.mark.parametrize("terminal", [False, True], ids=["in a file", "on a terminal"])
def test_items_that_end_early_are_not_all_done(opened, monkeypatch, items, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(opened.steps((k for k in range(items)), 9, "step", 4)) == list(range(items))
    assert progress_of(opened) == {"done": 4 + items, "total": 9, "unit": "step"}


def test_items_that_nobody_takes_to_the_end_are_not_all_done(opened, monkeypatch):
    monkeypatch.setattr(run_module, "PROGRESS_EVERY_SECONDS", 0)
    steps = opened.steps(range(5), 5, "step")
    assert [next(steps), next(steps)] == [0, 1]
    steps.close()
    assert progress_of(opened) == {"done": 1, "total": 5, "unit": "step"}


def test_the_bundle_of_a_loss_that_is_not_finite_says_where_it_was(opened):
    error = opened.not_finite(NotFiniteError(7, float("inf")), round=2, images=[4, 5], seed=0)
    bundle = json.loads((opened.folder / "not_finite.json").read_text())
    assert bundle == {
        "step": 7,
        "loss": "inf",
        "round": 2,
        "images": [4, 5],
        "seed": 0,
        "config": "{seed: 0, rate: 0.5}\n",
    }
    assert "step 7" in str(error)
    assert "not_finite.json" in str(error)
