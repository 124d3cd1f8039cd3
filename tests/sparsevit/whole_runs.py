"""Whole runs of tiny configurations."""

import json

from shared.run import Run
from sparsevit.train import train

TIMED = ("seconds", "peak_memory_bytes", "command", "commit")


def figures_of(folder):
    """All that a run says of itself but the time."""
    results = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "results": {key: value for key, value in results.items() if key not in TIMED},
        "metrics": rows,
        "files": {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")},
    }


def whole(folder, config, previous=False):
    with Run(folder, config, "test") as run:
        train(config, run, previous)
    return figures_of(folder)


SHORT = ("prune={set: authors, pruners: [global_l1, wanda], ratios: [0.5], removals: [neurons, heads], "
         "removal_ratios: [0.5], calibration_images: 40, recover: {epochs: 1, pruners: [global_l1, neurons], "
         "ratios: [0.5]}}",)  # fmt: skip
