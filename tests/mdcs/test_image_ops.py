import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from mdcs import image_ops as ops
from shared.errors import ConfigError, DataError
from tests.mdcs.pictures import from_pil, photos, seeded, to_pil

SHAPES = [(3, 32, 32), (1, 28, 28), (3, 15, 21), (1, 64, 40)]
SPREAD = torch.tensor([-1.0, -0.62, -0.3, -0.05, 0.0, 0.05, 0.31, 0.62, 1.0], dtype=torch.float64)  # of an argument
GEOMETRY = [
    ("Rotate", ops.rotate, 30 * SPREAD),
    ("ShearX", ops.shear_x, 0.3 * SPREAD),
    ("ShearY", ops.shear_y, 0.3 * SPREAD),
    ("TranslateX", ops.translate_x, (14 * SPREAD).trunc()),
    ("TranslateY", ops.translate_y, (14 * SPREAD).trunc()),
]
ENHANCERS = [
    ("Brightness", ops.brightness),
    ("Color", ops.color),
    ("Contrast", ops.contrast),
    ("Sharpness", ops.sharpness),
]


def difference(found, images, reference, *arguments):
    """Mean absolute difference in grey levels from reference(PIL image, arguments of the image)."""
    rows = zip(images, *arguments, strict=True)
    expected = torch.stack([from_pil(reference(to_pil(image), *row)) for image, *row in rows])
    assert found.shape == images.shape
    assert found.dtype == torch.uint8
    return float((found.int() - expected.int()).abs().float().mean())


# ---------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("mode", "most"), [("nearest", 0), ("bilinear", 0.02), ("bicubic", 1.2)])
@pytest.mark.parametrize(("name", "operation", "arguments"), GEOMETRY, ids=[name for name, *_ in GEOMETRY])
def test_geometry_is_that_of_torchvision_on_pil_images(name, operation, arguments, mode, most, shape):
    images, fill = photos(len(arguments), *shape), [124, 116, 104][: shape[0]]
    found = operation(images, arguments, fill, mode)

    def reference(image, argument):
        return _apply_op(image, name, float(argument), InterpolationMode(mode), fill)

    assert difference(found, images, reference, arguments) <= most


@pytest.mark.parametrize(("mode", "most"), [("nearest", 0), ("bilinear", 0.02), ("bicubic", 1.2)])
def test_any_affine_map_is_that_of_pil(mode, most):
    images = photos(12)
    matrix = torch.tensor([1, 0, 0, 0, 1, 0]) + torch.randn(12, 6, generator=seeded()) * torch.tensor([0.2, 0.2, 4] * 2)
    codes = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}

    def reference(image, row):
        return image.transform(image.size, Image.AFFINE, row.tolist(), codes[mode], fillcolor=(1, 2, 3))

    assert difference(ops.affine(images, matrix, (1, 2, 3), mode), images, reference, matrix) <= most


def test_a_fraction_of_a_pixel_shifts_as_pil_does():
    images, shift = photos(9), 9.7 * SPREAD
    for mode, code, most in (("nearest", Image.NEAREST, 0), ("bilinear", Image.BILINEAR, 0.02)):
        found = ops.translate_x(images, -shift, 7, mode)
        assert (
            difference(
                found,
                images,
                lambda image, x, code=code: image.transform(
                    image.size, Image.AFFINE, (1, 0, float(x), 0, 1, 0), code, fillcolor=(7, 7, 7)
                ),
                shift,
            )
            <= most
        )


@pytest.mark.parametrize("mode", ops.MODES)
def test_an_even_image_stays_even_and_the_fill_comes_in_where_nothing_is(mode):
    images = torch.full((2, 3, 20, 20), 100, dtype=torch.uint8)
    turned = ops.rotate(images, torch.tensor([0.0, 30.0]), (9, 8, 7), mode)
    assert bool((turned[0] == 100).all())
    assert turned[1, :, 0, 0].tolist() == [9, 8, 7]
    assert [sorted(channel.unique().tolist()) for channel in turned[1]] == [[9, 100], [8, 100], [7, 100]]


def test_quarter_turns_are_exact():
    images = photos(4, h=32, w=32)[:1].repeat(4, 1, 1, 1)
    turned = ops.rotate(images, torch.tensor([0.0, 90, 180, -90]))
    for k, image in zip((0, 1, 2, 3), turned, strict=True):
        assert torch.equal(image, torch.rot90(images[0], k, (1, 2)))


def test_a_colour_to_fill_with_becomes_grey_on_grey_images():
    images = photos(1, c=1)
    shifted = ops.translate_x(images, torch.tensor([5.0]), (255, 0, 0))
    assert shifted[0, 0, :, :5].unique().tolist() == [76]  # PIL's luma of red
    assert torch.equal(shifted[..., 5:], images[..., :-5])


@pytest.mark.parametrize("fill", [(1, 2), 256, (-1, 0, 0), ()])
def test_a_fill_that_does_not_fit_is_named(fill):
    with pytest.raises(ConfigError, match="fill") as error:
        ops.rotate(photos(2), torch.zeros(2), fill)
    assert "\n" not in str(error.value)


def test_an_unknown_interpolation_is_named():
    with pytest.raises(ConfigError, match="'cubic'; known are nearest, bilinear, bicubic"):
        ops.rotate(photos(2), torch.zeros(2), 0, "cubic")


def test_many_images_are_sampled_in_pieces_without_a_seam(monkeypatch):
    images, angle = photos(11), torch.linspace(-30, 30, 11)
    whole = ops.rotate(images, angle)
    monkeypatch.setattr(ops, "_CHUNK", 3 * 32 * 32)
    assert torch.equal(ops.rotate(images, angle), whole)


# ------------------------------------------------------------------------------------------------------------- colour


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "operation"), ENHANCERS, ids=[name for name, _ in ENHANCERS])
def test_enhancers_are_those_of_pil(name, operation, shape):
    factors = 1 + 0.9 * SPREAD
    images = photos(len(factors), *shape)

    def reference(image, factor):
        return getattr(ImageEnhance, name)(image).enhance(float(factor))

    assert difference(operation(images, factors), images, reference, factors) <= 0.02


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tables_of_values_are_those_of_pil(shape):
    images, c = photos(9, *shape), shape[0]
    bits = torch.arange(9).clamp(min=1)
    threshold = torch.tensor([0, 28.4, 56.7, 100, 128, 200.5, 254.9, 255, 256])
    addend = torch.arange(0, 117, 14)[:9]

    def add(image, value):
        return image.point([min(255, i + int(value)) if i < 128 else i for i in range(256)] * c)

    assert difference(ops.posterize(images, bits), images, lambda i, v: ImageOps.posterize(i, int(v)), bits) == 0
    found = ops.solarize(images, threshold)
    assert difference(found, images, lambda i, v: ImageOps.solarize(i, float(v)), threshold) == 0
    assert difference(ops.solarize_add(images, addend), images, add, addend) == 0
    assert difference(ops.invert(images), images, ImageOps.invert) == 0
    assert difference(ops.equalize(images), images, ImageOps.equalize) == 0
    assert difference(ops.autocontrast(images), images, ImageOps.autocontrast) <= 0.02


@pytest.mark.parametrize("operation", [ops.autocontrast, ops.equalize])
def test_channels_of_one_or_two_values_are_treated_as_pil_does(operation):
    images = torch.full((4, 3, 16, 16), 90, dtype=torch.uint8)
    images[1, 0, :8], images[2, :, 0, 0], images[3, 1, 3:] = 200, 91, 0
    reference = getattr(ImageOps, operation.__name__)
    assert difference(operation(images), images, reference) == 0
    assert torch.equal(operation(images)[0], images[0])


def test_both_ways_to_count_values_agree():
    rows = photos(5).reshape(15, -1)
    rows[0], rows[1], rows[2, ::2] = 0, 255, 255
    counts = ops._histogram(rows)
    assert torch.equal(ops._histogram_by_sort(rows), counts)
    assert counts.sum(1).tolist() == [1024] * 15
    assert torch.equal(counts[7], torch.stack([(rows[7] == v).sum() for v in range(256)]))


def test_adding_to_dark_pixels_never_wraps_around():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    added = ops.solarize_add(images, torch.tensor([255])).flatten().tolist()
    assert added == [255] * 128 + list(range(128, 256))


def test_sharpness_leaves_images_without_an_inside_alone():
    for h, w in ((1, 9), (2, 2), (9, 2)):
        images = photos(1, h=9, w=9)[..., :h, :w]
        assert torch.equal(ops.sharpness(images, torch.tensor([1.9])), images)


# ---------------------------------------------------------------------------------------------------------------- all


def calls():
    ones = torch.ones(3)
    yield from ((name, lambda i, f=f: f(i, 5 * ones)) for name, f, _ in GEOMETRY)
    yield from ((name, lambda i, f=f: f(i, 1.5 * ones)) for name, f in ENHANCERS)
    yield "Rotate bicubic", lambda i: ops.rotate(i, 5 * ones, 0, "bicubic")
    yield "Posterize", lambda i: ops.posterize(i, 4 * ones)
    yield "Solarize", lambda i: ops.solarize(i, 100 * ones)
    yield "SolarizeAdd", lambda i: ops.solarize_add(i, 50 * ones)
    yield from ((f.__name__, f) for f in (ops.autocontrast, ops.equalize, ops.invert))


@pytest.mark.parametrize(("name", "call"), list(calls()), ids=[name for name, _ in calls()])
def test_operations_leave_their_input_alone_and_take_any_memory_layout(name, call):
    images = photos(3, seed=4)
    before = images.clone()
    found = call(images)
    assert torch.equal(images, before)
    assert found.data_ptr() != images.data_ptr()
    assert not torch.equal(found, images)
    assert torch.equal(call(images.to(memory_format=torch.channels_last)), found)
    turned = call(images.transpose(2, 3))
    assert torch.equal(turned, call(images.transpose(2, 3).contiguous()))


@pytest.mark.parametrize(
    "images",
    [torch.rand(2, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(2, 4, 8, 8).byte(), torch.zeros(2).int()],
)
def test_other_images_than_uint8_batches_are_refused_in_one_line(images):
    with pytest.raises(DataError, match=r"uint8 \[B, 1 or 3, H, W\], got (float|u?int)") as error:
        ops.affine(images, torch.zeros(2, 6))
    assert "\n" not in str(error.value)
