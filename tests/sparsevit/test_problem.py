"""Images: held-out ones, balanced parts, resizing on the device, ImageNet-100 from an ImageNet-1k folder."""

import hashlib

import pytest
import torch
from torch.nn import functional

from shared import data
from shared.config import parse
from shared.errors import ConfigError, DataError
from shared.gpu import stream
from sparsevit.config import Config, DataConfig
from sparsevit.imagenet100 import CLASSES
from sparsevit.problem import imagenet100, load_problem, split_validation

CPU = torch.device("cpu")
SAMPLE = {"name": "sample", "mean": (0.286,), "std": (0.353,)}


def data_config(**changes):
    return DataConfig(**{**SAMPLE, **changes})


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """An ImageNet-1k folder in small: the 100 classes and one other, an image a class, of ragged sizes."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data") / "imagenet"
    draws = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for number, name in enumerate((*CLASSES, "n00000001")):
            folder = root / split / name
            folder.mkdir(parents=True)
            pixels = torch.randint(256, (30 + number % 3, 40, 3), generator=draws, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / "a.JPEG")
            Image.fromarray(pixels[:, ::-1].copy()).save(folder / "b.JPEG")
    return root


def test_the_class_list_is_the_authors():
    text = "\n".join(CLASSES) + "\n"
    assert hashlib.md5(text.encode()).hexdigest() == "beadc1c2cf12f367258afe772c00f306"
    assert list(CLASSES) == sorted(set(CLASSES))


def test_imagenet100_has_the_100_classes_in_sorted_order_and_ignores_the_others(image_folder):
    files = imagenet100(image_folder / "train", "train")
    assert len(files) == 200
    assert files.classes == CLASSES
    assert all(path.parent.name == CLASSES[label] for path, label in zip(files.paths, files.labels, strict=True))


def test_imagenet100_trains_on_random_crops_and_tests_on_the_centre(image_folder, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(image_folder.parent))
    config = data_config(name="imagenet100", image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, workers=2)
    problem = load_problem(config, CPU)
    assert (problem.image, problem.channels, len(problem.classes)) == (16, 3, 100)
    one, two, same = (problem.train.batch(torch.arange(4), stream(0, "x", k))[0] for k in (0, 1, 0))
    assert one.shape == (4, 3, 16, 16)
    assert torch.equal(one, same)
    assert not torch.equal(one, two)
    assert float(one.min()) >= -1
    assert float(one.max()) <= 1
    test = [images for images, _ in problem.test.evaluate(64)]
    assert sum(map(len, test)) == 200
    assert torch.equal(test[0], next(iter(problem.test.evaluate(64)))[0])


def test_a_training_crop_has_at_least_the_asked_share_of_the_image(image_folder, monkeypatch):
    from shared.batches import _random_box

    monkeypatch.setenv("DATA_ROOT", str(image_folder.parent))
    config = data_config(name="imagenet100", image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, min_area=0.5)
    crops = load_problem(config, CPU).train
    areas = []
    for draw in crops._draws(300, 7):
        left, top, right, bottom = _random_box(400, 400, draw[:10].tolist())
        areas.append((right - left) * (bottom - top) / 160_000)
    assert 0.49 < min(areas) < 0.6
    assert max(areas) > 0.9


@pytest.mark.parametrize(
    ("damage", "message"),
    [("folder", "no such folder"), ("class", "of the 100 classes are missing"), ("images", "no image in it")],
)
def test_an_imagenet_folder_that_is_not_whole_is_refused_in_one_line(tmp_path, damage, message):
    if damage != "folder":
        for name in CLASSES[:-1] if damage == "class" else CLASSES:
            (tmp_path / "train" / name).mkdir(parents=True)
    with pytest.raises(DataError, match=message) as found:
        imagenet100(tmp_path / "train", "train")
    assert "\n" not in str(found.value)
    assert str(tmp_path / "train") in str(found.value)


def test_held_out_images_are_balanced_seeded_and_not_trained_on():
    labels = torch.arange(60) % 3
    kept, held = split_validation(labels, 12, 0, 3)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(60))
    assert torch.bincount(labels[held]).tolist() == [4, 4, 4]
    again, other = split_validation(labels, 12, 0, 3)[1], split_validation(labels, 12, 1, 3)[1]
    assert torch.equal(held, again)
    assert not torch.equal(held, other)
    assert len(split_validation(labels, 0, 0, 3)[1]) == 0
    for count, message in ((10, "not a multiple"), (60, "none would be left")):
        with pytest.raises(DataError, match=message):
            split_validation(labels, count, 0, 3)


def test_part_of_a_set_has_the_first_images_of_each_class():
    problem = load_problem(data_config(train_images=100, test_images=50, val_images=20), CPU)
    assert (len(problem.train), len(problem.val), len(problem.test)) == (80, 20, 50)
    assert torch.bincount(problem.test.labels).tolist() == [5] * 10
    whole = data.load("sample", "test")
    rows = torch.cat([(whole.labels == c).nonzero()[:5, 0] for c in range(10)]).sort().values
    assert torch.equal(problem.test.images, whole.images[rows])
    assert torch.bincount(problem.train.labels).tolist() == [8] * 10
    assert problem.facts()["val_images"] == 20
    for count, message in ((55, "are not the same number"), (11_000 * 10, "are asked for")):
        with pytest.raises(DataError, match=message):
            load_problem(data_config(test_images=count), CPU)


def test_images_are_resized_on_the_device_after_augmentation():
    small = load_problem(data_config(test_images=10), CPU)
    large = load_problem(data_config(test_images=10, image_size=56), CPU)
    (native, _), (resized, _) = (next(iter(p.test.evaluate(10))) for p in (small, large))
    assert resized.shape == (10, 1, 56, 56)
    wanted = functional.interpolate(native, (56, 56), mode="bilinear", align_corners=False)
    assert torch.allclose(resized, wanted, atol=1e-5)
    assert large.image == 56


def test_flips_can_be_left_out_and_test_images_are_never_flipped():
    still = load_problem(data_config(train_images=10, flip=False), CPU).train
    flipped = load_problem(data_config(train_images=10), CPU).train
    plain = next(iter(still.evaluate(10)))[0]
    order = torch.arange(10)
    assert torch.equal(still.batch(order, stream(0, "a"))[0], plain)
    assert not torch.equal(flipped.batch(order, stream(0, "a"))[0], plain)
    assert torch.equal(next(iter(flipped.evaluate(10)))[0], plain)


def test_means_of_another_number_of_channels_are_refused():
    with pytest.raises(ConfigError, match="has 3 numbers, but sample has 1 channels"):
        load_problem(data_config(mean=(0.5,) * 3, std=(0.5,) * 3), CPU)


TEXT = "paper: sparsevit\ndata: {name: sample, mean: [0.5], std: [0.25]}\nmodel: {arch: s0}\nrecipe: {name: ours}\n"
TEXT += "epochs: 1\nbatch_size: 8\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [("prune.ratios=[0.5, 1]", "1 is an integer; a ratio is a fraction, write 1.0"), ("prune.ratios=[1.5]", "above 1"),
     ("prune.ratios=[-0.1]", "below 0"), ("method=papr", "did you mean 'paper'"), ("select=best", "held-out images"),
     ("prune.recover={pruners: [neurons], ratios: [0.5]}", "neither pruners nor removals"),
     ("prune.recover={pruners: [global_l1], ratios: [0.55]}", "at which global_l1 is not pruned"),
     ("data.std=[0.5, 0.5]", "one number a channel"), ("prune.set=all", "authors")],
)  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused_in_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as found:
        parse(TEXT, Config, [override])
    assert "\n" not in str(found.value)


def test_the_arm_called_null_may_be_written_as_yaml_would_have_it():
    for text in ("method=null", "method='null'", "method=~"):
        assert parse(TEXT, Config, [text]).method == "null"
    assert parse(TEXT, Config, ["method=none"]).method == "none"
