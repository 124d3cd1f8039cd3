"""One vision transformer, whose blocks may differ in heads and MLP width: the dense, the published and the shrunk one.

Attention is fused, but in a block whose map is asked for. Sizes are data (`Size`), so a shrunk network is a network.
"""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.errors import CheckpointError, ConfigError

Seen = dict[str, Tensor]  # what one block computed, see `Vit.observe`
INIT_STD = 0.02  # of the positions


@dataclass(frozen=True)
class BlockSize:
    """Inner sizes of a block; attention's scale is 1 / sqrt(head_dim), however many heads are left."""

    heads: int
    head_dim: int
    mlp: int


@dataclass(frozen=True)
class Size:
    """All that fixes the shapes of a network. `image` and `patch` are pixels a side."""

    image: int
    channels: int
    patch: int
    width: int
    classes: int
    blocks: tuple[BlockSize, ...]
    layer_scale: bool = False
    ln_eps: float = 1e-6

    def __post_init__(self) -> None:
        numbers = {"channels": self.channels, "width": self.width, "classes": self.classes, "patch": self.patch}
        if small := [name for name, value in numbers.items() if value < 1]:
            raise ConfigError(f"model: {small[0]} is {numbers[small[0]]}; it must be at least 1")
        if self.image < self.patch or self.image % self.patch:
            raise ConfigError(
                f"model: images of {self.image} pixels cannot be cut into patches of {self.patch}; take a divisor"
            )
        if not self.blocks:
            raise ConfigError("model: has no block; depth must be at least 1")
        for i, block in enumerate(self.blocks):
            if min(block.heads, block.head_dim, block.mlp) < 1:
                raise ConfigError(f"model: block {i} has {block}; each number must be at least 1")

    @property
    def tokens(self) -> int:
        """N, the patches and the class token."""
        return (self.image // self.patch) ** 2 + 1

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a config.json."""
        return asdict(self)


class _Arch(NamedTuple):
    patch: int
    width: int
    depth: int
    heads: int
    mlp: int


ARCHS: dict[str, _Arch] = {
    "vit_b16": _Arch(16, 768, 12, 12, 3072),
    "vit_s16": _Arch(16, 384, 12, 6, 1536),
    "vit_ti16": _Arch(16, 192, 12, 3, 768),
    "vit_s14": _Arch(14, 384, 12, 6, 1536),
    "s0": _Arch(7, 64, 4, 4, 256),  # Fashion-MNIST, 17 tokens
    "s1": _Arch(8, 192, 6, 3, 768),  # CIFAR at 32 px, 17 tokens
    "s2": _Arch(4, 192, 6, 3, 768),  # CIFAR at 32 px, 65 tokens
}


def uniform_size(image: int, channels: int, patch: int, width: int, depth: int, heads: int, mlp: int, classes: int,
                 layer_scale: bool = False, ln_eps: float = 1e-6) -> Size:  # fmt: skip
    """A network whose blocks are alike; ConfigError where the heads do not divide the width."""
    if heads < 1 or width % heads:
        raise ConfigError(f"model: {heads} heads do not divide a width of {width}; take a divisor")
    blocks = (BlockSize(heads, width // heads, mlp),) * depth
    return Size(image, channels, patch, width, classes, blocks, layer_scale, ln_eps)


def arch_size(arch: str, image: int, channels: int, classes: int, ln_eps: float = 1e-6,
              layer_scale: bool = False) -> Size:  # fmt: skip
    """The size of a named network for images of so many pixels a side."""
    if arch not in ARCHS:
        raise ConfigError(f"there is no network {arch!r}; choose from {', '.join(ARCHS)}")
    a = ARCHS[arch]
    return uniform_size(image, channels, a.patch, a.width, a.depth, a.heads, a.mlp, classes, layer_scale, ln_eps)


def size_from_dict(data: dict[str, Any]) -> Size:
    """Read `Size.as_dict` back; CheckpointError if it is not one."""
    try:
        blocks = tuple(BlockSize(**{k: int(v) for k, v in block.items()}) for block in data["blocks"])
        image, channels, patch, width, classes = (
            int(data[k]) for k in ("image", "channels", "patch", "width", "classes")
        )
        return Size(image, channels, patch, width, classes, blocks, bool(data["layer_scale"]), float(data["ln_eps"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json: the network's size cannot be read ({error!r})") from None


class Attention(nn.Module):
    """Multi-head self-attention with separate q, k, v [heads * head_dim, width] and out [width, heads * head_dim]."""

    def __init__(self, width: int, size: BlockSize) -> None:
        super().__init__()
        self.heads, self.head_dim, inner = size.heads, size.head_dim, size.heads * size.head_dim
        self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor, seen: Seen | None, explicit: bool) -> Tensor:
        """[B, N, width] -> [B, N, width]; `explicit` leaves the softmax map [B, H, N, N] in `seen`."""
        b, n, _ = x.shape
        q, k, v = (
            linear(x).view(b, n, self.heads, self.head_dim).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        scale = self.head_dim**-0.5
        if explicit and seen is not None:
            scores = (q * scale) @ k.transpose(-2, -1)
            attention = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
            mixed = attention.to(v.dtype) @ v
            seen["attention"] = attention
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, scale=scale)
        mixed = mixed.transpose(1, 2).reshape(b, n, -1)
        if seen is not None:
            seen["attn_in"], seen["mixed"] = x, mixed
        return self.out(mixed)  # type: ignore[no-any-return]


class Block(nn.Module):
    """x += attention(norm1 x); x += fc2 GELU fc1 norm2 x; each branch times a vector where there is LayerScale."""

    scale1: nn.Parameter | None
    scale2: nn.Parameter | None

    def __init__(self, size: Size, block: BlockSize, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(size.width, eps=size.ln_eps) for _ in range(2))
        self.attn = Attention(size.width, block)
        self.fc1, self.fc2 = nn.Linear(size.width, block.mlp), nn.Linear(block.mlp, size.width)
        self.dropout = dropout
        for name in ("scale1", "scale2"):
            self.register_parameter(name, nn.Parameter(torch.ones(size.width)) if size.layer_scale else None)

    def forward(self, x: Tensor, seen: Seen | None = None, explicit: bool = False) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        attended = self._drop(self.attn(self.norm1(x), seen, explicit))
        x = x + (attended if self.scale1 is None else attended * self.scale1)
        mlp_in = self.norm2(x)
        hidden = functional.gelu(self.fc1(mlp_in))
        if seen is not None:
            seen["mlp_in"], seen["hidden"] = mlp_in, hidden
        fed = self._drop(self.fc2(self._drop(hidden)))
        return x + (fed if self.scale2 is None else fed * self.scale2)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout) if self.training and self.dropout else x


class Vit(nn.Module):
    """A vision transformer as in Dosovitskiy et al. 2021, class token first, pre-norm (section 1.1 of the paper)."""

    def __init__(self, size: Size, dropout: float = 0.0) -> None:
        super().__init__()
        self.size, self.dropout = size, dropout
        self.patch = nn.Conv2d(size.channels, size.width, size.patch, size.patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, size.width))
        self.pos = nn.Parameter(torch.zeros(1, size.tokens, size.width))
        self.blocks = nn.ModuleList(Block(size, block, dropout) for block in size.blocks)
        self.norm = nn.LayerNorm(size.width, eps=size.ln_eps)
        self.head = nn.Linear(size.width, size.classes)

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return cast(list[Block], list(self.blocks))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, channels, image, image]."""
        x = self._embed(images)
        for block in self.layers:
            x = block(x)
        return self._read_out(x)

    def observe(self, images: Tensor, maps: Collection[int] = ()) -> tuple[Tensor, list[Seen]]:
        """Logits, and what each block computed.

        `attn_in` [B, N, d], `mixed` [B, N, heads * head_dim] (before the output matrix), `mlp_in` [B, N, d], `hidden`
        [B, N, mlp] (after GELU, before dropout); in the blocks of `maps` also `attention` [B, H, N, N].
        """
        x = self._embed(images)
        everything: list[Seen] = []
        for i, block in enumerate(self.layers):
            everything.append(Seen())
            x = block(x, everything[-1], i in maps)
        return self._read_out(x), everything

    def patches(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, patches, C * p * p], row by row: what the patch embedding multiplies."""
        b, c, h, w = images.shape
        p, wanted = self.size.patch, (self.size.channels, self.size.image, self.size.image)
        if (c, h, w) != wanted:
            raise ConfigError(f"model: images of {c} x {h} x {w} do not fit a network for {wanted}")
        return images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)

    def _embed(self, images: Tensor) -> Tensor:
        x = functional.linear(self.patches(images), self.patch.weight.flatten(1), self.patch.bias)
        x = torch.cat([self.cls.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        return functional.dropout(x, self.dropout) if self.training and self.dropout else x

    def _read_out(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x[:, 0]))  # type: ignore[no-any-return]


def build(size: Size, seed: int, dropout: float = 0.0, head_init: str = "torch") -> Vit:
    """A network with first values from `seed` alone; torch's global generators are left as they were.

    Matrices are U(+-1/sqrt(inputs)), as torch's linear layers are; positions normal, deviation 0.02; class token and
    biases 0, norms 1. The head: "torch" is U(+-1/sqrt(width)), its bias too; "zero" is zero.
    """
    with torch.device("meta"):
        network = Vit(size, dropout)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("head."):
                continue
            if name == "pos":
                parameter.normal_(0.0, INIT_STD, generator=generator)
            elif parameter.dim() > 1 and name != "cls":
                bound = 1 / math.sqrt(parameter[0].numel())
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") or name == "cls" else 1.0)
    reset_head(network, seed, head_init)
    return network


def reset_head(network: Vit, seed: int, head_init: str) -> None:
    """Give the classifier its first values, drawn by a generator of their own."""
    generator = torch.Generator().manual_seed(seed + 1)
    bound = 1 / math.sqrt(network.size.width) if head_init == "torch" else 0.0
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-1, 1, generator=generator) * bound)


def on_meta(size: Size) -> Vit:
    """A network without values, for counts."""
    with torch.device("meta"):
        return Vit(size)


def count_parameters(size: Size) -> int:
    """Closed form, with 2 d a block more where there is LayerScale."""
    d, patch = size.width, size.channels * size.patch**2
    blocks = sum(
        4 * d * b.heads * b.head_dim + 3 * b.heads * b.head_dim + d + 2 * d * b.mlp + b.mlp + d + 4 * d
        + (2 * d if size.layer_scale else 0)
        for b in size.blocks
    )  # fmt: skip
    return patch * d + d + d + size.tokens * d + blocks + 2 * d + d * size.classes + size.classes


def count_macs(size: Size) -> int:
    """Multiply-accumulates of one image, closed form: matrices and attention, no norms or activations."""
    d, n = size.width, size.tokens
    blocks = sum(
        4 * n * d * b.heads * b.head_dim + 2 * n * n * b.heads * b.head_dim + 2 * n * d * b.mlp for b in size.blocks
    )
    return (n - 1) * size.channels * size.patch**2 * d + blocks + d * size.classes


def count_prunable(size: Size) -> int:
    """Entries of the published pruning's set, closed form."""
    d = size.width
    blocks = sum(4 * d * b.heads * b.head_dim + 2 * d * b.mlp + 2 * d for b in size.blocks)
    return size.channels * size.patch**2 * d + blocks + d * size.classes


def resized(size: Size, heads: Collection[int] | None = None, mlp: Collection[int] | None = None) -> Size:
    """The size with other heads or MLP widths, one number a block."""
    new_heads = list(heads) if heads is not None else [b.heads for b in size.blocks]
    new_mlp = list(mlp) if mlp is not None else [b.mlp for b in size.blocks]
    return replace(size, blocks=tuple(
        BlockSize(h, b.head_dim, m) for b, h, m in zip(size.blocks, new_heads, new_mlp, strict=True)
    ))  # fmt: skip
