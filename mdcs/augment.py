"""Weak and strong augmentation of whole batches, each image with draws of its own.

Images are uint8 [B, C, H, W] on any device and keep shape and type. All draws come from a generator on the CPU: a CPU
and a GPU see the same ones, and the host never waits for the device. To be quick, the images are sorted by the
operation that they drew, and each operation runs once on its own part of the batch.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from mdcs import image_ops as ops
from shared.batches import Augment, random_crop, random_flip
from shared.errors import ConfigError

Operation = Callable[[Tensor, Tensor], Tensor]  # images [B, C, H, W] and their arguments [B] -> images
Choice = tuple[str, float, int | None]  # operation, probability, level 0..9

LEVELS = 10  # of AutoAugment

# AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019), in torchvision's order and spelling.
CIFAR10_POLICY: tuple[tuple[Choice, Choice], ...] = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)

RAND_AUGMENT_OPS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
)

_GEOMETRIC: dict[str, Callable[..., Tensor]] = {
    "ShearX": ops.shear_x,
    "ShearY": ops.shear_y,
    "TranslateX": ops.translate_x,
    "TranslateY": ops.translate_y,
    "Rotate": ops.rotate,
}
_COLOURS: dict[str, Operation] = {
    "Brightness": ops.brightness,
    "Color": ops.color,
    "Contrast": ops.contrast,
    "Sharpness": ops.sharpness,
    "Posterize": ops.posterize,
    "Solarize": ops.solarize,
    "SolarizeAdd": ops.solarize_add,
    "AutoContrast": lambda images, _: ops.autocontrast(images),
    "Equalize": lambda images, _: ops.equalize(images),
    "Invert": lambda images, _: ops.invert(images),
    "Identity": lambda images, _: images,
}
_ENHANCERS = ("Brightness", "Color", "Contrast", "Sharpness")


# -------------------------------------------------------------------------------------------------------- operations


def auto_augment(images: Tensor, generator: Generator, fill: ops.Fill = 128) -> Tensor:
    """AutoAugment with the policy for CIFAR-10, as torchvision's on PIL images; nearest sampling.

    Each image draws one of the 25 pairs of operations, whether each of the two is applied, and the signs.
    """
    ops.check_images(images)
    b = len(images)
    operations = _operations(fill)
    names = list(operations)
    pairs = torch.randint(len(CIFAR10_POLICY), (b,), generator=generator)
    chances = torch.rand(b, 2, generator=generator)
    positive = torch.randint(2, (b, 2), generator=generator)
    space = auto_augment_space(*images.shape[-2:])
    for slot in range(2):
        codes, probabilities, arguments = _policy_columns(slot, names, space)
        applied = chances[:, slot] <= probabilities[pairs]
        drawn = torch.where(applied, codes[pairs], names.index("Identity"))
        images = _apply(images, drawn, arguments[positive[:, slot], pairs], list(operations.values()))
    return images


def auto_augment_space(height: int, width: int) -> dict[str, tuple[Tensor, bool]]:
    """Each operation's magnitudes at the levels 0..9 [10], and whether a sign is drawn for it.

    Shear: factor; translation: pixels; rotation: degrees; brightness, colour, contrast, sharpness: distance of the
    factor from 1; posterize: bits kept; solarize: threshold.
    """
    nine_tenths = torch.linspace(0, 0.9, LEVELS)
    return {
        "ShearX": (torch.linspace(0, 0.3, LEVELS), True),
        "ShearY": (torch.linspace(0, 0.3, LEVELS), True),
        "TranslateX": (torch.linspace(0, 150 / 331 * width, LEVELS), True),
        "TranslateY": (torch.linspace(0, 150 / 331 * height, LEVELS), True),
        "Rotate": (torch.linspace(0, 30, LEVELS), True),
        **dict.fromkeys(_ENHANCERS, (nine_tenths, True)),
        "Posterize": (8 - (torch.arange(LEVELS) * (4 / (LEVELS - 1))).round(), False),
        "Solarize": (torch.linspace(255, 0, LEVELS), False),
        **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), (torch.zeros(LEVELS), False)),
    }


def rand_augment(images: Tensor, generator: Generator, fill: ops.Fill = (124, 116, 104)) -> Tensor:
    """RandAugment "rand-n2-m10-mstd0.5" of the authors' code; `fill` is 255 * ImageNet's mean.

    Twice, each image draws one of 15 operations with probability 1/2, its level clip(Normal(10, 0.5), 0, 10), a sign,
    and bilinear or bicubic sampling.
    """
    ops.check_images(images)
    b = len(images)
    bilinear, bicubic = _operations(fill, "bilinear"), _operations(fill, "bicubic")
    calls = [table[name] for table in (bilinear, bicubic) for name in RAND_AUGMENT_OPS]
    # Only geometry knows the two kinds of sampling: the other operations need one group each.
    second = torch.tensor([len(RAND_AUGMENT_OPS) * (name in _GEOMETRIC) for name in RAND_AUGMENT_OPS])
    signed = torch.tensor([name in _GEOMETRIC for name in RAND_AUGMENT_OPS])
    for _ in range(2):
        kind = torch.randint(len(RAND_AUGMENT_OPS), (b,), generator=generator)
        applied = torch.rand(b, generator=generator) < 0.5
        level = (10 + 0.5 * torch.randn(b, generator=generator, dtype=torch.float64)).clamp_(0, 10)
        negative, cubic = torch.randint(2, (2, b), generator=generator)
        table = rand_augment_arguments(level, *images.shape[-2:])
        argument = torch.stack([table[name] for name in RAND_AUGMENT_OPS]).gather(0, kind.view(1, b))[0]
        argument = torch.where(signed[kind] & (negative == 1), -argument, argument)
        codes = torch.where(applied, kind + second[kind] * cubic, len(calls))
        images = _apply(images, codes, argument, [*calls, _COLOURS["Identity"]])
    return images


def rand_augment_arguments(level: Tensor, height: int, width: int) -> dict[str, Tensor]:
    """Each operation's argument [B] at the levels [B] of 0..10, before a sign is drawn; units as in `image_ops`."""
    share = level / 10
    none, factor = torch.zeros_like(share), 0.1 + 1.8 * share
    return {
        **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), none),
        **dict.fromkeys(_ENHANCERS, factor),
        "Rotate": 30 * share,
        "Posterize": (4 * share).floor(),
        "Solarize": (256 * share).floor(),
        "SolarizeAdd": (110 * share).floor(),
        "ShearX": 0.3 * share,
        "ShearY": 0.3 * share,
        "TranslateX": 0.45 * width * share,
        "TranslateY": 0.45 * height * share,
    }


def color_jitter(
    images: Tensor, generator: Generator, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4
) -> Tensor:
    """Change the three by factors uniform in 1 +- x, for each image in an order of its own (torchvision's ColorJitter).

    Raises ConfigError for a negative x.
    """
    ops.check_images(images)
    spread = torch.tensor([brightness, contrast, saturation])
    if bool((spread < 0).any()):
        raise ConfigError(f"color_jitter: the spreads must be 0 or more, got {spread.tolist()}")
    low = (1 - spread).clamp_(min=0)
    factors = low + (1 + spread - low) * torch.rand(len(images), 3, generator=generator)
    order = torch.rand(len(images), 3, generator=generator).argsort(dim=1)
    for codes in order.unbind(1):
        chosen = factors.gather(1, codes.view(-1, 1))[:, 0]
        images = _apply(images, codes, chosen, (ops.brightness, ops.contrast, ops.color))
    return images


def random_rotation(images: Tensor, generator: Generator, degrees: float = 15) -> Tensor:
    """Turn each image about its centre by an angle uniform in +-`degrees`; nearest sampling, black corners."""
    angle = degrees * (2 * torch.rand(len(images), generator=generator, dtype=torch.float64) - 1)
    return ops.rotate(images, angle)


def random_affine(images: Tensor, generator: Generator, fill: ops.Fill = 0) -> Tensor:
    """Two different ones of rotation, two shears and two translations for each image: a strong view without colours.

    AutoAugment's geometry with continuous magnitudes: uniform in +-30 degrees, +-0.3 for shears, and for translations
    in +-75/331 of the side, half of AutoAugment's most: two of that would push a centred object out of the frame.
    """
    ops.check_images(images)
    b, (h, w) = len(images), images.shape[-2:]
    names = list(_GEOMETRIC)
    most = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 75 / 331 * w, "TranslateY": 75 / 331 * h, "Rotate": 30.0}
    limits = torch.tensor([most[name] for name in names], dtype=torch.float64)
    chosen = torch.rand(b, len(names), generator=generator).argsort(dim=1)[:, :2]
    magnitudes = limits[chosen] * (2 * torch.rand(b, 2, generator=generator, dtype=torch.float64) - 1)
    operations = _operations(fill)
    for codes, arguments in zip(chosen.unbind(1), magnitudes.unbind(1), strict=True):
        images = _apply(images, codes, arguments, [operations[name] for name in names])
    return images


def cutout(images: Tensor, generator: Generator, size: int) -> Tensor:
    """Set one square of `size` pixels to 0 in each image; its centre is uniform over all pixels, the border clips it.

    Raises ConfigError for a negative size.
    """
    ops.check_images(images)
    if size < 0:
        raise ConfigError(f"cutout: the square's side must be 0 or more, got {size}")
    keep = []
    for side in images.shape[-2:]:
        first = torch.randint(side, (len(images), 1), generator=generator) - size // 2
        position = torch.arange(side)
        keep.append(((position < first) | (position >= first + size)).byte())
    rows, columns = (part.to(images.device, non_blocking=True) for part in keep)
    return images * (rows[:, None, :, None] | columns[:, None, None, :])


def _operations(fill: ops.Fill, mode: str = "nearest") -> dict[str, Operation]:
    return {**{name: partial(f, fill=fill, mode=mode) for name, f in _GEOMETRIC.items()}, **_COLOURS}


def _policy_columns(
    slot: int, names: list[str], space: dict[str, tuple[Tensor, bool]]
) -> tuple[Tensor, Tensor, Tensor]:
    """One half of each pair: index in `names` [25], probability [25], argument with sign - and + [2, 25]."""
    chosen = [pair[slot] for pair in CIFAR10_POLICY]
    magnitudes = torch.stack([space[name][0][level or 0] for name, _, level in chosen])
    signs = torch.tensor([[-1 if space[name][1] else 1 for name, _, _ in chosen], [1] * len(chosen)])
    arguments = magnitudes * signs
    whole = torch.tensor([name.startswith("Translate") for name, _, _ in chosen])  # torchvision: whole pixels
    centre = torch.tensor([float(name in _ENHANCERS) for name, _, _ in chosen])
    arguments = torch.where(whole, arguments.trunc(), arguments) + centre
    codes = torch.tensor([names.index(name) for name, _, _ in chosen])
    return codes, torch.tensor([probability for _, probability, _ in chosen]), arguments


def _apply(images: Tensor, codes: Tensor, arguments: Tensor, operations: Sequence[Operation]) -> Tensor:
    """Run operations[codes[i]] with arguments[i] on image i; codes and arguments [B] on the CPU."""
    if not len(images):
        return images
    order = codes.argsort(stable=True)
    counts = codes.bincount(minlength=len(operations)).tolist()
    there, back = torch.stack((order, order.argsort())).to(images.device, non_blocking=True)
    parts = torch.split(images.index_select(0, there), counts)
    groups = zip(operations, parts, torch.split(arguments[order], counts), strict=True)
    done = torch.cat([operation(part, argument) for operation, part, argument in groups if len(part)])
    return done.index_select(0, back)


# --------------------------------------------------------------------------------------------------------- pipelines


def _crop_flip(images: Tensor, generator: Generator) -> Tensor:
    return random_flip(random_crop(images, images.shape[-1] // 8, generator), generator)


def _weak(images: Tensor, generator: Generator) -> Tensor:
    ops.check_images(images)
    return random_rotation(_crop_flip(images, generator), generator)


def _cifar_strong(images: Tensor, generator: Generator) -> Tensor:
    ops.check_images(images)
    return cutout(auto_augment(_crop_flip(images, generator), generator), generator, images.shape[-1] // 2)


def _grey_strong(images: Tensor, generator: Generator) -> Tensor:
    ops.check_images(images)
    return cutout(random_affine(_crop_flip(images, generator), generator), generator, images.shape[-1] // 2)


def _photo_strong(images: Tensor, generator: Generator) -> Tensor:
    return rand_augment(color_jitter(images, generator), generator)


def _unchanged(images: Tensor, _generator: Generator) -> Tensor:
    return images


# (weak, strong) of each. Photos were cropped, resized and flipped when their files were decoded. iNaturalist has no
# strong view in the authors' code: that of the other photos is our choice.
VIEWS: dict[str, tuple[Augment, Augment]] = {
    "cifar": (_weak, _cifar_strong),
    "grey": (_weak, _grey_strong),
    "photo": (color_jitter, _photo_strong),
    "inaturalist": (_unchanged, _photo_strong),
    "none": (_unchanged, _unchanged),
}
