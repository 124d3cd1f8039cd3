"""Two views of each training image: from the same pixels, in order, and the same bits wherever an epoch is entered."""

import numpy as np
import pytest
import torch
from PIL import Image

from mdcs import augment, views
from mdcs.views import FileViews, ResidentViews
from shared.batches import split_batches
from shared.data import FileSet
from shared.errors import DataError

CPU = torch.device("cpu")
MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.25, 0.4)


def invert(images, generator):
    return 255 - images


def keep(images, generator):
    return images


@pytest.fixture
def marked(monkeypatch):
    """The name of a pair of views that a test can tell apart: the strong one is the negative of the weak one."""
    monkeypatch.setitem(augment.VIEWS, "marked", (keep, invert))
    return "marked"


def pixels(n=23, size=12):
    return torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def resident(kind, images=None):
    images = pixels() if images is None else images
    return ResidentViews(images, torch.arange(len(images)) % 7, MEAN, STD, kind)


def order(n=23, size=4):
    return split_batches(torch.randperm(n, generator=torch.Generator().manual_seed(1)), size)


def whole(batches, data, which="both", seed=0, names=("views", 0), first=0):
    return list(data.epoch(batches, which, seed, names, first))


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def normalised(images):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return (images.double() / 255 - mean) / std


# --- images in memory -------------------------------------------------------------------------------------------------


def test_both_views_are_the_image_itself_where_nothing_is_augmented():
    data, batches = resident("none"), order()
    for (images, _), indices in zip(whole(batches, data), batches, strict=True):
        weak, strong = images.chunk(2)
        assert torch.equal(weak, strong)
        assert torch.allclose(weak.double(), normalised(data.images[indices]), atol=1e-5)


def test_labels_come_once_an_image_in_the_order_of_the_batch():
    data, batches = resident("cifar"), order()
    for (images, labels), indices in zip(whole(batches, data), batches, strict=True):
        assert torch.equal(labels, data.labels[indices])
        assert images.shape == (2 * len(labels), 3, 12, 12)
        assert images.dtype == torch.float32


def test_weak_rows_come_first_and_strong_rows_of_the_same_images_follow(marked):
    data, batches = resident(marked), order()
    for (images, _), indices in zip(whole(batches, data), batches, strict=True):
        wanted = torch.cat([data.images[indices], 255 - data.images[indices]])
        assert torch.allclose(images.double(), normalised(wanted), atol=1e-5)


@pytest.mark.parametrize(("which", "change"), [("weak", keep), ("strong", invert)])
def test_one_view_alone_has_one_row_an_image(marked, which, change):
    data, batches = resident(marked), order()
    for (images, _), indices in zip(whole(batches, data, which), batches, strict=True):
        assert torch.allclose(images.double(), normalised(change(data.images[indices], None)), atol=1e-5)


@pytest.mark.parametrize("kind", ["cifar", "grey"])
def test_weak_and_strong_views_differ_from_each_other_and_from_the_image(kind):
    data = resident(kind, pixels(64, 32))
    ((images, _),) = whole([torch.arange(64)], data)
    weak, strong = images.chunk(2)
    plain = normalised(data.images).float()
    for left, right in ((weak, strong), (weak, plain), (strong, plain)):
        assert ((left - right).abs().amax(dim=(1, 2, 3)) > 0.1).sum() >= 60


@pytest.mark.parametrize("kind", ["cifar", "grey"])
def test_each_image_of_a_batch_and_each_group_of_batches_has_draws_of_its_own(kind, monkeypatch):
    monkeypatch.setattr(views, "GROUP_IMAGES", 8)
    data = resident(kind)
    made = torch.cat([images.chunk(2)[0] for images, _ in whole([torch.full((8,), 3)] * 4, data)])
    assert len(torch.unique(made.flatten(1), dim=0)) > 24


@pytest.mark.parametrize("which", ["weak", "strong", "both"])
@pytest.mark.parametrize("kind", ["cifar", "grey"])
def test_an_epoch_entered_at_any_batch_goes_on_to_the_bit(kind, which, monkeypatch):
    monkeypatch.setattr(views, "GROUP_IMAGES", 9)  # two batches a group: entered on and between their borders
    data, batches = resident(kind), order()
    assert len(batches) == 6
    all_batches = whole(batches, data, which)
    for first in range(len(batches) + 1):
        assert same(whole(batches, data, which, first=first), all_batches[first:])


def test_an_epoch_can_be_entered_where_the_last_batch_is_the_largest(monkeypatch):
    monkeypatch.setattr(views, "GROUP_IMAGES", 10)
    data, batches = resident("cifar", pixels(21)), order(21)
    assert [len(part) for part in batches] == [4, 4, 4, 4, 5]
    all_batches = whole(batches, data)
    assert [len(labels) for _, labels in all_batches] == [4, 4, 4, 4, 5]
    for first in range(len(batches)):
        assert same(whole(batches, data, first=first), all_batches[first:])


def test_the_last_batch_may_be_smaller_and_one_may_be_larger_than_a_group(monkeypatch):
    monkeypatch.setattr(views, "GROUP_IMAGES", 3)
    data, batches = resident("cifar"), order()
    assert [len(labels) for _, labels in whole(batches, data)] == [4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize("kind", ["cifar", "grey"])
def test_views_depend_on_seed_and_names_and_on_nothing_else(kind):
    data, batches = resident(kind), order()
    first = whole(batches, data)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert same(whole(batches, data), first)
    assert torch.equal(torch.get_rng_state(), before)
    for seed, names in ((1, ("views", 0)), (0, ("views", 1))):
        other = whole(batches, data, seed=seed, names=names)
        assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))


def test_the_images_in_memory_stay_as_they_are():
    data = resident("cifar")
    whole(order(), data)
    assert torch.equal(data.images, pixels())


# --- images in files --------------------------------------------------------------------------------------------------

N = 9


@pytest.fixture(scope="module")
def image_files(tmp_path_factory):
    """Nine files of several kinds and sizes, one grey-scale: red rises to the right, blue tells the image."""
    folder, paths = tmp_path_factory.mktemp("files"), []
    for i in range(N):
        height, width = (40, 60) if i % 2 else (64, 48)
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 0] = np.linspace(0, 250, width)
        image[..., 2] = 25 * i
        grey = i == 4
        picture = Image.fromarray(image[..., 0] if grey else image)
        paths.append(folder / f"{i}.{'jpg' if i in (2, 4) else 'png'}")
        picture.save(paths[-1], **({"quality": 95} if i in (2, 4) else {}))
    return FileSet(tuple(paths), torch.arange(N) % 4, tuple("abcd"), "files", "train", "0")


@pytest.fixture(scope="module")
def plain_files(tmp_path_factory):
    """Files of one colour each: a crop of them tells no place."""
    folder, paths = tmp_path_factory.mktemp("plain"), []
    for i in range(N):
        paths.append(folder / f"{i}.png")
        Image.new("RGB", (30 + i, 40), (20 * i, 255 - 20 * i, 7)).save(paths[-1])
    return FileSet(tuple(paths), torch.arange(N) % 4, tuple("abcd"), "files", "train", "0")


def from_files(files, kind, workers=2, size=16):
    return FileViews(files, size, workers, MEAN, STD, CPU, kind)


def test_both_views_of_a_file_are_of_the_same_image_and_labels_are_in_order(plain_files):
    data, batches = from_files(plain_files, "none"), order(N)
    for (images, labels), indices in zip(whole(batches, data), batches, strict=True):
        weak, strong = images.chunk(2)
        assert torch.equal(weak, strong)
        assert torch.equal(labels, plain_files.labels[indices])
        colours = torch.stack([20 * indices, 255 - 20 * indices, torch.full_like(indices, 7)], dim=1)
        assert torch.allclose(weak.double(), normalised(colours[:, :, None, None]).expand_as(weak), atol=1e-5)


def test_weak_rows_of_files_come_first_and_strong_rows_follow(plain_files, marked):
    data, batches = from_files(plain_files, marked), order(N)
    for which, changes in (("both", (keep, invert)), ("weak", (keep,)), ("strong", (invert,))):
        for (images, _), indices in zip(whole(batches, data, which), batches, strict=True):
            colours = torch.stack([20 * indices, 255 - 20 * indices, torch.full_like(indices, 7)], dim=1)
            wanted = normalised(torch.cat([change(colours, None) for change in changes])[:, :, None, None])
            assert images.shape == (len(changes) * len(indices), 3, 16, 16)
            assert torch.allclose(images.double(), wanted.expand_as(images), atol=1e-5)


def test_the_two_views_of_a_file_are_cut_apart_and_of_the_same_image(image_files):
    ((images, _),) = whole([torch.arange(N)], from_files(image_files, "none"))
    weak, strong = images.chunk(2)
    apart = (weak - strong)[:, 0].abs().amax(dim=(1, 2)) > 0.05
    assert apart.all(), "red rises to the right: crops of other places differ"
    coloured = [i for i in range(N) if i != 4]
    assert torch.allclose(weak[coloured, 2].mean(dim=(1, 2)), strong[coloured, 2].mean(dim=(1, 2)), atol=0.05)


def test_a_grey_scale_file_has_three_equal_channels(image_files):
    data = from_files(image_files, "none")
    ((images, _),) = whole([torch.tensor([4])], data, "weak")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    back = images[0] * std + mean
    assert torch.allclose(back[0], back[1], atol=1e-5)
    assert torch.allclose(back[0], back[2], atol=1e-5)
    assert back.amax() - back.amin() > 0.05


@pytest.mark.parametrize("kind", ["photo", "inaturalist"])
def test_weak_and_strong_views_of_files_differ(image_files, kind):
    ((images, _),) = whole([torch.arange(N)], from_files(image_files, kind))
    weak, strong = images.chunk(2)
    assert ((weak - strong).abs().amax(dim=(1, 2, 3)) > 0.05).all()


@pytest.mark.parametrize("which", ["weak", "both"])
def test_the_number_of_workers_changes_no_bit(image_files, which):
    made = [whole(order(N), from_files(image_files, "photo", workers), which) for workers in (0, 1, 2, 5)]
    assert all(same(made[0], other) for other in made[1:])


@pytest.mark.parametrize("which", ["weak", "strong", "both"])
def test_an_epoch_of_files_entered_at_any_batch_goes_on_to_the_bit(image_files, which):
    data, batches = from_files(image_files, "photo"), order(N, 2)
    all_batches = whole(batches, data, which)
    assert [len(labels) for _, labels in all_batches] == [2, 2, 2, 3]
    for first in range(len(batches) + 1):
        assert same(whole(batches, data, which, first=first), all_batches[first:])


def test_views_of_files_depend_on_seed_and_names_and_batch_and_on_nothing_else(image_files):
    data, batches = from_files(image_files, "none"), [torch.arange(4)] * 2
    first = whole(batches, data)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert same(whole(batches, data), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first[0][0], first[1][0])
    for seed, names in ((1, ("views", 0)), (0, ("views", 1))):
        other = whole(batches, data, seed=seed, names=names)
        assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))


def test_the_last_batch_of_files_may_be_smaller(image_files):
    assert [len(labels) for _, labels in whole(order(N, 6), from_files(image_files, "none"))] == [6, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(image_files, tmp_path, workers):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    files = FileSet((image_files.paths[0], bad), torch.tensor([0, 1]), ("a", "b"), "files", "train", "0")
    with pytest.raises(DataError, match=r"bad\.png: not a readable image"):
        whole([torch.arange(2)], from_files(files, "none", workers))
