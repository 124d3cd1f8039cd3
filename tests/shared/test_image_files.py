"""Folders and lists of image files."""

import io

import numpy as np
import pytest
from PIL import Image

from shared.data import FileSet, load_folder, load_list, open_rgb, take
from shared.errors import DataError
from tests.shared.official_files import SOURCE, needs_source, write

pytestmark = pytest.mark.usefixtures("no_data_but_the_tests_own")

# ------------------------------------------------------------------------------------------------ folders and lists


def write_folder(root, classes=("cat", "dog"), count=2):
    for c, name in enumerate(classes):
        for i in range(count):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), (10 * i, 20 * c, 30)).save(root / name / f"{i}.JPEG")
    return root


def test_an_image_folder_gives_sorted_classes_and_paths(tmp_path):
    root = write_folder(tmp_path / "train", ("dog", "cat"))
    (root / "cat" / "notes.txt").write_text("no image")
    found = load_folder(root)
    assert isinstance(found, FileSet)
    assert found.classes == ("cat", "dog")
    assert [p.relative_to(root).as_posix() for p in found.paths] == [
        "cat/0.JPEG",
        "cat/1.JPEG",
        "dog/0.JPEG",
        "dog/1.JPEG",
    ]
    assert found.labels.tolist() == [0, 0, 1, 1]


def test_a_validation_folder_without_a_class_keeps_the_labels_of_the_training_set(tmp_path):
    write_folder(tmp_path / "val", ("dog",))
    assert load_folder(tmp_path / "val", "val", classes=("cat", "dog")).labels.tolist() == [1, 1]
    with pytest.raises(DataError, match="found dog"):
        load_folder(tmp_path / "val", "val", classes=("cat",))


def test_a_folder_without_classes_or_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such image folder"):
        load_folder(tmp_path / "none")
    with pytest.raises(DataError, match="found no subfolder"):
        load_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="cat: no image in it"):
        load_folder(tmp_path)


def test_a_file_digest_does_not_depend_on_where_the_folder_lies(tmp_path):
    first, second = (load_folder(write_folder(tmp_path / name)) for name in "ab")
    assert first.digest == second.digest
    assert first.digest != load_folder(write_folder(tmp_path / "c", ("cat", "doe"))).digest
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
def test_real_list_and_folder_hold_the_same_images():
    root = SOURCE / "tiny-imagenet-sample"
    folder, listed = load_folder(root / "train"), load_list(root / "train.txt", root)
    assert set(zip(folder.paths, folder.labels.tolist(), strict=True)) == set(
        zip(listed.paths, listed.labels.tolist(), strict=True)
    )
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
