"""Whole runs: the same bits after an interruption anywhere, one pre-training for all arms, the command."""

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from shared import run as run_module
from shared.checkpoint import load_model, load_state
from shared.errors import CheckpointError, DataError, InterruptedRunError, RunError
from shared.run import Run, read_metrics, read_results
from sparsevit import start, weights
from sparsevit.fit import Fit
from sparsevit.model import build
from sparsevit.prune import Sweep, groups_of
from sparsevit.shrink import load_network
from sparsevit.train import train
from tests.shared.small_runs import began_elsewhere
from tests.sparsevit.whole_runs import SHORT, figures_of, whole


class StoppedRun(Run):
    """A run that a signal reaches at the so many-th look for one."""

    def __init__(self, folder, config, looks):
        super().__init__(folder, config, "test")
        self.left = looks

    def check(self):
        self.left -= 1
        if self.left == 0:
            raise InterruptedRunError(2, self.folder)


def stop(folder, config, looks):
    """Run until the signal; whether it came before the end."""
    try:
        with StoppedRun(folder, config, looks) as run:
            train(config, run)
    except InterruptedRunError:
        assert not (folder / "results.json").exists()
        return True
    return False


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, tiny, cache):
    known = {}

    def figures(method, *more):
        if (method, more) not in known:
            folder = tmp_path_factory.mktemp("whole")
            (folder / "pretrained").symlink_to(cache)
            known[method, more] = whole(folder / "run", tiny(method, *SHORT, *more))
        return known[method, more]

    return figures


@pytest.mark.parametrize("looks", [1, 7, 10, 11, 19, 20, 21, 23, 25, 26, 30, 33])
def test_a_run_that_stopped_anywhere_goes_on_to_the_same_bits(place, tiny, never_stopped, looks):
    """10 steps an epoch, 2 epochs, then looks within the sweep and the two recoveries."""
    config = tiny("paper", *SHORT)
    assert stop(place / "run", config, looks)
    saved = load_state(place / "run" / "checkpoint" / "state.ckpt")["state"]
    assert saved["fit"]["step"] == min(looks, 20)
    assert whole(place / "run", config) == never_stopped("paper")


def test_a_run_logs_how_much_its_term_is_beside_the_cross_entropy_at_the_first_step(never_stopped):
    def share(method, *more):
        (row,) = (row for row in never_stopped(method, *more)["metrics"] if row["event"] == "first_step")
        return row["term_share"]

    assert share("none") == 0
    assert 0 < share("paper") < 1e-2
    assert share("l1", "coefficients.l1=0.1") > share("l1") > 1e-3


def test_a_run_that_is_stopped_again_and_again_gives_the_same_bits(place, tiny, never_stopped):
    config, stops = tiny("paper", *SHORT), 0
    while stop(place / "run", config, 14):
        stops += 1
    assert stops >= 2
    assert figures_of(place / "run") == never_stopped("paper")


@pytest.mark.parametrize("method", ["null", "l1", "group", "attn_sparse"])
def test_every_kind_of_arm_goes_on_to_the_same_bits(place, tiny, never_stopped, method):
    config = tiny(method, *SHORT)
    assert stop(place / "run", config, 13)
    assert whole(place / "run", config) == never_stopped(method)


def test_the_best_epoch_is_kept_over_an_interruption(place, tiny, never_stopped):
    more = ("select=best", "epochs=3", "recipe.lr=0.3")
    config = tiny("none", *SHORT, *more)
    assert stop(place / "run", config, 15)
    assert whole(place / "run", config) == never_stopped("none", *more)
    accuracies = [row["val_accuracy"] for row in read_metrics(place / "run", "epoch")]
    stated = {row["metric"]: row["value"] for row in read_results(place / "run")["figures"]}
    assert stated["val.accuracy"] == max(accuracies)


def test_a_run_goes_on_from_the_state_before_the_last(place, tiny, never_stopped, monkeypatch):
    monkeypatch.setattr(run_module, "SAVE_EVERY_SECONDS", 0)
    config = tiny("paper", *SHORT)
    stop(place / "run", config, 15)
    assert whole(place / "run", config, previous=True) == never_stopped("paper")


def test_a_run_does_not_go_on_with_other_images(place, tiny):
    config = tiny("paper", *SHORT)
    assert stop(place / "run", config, 13)
    began_elsewhere(place / "run" / "metrics.jsonl")
    with Run(place / "run", config, "test") as run, pytest.raises(DataError, match=r"began on other data \(train\)"):
        train(config, run)


def test_an_interrupted_pre_training_goes_on_to_the_same_bits_and_names_the_run(tmp_path, tiny, never_stopped):
    config = tiny("paper", *SHORT)

    class Stopped(Run):
        looks = 0

        def check(self):
            Stopped.looks += 1
            if self.folder.parent.name == "pretrained" and Stopped.looks == 3:
                raise InterruptedRunError(15, self.folder)

    original = start.Run
    start.Run = Stopped
    try:
        with pytest.raises(InterruptedRunError) as found, Run(tmp_path / "run", config, "test") as run:
            train(config, run)
    finally:
        start.Run = original
    assert (found.value.folder, found.value.exit_code) == (tmp_path / "run", 143)
    (state,) = tmp_path.glob("pretrained/*/checkpoint/state.ckpt")
    assert load_state(state)["state"]["step"] == 3
    assert whole(tmp_path / "run", config) == never_stopped("paper")


def test_arms_of_a_seed_share_start_and_batches_and_seeds_share_the_pre_training(never_stopped):
    arms = {method: never_stopped(method)["results"] for method in ("none", "paper", "l1")}
    assert len({arm["order_digest"] for arm in arms.values()}) == 1
    assert len({arm["start"]["digest"] for arm in arms.values()}) == 1
    assert len({arm["model_digest"] for arm in arms.values()}) == 3
    other = never_stopped("none", "seed=1")["results"]
    assert other["order_digest"] != arms["none"]["order_digest"]
    assert other["start"]["pretrained"] == arms["none"]["start"]["pretrained"]


def test_runs_that_start_together_pre_train_once(tmp_path, tiny, never_stopped, monkeypatch):
    config, trained = tiny("none", *SHORT), []
    original = start._pretrain
    monkeypatch.setattr(start, "_pretrain", lambda *a: (trained.append(1), original(*a))[1])
    torch.manual_seed(0)

    def pretrain_in(name):
        with Run(tmp_path / name, config, "test") as run:
            from sparsevit.problem import load_problem

            return start.pretrain(config, run, load_problem(config.data, torch.device("cpu")), torch.device("cpu"))

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(pretrain_in, ("a", "b"))
    assert one == two
    assert len(trained) == 1
    tensors = load_model(one[0])[0]
    assert torch.equal(tensors["cls"], load_model(next(iter(tmp_path.glob("pretrained/*/model"))))[0]["cls"])


@pytest.mark.parametrize("change", ["pretrain.seed=1", "model.width=12", "data.train_images=130", "pretrain.epochs=2"])
def test_another_pre_training_has_another_folder(tmp_path, tiny, change):
    from sparsevit.problem import load_problem

    names = set()
    for more in ([], [change]):
        config = tiny("none", *SHORT, *more)
        with Run(tmp_path / f"run{len(more)}", config, "test") as run:
            folder, _ = start.pretrain(config, run, load_problem(config.data, torch.device("cpu")), torch.device("cpu"))
        names.add(folder.parent.name)
    assert len(names) == 2


def test_pre_training_on_other_images_gives_everything_but_the_head(tmp_path, tiny):
    other = "pretrain={epochs: 1, batch_size: 20, data: {name: sample, mean: [0.3], std: [0.3], train_images: 60, "
    config = tiny("none", *SHORT, other + "test_images: 20}}")
    results = whole(tmp_path / "run", config)["results"]
    assert results["start"]["start"] == "pre-training"
    (model,) = tmp_path.glob("pretrained/*/model")
    own = tiny("none", *SHORT)
    seen = {}
    for name, c in (("other", config), ("own", own)):
        with Run(tmp_path / name, c, "test") as run:
            from sparsevit.problem import load_problem

            seen[name] = start.starting_network(c, run, load_problem(c.data, torch.device("cpu")), torch.device("cpu"))
    tensors, _ = load_model(model)
    assert torch.equal(seen["other"].cls, tensors["cls"])
    assert not torch.equal(seen["other"].head.weight, tensors["head.weight"])


def test_a_run_starts_from_a_pretrained_file(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    config = tiny("none", *SHORT, "pretrain=null", "weights={path: w.safetensors}", "model.dropout=0.0")
    from sparsevit.start import network_size

    state = build(network_size(config.model, 28, 1, 10), 77).state_dict()
    save_file(weights.to_timm(state), tmp_path / "w.safetensors")
    results = whole(tmp_path / "run", config)["results"]
    assert results["start"]["start"] == "file"
    assert len(results["start"]["sha256"]) == 64
    assert results["start"]["sha256"] in capsys.readouterr().out
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"w\.safetensors: cannot be read"):
        whole(tmp_path / "again", config)


def test_a_loss_that_is_not_finite_ends_the_run_with_a_bundle(place, tiny, monkeypatch):
    original = Fit._update

    def broken(self, images, labels):
        if self.step == 13 and self.plan.names == ("fine-tune",):
            with torch.no_grad():
                self.network.head.bias[0] = math.inf
        original(self, images, labels)

    monkeypatch.setattr(Fit, "_update", broken)
    with pytest.raises(RunError, match="step 13"):
        whole(place / "run", tiny("none", *SHORT))
    bundle = json.loads((place / "run" / "not_finite.json").read_text())
    assert bundle["step"] == 13
    assert len(bundle["images"]) == 10
    assert bundle["seed"] == 0


def test_the_sweep_starts_from_the_dense_weights_every_time(tiny_run, tiny):
    from shared.gpu import setup
    from sparsevit.problem import load_problem

    config = tiny("paper")
    problem = load_problem(config.data, setup("cpu", 1))
    network = load_network(tiny_run / "model")
    before = copy.deepcopy(network.state_dict())
    sweep = Sweep(config, network, problem, lambda: None)
    share = {}
    for group in [*groups_of(config), *groups_of(config)]:
        figures, _ = sweep.run(group)
        share.setdefault(group, []).append(figures)
    assert all(one == two for one, two in share.values()), "a second sweep finds what the first one did"
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())
    twice = sweep.pruned("global_l1", 0.3), sweep.pruned("global_l1", 0.3)
    ranked = sum(int(torch.numel(before[n])) for n in sweep.masks("global_l1", 0.3))
    for pruned in twice:
        zeros = sum(int((pruned.state_dict()[n] == 0).sum()) for n in sweep.masks("global_l1", 0.3))
        assert zeros == round(0.3 * ranked)


def test_what_a_run_saves_is_what_it_says(tiny_run, tiny):
    config, results = tiny("paper"), read_results(tiny_run)
    figures = {row["metric"]: row["value"] for row in results["figures"]}
    recovered = load_network(tiny_run / "pruned" / "global_l1.50.recovered")
    ranked = Sweep(config, recovered, None, lambda: None).masks("global_l1", 0.0)
    zeros = sum(int((recovered.state_dict()[n] == 0).sum()) for n in ranked)
    assert zeros >= round(0.5 * sum(m.numel() for m in ranked.values()))
    dense = load_network(tiny_run / "model")
    assert figures["dense.parameters"] == sum(p.numel() for p in dense.parameters())
    file = tiny_run / "pruned" / "neurons.50" / "model.safetensors"
    assert figures["neurons.50.bytes"] == file.stat().st_size < figures["dense.bytes"]
    small = load_network(file.parent)
    assert [b.mlp for b in small.size.blocks] == [6, 6]
    assert figures["neurons.50.parameters"] == sum(p.numel() for p in small.parameters())
    nonzero = figures["global_l1.50.nonzero"]
    assert nonzero == figures["dense.nonzero"] - round(0.5 * figures["dense.prunable"])
    mean = sum(figures[f"global_l1.{r}.accuracy"] for r in (10, 20, 30, 40, 50)) / 5
    assert figures["global_l1.mean_10_50"] == pytest.approx(mean)
    assert figures["global_l1.80.drop"] == pytest.approx(figures["dense.accuracy"] - figures["global_l1.80.accuracy"])
