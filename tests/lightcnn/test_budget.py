"""The budget track: networks as layouts, the student's loss, the teacher, and the ladder of ingredients."""

import json
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from lightcnn import feed, fused, training
from lightcnn.algorithm import plan
from lightcnn.baselines import BnGap, ImageShape
from lightcnn.budget import LayoutNet, Recipe, recipe_losses, teacher_logits
from lightcnn.config import Config
from lightcnn.export import build
from lightcnn.export import main as export_main
from lightcnn.reproduce import main
from lightcnn.study import CONFIGS, CONVOLUTIONS, RUNGS, TEACHER, jobs_of, overrides_of, teacher_job
from lightcnn.train import main as train_main
from shared.checkpoint import load_model
from shared.cli import find_config
from shared.config import load
from shared.errors import ConfigError, RunError
from shared.export import load_exported
from shared.study import Outcome

GREY, COLOUR = ImageShape(1, 28, 10), ImageShape(3, 32, 10)
LIMITS = {"budget_mnist": (GREY, 14_862), "budget_fashion_mnist": (GREY, 14_862), "budget_cifar10": (COLOUR, 19_622)}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", LIMITS)
def test_the_network_has_no_more_parameters_than_the_papers(name):
    shape, limit = LIMITS[name]
    layout = load(find_config(name, "lightcnn"), Config).method.layout
    assert 0.9 * limit < parameters(LayoutNet(layout, shape, 0)) <= limit


def test_the_rung_of_convolutions_is_the_briefs_small_network():
    assert parameters(LayoutNet(CONVOLUTIONS, GREY, 0)) == parameters(BnGap(GREY, 0)) == 12_410


def test_a_layout_counts_and_computes_what_it_says():
    net = LayoutNet("c4 r4 P s6 s6 p5", COLOUR, 0)
    convolutions = 27 * 4 + 36 * 4 + (9 * 4 + 4 * 6) + (9 * 6 + 6 * 6) + 6 * 5
    norms = 2 * (4 + 4 + 6 + 6 + 5)
    assert parameters(net) == convolutions + norms + 5 * 10 + 10
    images = torch.rand(2, 3, 32, 32)
    net.eval()
    c, r, _, s, t, p = net.blocks
    hidden = functional.relu(c.norm(c.conv(2 * images - 1)))
    hidden = functional.max_pool2d(functional.relu(hidden + r.norm(r.conv(hidden))), 2)
    hidden = functional.relu(s.norm(s.pointwise(s.depthwise(hidden))))
    hidden = hidden + functional.relu(t.norm(t.pointwise(t.depthwise(hidden))))
    wanted = net.fc(functional.relu(p.norm(p.conv(hidden))).mean((2, 3)))
    torch.testing.assert_close(net(images), wanted)
    again = LayoutNet("c4 r4 P s6 s6 p5", COLOUR, 0)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("c4 r5", "which has 4 channels"),
        ("c4" + " P" * 6, "6 pools"),
        ("c4 x5", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_a_layout_that_cannot_be_built_is_refused(layout, words):
    with pytest.raises(ConfigError, match=words):
        LayoutNet(layout, COLOUR, 0)


def test_the_losses_are_hintons_for_each_network_alone():
    generator = torch.Generator().manual_seed(0)
    logits, soft = torch.randn(2, 5, 10, generator=generator), torch.randn(2, 5, 10, generator=generator)
    targets = torch.randint(10, (2, 5), generator=generator)
    hard = torch.stack([functional.cross_entropy(logits[i], targets[i]) for i in range(2)])
    torch.testing.assert_close(recipe_losses(logits, targets, None, Recipe(0.0)), hard)
    smooth = torch.stack([functional.cross_entropy(logits[i], targets[i], label_smoothing=0.1) for i in range(2)])
    torch.testing.assert_close(recipe_losses(logits, targets, None, Recipe(0.0, 0.1)), smooth)
    recipe = Recipe(0.0, teacher_share=0.7, temperature=3.0)
    distilled = torch.stack([functional.cross_entropy(logits[i] / 3, (soft[i] / 3).softmax(-1)) for i in range(2)])
    torch.testing.assert_close(recipe_losses(logits, targets, soft, recipe), 0.3 * hard + 0.7 * 9 * distilled)


@pytest.mark.parametrize(
    ("layout", "decaying"),
    [("c4 P c4", {"blocks.0.conv.weight", "blocks.2.conv.weight", "fc.weight"}),
     ("merged", {f"{layer}.weight" for layer in ("conv1", "conv2", "head", "fc1", "fc2")})],
)  # fmt: skip
def test_decay_spares_norms_and_biases_and_is_decoupled(config_of, problem_of, layout, decaying):
    config = config_of(f"method={{name: budget, layout: {layout}, decay: 0.5}}")
    problem = problem_of(config)
    state = training.begin(plan(config, problem)[0], {}, problem, config)
    for parameter in state.optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
        parameter.data += 1  # biases begin at 0, where nothing decays
    before = {name: tensor.detach().clone() for name, tensor in state.weights.items()}
    state.optimizer.param_groups[0]["lr"] = 0.1
    state.optimizer.step()
    for name, tensor in state.weights.items():
        factor = 0.95 if name in decaying else 1
        torch.testing.assert_close(tensor.detach(), factor * before[name], msg=name)


def test_every_rung_adds_what_it_says_and_the_last_is_the_configuration(tmp_path):
    path = find_config("budget_cifar10", "lightcnn")
    whole = load(path, Config)
    fields = [load(path, Config, overrides_of(rung, whole.method)).method.model_dump() for rung in RUNGS]
    changed = [{key for key in a if a[key] != b[key]} for a, b in pairwise(fields)]
    assert changed[0] == {"optimizer", "batch_size"}
    assert changed[1] == {"layout", "peak_lr", "decay"}
    assert changed[2] == {"layout"}
    assert changed[3] == {"shift", "flip"}
    assert changed[4] == {"epochs"}
    assert not changed[5]  # the teacher's folder is the study's to name
    assert fields[-1] == whole.method.model_dump()
    jobs = jobs_of(path, whole, tmp_path / "teacher", tmp_path, None)
    assert sorted({sum(j.group == r.name for j in jobs) for r in RUNGS}) == [3, 5]
    taught = [any(a.startswith("method.teacher=") and "null" not in a for a in job.arguments) for job in jobs]
    assert taught == [job.group == "distillation" for job in jobs]
    assert len({job.folder for job in (*jobs, teacher_job(path, whole, tmp_path))}) == len(jobs) + 1


def test_a_teacher_of_other_images_is_refused_and_a_right_one_gives_its_logits(tmp_path, config_of, problem_of):
    data = "data={name: sample, val_images: 20, val_from: each_class, train_images: 60}"
    arguments = ["--config", "lightcnn/configs/budget_smoke.yaml", "--out", str(tmp_path)]
    assert train_main([*arguments, data, "method.epochs=1"]) == 0
    (folder,) = (tmp_path / "lightcnn").iterdir()
    config = load(find_config("budget_smoke", "lightcnn"), Config, [data])
    problem = problem_of(config)
    recipe = Recipe(0.0, teacher=folder, teacher_share=0.9)
    found = teacher_logits(recipe, problem, config)
    network = LayoutNet(config.method.layout, GREY, 0).eval()
    network.load_state_dict(load_model(folder / "model" / "s0")[0])
    images = problem.images.float() / 255
    with torch.no_grad():
        wanted = (network(images) + network(images.flip(-1))) / 2
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    taught = load(find_config("budget_smoke", "lightcnn"), Config, [data, f"method.teacher={folder}", "seeds=2"])
    state = training.begin(plan(taught, problem)[0], {}, problem_of(taught), taught)
    assert state.step.recipe == Recipe(0.005, 0.0, folder, 0.9, 2.0)
    assert state.step.phase.patience == 0
    group = state.optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    state_batch = next(iter(feed.batches(state, problem_of(taught))))
    order = feed.orders(state)[:, : state_batch.soft.shape[1]]
    assert len({tuple(row) for row in order.tolist()}) == 2, "each seed has an order of its own"
    assert torch.equal(state_batch.soft, state.soft[order])
    torch.testing.assert_close(state.soft, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(state_batch.labels, problem.labels[order])
    unflipped = load(find_config("budget_smoke", "lightcnn"), Config, [data, "method.flip=false"])
    with torch.no_grad():
        torch.testing.assert_close(teacher_logits(recipe, problem, unflipped), network(images), atol=1e-4, rtol=1e-4)
    losses = taught_losses(state, problem, taught)
    training.train_epoch(state, problem_of(taught), taught)
    torch.testing.assert_close(state.loss_sums / state_batch.labels.shape[1], losses, atol=1e-4, rtol=1e-4)
    other = config_of("data={name: sample, val_images: 20, val_from: each_class, train_images: 50}")
    with pytest.raises(RunError, match="not trained on this run's images"):
        teacher_logits(recipe, problem_of(other), other)


def test_a_student_leaves_the_house_without_the_path_of_its_teacher(tmp_path):
    data = "data={name: sample, val_images: 20, val_from: each_class, train_images: 60, test_images: 20}"
    arguments = ["--config", "lightcnn/configs/budget_smoke.yaml", data, "method.epochs=1", "--out", str(tmp_path)]
    assert train_main(arguments) == 0
    (teacher,) = (tmp_path / "lightcnn").iterdir()
    assert train_main([*arguments, f"method.teacher={teacher}"]) == 0
    (student,) = set((tmp_path / "lightcnn").iterdir()) - {teacher}
    assert export_main([str(student), "--out", str(tmp_path / "model")]) == 0
    for name in ("config.json", "README.md"):
        text = (tmp_path / "model" / name).read_text()
        assert str(tmp_path) not in text
        assert f"method.teacher={teacher.name}" in text
    network, _ = load_exported(tmp_path / "model", "lightcnn", build)
    assert network(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def taught_losses(state, problem, config):
    """0.1 times cross-entropy and 0.9 times 2^2 times that to the teacher's softened probabilities, in one batch."""
    batch, found = next(feed.batches(state, problem)), []
    assert batch.labels.shape[1] == len(state.lanes[0].train), "one batch an epoch"
    for row, images in enumerate(batch.inputs):
        weights = {name: tensor.clone() for name, tensor in fused.unstack(state.weights, row).items()}
        logits = state.step.network.to_module(weights).train()(images).detach()
        soft = (batch.soft[row] / 2).softmax(1)
        taught = -(soft * (logits / 2).log_softmax(1)).sum(1).mean()
        found.append(0.1 * functional.cross_entropy(logits, batch.labels[row]) + 0.9 * 4 * taught)
    return torch.stack(found)


@pytest.mark.parametrize("kfold", ["honest", "notebook"])
def test_a_teacher_that_was_trained_in_folds_saw_the_validation_images_and_is_refused(tmp_path, kfold, problem_of):
    data = "data={name: sample, val_images: 20, val_from: each_class, train_images: 60}"
    short = ("stage1.epochs=1", "stage2.max_epochs=1", "seeds=1")
    method = f"method={{name: two_stage, kfold: {kfold}, folds: 2}}"
    arguments = ["--config", "lightcnn/configs/smoke.yaml", "--out", str(tmp_path), data, *short, method]
    assert train_main(arguments) == 0
    (folder,) = (tmp_path / "lightcnn").iterdir()
    config = load(find_config("budget_smoke", "lightcnn"), Config, [data])
    with pytest.raises(RunError, match="trained in folds, so it saw validation images"):
        teacher_logits(Recipe(0.0, teacher=folder, teacher_share=0.9), problem_of(config), config)


def test_the_budget_study_runs_and_its_table_has_every_rung(tmp_path, capsys):
    command = ["--study", "budget", "--scale", "smoke", "--seeds", "2", "--workers", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    table = (tmp_path / "lightcnn" / "report-budget_smoke-partial" / "methods.md").read_text()
    assert all(f"| {rung.name} | {rung.adds} |" in table for rung in RUNGS)
    assert "| teacher |" in table
    assert "no more parameters" in capsys.readouterr().out
    assert (tmp_path / "lightcnn" / "report-budget_smoke-partial" / "results.csv").exists()
    assert (tmp_path / "lightcnn" / "report-budget_smoke-partial" / "plots" / "ladder.svg").exists()


def test_without_its_teacher_only_the_last_rung_is_not_run(tmp_path, monkeypatch, capsys):
    asked, told = [], {}

    def run_jobs(module, jobs, workers):
        asked.extend(job.group for job in jobs)
        for job in jobs:
            if job.group != TEACHER:
                job.folder.mkdir(parents=True, exist_ok=True)
                (job.folder / "results.json").write_text("{}")
        return {job.name: Outcome(int(job.group == TEACHER), 0.1) for job in jobs}

    monkeypatch.setattr("lightcnn.study.run_jobs", run_jobs)
    monkeypatch.setattr("lightcnn.study.report", lambda path, done, folder, command: told.update(done=done))
    assert main(["--study", "budget", "--scale", "smoke", "--out", str(tmp_path)]) == 1
    names = [rung.name for rung in RUNGS]
    assert set(asked) == {TEACHER, *names[:-1]}
    assert {job.group for job in told["done"]} == set(names[:-1])


@pytest.mark.parametrize("seeds", ["0", "-1"])
def test_the_budget_study_wants_at_least_one_seed(seeds, tmp_path, capsys):
    assert main(["--study", "budget", "--scale", "smoke", f"--seeds={seeds}", "--out", str(tmp_path)]) == 2
    assert "at least one seed is needed" in capsys.readouterr().err


def test_the_one_teacher_does_not_keep_the_budget_study_from_being_published_and_a_rung_of_two_seeds_does(
    tmp_path, monkeypatch, capsys
):
    def run_jobs(module, jobs, workers):
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            if (job.group == spoilt and job.seed == 2) or job.name.startswith("budget_mini-"):
                continue
            figure = {"at": "final", "split": "test", "metric": "accuracy", "value": 0.5, "seed": job.seed}
            results = {"paper": "lightcnn", "config": "budget_smoke", "method": "budget", "device": "-", "seconds": 1.0,
                       "precision": "-", "commit": "c" * 40, "command": "-", "figures": [figure]}  # fmt: skip
            (job.folder / "results.json").write_text(json.dumps(results))
            (job.folder / "environment.json").write_text(json.dumps({"commit": "c" * 40, "dirty": False}))
        return {job.name: Outcome(0, 0.1) for job in jobs}

    def report(path, done, folder, command):
        folder.mkdir(parents=True)
        (folder / "methods.md").write_text("")

    monkeypatch.setattr("lightcnn.study.run_jobs", run_jobs)
    monkeypatch.setattr("lightcnn.study.report", report)
    monkeypatch.setattr("shared.publish.REPOSITORY", tmp_path / "repository")
    command = ["--study", "budget", "--scale", "smoke", "--publish", "--out"]
    spoilt = "plain"
    assert main([*command, str(tmp_path / "spoilt")]) == 2
    assert "runs failed" in capsys.readouterr().err
    spoilt = None
    monkeypatch.setattr("lightcnn.study.SEEDS", 2)
    assert main([*command, str(tmp_path / "few")]) == 2
    assert "has 2 seeds" in capsys.readouterr().err
    monkeypatch.setattr("lightcnn.study.SEEDS", 3)
    assert not (tmp_path / "repository" / "results").exists()
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert (tmp_path / "repository" / "results" / "lightcnn" / "budget_smoke" / "methods.md").exists()
    assert TEACHER not in [rung.name for rung in RUNGS]

    monkeypatch.setitem(CONFIGS, "smoke", ("budget_mini", "budget_smoke"))  # of the first no run finishes
    assert main([*command, str(tmp_path / "two")]) == 1
    assert "failed: budget_mini: no run of the study has finished" in capsys.readouterr().err
    assert (tmp_path / "two" / "lightcnn" / "report-budget_smoke").is_dir()
