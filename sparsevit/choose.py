"""The coefficients of our arms, chosen on held-out images: `python -m sparsevit.reproduce --scale mini --study choose`.

The rule: of the grid below, the largest coefficient whose unpruned accuracy is at most 0.5
points below that of `none`, as a mean of paired differences over seeds that the study does not report. Nothing is
pruned in these runs, and of their results one figure is read, that of the held-out images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.checkpoint import atomic_write
from shared.claims import show_difference
from shared.config import load
from shared.errors import ConfigError, RunError
from shared.metrics import paired_difference
from shared.report import markdown, show
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


def job_of(candidate: Candidate, seed: int, config_name: str, config: str, out: Path) -> Job:
    """The training command of a candidate."""
    overrides = candidate.overrides(seed)
    folder = out / "sparsevit" / folder_name(config_name, candidate.arm, seed, overrides)
    return Job("choose", seed, folder, ("--config", config, "--out", str(out), *overrides))


def held_out_accuracy(folder: Path) -> float:
    """The one figure of a finished run that the choice may see."""
    for row in read_results(folder)["figures"]:
        if row["metric"] == METRIC:
            return float(row["value"])
    raise RunError(f"{folder}: has no {METRIC}; the choice needs held-out images (data.val_images)")


def term_share(folder: Path) -> float:
    """The arm's term over the cross-entropy, at the first step of fine-tuning."""
    return float(read_metrics(folder, "first_step")[0]["term_share"])


def chosen(found: Found, grid: Mapping[str, tuple[float, ...]]) -> dict[str, float | None]:
    """For each arm the largest coefficient that keeps the bound; None where none does."""
    base, picked = found[Candidate("none")], dict[str, float | None]()
    for arm, values in grid.items():
        kept = []
        for coefficient in values:
            mine = found[Candidate(arm, coefficient)]
            loss = sum(base[s] - mine[s] for s in mine) / len(mine)
            kept += [coefficient] if loss <= BOUND + 1e-9 else []
        picked[arm] = max(kept, default=None)
    return picked


def table(found: Found, shares: Mapping[Candidate, float], grid: Mapping[str, tuple[float, ...]]) -> list[list[str]]:
    """Head and one row a candidate."""
    picked, base = chosen(found, grid), found[Candidate("none")]
    rows = [["arm", "coefficient", "term / cross-entropy, first step", "held out, %", "to none, points [95 %]", ""]]
    for candidate, values in found.items():
        accuracy = f"{100 * sum(values.values()) / len(values):.2f}"
        if candidate.arm == "none":
            rows.append(["none", "-", "-", accuracy, "-", ""])
            continue
        difference = paired_difference([values[s] for s in values], [base[s] for s in values])
        mark = "chosen" if picked[candidate.arm] == candidate.coefficient else ""
        rows.append([candidate.arm, f"{candidate.coefficient:g}", f"{shares[candidate]:.2g}", accuracy,
                     show_difference(difference), mark])  # fmt: skip
    return rows


def sentences(picked: Mapping[str, float | None], grid: Mapping[str, tuple[float, ...]]) -> list[str]:
    """What was chosen, and where the grid's end decided."""
    lines = []
    for arm, value in picked.items():
        if value is None:
            lines.append(f"{arm}: every coefficient of the grid costs more than {100 * BOUND:g} points; lower it.")
        elif value == max(grid[arm]):
            lines.append(f"{arm}: {value:g}, the largest of the grid, which may be too short.")
        else:
            lines.append(f"{arm}: {value:g}")
    return lines


def choose(path: Path, shown_path: str, out: Path, workers: int, command: str,
           grid: Mapping[str, tuple[float, ...]] = GRID) -> Path:  # fmt: skip
    """Train all candidates of a configuration, print the table and the choice, and write them to the folder returned.

    Raises:
        ConfigError: no images are held out, or a run that the choice needs did not finish.
    """
    if not load(path, Config).data.val_images:
        raise ConfigError(f"{path.name}: data.val_images is 0; a choice needs held-out images, never the test set")
    jobs = {(c, s): job_of(c, s, path.stem, shown_path, out) for s in SEEDS for c in candidates(grid)}
    print(f"{path.stem}: {len(jobs)} runs, {len(candidates(grid))} candidates", flush=True)
    failed = sum(outcome.code != 0 for outcome in run_jobs("sparsevit.train", list(jobs.values()), workers).values())
    if failed:
        raise ConfigError(
            f"{failed} of {len(jobs)} runs did not finish; the lines above say why; mend it and run again"
        )
    found = {c: {s: held_out_accuracy(jobs[c, s].folder) for s in SEEDS} for c in candidates(grid)}
    shares = {c: sum(term_share(jobs[c, s].folder) for s in SEEDS) / len(SEEDS) for c in found}
    rows, folder = table(found, shares, grid), out / "sparsevit" / f"choice-{path.stem}"
    rule = (
        f"The largest coefficient whose unpruned accuracy on held-out images is at most {100 * BOUND:g} points below "
        f"that of `none` (mean of paired differences, seeds {', '.join(map(str, SEEDS))}, none of them reported). "
        f"`{command}`."
    )
    lines = sentences(chosen(found, grid), grid)
    atomic_write(folder / "choice.md", "\n".join([rule, "", markdown(rows), *(f"- {x}" for x in lines), ""]).encode())
    show(f"{path.stem}: held-out accuracy of unpruned networks", rows)
    print("\n".join([*lines, f"report in {folder}"]))
    return folder
