import contextlib
import errno
import hashlib
import json
import os
import random
from functools import partial
from pathlib import Path

import pytest
import torch

from shared import checkpoint
from shared.checkpoint import (
    HEADER_BYTES,
    MAGIC,
    atomic_write,
    load_model,
    load_state,
    previous_of,
    save_model,
    save_state,
)
from shared.errors import CheckpointError, RunError

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


def example_state() -> dict:
    draws = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=draws)
    return {
        "weights": {"a": base, "row": base[1], "transposed": base.T, "wide": base[:1].expand(3, 4),
                    "empty": torch.empty(0, 5)},
        "scalars": [torch.tensor(3.5), torch.tensor(True), torch.tensor(7)],
        "round": 3, "big": 2**80, "negative": -1, "share": 0.1 + 0.2, "tiny": 5e-324, "text": "gré\n\"", "flag": True,
        "none": None, "nothing": {}, "list": [1, [2.5, None, False], {"tensor": 1, "dict": base[0]}],
    }  # fmt: skip


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if "tmp" in path.name]


def fail_with(code: int):
    def fail(*arguments: object, **named: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_nested_state_comes_back_equal_in_every_type_and_bit(tmp_path):
    save_state(tmp_path / "a" / "state.ckpt", example_state())
    assert equal(example_state(), load_state(tmp_path / "a" / "state.ckpt"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (3, 4)], ids=str)
def test_a_tensor_of_each_type_and_shape_comes_back_bit_for_bit(tmp_path, dtype, shape):
    tensor = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    save_state(tmp_path / "state.ckpt", {"x": tensor})
    found = load_state(tmp_path / "state.ckpt")["x"]
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_numbers_that_are_not_finite_keep_their_bits_in_tensors(tmp_path):
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    save_state(tmp_path / "state.ckpt", {"x": tensor})
    assert torch.equal(load_state(tmp_path / "state.ckpt")["x"].view(torch.int32), tensor.view(torch.int32))


def test_views_that_share_memory_come_back_as_tensors_of_their_own(tmp_path):
    base = torch.zeros(4)
    save_state(tmp_path / "state.ckpt", {"all": base, "half": base[:2]})
    found = load_state(tmp_path / "state.ckpt")
    found["half"] += 1
    assert found["all"].tolist() == [0, 0, 0, 0]


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_state(tmp_path / name, example_state())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("value", [object(), {1: 2}, {1, 2}, b"bytes"], ids=repr)
def test_what_a_state_cannot_hold_is_refused_before_anything_is_written(tmp_path, value):
    save_state(tmp_path / "state.ckpt", {"round": 1})
    with pytest.raises(TypeError):
        save_state(tmp_path / "state.ckpt", {"x": value})
    assert load_state(tmp_path / "state.ckpt") == {"round": 1}
    assert not previous_of(tmp_path / "state.ckpt").exists()


def mutate(data: bytes, draws: random.Random) -> bytes:
    """One random change of the file; the result differs from the file."""
    changed, place = bytearray(data), draws.randrange(len(data))
    kind = draws.randrange(10)
    if kind == 0:
        changed[place] ^= 1 << draws.randrange(8)
    elif kind == 1:
        changed[place] = draws.randrange(256)
    elif kind == 2:
        changed = changed[:place]
    elif kind == 3:
        changed[place:place] = draws.randbytes(draws.randint(1, 64))
    elif kind == 4:
        del changed[place : place + draws.randint(1, 64)]
    elif kind == 5:  # two blocks change places
        size, other = draws.randint(1, 200), draws.randrange(len(data))
        first, second = changed[place : place + size], changed[other : other + size]
        changed[place : place + len(second)], changed[other : other + len(first)] = second, first
    elif kind == 6:  # in our header
        changed[draws.randrange(HEADER_BYTES)] = draws.randrange(256)
    elif kind == 7:  # in the header of safetensors
        changed[HEADER_BYTES + draws.randrange(400)] = draws.choice(b'{}[]":,0123456789tF')
    elif kind == 8:
        changed += draws.randbytes(draws.randint(1, 64))
    else:  # a block of zeros, as a power cut leaves
        changed[place : place + 512] = bytes(len(changed[place : place + 512]))
    return bytes(changed)


def test_two_thousand_random_mutations_are_all_refused(tmp_path):
    path, draws, tried = tmp_path / "state.ckpt", random.Random(0), 0
    save_state(path, {"old": True})
    save_state(path, example_state())
    data = path.read_bytes()
    while tried < 2000:
        changed = mutate(data, draws)
        if changed == data:
            continue
        tried += 1
        path.write_bytes(changed)
        returned = None
        with pytest.raises(CheckpointError) as caught:
            returned = load_state(path)
        assert returned is None
        assert str(path) in str(caught.value)
        assert "--previous" in str(caught.value)
    assert load_state(previous_of(path)) == {"old": True}


def resealed(data: bytes) -> bytes:
    """A payload under a header that fits it."""
    return MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def test_a_payload_that_was_changed_together_with_its_checksum_is_never_another_error(tmp_path):
    path, draws = tmp_path / "state.ckpt", random.Random(1)
    save_state(path, example_state())
    payload = path.read_bytes()[HEADER_BYTES:]
    for _ in range(300):
        changed = bytearray(payload)
        for _ in range(draws.randint(1, 3)):
            changed[draws.randrange(1200)] = draws.choice(b'{}[]":,0123456789tF\\')
        path.write_bytes(resealed(bytes(changed)))
        with contextlib.suppress(CheckpointError):  # a change inside a text or a number is a valid state
            load_state(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", MAGIC, b"PK\x03\x04", resealed(b""), resealed(b"\xff" * 8)])
def test_what_is_no_saved_state_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "state.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_state(tmp_path / "state.ckpt")
    assert "\n" not in str(caught.value)


def test_a_missing_state_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.ckpt: cannot be read"):
        load_state(tmp_path / "none.ckpt")


def test_the_state_before_the_last_is_kept_and_loads(tmp_path):
    path = tmp_path / "state.ckpt"
    for number in range(4):
        save_state(path, {"round": number, "x": torch.full((3,), float(number))})
    assert load_state(path)["round"] == 3
    assert load_state(previous_of(path))["round"] == 2
    assert sorted(os.listdir(tmp_path)) == ["previous-state.ckpt", "state.ckpt"]


def test_the_previous_state_is_kept_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
    for number in range(3):
        save_state(tmp_path / "state.ckpt", {"round": number})
    assert [load_state(p)["round"] for p in (tmp_path / "state.ckpt", previous_of(tmp_path / "state.ckpt"))] == [2, 1]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_the_old_state_and_no_temporary(tmp_path, monkeypatch, call):
    path = tmp_path / "state.ckpt"
    save_state(path, {"round": 1})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_with(errno.ENOSPC))
        with pytest.raises(RunError) as caught:
            save_state(path, {"round": 2})
    assert "\n" not in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert path.read_bytes() == before
    assert leftovers(tmp_path) == []
    save_state(path, {"round": 3})
    assert load_state(path) == {"round": 3}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_write_that_the_system_refuses_leaves_the_old_content(tmp_path, monkeypatch):
    atomic_write(tmp_path / "file", b"old")
    monkeypatch.setattr(checkpoint, "open", lambda _, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
    with pytest.raises(RunError, match="No space left"):
        atomic_write(tmp_path / "file", b"new" * 100_000)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupt_while_writing_leaves_the_old_content_and_no_temporary(tmp_path, monkeypatch, interrupt):
    atomic_write(tmp_path / "file", b"old")

    def fail(handle: int) -> None:
        raise interrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(interrupt):
        atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("folder", ["/proc/nowhere/deep", "file/below"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, folder):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(RunError) as caught:
        save_state(tmp_path / folder / "state.ckpt", {"round": 1})
    assert "\n" not in str(caught.value)
    assert "cannot be written" in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"old"


def test_at_no_moment_of_saving_is_the_present_state_missing(tmp_path, monkeypatch):
    path, seen = tmp_path / "state.ckpt", []
    save_state(path, {"round": 0})

    def watched(real, *arguments: object, **named: object) -> object:
        seen.append(load_state(path)["round"])
        done = real(*arguments, **named)
        seen.append(load_state(path)["round"])
        return done

    for name in ("link", "replace", "fsync", "unlink"):
        monkeypatch.setattr(os, name, partial(watched, getattr(os, name)))
    save_state(path, {"round": 1})
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


def test_sweeping_removes_what_killed_writers_left_and_nothing_else(tmp_path):
    save_state(tmp_path / "checkpoint" / "state.ckpt", {"round": 1})
    for name in ("checkpoint/.state.ckpt.x1.tmp", ".results.json.x2.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"mine")
    checkpoint.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["notes.tmp", "state.ckpt"]


def test_a_model_comes_back_with_its_configuration(tmp_path):
    tensors = {"w": torch.randn(3, 2).T, "b": torch.zeros(0), "n": torch.tensor(3)}
    save_model(tmp_path, tensors, {"classes": ["a", "b"]})
    found, config = load_model(tmp_path)
    assert equal({k: tensors[k] for k in sorted(tensors)}, {k: found[k] for k in sorted(found)})
    assert config["classes"] == ["a", "b"]
    assert config["weights_sha256"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_every_single_changed_byte_of_the_weights_is_refused(tmp_path):
    save_model(tmp_path, {"w": torch.arange(8.0)}, {})
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    for place in range(len(data)):
        weights.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", json.dumps({"weights_sha256": "0"}).encode()])
def test_a_damaged_description_of_a_model_is_refused_in_one_line(tmp_path, content):
    save_model(tmp_path, {"w": torch.arange(8.0)}, {})
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_weights_are_refused_even_with_their_checksum(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    (tmp_path / "config.json").write_text(json.dumps({"weights_sha256": hashlib.sha256(b"junk").hexdigest()}))
    with pytest.raises(CheckpointError, match="is not a model"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(tmp_path)
