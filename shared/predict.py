"""Classify picture files with a run's network or an exported one: the five most probable classes of each."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared import report
from shared.cli import check_shared
from shared.errors import ConfigError, DataError
from shared.export import Build, Options, Portable, load_exported, parser_of
from shared.gpu import setup

TOP, AT_ONCE = 5, 64
DECODING = Exception  # a decoder that meets damaged bytes raises what it likes: RuntimeError, EOFError, struct.error


def predict_command(
    file: str, arguments: Sequence[str], options: Options, take: Callable[[argparse.Namespace], Portable], build: Build
) -> int:
    """`<package>.predict`: print a table, or with `--json` a list; the arguments are those of `export_command`."""
    package = Path(file).resolve().parent.name
    parser = parser_of(package, "predict", __doc__ or "", options)
    parser.add_argument("images", type=Path, nargs="+", help="picture files of any size and mode")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    asked = parser.parse_args(arguments)
    check_shared(file)
    for path in asked.images:  # a wrong path is told before the network is built
        check_image(path)
    setup("cpu", threads=1)  # small products on many threads wait for each other where the cores are busy
    if (asked.run / "config.json").is_file():
        unchosen = argparse.ArgumentParser()
        options(unchosen)
        if given := [n for n, value in vars(unchosen.parse_args([])).items() if getattr(asked, n) != value]:
            raise ConfigError(f"--{given[0]}: {asked.run} is one exported network; this chooses one of a run's")
        whole, config = load_exported(asked.run, package, build)
    else:
        taken = take(asked)
        whole, config = taken.whole, taken.description()
    size = (config["channels"], config["image_size"])
    images = torch.stack([read_image(path, *size, config["preparation"]) for path in asked.images])
    with torch.no_grad():
        logits = torch.cat([whole(some.float() / 255) for some in torch.split(images, AT_ONCE)])
    show(asked.images, logits.softmax(dim=1), config["classes"], asked.json)
    return 0


def show(paths: Sequence[Path], probabilities: Tensor, classes: Sequence[str], as_json: bool) -> None:
    """Print the most probable classes of each picture; probabilities [N, K]."""
    values, places = (part.tolist() for part in probabilities.topk(min(TOP, len(classes))))
    found = {str(path): {classes[k]: p for k, p in zip(*row, strict=True)}
             for path, *row in zip(paths, places, values, strict=True)}  # fmt: skip
    if as_json:
        print(json.dumps(found, indent=1))
        return
    rows = [[path if n == 0 else "", name, f"{100 * p:.1f} %"]
            for path, top in found.items() for n, (name, p) in enumerate(top.items())]  # fmt: skip
    report.show("the most probable classes", [["image", "class", "probability"], *rows])


def check_image(path: Path) -> None:
    """DataError if there is no such file or it does not begin as a picture does; reads its first bytes only."""
    from PIL import Image

    with one_line_errors(path, DECODING):
        Image.open(path).close()


@contextmanager
def one_line_errors(path: Path, kind: type[Exception]) -> Iterator[None]:
    """DataError for what goes wrong while a picture file is read."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except kind as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(f"{path}: is not a picture that can be read ({reason})") from None


def read_image(path: Path, channels: int, size: int, preparation: Mapping[str, Any]) -> Tensor:
    """A picture file as uint8 [channels, size, size]: upright, transparent parts white, grey for one channel.

    Args:
        preparation: as in `config.json`; see `shared.export.Portable`.

    Raises:
        DataError: there is no such file, or it is no picture that can be read.
    """
    from PIL import Image, ImageOps

    with one_line_errors(path, DECODING), Image.open(path) as opened:
        image: Image.Image = ImageOps.exif_transpose(opened)
    with one_line_errors(path, ValueError):  # a mode that has no grey or colours
        if image.mode.startswith(("I", "F")):  # more than 8 bits, which PIL would cut off at 255
            pixels = np.asarray(image)
            if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError(f"pixels of mode {image.mode} without a known range; save it with 8 or 16 bits")
            image = Image.fromarray((pixels / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
    # A box makes a blur of what it shrinks as the training did, but squares of what it enlarges.
    box = preparation["resample"] == "box" and min(image.size) >= size
    method = Image.Resampling.BOX if box else Image.Resampling.BILINEAR
    image = ImageOps.fit(image, (size, size), method, bleed=(1 - preparation["centre"]) / 2)
    return torch.from_numpy(np.array(image).reshape(size, size, -1)).permute(2, 0, 1)
