import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shared import gpu
from shared.errors import ConfigError
from shared.gpu import LossMeter, NotFiniteError, autocast, describe, peak_memory, resolve_precision, setup, stream


def test_a_stream_never_changes():
    draws = stream(0, "order", 3, 7)
    assert draws.initial_seed() == 7246714924964659183  # sha256('0:order:3:7'), 8 bytes, little-endian, halved
    assert torch.randint(2**31, (3,), generator=draws).tolist() == [580164728, 1527025368, 331782042]


def test_a_stream_depends_on_the_seed_and_every_name_and_on_nothing_else():
    def first(*names):
        return stream(*names).initial_seed()

    different = [
        (0, "a"),
        (1, "a"),
        (0, "b"),
        (0, "a", 0),
        (0, "a", 1),
        (0, "a", 1, 2),
        (0, "a", 2, 1),
        (10, "a"),
        (0, 1, "a"),
    ]
    assert len({first(*names) for names in different}) == len(different)
    before = torch.random.get_rng_state()
    one = torch.rand(4, generator=stream(0, "a"))
    torch.rand(10, generator=stream(0, "b"))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4, generator=stream(0, "a")), one)
    torch.random.set_rng_state(before)
    torch.rand(4, generator=stream(0, "a"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_streams_look_independent():
    draws = torch.stack([torch.randn(2000, generator=stream(0, "order", client)) for client in range(20)])
    correlations = torch.corrcoef(draws) - torch.eye(20)
    assert correlations.abs().max() < 0.1
    assert abs(float(draws.mean())) < 0.02


@pytest.mark.parametrize(
    "device", ["gpu", "meta", "mps", "xpu", "", "cuda:-1", "cuda:99999", "cuda:256", "cpu:3", "cuda:x", "cpu cuda"]
)
def test_a_device_that_is_not_here_is_refused_by_name(device):
    with pytest.raises(ConfigError, match="device: "):
        setup(device, threads=1)


def test_setup_makes_the_process_deterministic_with_the_threads_that_were_asked_for():
    assert setup("cpu", threads=2) == torch.device("cpu")
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "highest"
    setup("cpu")
    assert torch.get_num_threads() == (os.cpu_count() or 1)
    setup("cpu", threads=1)


def test_auto_takes_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup("auto", threads=1).type == "cpu"


def test_a_meter_on_the_cpu_stops_before_the_update():
    meter = LossMeter(torch.device("cpu"))
    meter.add(torch.tensor(1.0))
    meter.add(torch.tensor(2.0, requires_grad=True))
    with pytest.raises(NotFiniteError) as caught:
        meter.add(torch.tensor(math.nan))
    assert caught.value.step == 2
    assert math.isnan(caught.value.loss)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_meter_on_a_gpu_looks_only_when_it_is_read(bad):
    meter = LossMeter(SimpleNamespace(type="cuda"))
    for value in (1.0, bad, 3.0):
        meter.add(torch.tensor(value))
    with pytest.raises(NotFiniteError) as caught:
        meter.read()
    assert caught.value.step == 1
    assert meter.read() == []


def test_a_meter_gives_the_losses_in_order_once_and_keeps_no_graph():
    for device in (torch.device("cpu"), SimpleNamespace(type="cuda")):
        meter = LossMeter(device)
        for value in (1.0, 2.5, 0.5):
            meter.add(torch.tensor(value, requires_grad=True) * 1)
        assert all(not loss.requires_grad for loss in meter._losses)
        assert meter.read() == [1.0, 2.5, 0.5]
        assert meter.read() == []


def test_precision_is_float32_on_a_cpu_unless_asked_and_follows_the_gpu(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision("auto", cpu) == "float32"
    assert resolve_precision("bfloat16", cpu) == "bfloat16"
    assert resolve_precision("float32", cuda) == "float32"
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has: has)
        assert resolve_precision("auto", cuda) == ("bfloat16" if has else "float32")


def test_autocast_changes_products_only_where_bfloat16_is_asked_for():
    x = torch.ones(2, 2)
    for precision, dtype in (("float32", torch.float32), ("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (x @ x).dtype == dtype


def test_the_device_is_described_in_words_with_its_threads():
    setup("cpu", threads=1)
    assert describe(torch.device("cpu")).startswith("CPU (")
    assert describe(torch.device("cpu")).endswith("1 thread")
    torch.set_num_threads(2)
    assert describe(torch.device("cpu")).endswith("2 threads")
    torch.set_num_threads(1)


def test_the_peak_of_memory_is_in_bytes():
    assert 50 * 2**20 < peak_memory(torch.device("cpu")) < 2**40


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells it")
def test_the_memory_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it():
    """`ru_maxrss` of a new program begins at the most that its parent has held."""
    ballast = b"1" * (1500 * 2**20)
    code = "import torch; from shared.gpu import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 * 2**20 < int(done.stdout) < len(ballast)


def test_the_message_of_a_loss_that_is_not_finite_names_the_step():
    assert "step 3" in str(gpu.NotFiniteError(3, math.inf))
