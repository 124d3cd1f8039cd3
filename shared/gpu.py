"""Devices: choice, precision, determinism, random streams, memory and time."""

import contextlib
import hashlib
import math
import os
import platform
import re
import resource
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shared.errors import ConfigError, UserError

Precision = Literal["auto", "float32", "bfloat16"]


class NotFiniteError(UserError):
    """A loss became NaN or infinite."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"the loss is {loss} at step {step}; a lower learning rate usually mends this")
        self.step, self.loss = step, loss


def setup(device: str = "auto", threads: int = 0) -> torch.device:
    """Choose the device and make this process deterministic on it; ConfigError if the device is not there.

    Args:
        device: "auto" takes the first GPU where there is one; else "cpu", "cuda" or "cuda:1".
        threads: CPU threads; 0 takes all cores. The sums of a run depend on it, so a configuration states it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    named = re.fullmatch(r"cpu|cuda(?::([0-9]+))?", device)  # torch wraps large numbers: its cuda:256 is cuda:0
    if named is None:
        raise ConfigError(f"device: {device!r} is not a device; use auto, cpu, cuda or cuda:1")
    if device != "cpu" and int(named[1] or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {device!r} is not here ({torch.cuda.device_count()} GPUs found); use device=cpu")
    torch.set_num_threads(threads or os.cpu_count() or 1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory with NaN takes a tenth of a step and changes no bit.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    return torch.device(device)


def stream(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random stream of a seed and a purpose: `stream(seed, "order", round, client)`.

    It is derived, not advanced: no part of a run changes what another draws, and resuming needs no saved generator.
    """
    text = ":".join(map(str, (seed, *names)))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator(device).manual_seed(number)


def resolve_precision(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """What "auto" is: bfloat16 on a GPU that has it, else float32; never measured, for a seed gives the same bits."""
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context in which forward passes run."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(precision, device) == "bfloat16")


class LossMeter:
    """Collects losses on the device; a loss that is not finite stops the run.

    On a CPU each is looked at as it comes, before the update. On a GPU that would stall the queue, so they are looked
    at when read; until then nothing that was computed from them may leave the caller.
    """

    def __init__(self, device: torch.device) -> None:
        self._eager = device.type == "cpu"
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Take the loss of one step; on a CPU, NotFiniteError if it is NaN or infinite."""
        self._losses.append(loss.detach())
        if self._eager and not math.isfinite(value := float(self._losses[-1])):
            raise NotFiniteError(len(self._losses) - 1, value)

    def read(self) -> list[float]:
        """All losses since the last reading, in order; NotFiniteError for the first that is NaN or infinite."""
        values: list[float] = torch.stack(self._losses).tolist() if self._losses else []
        self._losses.clear()
        for step, value in enumerate(values):
            if not math.isfinite(value):
                raise NotFiniteError(step, value)
        return values


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the device has held on a GPU, the most that this process has held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # `ru_maxrss` of a new program begins at what the one that started it had held
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(device: torch.device) -> str:
    """The device in words, as it stands beside a measured figure: a GPU's name, or the processor and the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: *(\S.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1].strip() if found else name
    threads = torch.get_num_threads()
    return f"CPU ({name}), {threads} thread{'s' if threads > 1 else ''}"
