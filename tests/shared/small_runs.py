"""Runs of a small configuration."""

from pathlib import Path

from shared.config import Section


class Small(Section):
    """A configuration."""

    seed: int = 0
    rate: float = 0.5


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
