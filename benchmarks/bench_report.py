"""What every benchmark needs: images, a stopwatch, the bytes that tensors hold, and a report as tables and as CSV."""

import gc
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shared.checkpoint import atomic_write
from shared.gpu import describe, stream
from shared.report import markdown, show, write_csv
from shared.run import environment

CPU = torch.device("cpu")
COLUMNS = (
    "benchmark", "setting", "ours", "reference", "ratio", "ratio_q1", "ratio_q3", "unit", "n", "device", "threads",
    "torch", "commit",
)  # fmt: skip


def smooth_images(n: int, name: str, channels: int = 3, side: int = 32) -> Tensor:
    """uint8 [n, C, side, side]: noise of four wavelengths, the longer the stronger, over the whole range of pixels."""
    draws, waves = stream(0, "images", name), torch.zeros(n, channels, side, side)
    for short in (2, 4, 8, 16):
        noise = torch.randn(n, channels, short, short, generator=draws) / short
        waves += functional.interpolate(noise, (side, side), mode="bilinear", align_corners=False)
    low, high = waves.amin((1, 2, 3), keepdim=True), waves.amax((1, 2, 3), keepdim=True)
    return ((waves - low) / (high - low) * 255).round().byte()


def now(device: torch.device) -> float:
    """The time in seconds when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    gc.collect()
    started = perf_counter()
    result = work()
    return perf_counter() - started, result


class Report:
    """The rows measured so far, as they stand in the CSV."""

    def __init__(self, device: torch.device = CPU, speedups: Collection[str] = ("round",)) -> None:
        """Measured on `device`; in the benchmarks named by `speedups` a large ratio is to say that ours is quick."""
        self.device, self.speedups = device, speedups
        self.rows: list[dict[str, Any]] = []
        self.about = environment("")

    def add(self, name: str, setting: str, unit: str, ours: Sequence[float], other: Sequence[float] = ()) -> None:
        """Add a row of medians. The ratio is reference over ours for a speed-up, else ours over reference."""
        row: dict[str, Any] = {"benchmark": name, "setting": setting, "ours": statistics.median(ours), "unit": unit}
        if other:
            ratios = [b / a if name in self.speedups else a / b for a, b in zip(ours, other, strict=True)]
            low, middle, high = statistics.quantiles(ratios if len(ratios) > 1 else ratios * 2, method="inclusive")
            row |= {"reference": statistics.median(other), "ratio": middle, "ratio_q1": low, "ratio_q3": high}
        self.rows.append(row | {"n": len(ours)} | self.circumstances())

    def circumstances(self) -> dict[str, Any]:
        """Under what a row is measured: its last columns."""
        device = describe(self.device)
        device = device.rpartition(",")[0] if self.device.type == "cpu" else device  # its threads have a column
        commit = self.about["commit"] + ("-dirty" if self.about["dirty"] else "")
        return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}

    def finish(self, path: Path) -> None:
        """Print a table for each benchmark; write the CSV, and the ratios as Markdown beside it."""
        names = dict.fromkeys(row["benchmark"] for row in self.rows)
        for name in names:
            show(f"{name}: {self.rows[0]['device']}, torch {torch.__version__}", table(self.rows, name))
        write_csv(path, COLUMNS, self.rows)
        atomic_write(path.with_suffix(".md"), ratios(self.rows).encode())


def table(rows: Sequence[Mapping[str, Any]], name: str) -> list[list[str]]:
    """Head and one row a setting of one benchmark."""
    lines = [["setting", "threads", "ours", "reference", "ratio [quartiles]", "unit", "n"]]
    for row in (row for row in rows if row["benchmark"] == name):
        other = ("{reference:.4g}", "{ratio:.2f} [{ratio_q1:.2f}, {ratio_q3:.2f}]") if "ratio" in row else ("", "")
        cells = ("{setting}", "{threads}", "{ours:.4g}", *other, "{unit}", "{n}")
        lines.append([cell.format_map(row) for cell in cells])
    return lines


def ratios(rows: Sequence[Mapping[str, Any]]) -> str:
    """The benchmarks that compare, as Markdown for a README."""
    compared = dict.fromkeys(row["benchmark"] for row in rows if "ratio" in row and row["unit"] != "share")
    about = f"{rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit'][:10]}, medians.\n"
    return "\n".join([about, *(f"**{name}**\n\n{markdown(table(rows, name))}" for name in compared)])


def held_bytes() -> int:
    """Bytes of all tensors that Python holds, each storage once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
