"""Atomic, checksummed files: training states that resume exactly, and models for others to load.

A state file is the line `shared-state 1 <sha256 of the rest>` and then a safetensors file: the tensors, and in its
metadata the tree that holds them. It is written by one rename, and a single changed bit is noticed before it is read.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from shared.errors import CheckpointError, RunError

MAGIC = b"shared-state 1 "
HEADER_BYTES = len(MAGIC) + 64 + 1


@contextlib.contextmanager
def _replacing(path: Path, wait: bool = True) -> Iterator[Path]:
    """A new name beside a file, which takes the file's place when all went well and is gone when not.

    `wait`: until the rename would outlive a power cut, where the system can.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        yield temporary
        os.replace(temporary, path)
        if wait:
            with contextlib.suppress(OSError):
                sync(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}; nothing there was changed") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: str | Path) -> None:
    """Wait until a file or a folder's list of names would outlive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that at any moment the old or the new content is there, whole, also after a power cut.

    Raises RunError where that cannot be done, as on a full disk; what was there is untouched.
    """
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, as `atomic_write` does."""
    atomic_write(path, (json.dumps(value, indent=1) + "\n").encode())


def write_progress(path: Path, state: Mapping[str, Any]) -> None:
    """Write a small JSON file so that a reader finds the old or the new, whole; where it cannot be written, it stays.

    It does not wait for the disk as `atomic_write` does: nothing is lost with it, and it is written every moment.
    """
    with contextlib.suppress(RunError), _replacing(path, wait=False) as temporary:
        temporary.write_text(json.dumps(state))


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save a tree of dicts, lists, tensors, numbers, texts and None; `previous_of(path)` keeps the file before it."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(dict(state), tensors))
    payload = save_tensors(tensors, metadata={"tree": tree})
    if path.exists():
        with _replacing(previous_of(path)) as temporary:
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)
    atomic_write(path, MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def load_state(path: Path) -> dict[str, Any]:
    """Load what `save_state` wrote, tensors on the CPU; CheckpointError if the file is missing or changed anywhere."""
    previous = previous_of(path)
    advice = f"; continue from the state before it with --previous ({previous})" if previous.exists() else ""
    try:
        data = path.read_bytes()
        header, payload = data[:HEADER_BYTES], data[HEADER_BYTES:]
        found = hashlib.sha256(payload).hexdigest()
        if header != MAGIC + found.encode() + b"\n":
            raise CheckpointError(f"{path}: is damaged: sha256 {found}, but it begins with {header!r}{advice}")
        size = int.from_bytes(payload[:8], "little")
        tree = json.loads(payload[8 : 8 + size])["__metadata__"]["tree"]
        return dict(_decode(json.loads(tree), load_tensors(payload)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}{advice}") from None
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not a saved state: {error}{advice}") from None


def previous_of(path: Path) -> Path:
    """Where the state before the last one is kept."""
    return path.with_name(f"previous-{path.name}")


def save_model(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and a `config.json` that holds `config` and the weights' sha256."""
    data = save_tensors({name: _plain(tensor) for name, tensor in tensors.items()})
    atomic_write(folder / "model.safetensors", data)
    write_json(folder / "config.json", {**config, "weights_sha256": hashlib.sha256(data).hexdigest()})


def load_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_model` wrote: (tensors, config); CheckpointError if a file is missing, damaged or another's."""
    weights = folder / "model.safetensors"
    try:
        data, config = weights.read_bytes(), dict(json.loads((folder / "config.json").read_bytes()))
        stated, found = config.get("weights_sha256"), hashlib.sha256(data).hexdigest()
        if stated != found:
            raise CheckpointError(f"{weights}: is damaged: sha256 {found}, but config.json says {stated}")
        return load_tensors(data), config
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except (SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: is not a model with its config.json: {error}") from None


def sweep(folder: Path) -> None:
    """Remove what a process that was killed while writing left below the folder."""
    for temporary in folder.rglob(".*.tmp"):
        with contextlib.suppress(OSError):
            temporary.unlink()


def _plain(tensor: Tensor) -> Tensor:
    """A CPU tensor with storage of its own: safetensors refuses views that share memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = _plain(value)
        return {"tensor": name}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("the keys of a state are texts")
        return {"dict": {key: _encode(item, tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return [_encode(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a state cannot hold {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _decode(item, tensors) for key, item in value["dict"].items()}
    return value
