"""Starting weights from a single ResNet that was trained on ImageNet."""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from mdcs.model import MultiExpert
from shared.errors import CheckpointError


def load_pretrained(model: MultiExpert, path: Path) -> str:
    """Copy a single network's stages into the trunk and into every expert that has them; classifiers stay as they are.

    Args:
        model: changed in place, and only if everything fits.
        path: a state dict named as in torchvision, as .safetensors or as torch.save writes it, where it may lie under
            "state_dict" or "model", with or without the prefix "module."; fc.* is passed over.

    Returns:
        The file's sha256.

    Raises:
        CheckpointError: the file is missing or damaged, or its weights are not those of the model, one for one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        advice = "download the pretrained weights or correct the path"
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}; {advice}") from None
    found = {key: value for key, value in _state(data, path).items() if not key.startswith("fc.")}
    parts = [model.trunk, *model.experts]
    _compare(found, {key: value for part in parts for key, value in part.state_dict().items()}, path)
    for part in parts:
        part.load_state_dict(found, strict=False)  # a part takes what is its own; all else was compared
    return hashlib.sha256(data).hexdigest()


def _state(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without a wrapper's "module."."""
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_tensors(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        kind = type(error).__name__
        raise CheckpointError(f"{path}: is damaged or holds more than weights ({kind}); download it again") from None
    for wrapper in ("state_dict", "model"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: is not a state dict of tensors; save model.state_dict() with torch.save")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Refuse a file whose names and shapes are not the expected ones; num_batches_tracked may be missing."""
    advice = "give the weights of a single network of the same name and widths"
    for key, value in expected.items():
        if key not in found:
            if key.endswith(".num_batches_tracked"):
                continue
            raise CheckpointError(f"{path}: has no {key}, expected one of shape {list(value.shape)}; {advice}")
        if found[key].shape != value.shape:
            shapes = f"has the shape {list(found[key].shape)}, expected {list(value.shape)}"
            raise CheckpointError(f"{path}: {key} {shapes}; {advice}")
    for key in found:
        if key not in expected:
            raise CheckpointError(f"{path}: {key!r} is in no stage, expected none but the model's own; {advice}")
