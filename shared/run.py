"""One run, one folder: configuration, environment, metrics, checkpoint, model, results.

    runs/<paper>/<config>-<method>-s<seed>/
        config.yaml  environment.json  metrics.jsonl  progress.json  checkpoint/state.ckpt  model/  results.json  plots/

The same command again continues an unfinished run, reports a finished one and refuses another configuration.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Self, TypeVar

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor

from shared import checkpoint
from shared.config import Section, differences, dump, load
from shared.errors import ConfigError, DataError, InterruptedRunError, RunError
from shared.gpu import NotFiniteError, describe, peak_memory

SAVE_EVERY_SECONDS = 10.0  # a state is written at most this often, a large one less; what is saved depends on no clock
PROGRESS_EVERY_SECONDS = 0.3
BEGUN = {".lock", "environment.json"}  # what a run leaves that was killed before it wrote its configuration

C = TypeVar("C", bound=Section)
T = TypeVar("T")


class Run(Generic[C]):
    """An open run folder; as a context manager it holds the folder's lock and listens for Ctrl-C and SIGTERM."""

    def __init__(self, folder: Path, config: C, command: str) -> None:
        self.folder, self.config, self.command = folder, config, command
        self.state_path = folder / "checkpoint" / "state.ckpt"
        self._undo = contextlib.ExitStack()
        self._signal: int | None = None
        self._saved_at = self._opened_at = time.monotonic()
        self._seconds_before, self._saving = 0.0, 0.0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._create(undo)
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(ValueError):  # not in the main thread
                    undo.callback(signal.signal, number, signal.signal(number, self._on_signal))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal == number:  # asked twice: leave at once; the last saved state stands
            raise InterruptedRunError(number, self.folder)
        self._signal = self._signal or number  # a study sends SIGTERM after the terminal's Ctrl-C: that is one wish

    def _create(self, undo: contextlib.ExitStack) -> None:
        written = self.folder / "config.yaml"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {p.name for p in self.folder.iterdir() if not p.match(".*.tmp")} - BEGUN
            if names and not written.exists():
                raise RunError(f"{self.folder}: holds {min(names)!r} but is not a run; choose another with --out")
            lock = undo.enter_context((self.folder / ".lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.folder}: another process is writing this run; wait for it or choose --out") from None
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written: {error.strerror}; choose another with --out") from None
        try:
            changed = differences(load(written, type(self.config)), self.config) if written.exists() else []
        except ConfigError as error:
            changed = str(error).splitlines()
        if changed:
            shown = "; ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
            raise RunError(f"{self.folder}: holds a run with another configuration ({shown}); choose another --out")
        checkpoint.sweep(self.folder)
        made = self.folder / "environment.json"
        if not written.exists():
            checkpoint.write_json(made, environment(self.command))
            checkpoint.atomic_write(written, dump(self.config).encode())
        elif not (self.folder / "results.json").exists():
            before = read_mapping(made, "has no environment.json that says which commit made it")
            checkpoint.write_json(made, made_by_both(before, environment(self.command)))

    @property
    def results(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is not finished."""
        return _read_finished(self.folder) if (self.folder / "results.json").exists() else None

    @property
    def seconds(self) -> float:
        """Wall seconds spent in this run, those before interruptions included."""
        return self._seconds_before + time.monotonic() - self._opened_at

    def restore(self, previous: bool = False) -> dict[str, Any] | None:
        """The last saved state (or the one before it), or None for a new run; `metrics.jsonl` is cut back to it."""
        older = checkpoint.previous_of(self.state_path)
        path = older if previous else self.state_path
        if not (previous or path.exists() or older.exists()):
            self._cut_metrics(0)
            return None
        saved = checkpoint.load_state(path)
        if previous:  # in the place of the damaged one, which the next saving would keep instead of it
            os.replace(older, self.state_path)
        self._seconds_before, self._opened_at = float(saved["seconds"]), time.monotonic()
        self._cut_metrics(int(saved["metrics_bytes"]))
        return dict(saved["state"])

    def check_data(self, digests: Mapping[str, str]) -> None:
        """DataError if the run began on other data than what has these digests."""
        for row in read_metrics(self.folder, "start"):
            if wrong := [name for name, digest in digests.items() if row["digests"].get(name, digest) != digest]:
                raise DataError(f"{self.folder}: began on other data ({wrong[0]}); give it back or use another --out")

    def save(self, state: Mapping[str, Any], force: bool = False) -> None:
        """Save the state if the last saving is some seconds ago, or if `force`; writing takes a tenth of the time."""
        began = time.monotonic()
        if not force and began - self._saved_at < SAVE_EVERY_SECONDS * max(1.0, self._saving):
            return
        with open(self.folder / "metrics.jsonl", "ab") as file:
            os.fsync(file.fileno())  # what the state counts on must outlive a power cut as the state does
            size = file.tell()
        checkpoint.save_state(self.state_path, {"state": state, "metrics_bytes": size, "seconds": self.seconds})
        self._saved_at = time.monotonic()
        self._saving = self._saved_at - began

    def log(self, event: str, **values: Any) -> None:
        """Append one line to `metrics.jsonl`."""
        try:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **values}) + "\n")
        except OSError as error:
            raise RunError(f"{self.folder / 'metrics.jsonl'}: cannot be written: {error.strerror}") from None

    def steps(self, items: Iterable[T], total: int, unit: str, start: int = 0) -> Iterator[T]:
        """Iterate and keep `progress.json` up to date, which a study reads; on a terminal, show a bar."""
        if sys.stderr.isatty():
            from rich.progress import track

            items = track(items, unit, total, completed=start, transient=True)
        shown_at, done = 0.0, start
        for done, item in enumerate(items, start + 1):
            if time.monotonic() - shown_at >= PROGRESS_EVERY_SECONDS:
                shown_at = time.monotonic()
                self.progress(done - 1, total, unit)
            yield item
        self.progress(done, total, unit)

    def progress(self, done: float, total: int, unit: str) -> None:
        """Tell a study how far the run is; `steps` does so itself, but for the parts of a long step."""
        checkpoint.write_progress(self.folder / "progress.json", {"done": done, "total": total, "unit": unit})

    def check(self) -> None:
        """To be called after each step: raises InterruptedRunError once a signal has come."""
        if self._signal is not None:
            raise InterruptedRunError(self._signal, self.folder)

    def finish(self, results: Mapping[str, Any], device: torch.device, precision: str) -> dict[str, Any]:
        """Write `results.json`: the results, with where and how they were measured."""
        where = json.loads((self.folder / "environment.json").read_bytes())
        complete = {
            **results, "device": describe(device), "precision": precision, "commit": where["commit"],
            "command": where["command"], "seconds": round(self.seconds, 2), "peak_memory_bytes": peak_memory(device),
        }  # fmt: skip
        checkpoint.write_json(self.folder / "results.json", complete)
        return complete

    def not_finite(self, error: NotFiniteError, **where: Any) -> RunError:
        """Write what is needed to see a non-finite loss again, and the error that says so."""
        bundle = self.folder / "not_finite.json"
        details = {"step": error.step, "loss": str(error.loss), **where, "config": dump(self.config)}
        checkpoint.write_json(bundle, details)
        return RunError(f"{self.folder.name}: {error}; the batch and the configuration are in {bundle}")

    def _cut_metrics(self, size: int) -> None:
        path = self.folder / "metrics.jsonl"
        if (found := path.stat().st_size if path.exists() else 0) < size:
            raise RunError(f"{path}: has {found} bytes, but had {size} when the state was saved; this run is damaged")
        if found:
            os.truncate(path, size)


def folder_name(config_name: str, method: str, seed: int, overrides: Iterable[str]) -> str:
    """`<config>-<method>-s<seed>`, and a short digest where other overrides make it a different run."""
    named = re.compile(r"(seed|method|method\.name|device)=[\w:]*")  # what the name says already, or never matters
    others = sorted(override for override in overrides if not named.fullmatch(override))
    digest = "-" + hashlib.sha256("\n".join(others).encode()).hexdigest()[:6] if others else ""
    return f"{config_name}-{method}-s{seed}{digest}"


class Figure(BaseModel):
    """What each of a run's `figures` has, besides the seed where a run has several."""

    at: str
    split: str
    metric: str
    value: float | None


class SeedFigure(Figure):
    """A figure of a run of several seeds."""

    seed: int


WRITTEN = {"device": str, "precision": str, "commit": str, "command": str, "seconds": float}  # by `Run.finish`
OF_A_RUN = {"config": str, "method": str, "model_digest": str}
FINISH_AGAIN = "; delete it to make the run finish again"


def read_results(folder: Path) -> dict[str, Any]:
    """The results of a finished run that has figures; RunError if it is not finished or the file is damaged."""
    found = _read_finished(folder)
    check_keys(folder / "results.json", found, {"figures": list[Figure] if "seed" in found else list[SeedFigure]})
    return found


def _read_finished(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    found = read_mapping(path, "is not a finished run (no results.json in it)", FINISH_AGAIN)
    check_keys(path, found, WRITTEN)
    return found


def check_keys(path: Path, found: Mapping[str, Any], needed: Mapping[str, Any], inside: str = "") -> None:
    """RunError if a key (-> its type) is missing in what was read from a run's file, or holds something else."""
    for name, kind in needed.items():
        try:
            TypeAdapter(kind).validate_python(found[name], strict=True)
        except KeyError:
            raise RunError(f"{path}: is damaged ({inside}{name} is missing){FINISH_AGAIN}") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (name, *first["loc"])))
            raise RunError(f"{path}: is damaged ({inside}{place}: {first['msg']}){FINISH_AGAIN}") from None


def read_mapping(path: Path, missing: str, hint: str = "") -> dict[str, Any]:
    """A JSON mapping of a run's folder; RunError: its folder `missing`, or the file is damaged and `hint` mends it."""
    try:
        found = json.loads(path.read_bytes())
    except OSError:
        raise RunError(f"{path.parent}: {missing}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{path}: is damaged (no mapping in JSON){hint}")
    return found


def read_run(folder: Path, paper: str, **needed: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a finished run of a paper; RunError if it is not finished, damaged or another paper's.

    Args:
        needed: what the caller reads in a mapping of the results, as `data={"images": int}`.
    """
    results, path = read_results(folder), folder / "results.json"
    if results.get("paper") != paper:
        raise RunError(f"{folder}: is a run of {results.get('paper')!r}, not of {paper}")
    check_keys(path, results, {**OF_A_RUN, **dict.fromkeys(needed, dict)})
    for name, keys in needed.items():
        check_keys(path, results[name], keys, f"{name}.")
    return results


def changed_figures(stated: Mapping[str, float | None], found: Mapping[str, float | None]) -> list[str]:
    """One line a figure that a saved model does not give again, to a part in a million (1e-6 below 1)."""
    wrong = [f"{name}: is not in results.json, the model gives {found[name]}" for name in found if name not in stated]
    for name, value in stated.items():
        again = found.get(name)
        close = value is not None and again is not None and abs(value - again) <= 1e-6 * max(1.0, abs(value))
        if not close and value != again:
            wrong.append(f"{name}: results.json has {value}, the model gives {again}")
    return wrong


def tell_changed(stated: Mapping[str, float | None], found: Mapping[str, float | None], of: str = "",
                 wrong: Iterable[str] = ()) -> int:  # fmt: skip
    """Print which figures a saved model does not give again, and what is `wrong` besides; the exit code of an eval."""
    lines = [*wrong, *changed_figures(stated, found)]
    print("\n".join(lines) if lines else f"all {len(stated)} figures{of} are those of results.json")
    return 1 if lines else 0


def read_metrics(folder: Path, event: str) -> list[dict[str, Any]]:
    """All lines of one event in a run's `metrics.jsonl`; RunError if it is damaged."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
        return [row for row in map(json.loads, lines) if row["event"] == event]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{folder}/metrics.jsonl: is damaged or gone; make the run again in another folder") from None


def environment(command: str) -> dict[str, Any]:
    """Where a run was made: commit, whether something is in no commit (None: not known), versions, command."""
    # What a study of the same command has just published changes no run.
    changed = _git("status", "--porcelain", "--", ".", ":!results")
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown", "dirty": None if changed is None else bool(changed),
        "python": platform.python_version(), "torch": torch.__version__, "system": platform.platform(),
        "command": command, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def made_by_both(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A run's environment where code of another moment goes on with it: of no one commit, unless the code is the same.

    Settings are not looked at: a run refuses to go on with others anyway.
    """
    one, other = before.get("commit"), now["commit"]
    same = one == other or _git("diff", "--quiet", str(one), other, "--", "*.py", "requirements.lock") is not None
    dirty = max(before.get("dirty"), now["dirty"], key=[False, None, True].index)
    return {**before, "dirty": dirty, "commit": one if same else "unknown"}


def command_line(module: str, arguments: Iterable[str]) -> str:
    """The command that makes this run again."""
    return f"python -m {module} {shlex.join(arguments)}"


def state_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over named tensors: two runs with the same digest have the same bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=10).decode().strip()
    return None
