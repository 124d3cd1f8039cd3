"""Picture files of any size and mode become what a network takes; what is no picture is refused in one line."""

import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from shared import predict
from shared.errors import DataError
from shared.predict import check_image, predict_command, read_image

AS_IT_IS = {"centre": 1.0, "resample": "bilinear"}
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)


def saved(tmp_path, image, name="picture.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def with_alpha(values, alpha):
    channels = values if values.ndim == 3 else values[..., None]
    return np.concatenate([channels, np.full((8, 8, 1), alpha, np.uint8)], axis=-1)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (Image.fromarray(GREY), "picture.png"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "picture.png"),  # 16 bits
        (Image.fromarray(GREY.astype(np.int32) * 257), "picture.tiff"),
        (Image.fromarray(with_alpha(GREY, 255)), "picture.png"),
        (Image.fromarray(GREY).convert("P"), "picture.png"),
        (Image.fromarray(GREY).convert("RGB"), "picture.bmp"),
        (Image.fromarray(GREY).convert("RGBA"), "picture.webp"),
    ],
    ids=["L", "I;16", "I", "LA", "P", "RGB", "RGBA"],
)
def test_a_grey_picture_is_the_same_in_every_mode(tmp_path, image, name):
    path = saved(tmp_path, image, name, **({"lossless": True} if name.endswith("webp") else {}))
    assert read_image(path, 1, 8, AS_IT_IS).equal(torch.from_numpy(GREY)[None])
    assert read_image(path, 3, 8, AS_IT_IS).equal(torch.from_numpy(GREY).expand(3, 8, 8))


def test_the_colours_of_a_picture_are_its_channels(tmp_path):
    wanted = torch.from_numpy(COLOUR).permute(2, 0, 1)
    assert read_image(saved(tmp_path, Image.fromarray(COLOUR)), 3, 8, AS_IT_IS).equal(wanted)
    path = saved(tmp_path, Image.fromarray(COLOUR).convert("CMYK"), "picture.tiff")
    assert (read_image(path, 3, 8, AS_IT_IS).int() - wanted.int()).abs().max() <= 1
    grey = read_image(path, 1, 8, AS_IT_IS)[0].numpy()
    assert np.abs(grey - COLOUR @ [0.299, 0.587, 0.114]).max() < 2


@pytest.mark.parametrize(("values", "channels"), [(GREY, 1), (COLOUR, 3)], ids=["LA", "RGBA"])
def test_what_is_transparent_is_white(tmp_path, values, channels):
    clear = read_image(saved(tmp_path, Image.fromarray(with_alpha(values, 0))), channels, 8, AS_IT_IS)
    assert bool((clear == 255).all())
    half = read_image(saved(tmp_path, Image.fromarray(with_alpha(values, 128))), channels, 8, AS_IT_IS)
    assert half.float().mean() == pytest.approx((values.mean() + 255) / 2, abs=1.5)


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.zeros((8, 8), np.uint8), "P"), "picture.gif", transparency=0)
    assert bool((read_image(path, 1, 8, AS_IT_IS) == 255).all())


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: turn by a quarter, clockwise
    path = saved(tmp_path, Image.fromarray(GREY), exif=turned)
    assert read_image(path, 1, 8, AS_IT_IS)[0].equal(torch.from_numpy(GREY).rot90(-1))


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (900, 700)])
def test_a_picture_of_any_size_fits(tmp_path, size):
    path = saved(tmp_path, Image.new("RGB", size, (10, 20, 30)))
    for preparation in (AS_IT_IS, {"centre": 0.875, "resample": "box"}):
        found = read_image(path, 3, 14, preparation)
        assert found.equal(torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 14, 14))


def test_the_middle_of_a_wide_picture_is_taken_and_shrunk_by_means_as_in_training(tmp_path):
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = GREY
    found = read_image(saved(tmp_path, Image.fromarray(wide)), 1, 4, {"centre": 1.0, "resample": "box"})
    means = torch.nn.functional.avg_pool2d(torch.from_numpy(GREY)[None].float(), 2)
    assert (found.float() - means).abs().max() <= 0.5


def test_the_middle_is_cut_out_and_what_is_small_is_enlarged_without_squares(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = saved(tmp_path, Image.fromarray(values))
    cut = read_image(path, 1, 14, {"centre": 0.875, "resample": "bilinear"})
    assert cut[0].equal(torch.from_numpy(values[1:15, 1:15]))
    large = np.array(Image.fromarray(values).resize((32, 32), Image.Resampling.BILINEAR))
    for resample in ("bilinear", "box"):
        assert np.array_equal(read_image(path, 1, 32, {"centre": 1.0, "resample": resample})[0], large)


@pytest.mark.parametrize("value", [-1, 70_000])
def test_whole_numbers_beyond_16_bits_have_no_known_range(tmp_path, value):
    path = saved(tmp_path, Image.fromarray(np.full((8, 8), value, np.int32)), "picture.tiff")
    with pytest.raises(DataError, match="known range"):
        read_image(path, 1, 8, AS_IT_IS)


def test_16_bits_are_rounded_to_8(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.full((8, 8), 400, np.uint16)))
    assert read_image(path, 1, 8, AS_IT_IS).eq(2).all()


def test_the_most_probable_class_is_named_first_and_each_by_its_own_name(capsys):
    probabilities = torch.tensor([[0.1, 0.6, 0.05, 0.25]])
    predict.show(["a"], probabilities, list("wxyz"), True)
    assert list(json.loads(capsys.readouterr().out)["a"].items()) == [
        ("x", pytest.approx(0.6)), ("z", pytest.approx(0.25)), ("w", pytest.approx(0.1)), ("y", pytest.approx(0.05)),
    ]  # fmt: skip
    predict.show(["a"], probabilities, list("wxyz"), False)
    table = capsys.readouterr().out
    assert table.index("60.0 %") < table.index("25.0 %")


def test_what_is_no_picture_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("not a picture\nat all")
    whole = saved(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)))
    (tmp_path / "short.png").write_bytes(whole.read_bytes()[:900])
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tiff")
    for name, reason in {"text.png": "is not a picture", "short.png": "is not a picture", "float.tiff": "known range",
                         "none.png": "there is no such file", ".": "is not a picture"}.items():  # fmt: skip
        with pytest.raises(DataError, match=reason) as refused:
            read_image(tmp_path / name, 1, 8, AS_IT_IS)
        assert str(refused.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(refused.value)


def of_another_kind(tmp_path):
    """Files that a decoder refuses with an error of its own kind: name -> how it puts it."""
    avif = saved(tmp_path, Image.fromarray(COLOUR), "no_item.avif")
    avif.write_bytes(avif.read_bytes().replace(b"iloc", b"xloc"))
    dds = saved(tmp_path, Image.fromarray(COLOUR), "no_format.dds")
    dds.write_bytes(dds.read_bytes()[:80] + (128).to_bytes(4, "little") + dds.read_bytes()[84:])
    return {avif: "Missing or empty image item", dds: "Unknown pixel format flags 128"}


def test_whatever_a_decoder_raises_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    for path, reason in of_another_kind(tmp_path).items():
        for read in (check_image, lambda path: read_image(path, 3, 8, AS_IT_IS)):
            with pytest.raises(DataError, match=reason) as refused:
                read(path)
            assert str(refused.value).startswith(f"{path}: is not a picture that can be read (")
    path = saved(tmp_path, Image.fromarray(COLOUR))
    for error, reason in ((EOFError(), "EOFError"), (struct.error("short\nof bytes"), "short"), (KeyError(""), "''")):

        def failing(opened, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("PIL.ImageOps.exif_transpose", failing)
            with pytest.raises(DataError) as refused:
                read_image(path, 3, 8, AS_IT_IS)
        assert str(refused.value) == f"{path}: is not a picture that can be read ({reason})"


def test_a_defect_of_ours_is_not_taken_for_a_damaged_picture(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.fromarray(GREY.astype(np.int32)), "picture.tiff")

    def wrong(*_, **__):
        raise RuntimeError("ours")

    for name in ("numpy.asarray", "PIL.Image.Image.convert", "PIL.ImageOps.fit"):
        with monkeypatch.context() as patch:
            patch.setattr(name, wrong)
            with pytest.raises(RuntimeError, match="ours"):
                read_image(path, 1, 8, AS_IT_IS)


def test_a_wrong_picture_is_told_before_the_network_is_looked_for(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    for name, reason in {"text.png": "is not a picture", "none.png": "there is no such file"}.items():
        with pytest.raises(DataError, match=reason):
            predict_command(predict.__file__, ["no-run", str(tmp_path / name)], lambda parser: None, take, take)
    check_image(saved(tmp_path, Image.fromarray(COLOUR)))


def take(*arguments):
    raise AssertionError("the network was built first")
