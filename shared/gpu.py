"""Devices: choice, precision, determinism, random streams, memory and time."""

import contextlib
import hashlib
import math
import os
import platform
import re
import resource
import sys
from typing import Any, Literal

import torch
from torch import Tensor

from shared.errors import ConfigError, UserError

Precision = Literal["auto", "float32", "bfloat16"]


class NotFiniteError(UserError):
    """A loss became NaN or infinite."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"the loss is {loss} at step {step}; a lower learning rate usually mends this")
        self.step = step
        self.loss = loss


def setup(device: str = "auto", threads: int = 0) -> torch.device:
    """Choose the device and make this process deterministic on it.

    Args:
        device: "auto" takes the first GPU where there is one; else "cpu", "cuda" or "cuda:1".
        threads: CPU threads of this process; 0 takes all cores. The sums of a run depend on this number, so a
            configuration states it.

    Raises:
        ConfigError: the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    named = re.fullmatch(r"cpu|cuda(?::([0-9]+))?", device)  # torch wraps large numbers: its cuda:256 is cuda:0
    if named is None:
        raise ConfigError(f"device: {device!r} is not a device; use auto, cpu, cuda or cuda:1")
    if device != "cpu" and int(named[1] or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {device!r} is not here ({torch.cuda.device_count()} GPUs found); use device=cpu")
    chosen = torch.device(device)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("highest")
    return chosen


def stream(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random stream of a seed and a purpose: `stream(seed, "order", round, client)`.

    Streams are derived, not advanced: what one part of a run draws cannot change what another part draws, and a run
    that resumes needs no saved generator.
    """
    text = ":".join(str(part) for part in (seed, *names))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator(device).manual_seed(number)


def resolve_precision(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """ "auto" is bfloat16 on a GPU that has it and float32 elsewhere.

    On a CPU it is never chosen by a measurement at start: the same seed must give the same bits in every run.
    """
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context in which forward passes run."""
    if resolve_precision(precision, device) == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


class LossMeter:
    """Collects losses on the device; a loss that is not finite stops the run before the update that would follow.

    On a CPU each loss is looked at as it comes. On a GPU looking would stall the queue at every step, so the losses are
    looked at when read; until then nothing that was computed from them may leave the caller.
    """

    def __init__(self, device: torch.device) -> None:
        self._eager = device.type == "cpu"
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Take the loss of one step.

        Raises:
            NotFiniteError: it is NaN or infinite (on a CPU).
        """
        loss = loss.detach()
        self._losses.append(loss)
        if self._eager and not math.isfinite(value := float(loss)):
            raise NotFiniteError(len(self._losses) - 1, value)

    def read(self) -> list[float]:
        """All losses since the last reading, in order; the meter is empty afterwards.

        Raises:
            NotFiniteError: one of them is NaN or infinite.
        """
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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(device: torch.device) -> str:
    """The device in words, as it stands beside a measured figure: a GPU's name, or the processor and the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = models[0] if models and models[0] else name
    threads = torch.get_num_threads()
    return f"CPU ({name}), {threads} thread{'s' if threads > 1 else ''}"
