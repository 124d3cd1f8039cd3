"""Lists of image files."""

import io

import numpy as np
import pytest
from PIL import Image

from shared.data import FileSet, load_list, open_rgb, take
from shared.errors import DataError
from tests.shared.official_files import SOURCE, needs_source, write

pytestmark = pytest.mark.usefixtures("no_data_but_the_tests_own")


def write_folder(root, classes=("cat", "dog"), count=2):
    """Images in a folder for each class, and a list of them beside it; returns the list."""
    lines = []
    for c, name in enumerate(classes):
        for i in range(count):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), (10 * i, 20 * c, 30)).save(root / name / f"{i}.JPEG")
            lines.append(f"{name}/{i}.JPEG {c}\n")
    return write(root.with_suffix(".txt"), "".join(lines).encode())


def load_written(root, classes=("cat", "dog")):
    return load_list(write_folder(root, classes), root)


def test_a_file_digest_does_not_depend_on_where_the_folder_lies(tmp_path):
    first, second = (load_written(tmp_path / name) for name in "ab")
    assert first.digest == second.digest
    assert first.digest != load_written(tmp_path / "c", ("cat", "doe")).digest
    assert take(first, [1, 2]).digest == take(second, [1, 2]).digest != first.digest
    assert take(first, [2]).paths == (first.paths[2],)


def test_a_list_file_joins_its_paths_to_the_image_root(tmp_path):
    write_folder(tmp_path / "images")
    (tmp_path / "train.txt").write_text("dog/1.JPEG 4\ncat/0.JPEG 0\n")
    found = load_list(tmp_path / "train.txt", tmp_path / "images")
    assert found.paths == (tmp_path / "images/dog/1.JPEG", tmp_path / "images/cat/0.JPEG")
    assert found.labels.tolist() == [4, 0]
    assert len(found.classes) == 5
    assert len(load_list(tmp_path / "train.txt", tmp_path / "images", num_classes=9).classes) == 9
    with pytest.raises(DataError, match=r"train.txt:1: there is no .*2 of 2 images are missing"):
        load_list(tmp_path / "train.txt", tmp_path)


@needs_source
def test_a_real_list_names_images_by_the_folder_of_their_class():
    root = SOURCE / "tiny-imagenet-sample"
    listed = load_list(root / "train.txt", root)
    assert isinstance(listed, FileSet)
    folders = sorted({path.parent.relative_to(root).as_posix() for path in listed.paths})
    assert [folders[label] for label in listed.labels] == [p.parent.relative_to(root).as_posix() for p in listed.paths]
    tail = load_list(root / "train_lt.txt", root, num_classes=10)
    assert tail.labels.bincount().tolist() == [40, 31, 24, 19, 14, 11, 9, 7, 5, 4]


def test_a_grey_image_is_decoded_to_three_equal_channels(tmp_path):
    Image.new("L", (5, 4), 77).save(tmp_path / "grey.png")
    assert np.asarray(open_rgb(tmp_path / "grey.png")).tolist() == [[[77] * 3] * 5] * 4


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "ppm", "webp"])
def test_an_image_that_does_not_open_is_named(tmp_path, suffix):
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, {"jpg": "jpeg"}.get(suffix, suffix))
    for i, content in enumerate((b"", b"no image", whole.getvalue()[:300])):
        path = write(tmp_path / f"{i}.{suffix}", content)
        with pytest.raises(DataError, match="not a readable image") as caught:
            open_rgb(path)
        assert str(caught.value).startswith(str(path))
    with pytest.raises(DataError, match=r"none\.jpg"):
        open_rgb(tmp_path / "none.jpg")
