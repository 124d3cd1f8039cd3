"""Atomic, checksummed files: training states that resume exactly, and models for others to load.

A state file is one line of text, then a safetensors file:

    shared-state 1 <sha256 of the rest>\\n<safetensors: the tensors, and in its metadata the tree that holds them>

so it is written by one rename, and a single changed bit is noticed before anything is read from it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from shared.errors import CheckpointError, RunError

MAGIC = b"shared-state 1 "
HEADER_BYTES = len(MAGIC) + 64 + 1


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that at any moment the old or the new content is there, whole, also after a power cut.

    Raises:
        RunError: the folder cannot be written or the disk is full; what was there is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        sync_folder(path.parent)
        temporary = None
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}; nothing there was changed") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save a tree of dicts, lists, tensors, numbers, texts and None; `previous_of(path)` keeps the file before it."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(dict(state), tensors))
    payload = save_tensors(tensors, metadata={"tree": tree})
    keep_previous(path)
    atomic_write(path, MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def load_state(path: Path) -> dict[str, Any]:
    """Load what `save_state` wrote, tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated or changed; nothing of it is returned.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    header, payload = data[:HEADER_BYTES], memoryview(data)[HEADER_BYTES:]
    if not header.startswith(MAGIC) or header[-1:] != b"\n":
        raise CheckpointError(f"{path}: is not a saved state, or its header is damaged{_advice(path)}")
    stated, found = header[len(MAGIC) : -1].decode("ascii", "replace"), hashlib.sha256(payload).hexdigest()
    if stated != found:
        raise CheckpointError(f"{path}: is damaged: sha256 {found}, saved as {stated}{_advice(path)}")
    try:
        content = bytes(payload)
        tree = _metadata(content)["tree"]
        state = _decode(json.loads(tree), load_tensors(content))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not a saved state: {error}{_advice(path)}") from None
    assert isinstance(state, dict)
    return state


def previous_of(path: Path) -> Path:
    """Where the state before the last one is kept."""
    return path.with_name(f"previous-{path.name}")


def keep_previous(path: Path) -> None:
    """Keep the present file under its `previous` name, without a moment in which the present name is missing."""
    if not path.exists():
        return
    previous = previous_of(path)
    step = previous.with_name(f".{previous.name}.tmp")
    try:
        step.unlink(missing_ok=True)
        try:
            os.link(path, step)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, step)
        os.replace(step, previous)
    except OSError as error:
        with contextlib.suppress(OSError):
            step.unlink()
        raise RunError(f"{previous}: cannot be written: {error.strerror or error}; {path.name} is untouched") from None


def save_model(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and a `config.json` that holds `config` and the weights' sha256."""
    data = save_tensors({name: _plain(tensor) for name, tensor in tensors.items()})
    atomic_write(folder / "model.safetensors", data)
    described = {**config, "weights_sha256": hashlib.sha256(data).hexdigest()}
    atomic_write(folder / "config.json", (json.dumps(described, indent=1) + "\n").encode())


def load_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_model` wrote: (tensors, config).

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are not those that the config names.
    """
    weights, description = folder / "model.safetensors", folder / "config.json"
    try:
        data, config = weights.read_bytes(), json.loads(description.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{description}: is not JSON: {error}") from None
    found = hashlib.sha256(data).hexdigest()
    stated = config.get("weights_sha256") if isinstance(config, dict) else None
    if stated != found:
        raise CheckpointError(f"{weights}: is damaged: sha256 {found}, but {description.name} says {stated}")
    try:
        return load_tensors(data), config
    except SafetensorError as error:
        raise CheckpointError(f"{weights}: is not a model: {error}") from None


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


def _metadata(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    return dict(metadata)


def _advice(path: Path) -> str:
    previous = previous_of(path)
    return f"; the state before it is kept: continue from it with --previous ({previous})" if previous.exists() else ""
