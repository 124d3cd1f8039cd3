"""Publish a study's report: figures of clean commits alone, from at least three seeds, swapped in as one folder."""

import ctypes
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared.checkpoint import sync
from shared.cli import REPOSITORY
from shared.errors import RunError

if TYPE_CHECKING:
    from shared.study import Job

LEAST_SEEDS = 3
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def publish(
    report: Path, package: str, name: str, jobs: "Sequence[Job]", failed: int, few_seeds: Collection[str] = ()
) -> None:
    """Put a report where the READMEs' tables are made from, in place of the earlier one.

    Args:
        jobs: every run of the study, under the name of its arm.
        failed: how many of them failed this time; what is in their folders may be of other settings.
        few_seeds: the arms that have fewer than three seeds by design.

    Raises:
        RunError: the study may not be published, or its folder cannot be written; what was published is untouched.
    """
    if problem := problem_of(jobs, failed, few_seeds):
        raise RunError(f"--publish: {problem}; nothing was published, the report is in {report}")
    replace_folder(report, REPOSITORY / "results" / package / name)


def problem_of(jobs: "Sequence[Job]", failed: int, few_seeds: Collection[str] = ()) -> str:
    """Why figures of these runs may not be published; empty if they may."""
    from shared.report import rows_of
    from shared.run import read_mapping, read_results

    missing = [job.name for job in jobs if not (job.folder / "results.json").exists()]
    if missing or failed:
        which = f"{missing[0]} has no results" if missing else "the lines above say why"
        return f"{len(missing) or failed} of {len(jobs)} runs failed ({which}); the same command makes them again"
    seeds: dict[str, set[int]] = {}
    for job in jobs:
        results = read_results(job.folder)
        made = read_mapping(job.folder / "environment.json", "has no environment.json that says which commit made it")
        if made.get("dirty") is not False:
            return f"{job.folder} was made with changes that are in no commit; commit them, delete it and run it again"
        if made.get("commit") in (None, "unknown") or made["commit"] != results["commit"]:
            return f"{job.folder} does not say which one commit made it; delete it and run it again"
        seeds.setdefault(job.group, set()).update(row.seed for row in rows_of(results))
    few = {arm: len(found) for arm, found in seeds.items() if len(found) < LEAST_SEEDS and arm not in few_seeds}
    if few:
        arm = next(iter(few))
        return f"{arm} has {few[arm]} seed{'s' * (few[arm] != 1)}, and a published figure has at least {LEAST_SEEDS}"
    return ""


def replace_folder(source: Path, target: Path) -> None:
    """Make `target` a copy of `source`, so that at any moment the old or the new is there, whole, also after a crash.

    (Where the system cannot exchange two names, a crash may leave the old one beside it; the next call puts it back.)
    RunError where that cannot be done; what was there is untouched.
    """
    # A level up, where a copy that a crash leaves behind is not taken for a published study.
    new, old = (target.parent.parent / f".{target.parent.name}-{target.name}.{which}" for which in ("new", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not target.exists():  # a crash came between two renames
            os.rename(old, target)
        _remove(new, old)
        shutil.copytree(source, new)
        for folder, _, names in os.walk(new):
            for path in (*(os.path.join(folder, name) for name in names), folder):
                sync(path)
        if target.exists():
            _exchange(new, target, old)
        else:
            os.rename(new, target)
        sync(target.parent)
        _remove(old)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{target}: cannot be written: {reason}; the report is in {source}") from None
    finally:
        _remove(new)


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Give two folders each other's names: in one step where the system can, else by way of a third name."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename and rename(HERE, os.fsencode(new), HERE, os.fsencode(target), EXCHANGE) == 0:
        return
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
