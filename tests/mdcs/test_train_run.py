"""What a run says, leaves and refuses: forecast, progress, results, the command."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mdcs.algorithm as algorithm
import mdcs.problem as problem_module
from mdcs import eval as eval_module
from mdcs import state as state_module
from mdcs.config import Config
from mdcs.state import Forecast, start
from mdcs.train import main
from shared import run as run_module
from shared.checkpoint import load_model
from shared.cli import find_config
from shared.config import load
from shared.errors import InterruptedRunError
from shared.run import Run, read_metrics, read_results
from tests.mdcs.runs import CPU, STEPS, run_of, synthetic

pytestmark = pytest.mark.usefixtures("small_sample")


# The forecast


def test_the_forecast_is_of_the_steps_after_the_first_ten_and_comes_once(monkeypatch, capsys):
    for steps, said in ((620, "5 min for the 600"), (220, "100 s for the 200"), (20, "0 s for the 0"),
                        (5020, "42 min for the 5,000")):  # fmt: skip
        clock = iter([100.0, 105.0])
        monkeypatch.setattr(state_module.time, "monotonic", lambda clock=clock: next(clock))
        forecast, printed = Forecast(CPU), []
        for step in range(1, min(steps, 100) + 1):
            forecast.tick(steps - step)
            printed.append(capsys.readouterr().out)
        assert printed[19] == f"forecast: 500 ms a step, {said} steps left\n"
        assert "".join(printed) == printed[19]


def test_the_forecast_counts_the_steps_that_are_left_also_where_a_run_goes_on_within_an_epoch(
    tmp_path, mdcs_config, on_synthetic, monkeypatch, capsys
):
    monkeypatch.setattr(state_module, "FORECAST_STEPS", 4)
    config = mdcs_config("ce", "epochs=6", "batch_size=25", "schedule.milestones=[]", "evaluate.every=6")  # 30 steps
    left = iter(range(13, 0, -1))

    def check(run: Run[Any]) -> None:
        if next(left, 0) == 1:
            raise InterruptedRunError(2, run.folder)

    monkeypatch.setattr(Run, "check", check)
    with pytest.raises(InterruptedRunError):
        run_of(tmp_path / "run", config)
    assert "for the 26 steps left" in capsys.readouterr().out
    left = iter(())
    run_of(tmp_path / "run", config)
    assert f"for the {30 - 13 - 4} steps left" in capsys.readouterr().out


# The progress


def test_the_progress_of_a_run_grows_with_each_step_within_an_epoch_and_goes_on_where_it_stood(
    tmp_path, mdcs_config, monkeypatch
):
    """A study reads it: an epoch of the paper's takes a minute, one of ImageNet-LT hours."""
    monkeypatch.setattr(run_module, "PROGRESS_EVERY_SECONDS", 0)
    seen: list[Any] = []

    def check(run: Run[Any]) -> None:
        seen.append(json.loads((run.folder / "progress.json").read_text()))
        if len(seen) == STEPS + 3:
            raise InterruptedRunError(2, run.folder)

    monkeypatch.setattr(Run, "check", check)
    with pytest.raises(InterruptedRunError):
        run_of(tmp_path / "run", mdcs_config("ce"))
    assert seen == [{"done": n, "total": 2 * STEPS, "unit": "step"} for n in range(STEPS + 3)]
    run_of(tmp_path / "run", mdcs_config("ce"))
    assert [row["done"] for row in seen[STEPS + 3 :]] == [STEPS + 3]
    last = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert last == {"done": 2 * STEPS, "total": 2 * STEPS, "unit": "step"}


# The file of a pretrained network


@pytest.fixture
def from_file(tmp_path, mdcs_config) -> tuple[Config, str]:
    """A run that starts from a file of weights, as the large networks do, and the file's sha256."""
    config, path = mdcs_config("mdcs", "epochs=1"), tmp_path / "weights.pth"
    model = start(mdcs_config("mdcs", "seed=9"), problem_module.load_problem(config, CPU), CPU).model
    torch.save({**model.trunk.state_dict(), **model.experts[0].state_dict()}, path)
    named = config.model.model_copy(update={"pretrained": str(path)})
    return config.model_copy(update={"model": named}), hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_sha256_of_the_pretrained_file_is_in_the_start_event_and_in_the_results(tmp_path, from_file, mdcs_config):
    config, sha256 = from_file
    results = run_of(tmp_path / "run", config)
    assert read_metrics(tmp_path / "run", "start")[0]["pretrained"] == sha256
    assert results["details"]["pretrained"] == read_results(tmp_path / "run")["details"]["pretrained"] == sha256
    assert results["model_digest"] != run_of(tmp_path / "other", mdcs_config("mdcs", "epochs=1"))["model_digest"]


def test_a_run_without_a_pretrained_file_says_so(finished):
    assert read_metrics(finished, "start")[0]["pretrained"] is None
    assert read_results(finished)["details"]["pretrained"] is None


def test_the_file_of_a_pretrained_network_is_found_below_the_data_root(mdcs_config, monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    asked: list[Path] = []
    monkeypatch.setattr(state_module, "load_pretrained", lambda model, path: (asked.append(path), "of it")[1])
    config = mdcs_config("ce")
    named = config.model.model_copy(update={"pretrained": "nets/a.pth"})
    state = start(config.model_copy(update={"model": named}), synthetic(), CPU)
    assert (asked, state.pretrained) == ([tmp_path / "nets" / "a.pth"], "of it")


def test_a_run_of_fewer_steps_has_no_forecast(tmp_path, mdcs_config, capsys):
    run_of(tmp_path / "run", mdcs_config("ce"))
    assert "forecast" not in capsys.readouterr().out


# What a run leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mdcs_config, small_sample) -> Path:
    """A run of five epochs."""
    folder = tmp_path_factory.mktemp("finished") / "smoke-mdcs-s0"
    run_of(folder, mdcs_config("mdcs", "epochs=5", "evaluate.every=2", "model.width=4"))
    return folder


def test_the_test_set_is_looked_at_every_so_many_epochs_and_after_the_last(finished):
    assert [row["epoch"] for row in read_metrics(finished, "evaluate")] == [2, 4, 5]
    assert [row["epoch"] for row in read_metrics(finished, "epoch")] == [1, 2, 3, 4, 5]


def test_the_headline_is_the_last_epoch_and_the_best_on_the_test_set_stands_beside_it(finished):
    results, logged = read_results(finished), read_metrics(finished, "evaluate")
    figures = {(row["at"], row["metric"]): row["value"] for row in results["figures"]}
    assert {metric: value for (at, metric), value in figures.items() if at == "last_epoch"} == logged[-1]["figures"]
    best = max(logged, key=lambda row: row["figures"]["ensemble.accuracy"])
    beside = {metric: value for (at, metric), value in figures.items() if at == "best_on_test"}
    assert beside == {name: value for name, value in best["figures"].items() if name.startswith("ensemble.")}
    assert results["details"]["best_epoch_on_test"] == best["epoch"]
    assert {row["split"] for row in results["figures"]} == {"test"}


def test_results_name_the_run_and_its_data(finished):
    results = read_results(finished)
    assert (results["paper"], results["config"], results["method"], results["seed"]) == ("mdcs", "smoke", "mdcs", 0)
    assert results["data"]["images"] == sum(results["data"]["class_counts"])
    assert results["data"]["test_images"] == 200
    assert results["images_per_second"] > 0
    assert results["precision"] == "float32"


def test_the_predictions_are_those_whose_accuracy_is_reported(finished):
    tensors, description = load_model(finished / "predictions")
    figures = {row["metric"]: row["value"] for row in read_results(finished)["figures"] if row["at"] == "last_epoch"}
    assert description["columns"] == ["expert1", "expert2", "expert3", "ensemble"]
    right = (tensors["predictions"] == tensors["labels"][:, None]).double().mean(0).tolist()
    assert right == pytest.approx([figures[f"{who}.accuracy"] for who in description["columns"]], abs=1e-9)


def test_the_saved_model_gives_the_reported_figures_again(finished, capsys):
    assert eval_module.main([str(finished)]) == 0
    assert "figures of the last epoch are those of results.json" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["mdcs", "ce"])
def test_a_run_in_bfloat16_wide_enough_to_show_the_order_of_bytes_is_evaluated_to_the_same_figures(
    tmp_path, mdcs_arguments, capsys, method
):
    """oneDNN sums in another order over images that lie otherwise: in bfloat16 confidences then differ by percents."""
    wide = ("model.depth=14", "model.width=16", "precision=bfloat16", "epochs=1")
    assert main(mdcs_arguments(tmp_path, method, *wide)) == 0
    (folder,) = (tmp_path / "mdcs").iterdir()
    capsys.readouterr()
    assert eval_module.main([str(folder)]) == 0
    assert "figures of the last epoch are those of results.json" in capsys.readouterr().out
    tensors, _ = load_model(folder / "model")
    config = load(folder / "config.yaml", Config)
    model, _ = eval_module.load_network(folder, config, 10, 1, CPU)
    assert all(value.equal(tensors[name]) for name, value in model.state_dict().items())


def test_the_model_is_saved_with_what_is_needed_to_use_it(finished):
    _, description = load_model(finished / "model")
    assert (description["paper"], description["method"], description["epoch"]) == ("mdcs", "mdcs", 5)
    assert (description["channels"], description["class_order"], len(description["classes"])) == (1, None, 10)
    assert description["config"] == json.loads(load(finished / "config.yaml", Config).model_dump_json())


# The command


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path, mdcs_config, mdcs_arguments, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*mdcs_arguments(tmp_path / "out", "mdcs", "model.depth=14"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    config = mdcs_config("mdcs", "model.depth=14")
    problem = problem_module.load_problem(config, CPU)
    parameters = sum(p.numel() for p in start(config, problem, CPU).model.parameters())
    images = sum(problem.class_counts)
    assert f"# parameters       {parameters:,} (3 experts)\n" in printed
    assert f"# data             {images} images, 16 to 4 a class (0 many, 0 medium, 10 few); 200 to test\n" in printed
    assert f"# steps            {2 * STEPS} of 24 images, 48 rows, in 2 epochs\n" in printed
    assert "# learning rate    0.05 in epoch 1, 0.05 at most, 0.005 in the last\n" in printed
    assert "lambdas: [-0.5, 1.0, 2.5]" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_the_steps_of_a_last_batch_that_is_too_small_for_batch_norm(tmp_path, mdcs_arguments, capsys):
    images = len(problem_module.load_problem(load(find_config("smoke", "mdcs"), Config,
                                                  mdcs_arguments(tmp_path)[4:]), CPU).train)  # fmt: skip
    assert main([*mdcs_arguments(tmp_path, "ce", f"batch_size={images - 1}"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"# steps            2 of {images - 1} images, {images - 1} rows, in 2 epochs\n" in printed
    assert "(1 expert)" in printed


def test_the_networks_of_the_paper_have_its_parameters_in_a_dry_run(tmp_path, capsys, monkeypatch, small_sets):
    colour = {
        split: type(images)(images.images.repeat(1, 3, 1, 1), images.labels, images.classes, "cifar10", split, "")
        for split, images in small_sets.items()
    }
    monkeypatch.setattr("shared.data.load", lambda name, split, **_: colour[split])
    assert main(["--config", "cifar10_lt_if100", "--dry-run", "device=cpu", "threads=1", "data.n_max=100",
                 "data.download=false"]) == 0  # fmt: skip
    assert "# parameters       770,896 (3 experts)\n" in capsys.readouterr().out


def test_the_schema_is_json_and_lists_every_method(capsys):
    assert main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "lambdas" in schema["$defs"]["MdcsConfig"]["properties"]
    assert set(schema["properties"]["method"]["discriminator"]["mapping"]) == set(algorithm.METHODS)


@pytest.mark.parametrize(("overrides", "said"), [
    (["model.experts=2"], "model.experts is 2, but method mdcs has 3"),
    (["method=balpoe", "method.taus=[0.0, 1.0]"], "has mean 0.5; the ensemble is balanced only where it is 1"),
    (["method.lambdas=[]"], "lambdas"),
    (["method=mdcss"], "did you mean 'mdcs'?"),
    (["data.imbalance_factor=0.5"], "data.imbalance_factor"),
    (["model.depth=9"], "not 6 n + 2"),
    (["data.mean=[0.1, 0.2]"], "mean has 2 channels and std 1"),
    (["device=tpu"], "is not a device"),
    (["data.n_max=99999"], "99999"),
])  # fmt: skip
def test_a_configuration_that_cannot_run_is_refused_with_exit_code_2(tmp_path, mdcs_arguments, capsys, overrides, said):
    assert main([*mdcs_arguments(tmp_path / "out"), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [[], ["--config", "smoke", "--resume", "x"], ["--config", "nothing"],
                                       ["--resume", "nothing"]])  # fmt: skip
def test_a_command_line_that_names_no_run_is_refused_in_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_figures_and_does_not_train_a_finished_run_again(tmp_path, mdcs_arguments, capsys):
    arguments = mdcs_arguments(tmp_path, "dl")
    assert main(arguments) == 0
    first = capsys.readouterr().out
    (folder,) = (tmp_path / "mdcs").iterdir()
    before = (folder / "results.json").read_bytes()
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert again.startswith("already finished; nothing was trained\n")
    lines = [line for line in first.splitlines() if line.startswith(("ensemble", "expert"))]
    assert [line.split()[0] for line in lines] == ["ensemble", "expert1", "expert2", "expert3"]
    assert "many -  medium -  few " in lines[0]
    assert all(line in again for line in lines)
    assert (folder / "results.json").read_bytes() == before


def test_a_run_folder_of_another_configuration_is_not_continued(tmp_path, mdcs_arguments, capsys):
    arguments = mdcs_arguments(tmp_path, "ce")
    assert main(arguments) == 0
    (folder,) = (tmp_path / "mdcs").iterdir()
    assert main(["--resume", str(folder), "batch_size=12"]) == 2
    assert "batch_size: 24 -> 12" in capsys.readouterr().err
