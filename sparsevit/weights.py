"""Pretrained weights from a local file: timm's and Hugging Face's safetensors, Google's npz. Never a pickle.

Their names in ours, and back. Loading is strict: every tensor must find its place, but the classifier may differ from
the network's and then keeps its first values.
"""

import hashlib
import io
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.nn import functional

from shared.errors import CheckpointError
from sparsevit.model import Vit

Tensors = dict[str, Tensor]
PosResize = Literal["none", "bicubic", "bicubic_antialias", "bilinear"]

ACCEPTED = "give timm's .safetensors, Google's .npz or Hugging Face's .safetensors"
TIMM = {
    "patch_embed.proj.": "patch.", "cls_token": "cls", "pos_embed": "pos", "norm.": "norm.", "head.": "head.",
}  # fmt: skip
TIMM_BLOCK = {
    "norm1.": "norm1.", "norm2.": "norm2.", "attn.proj.": "attn.out.", "mlp.fc1.": "fc1.", "mlp.fc2.": "fc2.",
    "ls1.gamma": "scale1", "ls2.gamma": "scale2",
}  # fmt: skip
HF = {
    "embeddings.patch_embeddings.projection.": "patch.", "embeddings.cls_token": "cls",
    "embeddings.position_embeddings": "pos", "layernorm.": "norm.", "classifier.": "head.",
}  # fmt: skip
HF_BLOCK = {
    "layernorm_before.": "norm1.", "layernorm_after.": "norm2.", "attention.attention.query.": "attn.q.",
    "attention.attention.key.": "attn.k.", "attention.attention.value.": "attn.v.",
    "attention.output.dense.": "attn.out.", "intermediate.dense.": "fc1.", "output.dense.": "fc2.",
}  # fmt: skip
# Google's names; in the second column those of files that big_vision wrote.
GOOGLE_BLOCK = {
    "LayerNorm_0/": "norm1.", "LayerNorm_2/": "norm2.", "MultiHeadDotProductAttention_1/query/": "attn.q.",
    "MultiHeadDotProductAttention_1/key/": "attn.k.", "MultiHeadDotProductAttention_1/value/": "attn.v.",
    "MultiHeadDotProductAttention_1/out/": "attn.out.", "MlpBlock_3/Dense_0/": "fc1.", "MlpBlock_3/Dense_1/": "fc2.",
}  # fmt: skip
BIG_VISION = {"LayerNorm_1/": "LayerNorm_2/", "MultiHeadDotProductAttention_0/": "MultiHeadDotProductAttention_1/",
              "MlpBlock_0/": "MlpBlock_3/"}  # fmt: skip
GOOGLE = {
    "embedding/": "patch.", "cls": "cls", "Transformer/posembed_input/pos_embedding": "pos",
    "Transformer/encoder_norm/": "norm.", "head/": "head.",
}  # fmt: skip
UNUSED = re.compile(r"pre_logits[./]|pooler\.")  # a layer between network and classifier that fine-tuning drops


@dataclass(frozen=True)
class Loaded:
    """What was loaded, for the log."""

    path: str
    layout: str
    size: int
    sha256: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        text = f"weights {self.path}: {self.layout}, {self.size:,} bytes, sha256 {self.sha256}"
        return "; ".join((text, *self.notes))


def load_weights(path: Path, network: Vit, pos_resize: PosResize) -> Loaded:
    """Put a file's weights into a network; the classifier keeps its values where the file's does not fit.

    Raises:
        CheckpointError: the file is missing, a pickle or of another layout; a tensor other than the classifier's is
            missing, too many or of another shape; the positions are of another grid and may or can not be resized.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {ACCEPTED}") from None
    layout, tensors = read_weights(path, raw)
    wanted, notes = network.state_dict(), []
    if dropped := [name for name in tensors if UNUSED.match(name)]:
        notes.append(f"left out {', '.join(dropped)}")
    tensors = {name: tensor.float() for name, tensor in tensors.items() if name not in dropped}
    heads = [name for name in wanted if name.startswith("head.")]
    if any(name not in tensors or tensors[name].shape != wanted[name].shape for name in heads):
        notes.append("head re-initialised (the file's is missing or of other classes)")
        tensors = {n: t for n, t in tensors.items() if not n.startswith("head.")} | {n: wanted[n] for n in heads}
    if "pos" in tensors and tensors["pos"].shape[1:2] != wanted["pos"].shape[1:2]:
        before = tensors["pos"].shape[1]
        tensors["pos"] = resize_positions(tensors["pos"], network.size.tokens, pos_resize, str(path))
        notes.append(f"positions resized from {before} to {network.size.tokens} tokens ({pos_resize})")
    _check(path, tensors, wanted)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
    return Loaded(str(path), layout, len(raw), hashlib.sha256(raw).hexdigest(), tuple(notes))


def read_weights(path: Path, raw: bytes) -> tuple[str, Tensors]:
    """The layout's name and the tensors under our names; those of a dropped layer keep the file's names."""
    if path.suffix == ".npz" and zipfile.is_zipfile(io.BytesIO(raw)):
        try:
            return "Google npz", from_google(_read_npz(path, raw))
        except (TypeError, IndexError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path}: holds arrays that are no weights of Google's ViT ({reason})") from None
    try:
        tensors = load_safetensors(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        if raw[:1] == b"\x80" or zipfile.is_zipfile(io.BytesIO(raw)):  # also the first byte of some safetensors
            raise CheckpointError(f"{path}: is a pickle, or may be one; it is not opened; {ACCEPTED}") from None
        raise CheckpointError(f"{path}: is not a safetensors file ({error}); {ACCEPTED}") from None
    if "patch_embed.proj.weight" in tensors:
        return "timm safetensors", from_timm(tensors)
    if any(name.endswith("patch_embeddings.projection.weight") for name in tensors):
        return "Hugging Face safetensors", from_huggingface(tensors)
    if "patch.weight" in tensors:
        return "own safetensors", tensors
    raise CheckpointError(f"{path}: has {len(tensors)} tensors of an unknown layout; {ACCEPTED}")


def from_timm(tensors: Mapping[str, Tensor]) -> Tensors:
    """timm's names and fused qkv to ours; a name that is not in the table stays as it is."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if fused := re.fullmatch(r"(blocks\.\d+\.attn\.)qkv\.(weight|bias)", name):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{fused[1]}{letter}.{fused[2]}"] = part
        else:
            found[_renamed(name, r"(blocks\.\d+\.)", TIMM, TIMM_BLOCK)] = tensor
    return found


def to_timm(tensors: Mapping[str, Tensor]) -> Tensors:
    """The inverse of `from_timm`."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        split = re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])\.(weight|bias)", name)
        if split is None:
            found[_renamed(name, r"(blocks\.\d+\.)", _inverse(TIMM), _inverse(TIMM_BLOCK))] = tensor
        elif split[2] == "q":
            found[f"{split[1]}qkv.{split[3]}"] = torch.cat([tensors[f"{split[1]}{x}.{split[3]}"] for x in "qkv"])
    return found


def from_huggingface(tensors: Mapping[str, Tensor]) -> Tensors:
    """Hugging Face's ViT names to ours, with or without the leading `vit.`."""
    plain = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    blocks = {re.sub(r"^encoder\.layer\.(\d+)\.", r"blocks.\1.", name): tensor for name, tensor in plain.items()}
    return {_renamed(name, r"(blocks\.\d+\.)", HF, HF_BLOCK): tensor for name, tensor in blocks.items()}


def to_huggingface(tensors: Mapping[str, Tensor]) -> Tensors:
    """The inverse of `from_huggingface`."""
    found = {}
    for name, tensor in tensors.items():
        new = _renamed(name, r"(blocks\.\d+\.)", _inverse(HF), _inverse(HF_BLOCK))
        new = re.sub(r"^blocks\.(\d+)\.", r"encoder.layer.\1.", new)
        found[new if new.startswith("classifier.") else f"vit.{new}"] = tensor
    return found


def from_google(arrays: Mapping[str, NDArray[np.float32]]) -> Tensors:
    """Google's npz to ours: kernels are [in, out] (attention's with a dimension of heads), images HWIO."""
    found: Tensors = {}
    for name, array in arrays.items():
        new = re.sub(r"^Transformer/encoderblock_(\d+)/", r"blocks.\1.", name)
        for theirs, ours in BIG_VISION.items():  # LayerNorm_1 is theirs, and never Google's
            new = new.replace(theirs, ours)
        new = _renamed(new, r"(blocks\.\d+\.)", GOOGLE, GOOGLE_BLOCK)
        values = torch.from_numpy(np.ascontiguousarray(array))
        if new.endswith("kernel"):
            new = new.removesuffix("kernel") + "weight"
            if new == "patch.weight":
                values = values.permute(3, 2, 0, 1)
            else:
                values = (values.flatten(0, -2) if ".attn.out." in new else values.flatten(1)).T
        elif new.endswith("scale"):
            new = new.removesuffix("scale") + "weight"
        elif new.endswith("bias"):
            values = values.flatten()
        found[new] = values.contiguous()
    return found


def to_google(tensors: Mapping[str, Tensor], heads: int) -> dict[str, NDArray[np.float32]]:
    """The inverse of `from_google` for blocks of `heads` heads."""
    found: dict[str, NDArray[np.float32]] = {}
    for name, tensor in tensors.items():
        new = _renamed(name, r"(blocks\.\d+\.)", _inverse(GOOGLE), _inverse(GOOGLE_BLOCK))
        new, values = re.sub(r"^blocks\.(\d+)\.", r"Transformer/encoderblock_\1/", new), tensor.float()
        inner = re.search(r"\.attn\.[qkv]\.", name) is not None
        if name.endswith("weight"):
            is_norm = values.dim() == 1
            new = new.removesuffix("weight") + ("scale" if is_norm else "kernel")
            if name == "patch.weight":
                values = values.permute(2, 3, 1, 0)
            elif not is_norm:
                values = values.T
                values = values.reshape(len(values), heads, -1) if inner else values
                values = values.reshape(heads, -1, values.shape[-1]) if ".attn.out." in name else values
        elif inner:
            values = values.reshape(heads, -1)
        found[new] = values.contiguous().numpy()
    return found


def resize_positions(positions: Tensor, tokens: int, how: PosResize, source: str = "positions") -> Tensor:
    """Interpolate position embeddings [1, 1 + g * g, D] to [1, tokens, D]; the class token's row stays.

    Raises:
        CheckpointError: `how` is "none", or either grid is not square.
    """
    if positions.shape[1] == tokens:
        return positions
    before, after = (math.isqrt(max(n - 1, 0)) for n in (positions.shape[1], tokens))
    if how == "none":
        raise CheckpointError(
            f"{source}: has {positions.shape[1]} positions, the network {tokens}; allow it with weights.pos_resize"
        )
    if before < 1 or after < 1 or before**2 + 1 != positions.shape[1] or after**2 + 1 != tokens:
        raise CheckpointError(f"{source}: {positions.shape[1]} positions are no square grid and a class token")
    grid = positions[:, 1:].transpose(1, 2).reshape(1, -1, before, before)
    mode, antialias = how.removesuffix("_antialias"), how.endswith("_antialias")
    grid = functional.interpolate(grid, (after, after), mode=mode, align_corners=False, antialias=antialias)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _read_npz(path: Path, raw: bytes) -> dict[str, NDArray[np.float32]]:
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be read as plain arrays ({error}); {ACCEPTED}") from None


def _check(path: Path, tensors: Tensors, wanted: Mapping[str, Tensor]) -> None:
    problems: list[tuple[str, Callable[[str], bool]]] = [
        ("is missing", lambda n: n not in tensors),
        ("is unknown here", lambda n: n not in wanted),
    ]
    for what, is_wrong in problems:
        names = [name for name in (*wanted, *tensors) if is_wrong(name)]
        if names:
            raise CheckpointError(f"{path}: {names[0]} {what} ({len(names)} such); is it another network's?")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, the network wants {tuple(tensor.shape)}"
            raise CheckpointError(f"{path}: {name} is {shapes}; choose the model.arch that the file is of")


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in table.items()}


def _renamed(name: str, block: str, table: Mapping[str, str], block_table: Mapping[str, str]) -> str:
    """The name with its beginning (after the block's number, where it has one) replaced by the table's."""
    found = re.match(block, name)
    start, rest, names = (found[1], name[found.end() :], block_table) if found else ("", name, table)
    for theirs, ours in names.items():
        if rest == theirs or (theirs[-1] in "./" and rest.startswith(theirs)):
            return start + ours + rest[len(theirs) :]
    return name
