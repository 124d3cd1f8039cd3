"""The plots on the report's page: SVG with identifiers of its own and alternative text, or a PNG where large."""

import base64
import re
import struct
from html import escape, unescape
from pathlib import Path
from xml.etree import ElementTree

from shared.errors import DataError

LARGE = 400_000  # bytes of an SVG from which its PNG is taken
SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
REFERENCE = re.compile(r"#([\w.-]+)")
TICK = re.compile(r"[−-]?[\d.,]+(?:e[+-]?\d+)?%?|\$.*\$")
CAPTIONS = {
    "learning_curves": "Generic and personal accuracy by round: mean over seeds, shaded by one deviation.",
    "client_accuracies": "How the personal models' accuracy spreads over clients (all seeds), one box a method.",
    "row_lengths": "Lengths of the rows of psi and phi against the classes' training images, a line a seed.",
    "frame_cosines": "Pairwise cosines of the frame's rows: with the zeros just set, and after the repair.",
    "arms": "Ensemble accuracy of every arm: overall, and of the head, middle and tail third of the classes.",
    "accuracy_by_class": "Accuracy of each expert against the classes' training images.",
    "groups_by_epoch": "Accuracy of the ensemble on the groups of classes as it is trained.",
    "confident_by_epoch": "Share of training images that an expert gets right, by adjusted and by raw logits.",
    "reliability": "Accuracy against confidence of the ensemble, in 15 bins; the diagonal is calibrated.",
    "training_curves": "Training and validation accuracy by epoch, a line a seed, each phase shaded and named.",
    "size_and_accuracy": "Test accuracy (mean and range over seeds) against parameters, with published figures.",
    "ladder": "Accuracy by arm of the budget track, each seed a point: validation, which chose the recipe, and test.",
    "augmented_images": "Training images, and what the second branch sees of them under either warp.",
    "confusion_matrix": "Test images by class and prediction, of the first seed's final network.",
    "accuracy_by_ratio": "Accuracy against the share pruned, of weights and of neurons: mean and deviation.",
    "entropy_by_block": "Mean entropy of the attention rows of each block, and the ceiling, uniform attention.",
    "neuron_scores": "How the neurons' scores (deviation of the output times length of the column) spread.",
    "attention_maps": "Where the class token of the last block looks, mean over heads, arm by arm.",
    "accuracy_by_latency": "Accuracy against measured time, for the networks of one run.",
}


def caption(name: str, title: str = "") -> str:
    """What a plot shows, in a sentence; `title` is the README's words for one that is not known here."""
    words = title or name.replace("_", " ")
    return CAPTIONS.get(name, f"{words[0].upper()}{words[1:]}.")


def plot(path: Path, name: str, title: str) -> str:
    """An SVG file as an element of the page, its identifiers prefixed with `name`; or the PNG beside it.

    Raises:
        DataError: the file is not an SVG, or is too large and has no PNG beside it.
    """
    raw = path.read_text(encoding="utf-8")
    labels = label_text(raw)
    if len(raw.encode()) > LARGE:
        return _png(path.with_suffix(".png"), f"{title} {labels}")
    try:
        root = ElementTree.fromstring(raw)
    except ElementTree.ParseError as error:
        raise DataError(f"{path.name}: is not an SVG: {error}") from None
    return inline_svg(root, name, title, labels)


def inline_svg(root: ElementTree.Element, name: str, title: str, labels: str) -> str:
    """The drawing with a title and a description, and without what would act on the rest of the page."""
    ElementTree.register_namespace("", SVG[1:-1])
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style", f"{SVG}script", f"{SVG}title"):
                parent.remove(child)
    referred = {found for node in root.iter() for value in node.attrib.values() for found in REFERENCE.findall(value)
                if value.startswith("#") or "url(#" in value}  # fmt: skip
    names = {old: f"{name}-{number}" for number, old in enumerate(sorted(referred))}
    for node in root.iter():
        link = node.attrib.pop(LINK, None)
        if link:
            node.set("href", link)
        if (own := node.attrib.pop("id", None)) in names:
            node.set("id", names[own])
        for key, value in node.attrib.items():
            if value.startswith("#") and value[1:] in names:
                node.set(key, f"#{names[value[1:]]}")
            elif "url(#" in value:
                node.set(key, re.sub(r"url\(#([\w.-]+)\)", lambda m: f"url(#{names[m[1]]})", value))
    width = root.get("viewBox", "0 0 600 400").split()[2]
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({
        "role": "img", "aria-labelledby": f"{name}-title {name}-desc", "class": "plot",
        "style": f"stroke-linejoin:round;stroke-linecap:butt;max-width:{float(width) * 1.35:.0f}px",
    })  # fmt: skip
    for number, (tag, text) in enumerate((("title", title), ("desc", labels))):
        node = ElementTree.Element(f"{SVG}{tag}", {"id": f"{name}-{tag}"})
        node.text = text
        root.insert(number, node)
    for node in root.iter():
        node.tail = None
    return ElementTree.tostring(root, encoding="unicode")


def label_text(svg: str) -> str:
    """What is written in a plot, for its description: titles, axes, legends, but no numbers at ticks."""
    texts = [unescape(text.strip()) for text in re.findall(r"<!-- (.+?) -->", svg)]
    labels = list(dict.fromkeys(text for text in texts if not TICK.fullmatch(text)))
    shown = "; ".join(labels[:40])
    return f"Written in the plot: {shown}." if shown else "The table of the study has the figures."


def _png(path: Path, text: str) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read: {error.strerror}; the SVG beside it is too large") from None
    if raw[:8] != b"\x89PNG\r\n\x1a\n" or len(raw) < 24:
        raise DataError(f"{path.name}: is not a PNG")
    width, height = struct.unpack(">II", raw[16:24])
    source = f"data:image/png;base64,{base64.b64encode(raw).decode()}"
    return f'<img class="plot" src="{source}" width="{width}" height="{height}" alt="{escape(text)}" />'
