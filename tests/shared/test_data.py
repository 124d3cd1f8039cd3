"""The official formats and the embedded sample: reading, where data is found, damage, digests."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from shared import data
from shared.data import ImageSet, data_root, load, take
from shared.errors import DataError
from tests.shared import make_sample
from tests.shared.official_files import SOURCE, cifar_records, idx, needs_source, write, write_mnist

pytestmark = pytest.mark.usefixtures("no_data_but_the_tests_own")

DEBIAN = Path(data._SOURCES["fashion_mnist"].folders[-1])


needs_debian = pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")


def write_cifar10(root, labels=((0, 1), (2,), (3,), (4,), (9,))):
    batches = [cifar_records(part, seed=i) for i, part in enumerate(labels)]
    for i, records in enumerate(batches, start=1):
        write(root / f"cifar-10-batches-bin/data_batch_{i}.bin", records.tobytes())
    write(root / "cifar-10-batches-bin/test_batch.bin", cifar_records([5, 5, 5]).tobytes())
    return np.concatenate(batches)


# ------------------------------------------------------------------------------------------------ official formats


def test_cifar10_reads_every_record_of_files_of_any_length(tmp_path):
    records = write_cifar10(tmp_path)
    found = load("cifar10", "train")
    assert found.labels.tolist() == [0, 1, 2, 3, 4, 9]
    assert found.images.dtype == torch.uint8
    assert found.images.shape == (6, 3, 32, 32)
    assert np.array_equal(found.images.flatten(1).numpy(), records[:, 1:])
    assert found.classes[9] == "truck"
    assert len(load("cifar10", "test")) == 3


def test_cifar100_takes_the_fine_label_and_the_names_beside_it(tmp_path):
    records = cifar_records([99, 7], label_bytes=2)
    records[:, 0] = 19
    write(tmp_path / "cifar-100-binary/train.bin", records.tobytes())
    assert load("cifar100", "train").classes[:2] == ("0", "1")
    write(tmp_path / "cifar-100-binary/fine_label_names.txt", "\n".join(f"n{i}" for i in range(100)).encode())
    found = load("cifar100", "train")
    assert found.labels.tolist() == [99, 7]
    assert found.classes[99] == "n99"
    write(tmp_path / "cifar-100-binary/fine_label_names.txt", b"apple\npear\n")
    with pytest.raises(DataError, match="2 class names, expected 100"):
        load("cifar100", "train")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "MNIST/raw"),
        ("mnist", "mnist"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("fashion_mnist", "fashion-mnist"),
    ],
)
def test_idx_files_are_read_plain_and_packed_from_either_folder(tmp_path, name, folder, packed):
    images = write_mnist(tmp_path / folder, packed=packed)
    found = load(name, "train")
    assert np.array_equal(found.images[:, 0].numpy(), images)
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert len(found.classes) == 10


def test_loaded_tensors_can_be_written_without_a_warning(tmp_path, recwarn):
    write_mnist(tmp_path / "mnist")
    write_cifar10(tmp_path)
    for name in ("mnist", "cifar10", "sample"):
        load(name, "train").images[0] += 1
    assert not recwarn.list


@needs_source
@pytest.mark.parametrize(
    ("name", "per_class", "size"),
    [
        ("cifar10", (10, 10), 3072),
        ("cifar100", (2, 1), 3072),
        ("mnist", (20, 10), 784),
        ("fashion_mnist", (20, 10), 784),
    ],
)
def test_real_excerpts_in_the_official_layout_are_balanced(name, per_class, size):
    for split, count in zip(("train", "test"), per_class, strict=True):
        found = load(name, split, root=SOURCE / "mini")
        assert found.labels.bincount().tolist() == [count] * len(found.classes)
        assert found.images[0].numel() == size


@needs_source
def test_full_mnist_has_the_official_class_counts():
    found = load("mnist", "train", root=SOURCE)
    assert found.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


# ------------------------------------------------------------------------------------------------ where data is found


def test_missing_data_names_every_path_looked_at_and_the_ways_out(tmp_path):
    with pytest.raises(DataError) as caught:
        load("mnist", "test", root=tmp_path / "nowhere")
    text = str(caught.value)
    for folder in ("MNIST/raw", "mnist"):
        for part in ("images-idx3", "labels-idx1"):
            assert str(tmp_path / "nowhere" / folder / f"t10k-{part}-ubyte") in text
    assert "\n" not in text
    assert "data.download=true" in text
    assert "data.name=sample" in text


def test_one_missing_file_is_the_only_one_named(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-bin/data_batch_3.bin").unlink()
    with pytest.raises(DataError, match="data_batch_3") as caught:
        load("cifar10", "train")
    assert "data_batch_2" not in str(caught.value)


def test_root_comes_from_the_argument_then_the_environment_then_the_package(monkeypatch, tmp_path):
    assert data_root(tmp_path / "given") == tmp_path / "given"
    assert data_root() == tmp_path
    monkeypatch.delenv("DATA_ROOT")
    monkeypatch.chdir(tmp_path)
    assert data_root() == Path(data.__file__).resolve().parents[1] / "data"


@pytest.mark.parametrize(("name", "split"), [("cifar11", "train"), ("cifar10", "val"), ("sample", "val")])
def test_an_unknown_set_or_split_is_refused(name, split):
    with pytest.raises(DataError, match="there is no"):
        load(name, split)


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "0 bytes are not a whole number of 3073-byte records"),
        (bytes(3072), "3072 bytes are not"),
        (bytes(3073) + bytes(5), "3078 bytes are not"),
        (bytes(3073) + b"\x0a" + bytes(3072), r"record 1 has label 10, outside 0\.\.9"),
    ],
)
def test_a_damaged_cifar_file_is_named_with_the_numbers(tmp_path, content, problem):
    path = write(tmp_path / "cifar-10-batches-bin/test_batch.bin", content)
    with pytest.raises(DataError, match=problem) as caught:
        load("cifar10", "test")
    assert str(caught.value).startswith(str(path))


def test_a_cifar100_fine_label_out_of_range_is_named(tmp_path):
    write(tmp_path / "cifar-100-binary/test.bin", cifar_records([99, 100], label_bytes=2).tobytes())
    with pytest.raises(DataError, match=r"record 1 has label 100, outside 0\.\.99"):
        load("cifar100", "test")


def test_cifar100_files_in_the_cifar10_folder_are_refused(tmp_path):
    write(tmp_path / "cifar-10-batches-bin/test_batch.bin", cifar_records([99, 7], label_bytes=2).tobytes())
    with pytest.raises(DataError, match="6148 bytes"):
        load("cifar10", "test")


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (b"", "starts with , expected 00000803"),
        (idx(np.zeros((2, 28, 28), np.uint8))[:10], "starts with 00000803"),
        (idx(np.zeros(2, np.uint8)), "starts with 00000801, expected 00000803"),
        (idx(np.zeros((2, 28, 28), np.uint8))[:-1], "1567 bytes of data, but the header tells of 1568"),
        (idx(np.zeros((2, 28, 28), np.uint8)) + b"x", "1569 bytes of data"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(784), "784 bytes of data, but the header tells of 79228162"),
        (idx(np.zeros((0, 28, 28), np.uint8)), "0 bytes of data"),
        (idx(np.zeros((2, 32, 32), np.uint8)), "images of 32 x 32 pixels, expected 28 x 28"),
        (idx(np.zeros((3, 28, 28), np.uint8)), "3 images, but 2 labels"),
    ],
)
def test_a_damaged_idx_file_is_named_with_the_numbers(tmp_path, images, problem):
    write_mnist(tmp_path / "mnist", n=2, packed=False)
    path = write(tmp_path / "mnist/train-images-idx3-ubyte", images)
    with pytest.raises(DataError, match=problem) as caught:
        load("mnist", "train")
    assert str(caught.value).startswith(str(path))


def test_an_idx_label_out_of_range_is_named(tmp_path):
    write_mnist(tmp_path / "mnist", n=3, labels=[0, 9, 10])
    with pytest.raises(DataError, match=r"labels-idx1-ubyte\.gz: record 2 has label 10, outside 0\.\.9"):
        load("mnist", "train")


def test_every_cut_or_flipped_gzip_is_refused(tmp_path):
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist/train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damaged in (whole[: len(whole) // 2], whole[:-4], bytes(flipped), b"text", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
            load("mnist", "train")


# ------------------------------------------------------------------------------------------------ digests and subsets


def test_the_digest_sees_every_pixel_label_and_the_order(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-bin/data_batch_1.bin"
    whole = path.read_bytes()
    digests = {load("cifar10", "train").digest}
    for position in (0, 1, 3072, 6145):  # a label, the first and the last pixel of a record, the last byte
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        digests.add(load("cifar10", "train").digest)
    path.write_bytes(whole[3073:] + whole[:3073])
    digests.add(load("cifar10", "train").digest)
    assert len(digests) == 6
    path.write_bytes(whole)
    assert load("cifar10", "train").digest in digests


def test_take_keeps_images_and_labels_together(tmp_path):
    write_cifar10(tmp_path)
    whole = load("cifar10", "train")
    part = take(whole, torch.tensor([5, 0]))
    assert part.labels.tolist() == [9, 0]
    assert torch.equal(part.images, whole.images[[5, 0]])
    assert part.classes == whole.classes
    assert len({whole.digest, part.digest, take(whole, [0, 5]).digest}) == 3
    assert take(whole, [5, 0]).digest == part.digest
    assert len(take(whole, [])) == 0


@pytest.mark.parametrize("indices", [[6], [-1]])
def test_take_refuses_indices_that_are_not_there(tmp_path, indices):
    write_cifar10(tmp_path)
    with pytest.raises(DataError, match=r"go beyond 0\.\.5"):
        take(load("cifar10", "train"), indices)


# ------------------------------------------------------------------------------------------------ the embedded sample


@pytest.mark.parametrize(("split", "count"), [("train", 1000), ("test", 500)])
def test_the_sample_is_balanced_and_complete(split, count):
    found = load("sample", split)
    assert isinstance(found, ImageSet)
    assert found.images.shape == (10 * count, 1, 28, 28)
    assert found.labels.bincount().tolist() == [count] * 10
    assert found.images.flatten(1).float().std(dim=1).min() > 0  # no blank image


@needs_debian
@pytest.mark.parametrize(("split", "prefix", "count"), [("train", "train", 1000), ("test", "t10k", 500)])
def test_the_sample_is_the_first_official_images_of_each_class_pixel_for_pixel(split, prefix, count):
    source = data._SOURCES["fashion_mnist"]
    official = source.read([DEBIAN / f"{prefix}-images-idx3-ubyte.gz", DEBIAN / f"{prefix}-labels-idx1-ubyte.gz"])
    with np.load(data.SAMPLE, allow_pickle=False) as arrays:
        index = arrays[f"{split}_index"].astype(int)
    found = load("sample", split)
    assert np.array_equal(found.images.numpy(), official[0][index])
    assert np.array_equal(found.labels.numpy(), official[1][index])
    for c in range(10):
        assert index[count * c : count * (c + 1)].tolist() == np.flatnonzero(official[1] == c)[:count].tolist()


@needs_debian
def test_the_script_makes_the_sample_again_byte_for_byte(tmp_path):
    make_sample.make(DEBIAN, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == data.SAMPLE.read_bytes()


def test_a_damaged_sample_is_refused(monkeypatch, tmp_path):
    content = bytearray(data.SAMPLE.read_bytes())
    content[len(content) // 2] ^= 1
    monkeypatch.setattr(data, "SAMPLE", write(tmp_path / "sample.npz", bytes(content)))
    with pytest.raises(DataError, match=r"sample\.npz: damaged: sha256"):
        load("sample", "train")


def test_the_sample_is_small_and_loads_fast():
    assert data.SAMPLE.stat().st_size < 8 * 2**20
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load("sample", "train")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
