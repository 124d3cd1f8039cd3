"""The coefficients of our arms, chosen on held-out images: `python -m sparsevit.reproduce --scale mini --study choose`.

The rule: of the grid below, the largest coefficient whose unpruned accuracy is at most 0.5
points below that of `none`, as a mean of paired differences over seeds that the study does not report. Nothing is
pruned in these runs, and of their results one figure is read, that of the held-out images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shared.checkpoint import atomic_write
from shared.claims import show_difference
from shared.config import load
from shared.errors import ConfigError, RunError
from shared.metrics import PairedDifference, paired_difference
from shared.report import markdown, show, write_csv
from shared.run import folder_name, read_metrics, read_results
from shared.study import Job, run_jobs
from sparsevit.config import Config

GRID: dict[str, tuple[float, ...]] = {
    "l1": (5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3),
    "group": (2.5e-3, 5e-3, 1e-2, 1.5e-2, 2e-2, 4e-2),
    "ffn_log": (0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    "attn_sparse": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
}
SEEDS = (100, 101, 102)
BOUND = 0.005  # of the accuracy on the held-out images, a share
METRIC = "val.accuracy"
NOTHING_PRUNED = ("prune.pruners=[]", "prune.removals=[]", "prune.recover=null")


@dataclass(frozen=True)
class Candidate:
    """An arm with a coefficient; `none` has none."""

    arm: str
    coefficient: float = 0.0

    def overrides(self, seed: int) -> list[str]:
        """What makes a run of the study's configuration one of this candidate."""
        named = [] if self.arm == "none" else [f"coefficients.{self.arm}={self.coefficient!r}"]
        return [f"seed={seed}", f"method={self.arm}", *named, *NOTHING_PRUNED]


Found = Mapping[Candidate, Mapping[int, float]]  # candidate -> seed -> accuracy on held-out images


def candidates(grid: Mapping[str, tuple[float, ...]]) -> list[Candidate]:
    """`none`, then every arm with every coefficient, rising."""
    return [Candidate("none"), *(Candidate(arm, c) for arm, values in grid.items() for c in sorted(values))]


def job_of(candidate: Candidate, seed: int, config_name: str, config: str, out: Path, device: str) -> Job:
    """The training command of a candidate."""
    overrides = candidate.overrides(seed)
    folder = out / "sparsevit" / folder_name(config_name, candidate.arm, seed, overrides)
    return Job("choose", seed, folder, ("--config", config, "--out", str(out), *overrides), device)


def held_out_accuracy(folder: Path) -> float:
    """The one figure of a finished run that the choice may see."""
    for row in read_results(folder)["figures"]:
        if row["metric"] == METRIC:
            return float(row["value"])
    raise RunError(f"{folder}: has no {METRIC}; the choice needs held-out images (data.val_images)")


def term_share(folder: Path) -> float:
    """The arm's term over the cross-entropy, at the first step of fine-tuning."""
    return float(read_metrics(folder, "first_step")[0]["term_share"])


@dataclass(frozen=True)
class Line:
    """One line of `choice.csv`: a candidate, its accuracy on held-out images, the paired difference to `none` (shares).

    `none` itself has no coefficient, no term and no difference.
    """

    arm: str
    coefficient: float | None
    term_share: float | None
    held_out: float
    difference: float | None
    deviation: float | None
    low: float | None
    high: float | None
    seeds: str
    command: str


def lines_of(found: Found, shares: Mapping[Candidate, float], command: str) -> list[Line]:
    """What the candidates' runs give, in their order."""
    base, lines = found[Candidate("none")], list[Line]()
    for candidate, values in found.items():
        held_out, made = sum(values.values()) / len(values), (" ".join(map(str, values)), command)
        if candidate.arm == "none":
            lines.append(Line("none", None, None, held_out, None, None, None, None, *made))
            continue
        mean, std, _, low, high = paired_difference([values[s] for s in values], [base[s] for s in values])
        share = shares[candidate]
        lines.append(Line(candidate.arm, candidate.coefficient, share, held_out, mean, std, low, high, *made))
    return lines


def read_line(values: Mapping[str, str]) -> Line:
    """A line of the CSV."""
    kept: dict[str, Any] = {key: values[key] for key in ("arm", "seeds", "command")}
    return Line(**kept | {key: float(x) if x else None for key, x in values.items() if key not in kept})


def chosen(lines: Sequence[Line]) -> dict[str, float | None]:
    """For each arm the largest coefficient that keeps the bound; None where none does."""
    picked: dict[str, float | None] = {line.arm: None for line in lines if line.arm != "none"}
    for line in lines:
        if line.coefficient is not None and line.difference is not None and line.difference >= -BOUND - 1e-9:
            picked[line.arm] = max(line.coefficient, picked[line.arm] or 0.0)
    return picked


def table(lines: Sequence[Line]) -> list[list[str]]:
    """Head and one row a candidate."""
    picked = chosen(lines)
    rows = [["arm", "coefficient", "term / cross-entropy, first step", "held out, %", "to none, points [95 %]", ""]]
    for line in lines:
        accuracy = f"{100 * line.held_out:.2f}"
        numbers = [x for x in (line.difference, line.deviation, line.low, line.high) if x is not None]
        if line.coefficient is None or not numbers:
            rows.append(["none", "-", "-", accuracy, "-", ""])
            continue
        mean, std, low, high = numbers
        difference = show_difference(PairedDifference(mean, std, len(line.seeds.split()), low, high))
        mark = "chosen" if picked[line.arm] == line.coefficient else ""
        rows.append([line.arm, f"{line.coefficient:g}", f"{line.term_share:.2g}", accuracy, difference, mark])
    return rows


def sentences(lines: Sequence[Line]) -> list[str]:
    """What was chosen, and where the grid's end decided."""
    said = []
    for arm, value in chosen(lines).items():
        if value is None:
            said.append(f"{arm}: every coefficient of the grid costs more than {100 * BOUND:g} points; lower it.")
        elif value == max(line.coefficient or 0.0 for line in lines if line.arm == arm):
            said.append(f"{arm}: {value:g}, the largest of the grid, which may be too short.")
        else:
            said.append(f"{arm}: {value:g}")
    return said


def text_of(lines: Sequence[Line]) -> str:
    """What `choice.md` says: the rule, the table, the choice."""
    rule = (
        f"The largest coefficient whose unpruned accuracy on held-out images is at most {100 * BOUND:g} points below "
        f"that of `none` (mean of paired differences, seeds {', '.join(lines[0].seeds.split())}, none of them "
        f"reported). `{lines[0].command}`."
    )
    return "\n".join([rule, "", markdown(table(lines)), *(f"- {x}" for x in sentences(lines)), ""])


def choose(path: Path, shown_path: str, out: Path, workers: int, command: str,
           grid: Mapping[str, tuple[float, ...]] = GRID) -> tuple[Path, list[Job]]:  # fmt: skip
    """Train all candidates of a configuration, print the table and the choice, and write both.

    Returns their folder, and the runs.

    Raises:
        ConfigError: no images are held out, or a run that the choice needs did not finish.
    """
    config = load(path, Config)
    if not config.data.val_images:
        raise ConfigError(f"{path.name}: data.val_images is 0; a choice needs held-out images, never the test set")
    jobs = {(c, s): job_of(c, s, path.stem, shown_path, out, config.device) for s in SEEDS for c in candidates(grid)}
    print(f"{path.stem}: {len(jobs)} runs, {len(candidates(grid))} candidates", flush=True)
    failed = sum(outcome.code != 0 for outcome in run_jobs("sparsevit.train", list(jobs.values()), workers).values())
    if failed:
        raise ConfigError(
            f"{failed} of {len(jobs)} runs did not finish; the lines above say why; mend it and run again"
        )
    found = {c: {s: held_out_accuracy(jobs[c, s].folder) for s in SEEDS} for c in candidates(grid)}
    shares = {c: sum(term_share(jobs[c, s].folder) for s in SEEDS) / len(SEEDS) for c in found}
    lines, folder = lines_of(found, shares, command), out / "sparsevit" / f"choice-{path.stem}"
    write_csv(folder / "choice.csv", [field.name for field in fields(Line)], map(asdict, lines))
    atomic_write(folder / "choice.md", text_of(lines).encode())
    show(f"{path.stem}: held-out accuracy of unpruned networks", table(lines))
    print("\n".join([*sentences(lines), f"report in {folder}"]))
    return folder, list(jobs.values())
