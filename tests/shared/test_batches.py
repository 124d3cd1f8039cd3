import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shared.batches import (
    Files,
    Resident,
    _random_box,
    augmentations,
    epoch_order,
    random_crop,
    random_flip,
    resize_mean,
    split_batches,
)
from shared.data import load_list
from shared.errors import ConfigError, DataError

SOURCE = Path(os.environ.get("DATA_SOURCE", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(n, c=3, size=32, seed=0):
    return torch.randint(0, 256, (n, c, size, size), dtype=torch.uint8, generator=seeded(seed))


def normalised(images):
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    return (images / 255 - mean) / std


# ------------------------------------------------------------------------------------------------ order and batches


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own():
    generator = seeded()
    first, second = epoch_order(100, generator), epoch_order(100, generator)
    assert first.sort().values.tolist() == list(range(100))
    assert not torch.equal(first, second)
    assert torch.equal(first, epoch_order(100, seeded()))


@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 5))
def test_batches_lose_no_sample_and_the_last_is_not_too_small(n, size, min_last):
    batches = split_batches(torch.arange(n), size, min_last)
    assert [i for batch in batches for i in batch.tolist()] == list(range(n))
    assert all(len(batch) == size for batch in batches[:-1])
    if len(batches) > 1:
        assert len(batches[-1]) >= min(min_last, size)


def test_a_trailing_single_sample_joins_the_batch_before():
    assert [len(b) for b in split_batches(torch.arange(17), 8)] == [8, 9]
    assert [len(b) for b in split_batches(torch.arange(18), 8)] == [8, 8, 2]
    assert [len(b) for b in split_batches(torch.arange(1), 8)] == [1]


# ------------------------------------------------------------------------------------------------ augmentation


def crop_by_hand(image, dy, dx, padding):
    c, h, w = image.shape
    padded = torch.zeros(c, h + 2 * padding, w + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + h, padding : padding + w] = image
    return padded[:, dy : dy + h, dx : dx + w]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_crop_equals_the_same_crop_one_image_at_a_time(dtype):
    images, padding = noise(20).to(dtype)[:, :, :, :24], 3  # not square, so that rows and columns cannot be mixed up
    found = random_crop(images, padding, seeded(5))
    offsets = torch.randint(2 * padding + 1, (2, 20, 1), generator=seeded(5)).squeeze(2)
    expected = [crop_by_hand(image, y, x, padding) for image, (y, x) in zip(images, offsets.T.tolist(), strict=True)]
    assert found.dtype == dtype
    assert torch.equal(found, torch.stack(expected))


def test_every_crop_offset_is_drawn_equally_often_and_rows_apart_from_columns():
    n, padding = 20_000, 2
    # Each pixel tells its own place (from 1, so that the padding's 0 is told apart): the centre tells the offset.
    images = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(n, -1, -1, -1)
    counts = random_crop(images, padding, seeded())[:, 0, 2, 2].long().bincount(minlength=26)[1:].double()
    expected = n / 25
    assert len(counts) == 25
    assert ((counts - expected) ** 2 / expected).sum() < 51.2  # chi-square, 24 degrees of freedom: 0.1 %


def test_images_of_one_batch_get_different_crops_and_flips():
    images = noise(1).expand(64, -1, -1, -1)
    assert len(random_crop(images, 4, seeded()).flatten(1).unique(dim=0)) > 30
    assert len(random_flip(images, seeded()).flatten(1).unique(dim=0)) == 2


def test_a_crop_without_padding_changes_nothing():
    images = noise(4)
    assert torch.equal(random_crop(images, 0, seeded()), images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_half_of_the_images_are_mirrored_left_to_right_and_the_others_untouched(dtype):
    images = noise(4000, c=1, size=4).to(dtype)
    found = random_flip(images, seeded())
    same = (found == images).flatten(1).all(1)
    mirrored = (found == images.flip(3)).flatten(1).all(1)
    assert found.dtype == dtype
    assert (same | mirrored).all()
    assert 1850 < int(mirrored.sum()) < 2150  # 4.7 standard deviations
    changes = int((mirrored[1:] != mirrored[:-1]).sum())
    assert 1850 < changes < 2150  # neighbours are independent


def test_augmentations_follow_their_generator_and_no_other():
    images = noise(16)
    first = random_crop(images, 4, seeded(1))
    torch.manual_seed(123)
    assert torch.equal(first, random_crop(images, 4, seeded(1)))
    assert not torch.equal(first, random_crop(images, 4, seeded(2)))


def test_augmentations_are_applied_in_the_order_given():
    images, (crop, flip) = noise(8), augmentations(("crop", "flip"), padding=2)
    generator, batches = seeded(3), Resident(images, torch.arange(8), MEAN, STD, augmentations(("crop", "flip"), 2))
    found, _ = batches.batch(torch.arange(8), seeded(3))
    assert torch.allclose(found, normalised(flip(crop(images, generator), generator)), atol=1e-6)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ConfigError, match="there is no 'rotate'; known are crop, flip"):
        augmentations(("crop", "rotate"))


def test_resize_mean_gives_the_rounded_mean_of_each_block():
    images = noise(3, c=2, size=28)
    found = resize_mean(images, 14)
    expected = images.view(3, 2, 14, 2, 14, 2).double().mean(dim=(3, 5)).round()
    assert found.dtype == torch.uint8
    assert torch.equal(found.double(), expected)
    assert torch.equal(resize_mean(images, 28), images)


def test_resize_mean_keeps_the_order_over_its_slices():
    images = torch.arange(5000).remainder(251).byte().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    assert torch.equal(resize_mean(images, 1), images[:, :, :1, :1])


@pytest.mark.parametrize("size", [0, 15, 56])
def test_resize_mean_refuses_a_size_that_does_not_divide(size):
    with pytest.raises(DataError, match="28 x 28 pixels cannot be averaged"):
        resize_mean(noise(1, size=28), size)


# ------------------------------------------------------------------------------------------------ resident


def test_a_resident_batch_is_normalised_and_keeps_its_labels():
    images = noise(10)
    batches = Resident(images, torch.arange(10), MEAN, STD)
    found, labels = batches.batch(torch.tensor([7, 2]), seeded())
    assert found.dtype == torch.float32
    assert labels.tolist() == [7, 2]
    assert torch.allclose(found, normalised(images[[7, 2]]), atol=1e-6)


def test_a_resident_set_is_never_changed_by_its_batches():
    images = noise(10)
    batches = Resident(images.clone(), torch.arange(10), MEAN, STD, augmentations(("crop", "flip")))
    for indices in split_batches(epoch_order(10, seeded()), 4):
        batches.batch(indices, seeded())[0].zero_()
    assert torch.equal(batches.images, images)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_evaluation_sees_every_image_in_order_without_augmentation(batch_size):
    images = noise(20)
    batches = Resident(images, torch.arange(20), MEAN, STD, augmentations(("crop", "flip")))
    parts, labels = zip(*batches.evaluate(batch_size), strict=True)
    assert torch.allclose(torch.cat(parts), normalised(images), atol=1e-6)
    assert torch.cat(labels).tolist() == list(range(20))


def test_prefetching_a_resident_set_gives_its_batches():
    batches = Resident(noise(20), torch.arange(20), MEAN, STD, augmentations(("crop",)))
    order = split_batches(epoch_order(20, seeded()), 6)
    images, labels = batches.batch(torch.cat(order), seeded(4))  # all are augmented in one go
    found = list(batches.prefetch(order, seeded(4)))
    assert [len(part) for part, _ in found] == [len(part) for part in order]
    assert torch.equal(torch.cat([part for part, _ in found]), images)
    assert torch.equal(torch.cat([part for _, part in found]), labels)


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def folder(tmp_path):
    rng, lines = np.random.default_rng(0), []
    for i, (width, height) in enumerate([(40, 30), (30, 40), (33, 33), (64, 20), (20, 64), (50, 41)] * 2):
        target = tmp_path / f"class{i % 3}"
        target.mkdir(exist_ok=True)
        smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
        (smooth.convert("L") if i == 4 else smooth).save(target / f"{i}.png")
        lines.append(f"class{i % 3}/{i}.png {i % 3}\n")
    (tmp_path / "train.txt").write_text("".join(sorted(lines)))
    return load_list(tmp_path / "train.txt", tmp_path)


def files(folder, workers=2, train=True, size=16):
    return Files(folder, size, workers, train, MEAN, STD, CPU)


def pixels(batch):
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    return ((batch * std + mean) * 255).round().byte()


@pytest.mark.parametrize("train", [True, False])
def test_decoding_does_not_depend_on_the_workers_or_on_reading_ahead(folder, train):
    order = split_batches(epoch_order(12, seeded()), 3)
    expected, generator = [], seeded(9)
    for indices in order:
        expected.append(files(folder, 0, train).batch(indices, generator))
    for workers in (0, 1, 3):
        used = seeded(9)
        found = list(files(folder, workers, train).prefetch(order, used))
        assert len(found) == len(order)
        for (images, labels), (right, names) in zip(found, expected, strict=True):
            assert torch.equal(images, right)
            assert torch.equal(labels, names)
        assert torch.equal(used.get_state(), generator.get_state())


def test_prefetch_takes_its_seeds_at_once(folder):
    generator = seeded()
    iterator = files(folder).prefetch([torch.arange(3), torch.arange(3)], generator)
    state = generator.get_state()
    (first, _), (second, _) = iterator
    assert torch.equal(generator.get_state(), state)
    assert not torch.equal(first, second)


def test_a_loop_that_stops_early_can_start_again(folder):
    batches = files(folder)
    order = list(torch.arange(12).split(2))
    next(batches.prefetch(order, seeded()))
    assert len(list(batches.prefetch(order, seeded()))) == 6


@pytest.mark.parametrize("size", [16, 24])
def test_evaluation_equals_torchvision(folder, size):
    from torchvision.transforms import v2

    reference = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])
    found = torch.cat([pixels(images) for images, _ in files(folder, train=True, size=size).evaluate(5)])
    expected = torch.stack([reference(Image.open(path).convert("RGB")) for path in folder.paths])
    assert torch.equal(found, expected)


def test_training_crops_equal_torchvisions_resized_crop_of_the_same_box(folder):
    from torchvision.transforms.v2 import functional

    batches = files(folder, workers=0)
    indices = torch.arange(12)
    seed = int(torch.randint(2**62, (), generator=seeded(2)))
    found = pixels(batches.batch(indices, seeded(2))[0])
    for image, path, draws in zip(found, folder.paths, batches._draws(12, seed), strict=True):
        original = Image.open(path).convert("RGB")
        left, top, right, bottom = _random_box(*original.size, draws[:10].tolist())
        expected = functional.resized_crop(original, top, left, bottom - top, right - left, [16, 16])
        if draws[10, 0] < 0.5:
            expected = functional.hflip(expected)
        assert torch.equal(image, functional.pil_to_tensor(expected))


def test_random_boxes_lie_in_the_image_and_cover_areas_and_ratios_evenly():
    width, height, n = 400, 300, 4000
    draws = torch.rand(n, 10, 4, generator=seeded(), dtype=torch.float64).tolist()
    boxes = torch.tensor([_random_box(width, height, tries) for tries in draws]).double()
    left, top, right, bottom = boxes.T
    assert left.min() == 0
    assert top.min() == 0
    assert right.max() == width
    assert bottom.max() == height
    area, ratio = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    assert 0.075 < area.min() < 0.085
    assert area.max() < 1.01
    assert area.max() > 0.95
    assert ratio.min() > 0.73
    assert ratio.max() < 1.36
    # torchvision's own sampler is the reference for the means (4 standard errors).
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    sampler = RandomResizedCrop(8)
    blank = torch.zeros(1, height, width)
    reference = torch.tensor(
        [[p["top"], p["left"], p["height"] * p["width"], p["width"] / p["height"]]
         for p in (sampler.make_params([blank]) for _ in range(n))]
    ).double()  # fmt: skip
    mine = torch.stack([top, left, area * width * height, ratio], dim=1)
    error = (mine.std(0) ** 2 / n + reference.std(0) ** 2 / n).sqrt()
    assert ((mine.mean(0) - reference.mean(0)).abs() < 4 * error).all()


@pytest.mark.parametrize(("size", "box"), [((100, 10), (43, 0, 56, 10)), ((10, 100), (0, 43, 10, 56))])
def test_an_image_too_long_for_any_try_gives_the_largest_centred_box(size, box):
    assert _random_box(*size, [[1.0, 0.5, 0.5, 0.5]] * 10) == box


def test_images_of_one_batch_get_different_training_views(folder):
    images, labels = files(folder).batch(torch.zeros(32, dtype=torch.int64), seeded())
    assert len(images.flatten(1).unique(dim=0)) > 25
    assert labels.tolist() == [0] * 32


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_open_stops_the_batch_with_its_name(folder, workers):
    folder.paths[5].write_bytes(b"no image")
    with pytest.raises(DataError, match="not a readable image") as caught:
        list(files(folder, workers).prefetch([torch.arange(12)], seeded()))
    assert str(folder.paths[5]) in str(caught.value)


@pytest.mark.skipif(not (SOURCE / "tiny-imagenet-sample").is_dir(), reason="the image sample is not here")
def test_real_jpegs_with_grey_ones_among_them_are_read():
    root = SOURCE / "tiny-imagenet-sample"
    listed = load_list(root / "val.txt", root, num_classes=10)
    labels = torch.cat([labels for _, labels in files(listed, train=False, size=56).evaluate(64)])
    assert torch.equal(labels, listed.labels)
