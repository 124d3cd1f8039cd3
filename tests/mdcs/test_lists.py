"""Data sets of list files, on small folders of images: reading, renumbering and checks."""

import gzip

import pytest
import torch

from mdcs import lists
from mdcs.config import Config
from mdcs.lists import KnownList, by_count, check_known, relabel
from mdcs.problem import load_problem
from mdcs.views import FileViews
from shared.config import parse
from shared.data import FileSet, load_list
from shared.errors import ConfigError, DataError
from tests.mdcs.listed_data import COUNTS, LISTS, lose

CPU = torch.device("cpu")


def configure(*overrides):
    return parse(LISTS, Config, overrides)


def load(*overrides):
    return load_problem(configure(*overrides), CPU)


def listed(base, split="train", classes=4):
    return load_list(base / "lists" / f"{split}.txt", base / "images", classes, split)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_list_data_set_keeps_its_own_counts_and_is_found_below_the_data_root(folder):
    problem = load()
    assert problem.class_counts == COUNTS["train"]
    assert torch.bincount(problem.test.labels).tolist() == list(COUNTS["test"])
    assert (len(problem.train), len(problem.test), problem.channels) == (26, 12, 3)
    assert problem.class_order is None
    assert isinstance(problem.train, FileViews)


def test_paths_of_a_configuration_may_be_absolute(folder, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/nowhere")
    overrides = [f"data.{key}_list={folder}/lists/{key}.txt" for key in ("train", "test")]
    assert load(*overrides, f"data.image_root={folder}/images").class_counts == COUNTS["train"]


def test_paths_and_labels_are_those_of_the_lines_in_their_order(folder):
    problem = load()
    lines = (folder / "lists" / "train.txt").read_text().splitlines()
    assert [f"{p.relative_to(folder / 'images')}" for p in problem.train.paths] == [line[:-2] for line in lines]
    assert problem.train.labels.tolist() == [int(line[-1]) for line in lines]


def test_three_lines_are_read_plain_or_packed(folder):
    text = "test/class 0/0.jpg 0\n\ntest/class 1/1.png 1\ntest/class 3/2.jpg 3\n"
    (folder / "three.txt").write_text(text)
    (folder / "three.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("three.txt", "three.txt.gz"):
        problem = load(f"data.test_list={name}")
        assert problem.test.labels.tolist() == [0, 1, 3]
        assert [path.name for path in problem.test.paths] == ["0.jpg", "1.png", "2.jpg"]


def test_training_and_test_images_have_the_asked_size_and_the_test_images_come_in_order(folder):
    problem = load()
    ((images, labels),) = problem.train.epoch([torch.arange(6)], "both", 0, ("views", 0))
    assert images.shape == (12, 3, 32, 32)
    assert torch.equal(labels, problem.train.labels[:6])
    parts = list(problem.test.evaluate(5))
    assert [tuple(images.shape) for images, _ in parts] == [(5, 3, 32, 32)] * 2 + [(2, 3, 32, 32)]
    assert torch.equal(torch.cat([labels for _, labels in parts]), problem.test.labels)


def test_image_files_have_224_pixels_unless_said_otherwise(folder):
    problem = load("data.image_size=null")
    assert next(problem.test.evaluate(1))[0].shape == (1, 3, 224, 224)
    assert next(problem.train.epoch([torch.arange(2)], "weak", 0, ("views", 0)))[0].shape == (2, 3, 224, 224)


def test_digests_follow_the_lists(folder):
    first = load().digests
    assert load().digests == first
    path = folder / "lists" / "train.txt"
    path.write_text("".join(path.read_text().splitlines(True)[1:]))
    other = load().digests
    assert other["train"] != first["train"]
    assert other["test"] == first["test"]


# --- renumbering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "order"),
    [((5, 9, 5, 7), [1, 3, 0, 2]), ((3, 2, 1), [0, 1, 2]), ((1, 1, 1, 1), [0, 1, 2, 3]), ((1, 2, 2, 3), [3, 1, 2, 0])],
)
def test_classes_are_ordered_by_descending_count_and_equal_ones_keep_their_order(counts, order):
    assert by_count(counts) == order


def test_the_order_of_many_equal_counts_is_stable_and_a_permutation():
    counts = torch.randint(4, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    order = by_count(counts)
    assert sorted(order) == list(range(500))
    assert order == [c for n in (3, 2, 1, 0) for c in range(500) if counts[c] == n]


def test_renumbering_gives_an_image_the_place_of_its_class_and_the_class_keeps_its_name(folder):
    files = listed(folder)
    order = [1, 3, 0, 2]
    new = relabel(files, order)
    assert new.classes == ("1", "3", "0", "2")
    assert [new.classes[c] for c in new.labels.tolist()] == [files.classes[c] for c in files.labels.tolist()]
    assert new.paths == files.paths


def test_a_renumbered_data_set_has_falling_counts_and_the_same_map_on_its_test_images(folder):
    plain, problem = load(), load("data.relabel=true")
    assert problem.class_order == (1, 3, 0, 2)
    assert problem.class_counts == (9, 7, 5, 5)
    assert problem.classes == ("1", "3", "0", "2")
    order = torch.tensor(problem.class_order)
    for part in ("train", "test"):
        assert torch.equal(order[getattr(problem, part).labels], getattr(plain, part).labels)
        assert getattr(problem, part).paths == getattr(plain, part).paths
    assert problem.thirds["head"] == (0,)
    assert problem.facts()["class_order"] == (1, 3, 0, 2)


def test_the_order_is_the_training_sets_even_where_the_test_set_has_another(folder):
    path = folder / "lists" / "test.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if line.endswith(("0\n", "2\n"))))
    problem = load("data.relabel=true")
    assert problem.class_order == (1, 3, 0, 2)
    assert torch.bincount(problem.test.labels, minlength=4).tolist() == [0, 0, 3, 3]


# --- known data sets --------------------------------------------------------------------------------------------------

RIGHT = KnownList(classes=4, train=26, test=12, largest=9, smallest=5)


@pytest.fixture
def known(folder, monkeypatch):
    """`places_lt` is the small folder, with these numbers in place of its own."""

    def state(**numbers):
        monkeypatch.setitem(lists.KNOWN, "places_lt", KnownList(**{**RIGHT.__dict__, **numbers}))

    return state


def test_a_known_data_set_with_the_right_lists_is_taken(known):
    known()
    assert load("data.name=places_lt").class_counts == COUNTS["train"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"classes": 365}, r"places_lt: 4 classes \(data.num_classes\), but this data set has 365"),
        ({"train": 62_500}, r"26 training images \(data.train_list\), but this data set has 62,500"),
        ({"test": 13}, r"12 test images \(data.test_list\), but this data set has 13"),
        ({"largest": 10}, r"9 images in the largest class .*has 10"),
        ({"smallest": 4}, r"5 images in the smallest class .*has 4"),
        ({"smallest": 4, "train": 27}, r"26 training images"),
    ],
)
def test_a_known_data_set_with_other_lists_is_refused_with_the_number_that_differs(known, wrong, words):
    known(**wrong)
    with pytest.raises(DataError, match=words) as caught:
        load("data.name=places_lt")
    assert "\n" not in str(caught.value)


def test_lists_of_ones_own_are_not_compared_with_anything(folder):
    files = listed(folder)
    check_known("list", files, files)
    with pytest.raises(DataError, match=r"official lists, or data\.name=list"):
        check_known("imagenet_lt", files, files)


def test_numbers_of_the_known_data_sets_are_the_published_ones():
    published = {
        "imagenet_lt": KnownList(classes=1000, train=115_846, test=50_000, largest=1280, smallest=5),
        "places_lt": KnownList(classes=365, train=62_500, test=36_500, largest=4980, smallest=5),
        "inaturalist18": KnownList(classes=8142, train=437_513, test=24_426, largest=1000, smallest=2),
    }
    assert published == lists.KNOWN


@pytest.mark.parametrize(("split", "total"), [("train", 26), ("test", 12)])
# --- bad lists --------------------------------------------------------------------------------------------------------


def test_a_missing_image_is_named_with_its_line(folder, split, total):
    lose(folder, split, 7, 9)
    with pytest.raises(DataError, match=rf"{split}\.txt:7: there is no .*images/{split}/class .*2 of {total} images"):
        load()


def test_a_line_is_counted_as_it_stands_in_the_file_with_blank_ones(folder):
    path = folder / "lists" / "train.txt"
    lose(folder, "train", 3)
    lines = path.read_text().splitlines(True)
    path.write_text("".join([lines[0], "\n", "  \n", *lines[1:]]))
    with pytest.raises(DataError, match=r"train\.txt:5: there is no "):
        load()


def test_a_line_is_counted_as_the_reader_counts_it_whatever_ends_it(folder):
    """A form feed or a Unicode line separator ends a line for the reader of lists; a no-break space is blank to it."""
    path = folder / "lists" / "train.txt"
    lose(folder, "train", 4)
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\x0c{lines[1]}\u2028\u00a0\n" + "\n".join(lines[2:]))
    with pytest.raises(DataError, match=r"train\.txt:5: there is no "):
        load()


def test_a_line_of_a_packed_list_is_counted_in_its_text(folder):
    lose(folder, "train", 2)
    text = (folder / "lists" / "train.txt").read_bytes()
    (folder / "lists" / "train.txt.gz").write_bytes(gzip.compress(text))
    with pytest.raises(DataError, match=r"train\.txt\.gz:2: there is no "):
        load("data.train_list=lists/train.txt.gz")


def test_a_list_all_of_whose_images_are_there_passes(folder):
    assert isinstance(listed(folder), FileSet)


def test_a_first_image_that_is_missing_points_to_the_image_folder(folder):
    with pytest.raises(DataError, match=r"train\.txt:1: there is no .*do the list's paths start at .*elsewhere"):
        load("data.image_root=elsewhere")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_label_out_of_range_is_named_with_its_line(folder, split):
    path = folder / "lists" / f"{split}.txt"
    lines = path.read_text().splitlines()
    lines[4] = lines[4][:-1] + "4"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"{split}\.txt:5: label 4 is outside 0\.\.3"):
        load()


@pytest.mark.parametrize("relabelled", ["false", "true"])
def test_a_class_without_a_training_image_is_refused(folder, relabelled):
    path = folder / "lists" / "train.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.endswith(" 2\n")))
    with pytest.raises(DataError, match=r"class \d has no training image"):
        load(f"data.relabel={relabelled}")


def test_the_mean_of_a_grey_data_set_is_refused_for_image_files(folder):
    with pytest.raises(ConfigError, match=r"data.mean: has 1 numbers.* 3 channels"):
        load("data.mean=[0.5]", "data.std=[0.5]")
