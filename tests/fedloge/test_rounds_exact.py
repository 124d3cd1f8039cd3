"""The round loop of the command against one written by hand, when it evaluates, and the settings of the paper."""

import pytest
import torch
from torch.nn import functional

from fedloge import eval as evaluation
from fedloge.config import Config
from fedloge.eval import evaluate, geometry
from fedloge.problem import load_problem
from fedloge.train import due, train
from shared.batches import random_crop, random_flip
from shared.checkpoint import load_model
from shared.cli import find_config
from shared.config import load
from shared.run import Run
from tests.fedloge.test_problem import load as load_sample

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")  # the frames here are repaired in a few steps

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["fedavg", "fedloge", "creff"])
def test_the_command_plays_the_rounds_that_are_written_down_here(tmp_path, tiny_config, lab, method):
    """Weights by the images of those who take part, messages made before training, two clients of three a round."""
    config = tiny_config(method, "clients={count: 3, fraction: 0.67, alpha: 1.0, min_size: 5}")
    with Run(tmp_path / "run", config, "test") as run:
        train(config, run)
    server = lab.play(config, load_problem(config, CPU), config.rounds)
    wanted = {f"global.{entry}": tensor for entry, tensor in server.state.items()}
    wanted |= {f"client.{entry}": tensor for entry, tensor in server.private.items()}
    assert lab.same(load_model(tmp_path / "run" / "model")[0], wanted)


def test_a_run_evaluates_every_so_many_rounds_and_in_each_of_the_last(lab):
    config = lab.configure("fedavg", "rounds=30", "evaluate.every=10", "evaluate.last=3")
    assert [round for round in range(30) if due(round, config)] == [9, 19, 27, 28, 29]


def test_the_groups_are_those_by_share_of_the_training_images():
    """The counts fall from 1,000 to 10. By 100 and 20 images the groups would have 5, 3 and 2 classes."""
    assert load_sample("data.n_max=1000", "data.imbalance_factor=100").groups == ((0, 1, 2), (3, 4, 5), (6, 7, 8, 9))


def test_clients_are_looked_at_some_at_a_time_to_the_same_figures(lab, any_method, monkeypatch):
    config, problem = lab.configure(any_method), lab.problem(tests_of_class=20)
    server = lab.play(config, problem, rounds=1)
    before = evaluate(server, problem, config)
    monkeypatch.setattr(evaluation, "CLIENTS_AT_ONCE", 2)
    assert evaluate(server, problem, config) == before


def test_the_frames_errors_and_those_of_the_realignment_are_measured(lab, monkeypatch):
    config, problem = lab.configure("fedloge"), lab.problem()
    server = lab.play(config, problem, rounds=1)
    figures = geometry(server, problem, config)[0]
    assert figures["gla.unit_row_error"] < 1e-5
    assert figures["gla.norm_transfer_error"] < 1e-5
    server.state["etf.weight"].mul_(2)
    found = geometry(server, problem, config)[0]
    assert found["etf.length_error"] == pytest.approx(1, abs=0.1)
    assert found["etf.angle_error"] == pytest.approx(figures["etf.angle_error"], abs=1e-3)
    server.state["etf.weight"][1] = server.state["etf.weight"][0]  # two rows in one direction
    found = geometry(server, problem, config)[0]
    assert found["etf.min_angle_error"] > figures["etf.min_angle_error"] + 10
    assert found["etf.angle_error"] > 1
    monkeypatch.setattr(evaluation, "realign_global", lambda weight: 1.1 * functional.normalize(weight, dim=-1))
    monkeypatch.setattr(evaluation, "realign_local", lambda shared, own: 1.3 * shared * own.norm(dim=-1, keepdim=True))
    found = geometry(server, problem, config)[0]
    assert found["gla.unit_row_error"] == pytest.approx(0.1, abs=1e-4)
    assert found["gla.norm_transfer_error"] == pytest.approx(0.3, abs=1e-4)


def test_training_images_are_cropped_after_padding_by_4_and_then_flipped():
    problem, draws, chosen = load_sample("data.augment=crop_flip"), torch.Generator().manual_seed(0), torch.arange(64)
    wanted = random_flip(random_crop(problem.train.images[chosen], 4, draws), draws)
    found, _ = problem.train.batch(chosen, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, (wanted / 255 - 0.286) / 0.353, atol=1e-5, rtol=0)
    plain, _ = problem.test.batch(chosen, torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain, (problem.test.images[chosen] / 255 - 0.286) / 0.353, atol=1e-5, rtol=0)


# --- the paper's settings ---------------------------------------------------------------------------------------------

MEANS = {"cifar10": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
         "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}  # fmt: skip
CASES = [(f"{name}_lt_if{factor}_alpha{alpha}", name, factor, value, clients, 1.0)
         for name, clients in (("cifar10", 40), ("cifar100", 20)) for factor in (50, 100)
         for alpha, value in (("05", 0.5), ("1", 1.0))]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "name", "factor", "alpha", "clients", "fraction"),
    [*CASES, ("cifar100_lt_readme", "cifar100", 100, 0.5, 40, 0.3)],
)
def test_the_cifar_configurations_have_the_papers_settings(file, name, factor, alpha, clients, fraction):
    config = load(find_config(file, "fedloge"), Config)
    assert (config.data.name, config.data.imbalance_factor, config.data.subset_seed) == (name, factor, 0)
    assert (config.data.mean, config.data.std) == MEANS[name]
    assert config.data.augment == "crop_flip"
    assert (config.clients.count, config.clients.fraction, config.clients.alpha) == (clients, fraction, alpha)
    assert config.clients.partition_seed == 3407
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.03, 0.5, 0.0)
    assert (config.batch_size, config.local_epochs, config.rounds) == (8, 5, 500)
    assert (config.method.sparsity, config.method.norm) == (0.6, 0.1)
    assert config.model.name == ("resnet18" if name == "cifar10" else "resnet34")
