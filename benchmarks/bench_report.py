"""What every benchmark needs: a stopwatch, the bytes that tensors hold, and a report as tables and as CSV."""

import csv
import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from shared.gpu import describe
from shared.report import show
from shared.run import environment

CPU = torch.device("cpu")
COLUMNS = [
    "benchmark",
    "setting",
    "ours",
    "reference",
    "ratio",
    "ratio_q1",
    "ratio_q3",
    "unit",
    "n",
    "device",
    "threads",
]
COLUMNS += ["torch", "commit"]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    gc.collect()
    started = perf_counter()
    result = work()
    return perf_counter() - started, result


class Report:
    """The rows measured so far, as they stand in the CSV."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.about = environment("")

    def add(self, name: str, setting: str, unit: str, ours: Sequence[float], other: Sequence[float] = ()) -> None:
        """Add a row of medians. The ratio is reference over ours for a round, else ours over reference."""
        row: dict[str, Any] = {"benchmark": name, "setting": setting, "ours": statistics.median(ours), "unit": unit}
        if other:
            ratios = [b / a if name == "round" else a / b for a, b in zip(ours, other, strict=True)]
            low, middle, high = statistics.quantiles(ratios if len(ratios) > 1 else ratios * 2, method="inclusive")
            row |= {"reference": statistics.median(other), "ratio": middle, "ratio_q1": low, "ratio_q3": high}
        row |= {"n": len(ours), "device": describe(CPU).rpartition(",")[0], "threads": torch.get_num_threads()}
        commit = self.about["commit"] + ("-dirty" if self.about["dirty"] else "")
        self.rows.append(row | {"torch": torch.__version__, "commit": commit})

    def finish(self, path: Path) -> None:
        """Print a table for each benchmark, write the CSV."""
        for name in dict.fromkeys(row["benchmark"] for row in self.rows):
            lines = [["setting", "threads", "ours", "reference", "ratio [quartiles]", "unit", "n"]]
            for row in (row for row in self.rows if row["benchmark"] == name):
                other = (
                    ("{reference:.4g}", "{ratio:.2f} [{ratio_q1:.2f}, {ratio_q3:.2f}]") if "ratio" in row else ("", "")
                )
                cells = ("{setting}", "{threads}", "{ours:.4g}", *other, "{unit}", "{n}")
                lines.append([cell.format_map(row) for cell in cells])
            show(f"{name}: {self.rows[0]['device']}, torch {torch.__version__}", lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def held_bytes() -> int:
    """Bytes of all tensors that Python holds, each storage once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
