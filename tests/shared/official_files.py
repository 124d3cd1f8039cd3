"""Small files in the official layouts, and where the real ones may lie."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(os.environ.get("DATA_SOURCE", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
needs_source = pytest.mark.skipif(not (SOURCE / "mini").is_dir(), reason="the shared data folder is not here")


def cifar_records(labels, label_bytes=1, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    columns = np.zeros((len(labels), label_bytes), np.uint8)
    columns[:, -1] = labels
    return np.concatenate([columns, pixels], axis=1)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, n=4, packed=True, prefix="train", labels=None):
    images = np.random.default_rng(1).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    labels = np.arange(n, dtype=np.uint8) if labels is None else np.array(labels, np.uint8)
    for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        content = idx(array)
        write(folder / (name + ".gz" * packed), gzip.compress(content) if packed else content)
    return images
