"""Makes the embedded sample from the official Fashion-MNIST files: `python -m tests.shared.make_sample FOLDER`.

The four .gz files lie in the folder.

Keeps the first 1,000 training and the first 500 test images of every class, in official order, grouped by class.
"""

import sys
from pathlib import Path

import numpy as np

from shared.data import SAMPLE, read_mnist


def make(source: Path, target: Path) -> None:
    """Write `target` (.npz): images [N, 28, 28], labels [N] and official indices [N] of each split, class by class."""
    arrays = {}
    for split, prefix, count in (("train", "train", 1000), ("test", "t10k", 500)):
        images, labels = read_mnist([source / f"{prefix}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")])
        index = np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)])
        arrays[f"{split}_images"] = images[index, 0]
        arrays[f"{split}_labels"] = labels[index]
        arrays[f"{split}_index"] = index.astype(np.uint16)
    np.savez_compressed(target, **arrays)  # a zip with fixed dates: the same bytes each time


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]), SAMPLE)
