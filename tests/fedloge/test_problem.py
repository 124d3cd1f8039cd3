"""The problem that a configuration states: long tail, partition, local tests, digests; image lists; refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from fedloge.algorithm import build_method
from fedloge.config import Config
from fedloge.eval import evaluate
from fedloge.federated import start
from fedloge.problem import load_problem
from shared.config import parse
from shared.errors import ConfigError, DataError
from shared.longtail import exponential_counts, step_counts

pytestmark = pytest.mark.filterwarnings("ignore:at sparsity")  # the frames here are repaired in a few steps

CPU = torch.device("cpu")
SAMPLE = """
paper: fedloge
data: {name: sample, imbalance_factor: 20, n_max: 200, image_size: 14, mean: [0.286], std: [0.353]}
clients: {count: 5, alpha: 0.5}
model: {name: mlp}
method: fedavg
optimizer: {lr: 0.05}
rounds: 1
local_epochs: 1
batch_size: 16
evaluate: {every: 1, last: 1}
device: cpu
precision: float32
threads: 1
"""


def sample(*overrides):
    return parse(SAMPLE, Config, overrides)


def load(*overrides):
    return load_problem(sample(*overrides), CPU)


# --- long tail and partition ------------------------------------------------------------------------------------------


def test_training_set_is_the_asked_long_tail_and_the_test_set_is_balanced():
    problem = load()
    wanted = exponential_counts(200, 10, 20)
    assert list(problem.class_counts) == wanted
    assert torch.bincount(problem.train.labels).tolist() == wanted
    assert torch.bincount(problem.test.labels).tolist() == [500] * 10
    assert problem.shape.image_size == 14
    assert sorted(c for group in problem.groups for c in group) == list(range(10))
    assert list(load("data.profile=step").class_counts) == step_counts(200, 10, 20)


def test_clients_split_the_training_set_and_their_counts_are_those_of_their_images():
    problem = load()
    together = torch.cat([client.images for client in problem.clients])
    assert torch.equal(together.sort().values, torch.arange(len(problem.train)))
    for client in problem.clients:
        assert client.size >= 10
        assert torch.equal(client.counts, torch.bincount(problem.train.labels[client.images], minlength=10))
        assert torch.equal(client.counts, problem.shape.counts[client.index])


def test_local_tests_have_the_histogram_of_the_rule():
    problem = load()
    table, total = problem.shape.counts, int(problem.shape.counts.sum())
    for client, local in zip(problem.clients, problem.local_tests, strict=True):
        assert len(local.unique()) == len(local)
        histogram = torch.bincount(problem.test.labels[local], minlength=10)
        assert torch.equal(histogram, (table[client.index] * 5000 // total).clamp(max=500))


def test_local_tests_of_a_fixed_size_have_the_clients_own_mix():
    problem = load("clients.local_test=proportional_client", "clients.local_test_size=100")
    for client, local in zip(problem.clients, problem.local_tests, strict=True):
        histogram = torch.bincount(problem.test.labels[local], minlength=10)
        exact = 100 * client.counts / client.size
        assert (histogram - exact).abs().max() <= 0.5
        assert not histogram[client.counts == 0].any()


def facts(problem):
    return problem.digests, [t.tolist() for t in problem.local_tests], [c.images.tolist() for c in problem.clients]


def test_a_problem_depends_on_its_configuration_alone():
    first = facts(load())
    torch.manual_seed(7)
    np.random.seed(7)
    assert facts(load()) == first


def test_partition_and_local_tests_follow_the_runs_seed_unless_they_have_their_own():
    digests, tests, _ = facts(load("seed=0"))
    other = load("seed=1")
    assert other.digests["partition"] != digests["partition"]
    assert {k: v for k, v in other.digests.items() if k != "partition"} == {
        k: v for k, v in digests.items() if k != "partition"
    }
    assert [t.tolist() for t in other.local_tests] != tests
    fixed = [facts(load("clients.partition_seed=1", f"seed={seed}")) for seed in (0, 1, 2)]
    assert fixed[0] == fixed[1] == fixed[2] == facts(other)


def test_subset_seed_changes_the_images_and_neither_counts_nor_test_set():
    first, other = load(), load("data.subset_seed=1")
    assert first.digests["train"] != other.digests["train"]
    assert first.digests["test"] == other.digests["test"]
    assert first.class_counts == other.class_counts


def test_facts_for_the_log_are_those_of_the_clients():
    problem = load()
    found = problem.facts()
    assert found["images"] == sum(found["client_sizes"]) == sum(problem.class_counts)
    held = problem.shape.counts > 0
    assert found["classes_a_client"] == pytest.approx(float(held.sum(dim=1).float().mean()), abs=0.005)
    assert found["empty_pairs"] == pytest.approx(1 - float(held.float().mean()), abs=1e-4)
    assert found["local_test_sizes"] == [len(t) for t in problem.local_tests]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["data.mean=[0.1, 0.2]"], ConfigError, "mean has 2 channels and std 1"),
        (["data.mean=[0.1, 0.2]", "data.std=[0.1, 0.2]"], ConfigError, "data.mean: has 2 numbers.* 1 channels"),
        (["data.std=[0]"], ConfigError, "must be above 0"),
        (["clients.alpha=0"], ConfigError, "clients.alpha.*must be above 0.*Dirichlet"),
        (["clients.fraction=0"], ConfigError, "must be above 0"),
        (["clients.fraction=1.5"], ConfigError, "is above 1"),
        (["clients.count=500"], DataError, "too few for 500 clients"),
        (["clients.alpha=0.01", "clients.count=60"], DataError, "raise alpha"),
        (["data.imbalance_factor=0.5"], ConfigError, "is below 1"),
        (["data.imbalance_factor=500"], DataError, "leave none for the smallest"),
        (["data.image_size=13"], DataError, "divisor"),
        (["data.n_max=4000"], DataError, "4000 images asked for"),
        (["data.name=list"], ConfigError, "train_list, test_list, image_root, num_classes"),
        (["batch_size=1"], ConfigError, "batch norm needs two"),
        (["seed=-1"], ConfigError, "is below 0"),
    ],
)
def test_a_problem_that_cannot_be_is_refused_with_what_is_wrong(overrides, error, words):
    with pytest.raises(error, match=words):
        load(*overrides)


# --- image lists ------------------------------------------------------------------------------------------------------

LISTS = """
paper: fedloge
data:
  name: list
  train_list: lists/train.txt
  test_list: lists/test.txt
  image_root: images
  num_classes: 3
  image_size: 32
  workers: 2
  mean: [0.485, 0.456, 0.406]
  std: [0.229, 0.224, 0.225]
clients: {count: 2, alpha: 1.0, min_size: 4, local_test: proportional_client, local_test_size: 6}
model: {name: convnet}
method: fedavg
optimizer: {lr: 0.05}
rounds: 1
local_epochs: 1
batch_size: 6
evaluate: {every: 1, last: 1, batch_size: 5}
device: cpu
precision: float32
threads: 1
"""


@pytest.fixture
def image_lists(tmp_path, monkeypatch):
    """30 training images of three colours, long-tailed, 12 test images, and their lists, below a data root."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    random = np.random.default_rng(0)
    (tmp_path / "lists").mkdir()
    for split, counts in (("train", (16, 9, 5)), ("test", (4, 4, 4))):
        lines = []
        for label, count in enumerate(counts):
            folder = tmp_path / "images" / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (40, 48, 3))
                pixels[..., label] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
                lines.append(f"{split}/class {label}/{i}.jpg {label}\n")
        (tmp_path / "lists" / f"{split}.txt").write_text("".join(lines))
    return tmp_path


def lists(*overrides):
    return parse(LISTS, Config, overrides)


def test_a_list_data_set_keeps_its_own_counts_and_is_found_below_the_data_root(image_lists):
    problem = load_problem(lists(), CPU)
    assert problem.class_counts == (16, 9, 5)
    assert (len(problem.train), len(problem.test)) == (30, 12)
    assert (problem.shape.in_channels, problem.shape.image_size) == (3, 32)
    assert next(problem.test.evaluate(4))[0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("name", ["fedloge", "fedavg_ft", "ditto", "fedetf", "creff"])
def test_a_list_data_set_trains_and_is_evaluated(lab, image_lists, name):
    config = lists(f"method={lab.settings[name]}")
    problem = load_problem(config, CPU)
    server = start(build_method(config, problem.shape), 2, CPU)
    lab.play_round(server, problem, config)
    figures, _ = evaluate(server, problem, config)
    assert 0 <= figures["generic.accuracy"] <= 1
    assert 0 <= figures["personal.accuracy"] <= 1
    assert all(tensor.isfinite().all() for tensor in server.state.values())


def test_a_resnet50_trains_on_a_list_data_set(lab, image_lists):
    config = lists("model.name=resnet50", "method={name: fedloge, etf_steps: 20}", "batch_size=16")
    problem = load_problem(config, CPU)
    server = start(build_method(config, problem.shape), 2, CPU)
    before = server.state["backbone.layers.conv1.weight"].clone()
    lab.play_round(server, problem, config)
    assert server.state["etf.weight"].shape == (3, 2048)
    assert not torch.equal(server.state["backbone.layers.conv1.weight"], before)
    assert 0 <= evaluate(server, problem, config)[0]["personal.accuracy"] <= 1


def test_a_list_without_an_image_of_a_class_is_refused(image_lists):
    path = image_lists / "lists" / "train.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.endswith(" 1\n")))
    with pytest.raises(DataError, match="1 classes have no image, '1' first"):
        load_problem(lists(), CPU)


def test_a_list_with_a_label_out_of_range_or_a_missing_image_is_refused(image_lists):
    with pytest.raises(DataError, match=r"outside 0\.\.1"):
        load_problem(lists("data.num_classes=2"), CPU)
    with pytest.raises(DataError, match=r"txt:1: there is no "):
        load_problem(lists("data.image_root=elsewhere"), CPU)


def test_clients_none_of_which_gets_a_test_image_are_refused_before_training(image_lists):
    (image_lists / "lists" / "test.txt").write_text("test/class 0/0.jpg 0\n")
    with pytest.raises(DataError, match="no client gets a test image of 1"):
        load_problem(lists("clients.local_test=proportional_global"), CPU)


def test_the_mean_of_a_grey_data_set_is_refused_for_colour_images(image_lists):
    with pytest.raises(ConfigError, match=r"data.mean: has 1 numbers.* 3 channels"):
        load_problem(lists("data.mean=[0.5]", "data.std=[0.5]"), CPU)
