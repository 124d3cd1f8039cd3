"""Image sets: official formats (no pickle), list files, downloads and the embedded sample.

Every problem of the data is a DataError that names the path.
"""

import hashlib
import http.client
import io
import math
import os
import struct
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.checkpoint import atomic_write
from shared.errors import DataError
from shared.longtail import read_file, read_list

if TYPE_CHECKING:
    from PIL import Image

Split = Literal["train", "test", "val"]
Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # images [N, C, H, W], labels [N]

SAMPLE = Path(__file__).resolve().parent / "sample" / "sample.npz"
SAMPLE_SHA256 = "79799a2bf44095a5f880e020f217a841f3ed72c5976ca45cbf4581055eeba67f"

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory. `digest` (sha256) tells the pixels and labels apart from any others."""

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N], indices into `classes`
    classes: tuple[str, ...]
    name: str
    split: str
    digest: str

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class FileSet:
    """Images on disk. `digest` covers the labels and the paths relative to the image folder, not the pixels."""

    paths: tuple[Path, ...]
    labels: Tensor  # int64 [N], indices into `classes`
    classes: tuple[str, ...]
    name: str
    split: str
    digest: str

    def __len__(self) -> int:
        return len(self.labels)


AnySet = TypeVar("AnySet", ImageSet, FileSet)

_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # torchvision's mirror
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DOWNLOADS: dict[str, dict[str, str]] = {  # official address of each file or archive -> its sha256
    "cifar10": {f"{_CIFAR}-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
    "cifar100": {f"{_CIFAR}-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"},
    "mnist": {
        f"{_MNIST}train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        f"{_MNIST}train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        f"{_MNIST}t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        f"{_MNIST}t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    "fashion_mnist": {
        f"{_FASHION}train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        f"{_FASHION}train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        f"{_FASHION}t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        f"{_FASHION}t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
}


def load(name: str, split: Split, root: Path | str | None = None, download: bool = False) -> ImageSet:
    """Read one split of cifar10, cifar100, mnist, fashion_mnist or sample (embedded Fashion-MNIST) into memory.

    The files lie in the official layout under `root`, else under $DATA_ROOT, else under data/ beside this package; they
    may hold fewer records than the official ones. With `download` missing files are fetched and their sha256 checked.
    """
    if split not in ("train", "test"):
        raise DataError(f"{name}: there is no split {split!r}, only train and test")
    if name == "sample":
        return _image_set(_read_sample(split), _CLOTHES, name, split)
    if name not in _SOURCES:
        raise DataError(f"there is no data set {name!r}; known are {', '.join([*_SOURCES, 'sample'])}")
    source, base = _SOURCES[name], data_root(root)
    paths, missing = _find(source, split, base)
    if missing and download:
        _download(DOWNLOADS[name], base, base / source.folders[0])
        paths, missing = _find(source, split, base)
    if missing:
        where = f"set DATA_ROOT to the folder that holds {source.folders[0]}, train with data.download=true, or take"
        raise DataError(f"{name} ({split}): there is no {', '.join(map(str, missing))}; {where} data.name=sample")
    classes, names = source.classes, paths[0].with_name("fine_label_names.txt")
    if names.is_file():  # CIFAR-100 brings the names of its classes
        classes = tuple(read_file(names, "list of names").decode("utf-8", "replace").split())
        if len(classes) != len(source.classes):
            raise DataError(f"{names}: {len(classes)} class names, expected {len(source.classes)}")
    images, labels = source.read(paths)
    if len(strangers := np.flatnonzero(labels >= len(classes))):
        found = f"record {strangers[0]} has label {labels[strangers[0]]}, outside 0..{len(classes) - 1}"
        raise DataError(f"{', '.join(map(str, paths))}: {found}")
    return _image_set((images, labels), classes, name, split)


def data_root(root: Path | str | None = None) -> Path:
    """Where data sets lie: `root`, else $DATA_ROOT, else data/ beside this package, whatever the working folder."""
    chosen = root or os.environ.get("DATA_ROOT")
    return Path(chosen).expanduser() if chosen else Path(__file__).resolve().parents[1] / "data"


def take(image_set: AnySet, indices: Tensor | Sequence[int]) -> AnySet:
    """The images at `indices` [M], in that order. The digest is derived from the whole set's and the indices."""
    index = torch.as_tensor(indices, dtype=torch.int64).cpu()
    rows: list[int] = index.tolist()
    if rows and (min(rows) < 0 or max(rows) >= len(image_set)):
        raise DataError(f"{image_set.name}: indices {min(rows)}..{max(rows)} go beyond 0..{len(image_set) - 1}")
    part: dict[str, Any] = {"labels": image_set.labels[index]}
    if isinstance(image_set, ImageSet):
        part["images"] = image_set.images[index]
    else:
        part["paths"] = tuple(image_set.paths[i] for i in rows)
    digest = hashlib.sha256(image_set.digest.encode() + index.numpy().tobytes()).hexdigest()
    return replace(image_set, digest=digest, **part)


def load_list(
    list_file: Path | str, image_root: Path | str, num_classes: int | None = None, split: Split = "train"
) -> FileSet:
    """Images named by a list of "path label" lines; `num_classes` is the highest label + 1 where not given.

    Raises DataError as `read_list`, and with the line of the first image that is not there.
    """
    (paths, labels), root = read_list(list_file, num_classes), Path(image_root)
    if missing := [i for i, name in enumerate(paths) if not os.path.isfile(os.path.join(root, name))]:
        text = read_file(Path(list_file), "list file").decode("utf-8", "replace")
        line = [number for number, line in enumerate(text.splitlines(), 1) if line.strip()][missing[0]]
        found = f"there is no {root / paths[missing[0]]} ({len(missing):,} of {len(paths):,} images are missing)"
        raise DataError(f"{list_file}:{line}: {found}; do the list's paths start at {root}?")
    classes = tuple(str(c) for c in range(num_classes or max(labels) + 1))
    digest = hashlib.sha256("\n".join(f"{p} {c}" for p, c in zip(paths, labels, strict=True)).encode()).hexdigest()
    files, name = tuple(root / path for path in paths), Path(list_file).name.split(".")[0]
    return FileSet(files, torch.tensor(labels), classes, name, split, digest)


def open_rgb(path: Path) -> "Image.Image":
    """Decode one image file to 8-bit RGB (grey-scale images get three equal channels)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error}); copy it again or leave it out") from error


def _image_set(arrays: Arrays, classes: tuple[str, ...], name: str, split: str) -> ImageSet:
    images, labels = np.array(arrays[0], order="C"), arrays[1].astype(np.int64)  # copies: torch wants to write
    digest = hashlib.sha256(repr(images.shape).encode() + labels.tobytes())
    digest.update(images.data)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), classes, name, split, digest.hexdigest())


def _read_sample(split: str) -> Arrays:
    raw = read_file(SAMPLE, "sample")
    if (found := hashlib.sha256(raw).hexdigest()) != SAMPLE_SHA256:
        raise DataError(f"{SAMPLE}: damaged: sha256 {found}, expected {SAMPLE_SHA256}; install the package again")
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
        return arrays[f"{split}_images"][:, None], arrays[f"{split}_labels"]


def _read_cifar(label_bytes: int, paths: Sequence[Path]) -> Arrays:
    """Binary CIFAR: records of `label_bytes` labels, the last one the class, then 3 x 32 x 32 pixels."""
    size, contents = label_bytes + 3 * 32 * 32, [read_file(path, "CIFAR file") for path in paths]
    for path, raw in zip(paths, contents, strict=True):
        if not raw or len(raw) % size:
            raise DataError(f"{path}: {len(raw)} bytes are not a whole number of {size}-byte records; copy it again")
    records = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, size)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1]


def read_mnist(paths: Sequence[Path]) -> Arrays:
    """Images [N, 1, 28, 28] and labels [N] from IDX files: magic, the dimensions as big-endian uint32, bytes."""
    arrays = []
    for path, dims in zip(paths, (3, 1), strict=True):
        raw, header = read_file(path, "IDX file"), 4 + 4 * dims
        if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) < header:
            raise DataError(f"{path}: starts with {raw[:4].hex()}, expected 000008{dims:02x}: another kind of file")
        shape = struct.unpack_from(f">{dims}I", raw, 4)
        size, expected = len(raw) - header, math.prod(shape)
        if size != expected or not size:
            raise DataError(f"{path}: {size} bytes of data, but the header tells of {expected}; copy it again")
        arrays.append(np.frombuffer(raw, np.uint8, offset=header).reshape(shape))
    images, labels = arrays
    if images.shape[1:] != (28, 28):
        raise DataError(f"{paths[0]}: images of {images.shape[1]} x {images.shape[2]} pixels, expected 28 x 28")
    if len(images) != len(labels):
        raise DataError(f"{paths[0]}: {len(images)} images, but {len(labels)} labels in {paths[1]}")
    return images[:, None], labels


class _Source(NamedTuple):
    folders: tuple[str, ...]  # under the root (or absolute); a download goes into the first
    files: Mapping[str, tuple[str, ...]]  # of each split
    read: Callable[[Sequence[Path]], Arrays]
    classes: tuple[str, ...]


_IDX = {s: (f"{p}-images-idx3-ubyte", f"{p}-labels-idx1-ubyte") for s, p in (("train", "train"), ("test", "t10k"))}
_CIFAR10_FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
_CIFAR100_FILES = {"train": ("train.bin",), "test": ("test.bin",)}
_DEBIAN = "/usr/share/datasets/fashion-mnist"  # where the package dataset-fashion-mnist puts it
_SOURCES = {
    "cifar10": _Source(("cifar-10-batches-bin",), _CIFAR10_FILES, partial(_read_cifar, 1), _CIFAR10),
    "cifar100": _Source(("cifar-100-binary",), _CIFAR100_FILES, partial(_read_cifar, 2), tuple(map(str, range(100)))),
    "mnist": _Source(("MNIST/raw", "mnist"), _IDX, read_mnist, tuple("0123456789")),
    "fashion_mnist": _Source(("FashionMNIST/raw", "fashion-mnist", _DEBIAN), _IDX, read_mnist, _CLOTHES),
}


def _find(source: _Source, split: str, base: Path) -> tuple[list[Path], list[Path]]:
    """Files of the first folder that has them all; else the files that are missing, of every folder."""
    missing: list[Path] = []
    for folder in source.folders:
        wanted = [base / folder / file for file in source.files[split]]
        found = {w: p for w in wanted for p in (w.with_name(w.name + ".gz"), w) if p.is_file()}
        if len(found) == len(wanted):
            return list(found.values()), []
        missing += [w for w in wanted if w not in found]
    return [], missing


def _download(items: Mapping[str, str], base: Path, target: Path) -> None:
    """Fetch, check and unpack into a temporary folder, then move each file that `target` lacks there, whole."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base, prefix=".download-") as temporary:
            folder = Path(temporary) / target.name
            folder.mkdir()
            for url, sha256 in items.items():
                content = _fetch(url, sha256)
                if url.endswith(".tar.gz"):
                    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                        archive.extractall(temporary, filter="data")
                else:
                    (folder / url.rpartition("/")[2]).write_bytes(content)
            for path in (path for path in folder.iterdir() if not (target / path.name).exists()):
                atomic_write(target / path.name, path.read_bytes())
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{target}: cannot be filled ({error}); check the space and rights of {base}") from error


def _fetch(url: str, sha256: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: the download failed ({error}); try again or copy the files by hand") from error
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{url}: sha256 {found}, expected {sha256}: cut off or changed; try again")
    return content
