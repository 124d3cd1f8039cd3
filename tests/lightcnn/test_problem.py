"""The data and its split: oracle T18, folds, and data that does not fit."""

import gzip
import re
import struct
from dataclasses import replace

import pytest
import torch

from lightcnn.config import Config
from lightcnn.problem import check_square, folds_of, load_problem, load_test, split
from lightcnn.train import main
from shared import data
from shared.config import parse
from shared.data import ImageSet
from shared.errors import ConfigError, DataError

CPU = torch.device("cpu")


def write_idx(folder, labels, side=28, images=None, magic=3):
    """Four IDX files of MNIST with these labels in training and in the test set."""
    folder.mkdir(parents=True)
    n = len(labels)
    pixels = images if images is not None else bytes(n * side * side)
    for split_name in ("train", "t10k"):
        head = bytes([0, 0, 8, magic]) + struct.pack(">3I", n, side, side)
        (folder / f"{split_name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels))
        (folder / f"{split_name}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + struct.pack(">I", n) + bytes(labels)
        )


def mnist(tmp_path, *overrides, **files):
    write_idx(tmp_path / "MNIST" / "raw", **files)
    return ["--config", "smoke", "--out", str(tmp_path / "out"), "data={name: mnist, val_images: 20}", *overrides]


def image_set(labels):
    labels = torch.as_tensor(labels)
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28).contiguous()
    return ImageSet(images, labels, tuple("0123456789"), "mnist", "train", "digest")


def config(**keys):
    text = ", ".join(f"{k}: {v}" for k, v in keys.items())
    return parse(f"paper: lightcnn\ndata: {{name: mnist, {text}}}", Config)


def test_validation_is_the_first_images_in_file_order_and_disjoint_from_training():
    whole = image_set([i % 10 for i in range(100)])
    train, validation = split(whole, config(val_images=30).data)
    assert validation.tolist() == list(range(30))
    assert train.tolist() == list(range(30, 100))


def test_the_papers_split_holds_out_the_first_10000():
    whole = image_set([0])
    whole = replace(whole, labels=torch.arange(60_000) % 10, images=torch.empty(60_000, 1, 1, 1, dtype=torch.uint8))
    train, validation = split(whole, parse("paper: lightcnn\ndata: {name: mnist}", Config).data)
    assert validation.equal(torch.arange(10_000))
    assert train.equal(torch.arange(10_000, 60_000))


def test_of_a_file_sorted_by_class_the_first_of_each_class_are_held_out():
    whole = image_set([c for c in range(10) for _ in range(8)])
    train, validation = split(whole, config(val_images=20, val_from="each_class", train_images=30).data)
    assert validation.tolist() == [8 * c + k for c in range(10) for k in (0, 1)]
    assert train.tolist() == [8 * c + k for c in range(10) for k in (2, 3, 4)]
    with pytest.raises(DataError, match=r"no training image of class '0'.*each_class"):
        split(whole, config(val_images=20).data)


@pytest.mark.parametrize(("keys", "said"), [
    ({"val_images": 20, "train_images": 15}, "data.train_images: 15 is not the same number of each of 10 classes"),
    ({"val_images": 15, "val_from": "each_class"}, "data.val_images: 15 is not the same number of each of 10 classes"),
    ({"val_images": 10, "train_images": 80}, "data.train_images: 80 are 8 of each class, but '3' has 4; ask for"),
    ({"val_images": 60, "val_from": "each_class"}, "data.val_images: 60 are 6 of each class, but '3' has 5; ask for"),
])  # fmt: skip
def test_a_number_of_images_that_the_classes_cannot_share_evenly_is_refused(keys, said):
    labels = [i % 10 for i in range(50)] + [c for c in range(10) if c != 3 for _ in range(5)]
    with pytest.raises(DataError, match=re.escape(said)):
        split(image_set(labels), config(**keys).data)


def test_a_number_of_test_images_that_does_not_divide_is_refused(config_of):
    with pytest.raises(DataError, match=r"data\.test_images: 15 is not the same number of each of 10 classes; ask for"):
        load_test(config_of("data={name: sample, val_images: 50, val_from: each_class, test_images: 15}"))


@pytest.mark.parametrize(("validation", "train"), [(100, None), (95, 10), (1000, None)])
def test_more_validation_images_than_there_are_is_refused(validation, train):
    keys = {"val_images": validation} | ({"train_images": train} if train else {})
    first = "data.train_images: 10, and " if train else ""
    with pytest.raises(
        DataError, match=f"^{first}data.val_images: {validation} are asked of 100 images; ask for fewer$"
    ):
        split(image_set([i % 10 for i in range(100)]), config(**keys).data)


def test_the_problem_holds_the_images_that_are_used_and_says_where_they_stood(config_of):
    problem = load_problem(config_of(), CPU)
    whole = data.load("sample", "train")
    assert len(problem.images) == 180
    assert torch.equal(whole.images[problem.places], problem.images)
    for lane in problem.lanes:
        assert not set(lane.train.tolist()) & set(lane.validation.tolist())
        assert torch.equal(problem.labels[lane.validation].bincount(), torch.full((10,), 5))
    assert [lane.seed for lane in problem.lanes] == [0, 1]
    other = load_problem(config_of("data={name: sample, val_images: 60, val_from: each_class, train_images: 120}"), CPU)
    assert other.digest != problem.digest


def test_folds_partition_the_images_and_each_is_held_out_once():
    train, validation = torch.arange(40, 100), torch.arange(40)
    parts = folds_of(3, train, validation, 6)
    assert [(len(a), len(b)) for a, b in parts] == [(84, 16)] * 6
    held = torch.cat([b for _, b in parts])
    assert len(held.unique()) == 96, "what does not divide is always trained on"
    for a, b in parts:
        assert torch.cat([a, b]).sort().values.equal(torch.arange(100))
    assert not torch.equal(parts[0][1], folds_of(4, train, validation, 6)[0][1])
    with pytest.raises(DataError, match=r"method\.folds: 200 folds of 100 images"):
        folds_of(0, train, validation, 200)


def test_honest_folds_are_lanes_with_weights_and_draws_of_their_own(config_of):
    problem = load_problem(config_of("method={name: two_stage, kfold: honest, folds: 3}"), CPU)
    assert [(lane.seed, lane.fold) for lane in problem.lanes] == [(s, k) for s in (0, 1) for k in range(3)]
    assert len({lane.init_seed("a") for lane in problem.lanes}) == 6


def test_images_that_are_not_square_are_refused():
    odd = replace(image_set([0]), images=torch.zeros(1, 1, 28, 30, dtype=torch.uint8))
    with pytest.raises(DataError, match="28 x 30 pixels; the network takes square ones"):
        check_square(odd)


def test_bad_data_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    labels = [i % 10 for i in range(60)]
    cases = {
        "truncated": ({"labels": labels, "images": bytes(100)}, "100 bytes of data, but the header tells of 47040"),
        "magic": ({"labels": labels, "magic": 4}, "another kind of file"),
        "labels": ({"labels": [*labels[:-1], 12]}, "record 59 has label 12, outside 0..9"),
        "size": ({"labels": labels, "side": 27}, "27 x 27 pixels, expected 28 x 28"),
        "class": ({"labels": [0] * 60}, "no training image of class '1'"),
    }
    for name, (files, message) in cases.items():
        root = tmp_path / name
        monkeypatch.setenv("DATA_ROOT", str(root))
        assert main(mnist(root, **files)) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert printed.count("\n") == 1
        assert message in printed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method={name: two_stage, schedule: papr}", "method.schedule: unknown value 'papr'; did you mean 'paper'?"),
        ("method=two_stag", "did you mean 'two_stage'?"),
        ("method={name: scratch, schedule: paper}", "there is no such key"),
        ("stage2.max_epochs=0", "is below 1"),
        ("seeds=0", "is below 1"),
        ("seed=4294967295", "go beyond 4294967295"),
        ("augment.zoom=1", "must be below 1"),
        ("data.name=cifar100", "unknown value 'cifar100'"),
    ],
)
def test_bad_settings_are_refused_with_their_place(override, message, config_of):
    with pytest.raises(ConfigError) as error:
        config_of(override)
    assert message in str(error.value)
    assert "(command line)" in str(error.value) or "tiny" in str(error.value)


def test_real_layouts_train_mnist_and_cifar10(tmp_path, monkeypatch, capsys):
    labels = [i % 10 for i in range(60)]
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    draws = torch.Generator().manual_seed(0)
    pixels = bytes(torch.randint(256, (60 * 784,), generator=draws, dtype=torch.uint8).tolist())
    assert main(mnist(tmp_path, "stage2.max_epochs=1", labels=labels, images=pixels)) == 0
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = torch.randint(256, (20, 3073), generator=draws, dtype=torch.uint8)
        records[:, 0] = torch.arange(20) % 10
        (folder / name).write_bytes(bytes(records.flatten().tolist()))
    arguments = ["--config", "smoke", "--out", str(tmp_path / "out"), "data={name: cifar10, val_images: 20}"]
    assert main([*arguments, "stage2.max_epochs=1", "seeds=1"]) == 0
    assert "accuracy on 20 test images" in capsys.readouterr().out
