"""Every view and every part of one: shapes, draws of each image's own, seeds, and what is refused."""

from functools import partial

import pytest
import torch

from mdcs.augment import (
    VIEWS,
    auto_augment,
    color_jitter,
    cutout,
    rand_augment,
    random_affine,
    random_rotation,
)
from shared.batches import random_crop, random_flip
from shared.errors import DataError
from tests.mdcs.pictures import photos, seeded

STRONG = [(name, strong) for name, (_, strong) in VIEWS.items() if name != "none"]


WEAK = [("cifar weak", VIEWS["cifar"][0]), ("photo weak", VIEWS["photo"][0])]


PARTS = [
    ("auto_augment", auto_augment),
    ("rand_augment", rand_augment),
    ("color_jitter", color_jitter),
    ("random_rotation", random_rotation),
    ("random_affine", random_affine),
    ("cutout", partial(cutout, size=16)),
]


ALL = PARTS + WEAK + STRONG


# --------------------------------------------------------------------------------------------------------- pipelines


def test_there_are_views_for_every_kind_of_data():
    assert list(VIEWS) == ["cifar", "grey", "photo", "inaturalist", "none"]
    images = photos(4)
    for view in (*VIEWS["none"], VIEWS["inaturalist"][0]):
        assert torch.equal(view(images, seeded()), images)


@pytest.mark.parametrize("name", ["cifar", "grey"])
@pytest.mark.parametrize("size", [28, 32])
def test_the_views_are_their_parts_in_order(name, size):
    images, (weak, strong) = photos(40, 3, size, size), VIEWS[name]
    g = seeded(2)
    moved = random_flip(random_crop(images, size // 8, g), g)
    state = g.get_state()
    assert torch.equal(weak(images, seeded(2)), random_rotation(moved, g, 15))
    changed = (auto_augment if name == "cifar" else random_affine)(moved, g.set_state(state))
    assert torch.equal(strong(images, seeded(2)), cutout(changed, g, size // 2))


def test_the_strong_view_of_photos_is_randaugment_after_the_jitter():
    images, g = photos(40), seeded(2)
    expected = rand_augment(color_jitter(images, g, 0.4, 0.4, 0.4), g, (124, 116, 104))
    assert VIEWS["photo"][1] is VIEWS["inaturalist"][1]
    assert torch.equal(VIEWS["photo"][1](images, seeded(2)), expected)
    assert torch.equal(VIEWS["photo"][0](images, seeded(2)), color_jitter(images, seeded(2), 0.4, 0.4, 0.4))


def test_the_grey_strong_view_only_moves_pixels():
    images = photos(64, 1, 28, 28)
    assert set(VIEWS["grey"][1](images, seeded()).unique().tolist()) <= {0, *images.unique().tolist()}
    two = torch.full((64, 1, 28, 28), 200, dtype=torch.uint8)
    assert VIEWS["grey"][1](two, seeded()).unique().tolist() == [0, 200]


@pytest.mark.parametrize(("name", "call"), ALL, ids=[name for name, _ in ALL])
@pytest.mark.parametrize(
    ("n", "c", "h", "w"), [(1, 3, 14, 14), (7, 1, 28, 28), (3, 3, 33, 21), (2, 3, 224, 224), (0, 3, 8, 8)]
)
def test_shape_and_type_stay_for_any_batch(name, call, n, c, h, w):
    images = photos(max(n, 1), c, h, w)[:n]
    found = call(images, seeded())
    assert found.shape == images.shape
    assert found.dtype == torch.uint8


@pytest.mark.parametrize(("name", "call"), ALL, ids=[name for name, _ in ALL])
def test_each_image_has_draws_of_its_own(name, call):
    images = photos(1).expand(100, 3, 32, 32)
    assert len(call(images, seeded()).flatten(1).unique(dim=0)) > 30


@pytest.mark.parametrize(("name", "call"), ALL, ids=[name for name, _ in ALL])
def test_a_seed_fixes_every_bit_and_another_one_gives_other_images(name, call):
    images = photos(60)
    before, state = images.clone(), torch.get_rng_state()
    found = call(images, seeded(5))
    assert torch.equal(call(images, seeded(5)), found)
    assert not torch.equal(call(images, seeded(6)), found)
    assert not torch.equal(found, images)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    generator = seeded(5)
    assert torch.equal(call(images, generator), found)
    assert not torch.equal(call(images, generator), found)


@pytest.mark.parametrize(("name", "call"), ALL, ids=[name for name, _ in ALL])
def test_no_image_depends_on_its_neighbours_content(name, call):
    images, others = photos(60), photos(60, seed=1)
    others[::7] = images[::7]
    assert torch.equal(call(images, seeded())[::7], call(others, seeded())[::7])


@pytest.mark.parametrize(("name", "call"), ALL, ids=[name for name, _ in ALL])
def test_no_pixel_is_read_back_by_the_host(name, call):
    # Tensors on "meta" have no content: whatever asks for a value of one, as `item` and masks do, fails.
    found = call(torch.empty(40, 3, 32, 32, dtype=torch.uint8, device="meta"), seeded())
    assert found.shape == (40, 3, 32, 32)


@pytest.mark.parametrize(("name", "call"), ALL, ids=[name for name, _ in ALL])
def test_normalised_images_are_refused_in_one_line(name, call):
    with pytest.raises(DataError, match="before normalising") as error:
        call(torch.rand(2, 3, 32, 32), seeded())
    assert "\n" not in str(error.value)
