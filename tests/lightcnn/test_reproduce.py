"""The study's plan: which runs, under which settings, and what may be published."""

import math
from argparse import Namespace

import pytest

from lightcnn.algorithm import METHODS, VARIANTS, nominal_epochs, plan, settings_of
from lightcnn.baselines import BASELINES
from lightcnn.claims import all_claims, peer_claims
from lightcnn.config import Config
from lightcnn.reproduce import (
    AS_LONG,
    CORE,
    PEERS,
    PLANS,
    SAME_STAGE1,
    Slice,
    chosen_slices,
    jobs_of,
    main,
    methods_table,
    queue_of,
    study_rows,
    unequal_epochs,
)
from shared.claims import Comparison
from shared.cli import find_config
from shared.config import load
from shared.report import figures_of, read_rows


def test_the_jobs_of_a_study_have_folders_of_their_own_and_commands_that_load(tmp_path):
    path = find_config("smoke", "lightcnn")
    jobs = jobs_of(Slice("smoke", METHODS, 3), path, tmp_path)
    assert len({job.folder for job in jobs}) == len(jobs) == len(METHODS) == 2 + len(VARIANTS) + len(BASELINES)
    for job in jobs:
        config = load(find_config(job.arguments[1], "lightcnn"), Config, job.arguments[4:])
        assert (config.method.name, config.seeds) == (job.group, 3)


@pytest.mark.parametrize("scale", PLANS)
def test_every_figure_of_a_claim_is_of_a_method_that_the_plan_runs(scale):
    configs = {part.config for part in PLANS[scale]}
    for config in configs:
        run = [m for part in PLANS[scale] if part.config == config for m in part.methods]
        assert len(run) == len(set(run)), "no method is run twice"
        if set(PEERS) & set(run):
            continue
        assert set(CORE) <= set(run)
        if scale != "paper" or config == "fashion_mnist":
            named = set()
            for claim in all_claims("sample", 1):
                if isinstance(claim, Comparison):
                    others = claim.right if isinstance(claim.right, tuple) else (claim.right,)
                    named |= {f.partition("/")[0] for f in (claim.left, *others) if isinstance(f, str)}
            assert named <= set(run)


def configs_of(part, tmp_path):
    """The configuration of each method's run."""
    jobs = jobs_of(part, find_config(part.config, "lightcnn"), tmp_path)
    return {job.group: load(find_config(job.arguments[1], "lightcnn"), Config, job.arguments[4:]) for job in jobs}


def total_epochs(config, problem):
    """Those of a stage 1 that is taken from another run included."""
    taken = config.stage1.epochs if config.stage1.branches else 0
    return taken + sum(step.phase.epochs for step in plan(config, problem))


@pytest.mark.parametrize("scale", PLANS)
def test_what_is_compared_over_as_many_epochs_has_them_and_does_not_stop_early(scale, tmp_path, config_of, problem_of):
    problem = problem_of(config_of())  # a plan's epochs are the same for all images
    for part in PLANS[scale]:
        configs = configs_of(part, tmp_path)
        nominal = nominal_epochs(next(iter(configs.values())))
        for method in set(AS_LONG) & set(configs):
            (step,) = plan(configs[method], problem)
            assert step.phase.patience == 0
            assert step.phase.epochs == (part.epochs or nominal)
        if part.config == "mini":
            assert nominal == 28
            found = {m: total_epochs(c, problem) for m, c in configs.items()}
            assert found.pop("bn_gap") == 20
            assert set(found.values()) == {28}


def test_what_takes_the_branches_of_two_stage_would_train_the_same(config_of, problem_of):
    problem = problem_of(config_of())

    def stage1(method):
        step = plan(config_of(f"method={method}"), problem)[0]
        return step.phase, step.images, step.batch_size, step.keep

    assert {method for method in VARIANTS if stage1(method) == stage1("two_stage")} == set(SAME_STAGE1)


@pytest.mark.parametrize("scale", PLANS)
@pytest.mark.parametrize("methods", [None, ["a_only", "scratch"], ["lenet5"]])
def test_branches_are_trained_before_they_are_taken_and_have_all_seeds(scale, methods, tmp_path):
    parts = chosen_slices(Namespace(config=None, methods=methods, seeds=None), scale)
    found = [(part, find_config(part.config, "lightcnn")) for part in parts]
    queue = {job.folder: job for job in queue_of(found, tmp_path)}
    configs = {folder: load(find_config(job.arguments[1], "lightcnn"), Config, job.arguments[4:])
               for folder, job in queue.items()}  # fmt: skip
    taken = set()
    for folder, config in configs.items():
        assert (config.stage1.branches is not None) == (queue[folder].group in SAME_STAGE1)
        assert queue[folder].after == config.stage1.branches
        if config.stage1.branches is not None:
            theirs = configs[config.stage1.branches]
            taken.add(config.stage1.branches)
            assert theirs.method.name == "two_stage"
            assert set(config.all_seeds) <= set(theirs.all_seeds)
            assert theirs.data == config.data
    assert set(queue) == taken | {job.folder for part, path in found for job in jobs_of(part, path, tmp_path)}
    assert bool(taken) == (methods != ["lenet5"])


def test_the_configurations_of_a_plan_go_by_turns(tmp_path):
    """Three runs that fail alike and none that ends well end a study: those of missing images must not come first."""
    queue = queue_of([(part, find_config(part.config, "lightcnn")) for part in PLANS["paper"]], tmp_path)
    names = [job.arguments[1].rpartition("/")[2] for job in queue]
    assert set(names[:4]) == {"fashion_mnist.yaml", "mnist.yaml", "cifar10.yaml", "fashion_mnist_peers.yaml"}
    groups = [job.group for job in queue if job.arguments[1].endswith("/mnist.yaml")]
    assert groups == list(CORE)[::-1], "the longest first"


def test_a_file_of_ones_own_is_what_is_run_under_the_plan_of_its_name(tmp_path):
    own = tmp_path / "mini.yaml"
    own.write_text(find_config("mini", "lightcnn").read_text().replace("train_images: 4000", "train_images: 1000"))
    asked = Namespace(config=str(own), methods=None, seeds=None)
    (part,) = chosen_slices(asked, "smoke")
    assert (part.methods, part.seeds) == (PLANS["mini"][0].methods, PLANS["mini"][0].seeds)
    assert {config.data.train_images for config in configs_of(part, tmp_path).values()} == {1000}


def test_a_part_of_a_study_has_the_runs_of_the_whole_and_others_three_seeds(tmp_path):
    def commands(scale, config, methods):
        parts = chosen_slices(Namespace(config=config, methods=methods, seeds=None), scale)
        jobs = [job for part in parts for job in jobs_of(part, find_config(part.config, "lightcnn"), tmp_path)]
        return {(job.group, job.folder.name, job.arguments) for job in jobs}

    for scale, config in (("paper", "fashion_mnist"), ("paper", None), ("mini", None)):
        whole = commands(scale, config, None)
        for method in ("two_stage", "lenet5", "scratch"):
            assert commands(scale, config, [method]) == {job for job in whole if job[0] == method}
    (part,) = chosen_slices(Namespace(config="mnist", methods=["lenet5"], seeds=None), "paper")
    assert (part.config, part.methods, part.seeds, part.epochs) == ("mnist", ("lenet5",), 3, 46)
    first, second = chosen_slices(Namespace(config="fashion_mnist", methods=["lenet5", "scratch"], seeds=2), "paper")
    assert (first.methods, first.seeds, second.methods, second.seeds) == (("scratch",), 2, ("lenet5",), 2)


def test_the_network_of_the_state_of_the_art_claim_is_not_larger_than_the_papers(config_of, problem_of):
    config = config_of("method=bn_gap")
    (step,) = plan(config, problem_of(config))
    assert sum(p.numel() for p in step.network.to_module(step.network.initial(0)).parameters()) <= 14862


def test_the_claims_are_told_apart_and_the_accuracies_are_those_of_the_abstract():
    for name, channels, shown in (("mnist", 1, "99 %"), ("fashion_mnist", 1, "89 %"), ("cifar10", 3, "65 %")):
        claims = all_claims(name, channels)
        assert len({claim.text for claim in claims}) == len(claims)
        assert claims[0].paper == shown
        assert claims[0].right == float(shown[:2]) / 100 - 0.005
    assert all_claims("sample", 1)[0].paper != "89 %"


def test_plain_training_has_as_many_epochs_as_the_published_two_stages_took(repository):
    """The mean over seeds, rounded up; the plan states it, for a study cannot know before it has run."""
    for part in PLANS["paper"]:
        path = repository / "results" / "lightcnn" / part.config / "results.csv"
        if part.epochs is not None:
            taken = figures_of(read_rows(path), "final")["two_stage/epochs.run"].values()
            assert part.epochs == math.ceil(sum(taken) / len(taken))


def test_the_small_modern_network_is_asked_to_be_better_than_the_larger_ones():
    claims = peer_claims(["squeezenet", "shufflenet_v2"])
    wanted = [("bn_gap/accuracy", f"{name}/accuracy") for name in ("squeezenet", "shufflenet_v2")]
    assert [(claim.left, claim.right) for claim in claims] == wanted


def test_the_study_counts_the_parameters_of_both_networks():
    found = study_rows("mini", {"device": "CPU", "precision": "float32", "commit": "c"}, "python -m x")
    assert {row.metric: row.value for row in found} == {"parameters.mnist": 14_862, "parameters.cifar10": 19_622}


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_the_configurations_have_the_papers_settings(name):
    config = load(find_config(name, "lightcnn"), Config)
    assert (config.data.name, config.data.val_images, config.data.val_from) == (name, 10_000, "first")
    assert (config.data.train_images, config.data.test_images) == (None, None)
    assert (config.stage1.epochs, config.stage1.patience, config.stage2.max_epochs) == (20, 5, None)
    assert (config.plain.epochs, config.plain.patience, config.plain.batch_size) == (50, 10, 128)
    augment = config.augment
    assert (augment.warp, augment.rotation, augment.zoom, augment.shift) == ("sequential", 0.1, 0.2, 0.2)
    assert (augment.brightness, augment.flip) == (0.0, False)
    assert (config.batch_size, config.seeds, config.seed, config.precision) == (32, 5, 0, "float32")


@pytest.mark.parametrize(
    ("name", "layout", "epochs", "shift", "flip", "rotation", "zoom"),
    [("budget_mnist", "c16 s32 P s40 s40 s40 P s56 s56", 18, 2, False, 0.028, 0.1),
     ("budget_fashion_mnist", "c16 s32 P s40 s40 s40 P s56 s56", 30, 2, True, 0.0, 0.0),
     ("budget_cifar10", "c16 s32 s32 P s48 s48 s48 P s64 s64", 36, 3, True, 0.0, 0.0)],
)  # fmt: skip
def test_the_budget_recipes_are_those_that_were_published(name, layout, epochs, shift, flip, rotation, zoom):
    method = load(find_config(name, "lightcnn"), Config).method
    assert (method.layout, method.epochs, method.shift, method.flip) == (layout, epochs, shift, flip)
    assert (method.rotation, method.zoom, method.batch_size, method.peak_lr) == (rotation, zoom, 128, 0.2)
    assert (method.decay, method.label_smoothing, method.optimizer) == (0.005, 0.0, "one_cycle")
    assert (method.teacher_share, method.temperature) == (0.9, 2.0)


def test_a_variant_differs_in_what_it_says(config_of):
    plain = settings_of(config_of())
    for name, changed in VARIANTS.items():
        settings = settings_of(config_of(f"method={name}"))
        assert {k: v for k, v in settings if v != getattr(plain, k)} == changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "two_stage", "--publish"], "--publish"),
        (["--methods", "nothing"], "--methods nothing: unknown"),
        (["--seeds", "0"], "at least one seed"),
        (["--config", "nothing"], "there is no such configuration"),
        (["--config", "mnist_notebook"], "mnist_notebook.yaml: method has schedule: notebook, head_transfer: a_only"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, capsys, arguments, message):
    assert main(["--scale", "smoke", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_study_of_some_methods_has_its_own_report(tmp_path, capfd):
    arguments = ["--scale", "smoke", "--out", str(tmp_path), "--methods", "two_stage", "submodel", "--seeds", "1"]
    assert main(arguments) == 0
    folder = tmp_path / "lightcnn" / "report-smoke-partial"
    assert {p.name for p in folder.iterdir()} == {"results.csv", "methods.md", "claims.md", "summary.md", "plots"}
    assert len(list((folder / "plots").glob("*.png"))) == 4
    assert "not run" in capfd.readouterr().out


def test_unequal_epochs_are_told_in_the_head_of_a_report():
    two_stage = {"two_stage/epochs.run": {0: 56.0, 1: 57.0}}  # a mean of 56.5, rounded up
    assert unequal_epochs({**two_stage, "scratch/epochs.run": {0: 57.0, 1: 57.0}}) == ""
    assert unequal_epochs({"scratch/epochs.run": {0: 30.0}}) == ""
    told = unequal_epochs({**two_stage, "scratch/epochs.run": {0: 57.0}, "wide/epochs.run": {0: 30.0}})
    assert told == "**Not as many epochs as two_stage (56.5): wide 30.** "


def test_a_table_of_methods_without_branches_has_no_columns_for_them():
    values = {"accuracy": 0.9, "validation": 0.91, "parameters": 12_410.0, "multiply_adds": 2e6, "epochs.run": 10.0}
    figures = {f"bn_gap/{metric}": {0: value} for metric, value in values.items()}
    figures["two_stage/branch_a.accuracy"] = {0: 0.8}  # not asked for
    head, row = methods_table(figures, ["bn_gap"])
    assert head == ["method", "test", "validation", "parameters", "multiply-adds", "epochs", "n"]
    assert row == ["bn_gap", "90.00", "91.00", "12,410", "2,000,000", "10.0", "1"]
