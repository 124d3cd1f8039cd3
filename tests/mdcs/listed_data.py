"""A small data set of list files."""

import numpy as np
from PIL import Image

LISTS = """
paper: mdcs
data:
  name: list
  train_list: lists/train.txt
  test_list: lists/test.txt
  image_root: images
  num_classes: 4
  image_size: 32
  workers: 2
  mean: [0.485, 0.456, 0.406]
  std: [0.229, 0.224, 0.225]
  augment: photo
model: {name: resnet_cifar, depth: 8, width: 4}
method: {name: mdcs, ramp_epochs: 2}
optimizer: {lr: 0.05}
schedule: cosine
epochs: 1
batch_size: 8
evaluate: {batch_size: 5}
device: cpu
precision: float32
threads: 1
"""
COUNTS = {"train": (5, 9, 5, 7), "test": (3, 3, 3, 3)}  # images a class: not sorted, two equal


def make_folder(base):
    """Images of four classes in several formats, one of them grey-scale, and their lists."""
    random = np.random.default_rng(0)
    (base / "lists").mkdir(parents=True)
    for split, counts in COUNTS.items():
        lines = []
        for label, count in enumerate(counts):
            folder = base / "images" / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (40, 48, 3))
                pixels[..., label % 3] += 60 + 30 * label
                image = Image.fromarray(pixels.astype(np.uint8))
                name = f"{i}.{'png' if i % 2 else 'jpg'}"
                (image.convert("L") if i == 2 else image).save(folder / name)
                lines.append(f"{split}/class {label}/{name} {label}\n")
        random.shuffle(lines)
        (base / "lists" / f"{split}.txt").write_text("".join(lines))
    return base


def lose(folder, split, *places):
    """Delete the images of these lines (from 1)."""
    lines = (folder / "lists" / f"{split}.txt").read_text().splitlines()
    for place in places:
        (folder / "images" / lines[place - 1].rpartition(" ")[0]).unlink()
