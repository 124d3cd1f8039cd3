"""Evaluate the networks that a run kept; as a command, recompute its figures from the saved model.

The test set is read here and nowhere else, once, after all training.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lightcnn.algorithm import BRANCHES, CARRY, Points, Step, final_point, plan
from lightcnn.config import Config
from lightcnn.feed import at_once, pixels
from lightcnn.fused import Stack, rows, unstack
from lightcnn.networks import Network
from lightcnn.problem import Problem, load_problem, load_test
from shared.checkpoint import load_model, save_model
from shared.cli import check_shared, eval_parser, run_main
from shared.config import load
from shared.data import ImageSet
from shared.errors import CheckpointError, RunError
from shared.gpu import autocast, setup
from shared.run import read_metrics, read_run, state_digest, tell_changed

Figure = dict[str, Any]  # seed, at, split, metric, value: a row of the results


@torch.no_grad()
def probabilities(network: Network, stacked: Stack, images: Tensor, config: Config) -> Tensor:
    """Class probabilities [L, N, K] of L networks on the same images, uint8 [N, C, H, H]."""
    count, parts = len(next(iter(stacked.values()))), []
    for some in torch.split(images, at_once(images.device, count)):
        inputs = pixels(some).expand(count, *some.shape)
        with autocast(images.device, config.precision):
            logits = network.forward(stacked, inputs, network.levels)
        parts.append(logits.float().softmax(dim=-1))
    return torch.cat(parts, dim=1)


def evaluate(
    steps: Sequence[Step], points: Points, problem: Problem, test: ImageSet, config: Config
) -> tuple[list[Figure], dict[str, Any]]:
    """All figures of a run and the details behind them.

    `accuracy` is the final network's on the test set; `<point>.accuracy` that of the network kept there (`branch_a`,
    `branch_b`, their mean probabilities `branches_mean`, each phase of stage 2, and `best_epoch`, the best of its last
    phase); `validation` the same on the validation images. Under `kfold: honest` a seed's figures are those of its fold
    with the best validation accuracy, and `kfold.` stands before the means over folds. Under `kfold: notebook` the
    folds train on images of `validation`, which means nothing for them.
    """
    images, labels = test.images.to(problem.images.device), test.labels.to(problem.images.device)
    by_lane: dict[str, list[float]] = {}
    final, predicted = final_point(steps), torch.empty(0)
    for step in steps:
        found = []
        for point in step.all_points:
            found.append(probabilities(step.network, points[point], images, config))
            held = validation_accuracy(step.network, points[point], problem, config)
            for name in (f"{point}.", "") if point == final else (f"{point}.",):
                by_lane[f"{name}accuracy"] = shares(found[-1], labels)
                by_lane[f"{name}validation"] = held
        if step.points == BRANCHES:
            by_lane["branches_mean.accuracy"] = shares((found[0] + found[1]) / 2, labels)
        predicted = found[len(step.points) - 1].argmax(-1)
    best = best_lanes(problem, by_lane["validation"])
    figures = [
        {"seed": seed, "at": "final", "split": "test" if name.endswith("accuracy") else "validation", "metric": name,
         "value": values[lane]}
        for seed, lane in best.items() for name, values in by_lane.items()
    ]  # fmt: skip
    figures += fold_figures(problem, by_lane)
    first = predicted[best[problem.lanes[0].seed]]
    return figures, {"confusion": confusion(first, labels, len(problem.classes))}


def shares(probability: Tensor, labels: Tensor) -> list[float]:
    """Accuracy of each network: [L, N, K] against [N]."""
    right: list[int] = (probability.argmax(-1) == labels).sum(1).tolist()
    return [count / len(labels) for count in right]


def validation_accuracy(network: Network, stacked: Stack, problem: Problem, config: Config) -> list[float]:
    """Accuracy of each lane's network on the lane's own validation images; lanes with the same images share a pass."""
    if all(lane.fold is None for lane in problem.lanes):
        held = problem.lanes[0].validation.to(problem.images.device)
        return shares(probabilities(network, stacked, problem.images[held], config), problem.labels[held])
    found = []
    for number, lane in enumerate(problem.lanes):
        held = lane.validation.to(problem.images.device)
        one = probabilities(network, rows(stacked, [number]), problem.images[held], config)
        found += shares(one, problem.labels[held])
    return found


def best_lanes(problem: Problem, validation: Sequence[float]) -> dict[int, int]:
    """Of each seed the lane that stands for it: its only one, or its fold with the best validation accuracy."""
    best: dict[int, int] = {}
    for number, lane in enumerate(problem.lanes):
        if lane.seed not in best or validation[number] > validation[best[lane.seed]]:
            best[lane.seed] = number
    return best


def fold_figures(problem: Problem, by_lane: dict[str, list[float]]) -> list[Figure]:
    """Means over the folds of each seed, where there are folds."""
    if problem.lanes[0].fold is None:
        return []
    figures = []
    for seed in dict.fromkeys(lane.seed for lane in problem.lanes):
        own = [number for number, lane in enumerate(problem.lanes) if lane.seed == seed]
        for metric, split in (("accuracy", "test"), ("validation", "validation")):
            value = sum(by_lane[metric][number] for number in own) / len(own)
            figures.append({"seed": seed, "at": "final", "split": split, "metric": f"kfold.{metric}", "value": value})
    return figures


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> list[list[int]]:
    """Test images of each class (row) by predicted class (column)."""
    counts = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    table: list[list[int]] = counts.view(num_classes, num_classes).tolist()
    return table


def sizes(steps: Sequence[Step], points: Points, problem: Problem) -> dict[str, int]:
    """Figures of the final network that need no test image: parameters, bytes, multiply-adds."""
    state = unstack(points[final_point(steps)], 0)
    module = steps[-1].network.to_module({name: tensor.cpu() for name, tensor in state.items()}).eval()
    return module_sizes(module, torch.zeros(1, problem.in_channels, problem.image_size, problem.image_size))


def module_sizes(module: nn.Module, image: Tensor) -> dict[str, int]:
    """Parameters, bytes and multiply-adds of a module in eval mode, for one image [1, C, H, H]."""
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "bytes.weights": sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()),
        "bytes.safetensors": len(save({name: tensor.contiguous() for name, tensor in module.state_dict().items()})),
        "multiply_adds": multiply_adds(module, image),
    }


def multiply_adds(module: nn.Module, images: Tensor) -> int:
    """Multiplications of one forward pass in convolutions and dense layers (biases, pools and norms not counted)."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add the layer's multiply-adds."""
        nonlocal total
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        total += layer.weight[0].numel() * output.numel()

    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        module(images)
    for hook in hooks:
        hook.remove()
    return total // len(images)


def save_points(folder: Path, steps: Sequence[Step], points: Points, problem: Problem, config: Config) -> Stack:
    """Write each seed's final network as an ordinary model, and all points' in one file; returns its tensors."""
    tensors = {f"{point}.{name}": tensor for point, stacked in points.items() if point != CARRY
               for name, tensor in stacked.items()}  # fmt: skip
    description = {
        "paper": "lightcnn", "method": config.method.name, "classes": list(problem.classes),
        "image": [problem.in_channels, problem.image_size, problem.image_size],
        "config": config.model_dump(mode="json"),
    }  # fmt: skip
    for lane, (name, state) in zip(problem.lanes, final_states(steps, points, problem), strict=True):
        save_model(folder / name, state, {**description, "seed": lane.seed})
    save_model(folder / "points", tensors, {**description, "seeds": config.all_seeds})
    return tensors


def final_states(steps: Sequence[Step], points: Points, problem: Problem) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each lane's folder below `model/`, and the final network there as an ordinary module's tensors."""
    for number, lane in enumerate(problem.lanes):
        state = {name: tensor.cpu() for name, tensor in unstack(points[final_point(steps)], number).items()}
        name = f"s{lane.seed}" + ("" if lane.fold is None else f"-fold{lane.fold + 1}")
        yield name, steps[-1].network.to_module(state).state_dict()


def check_models(folder: Path, steps: Sequence[Step], points: Points, problem: Problem) -> None:
    """CheckpointError if a seed's own file, which export and predict read, is not the network that is evaluated."""
    for name, state in final_states(steps, points, problem):
        found, _ = load_model(folder / "model" / name)
        if state_digest(found) != state_digest(state):
            raise CheckpointError(f"{folder / 'model' / name}: is not the network of {folder / 'model' / 'points'}")


def load_points(folder: Path, steps: Sequence[Step], problem: Problem) -> Points:
    """Read the networks that a finished run kept.

    Raises:
        CheckpointError: they are missing, damaged, or not those of the configuration.
    """
    tensors, description = load_model(folder / "model" / "points")
    image = [problem.in_channels, problem.image_size, problem.image_size]
    if (description.get("classes"), description.get("image")) != (list(problem.classes), image):
        raise CheckpointError(f"{folder / 'model'}: was trained on another data set than the run's configuration names")
    points: Points = {}
    for step in steps:
        wanted = step.network.initial(0)
        for point in step.all_points:
            points[point] = {}
            for name, tensor in wanted.items():
                found = tensors.pop(f"{point}.{name}", None)
                if found is None or found.shape != (len(problem.lanes), *tensor.shape):
                    raise CheckpointError(
                        f"{folder / 'model'}: {point}.{name} is {'missing' if found is None else list(found.shape)}; "
                        "this is another network than the run's configuration describes"
                    )
                points[point][name] = found.to(problem.images.device)
    if tensors:
        raise CheckpointError(f"{folder / 'model'}: holds {min(tensors)}, which the run's configuration has not")
    return points


def epochs_of(folder: Path, config: Config) -> dict[int, list[list[int]]]:
    """The epochs of each phase of a run: seed -> lanes -> phases; where branches were taken, those that they took."""
    phases = [row["epochs"] for row in read_metrics(folder, "phase")]
    lanes, folds = [list(one) for one in zip(*phases, strict=True)], len(phases[0]) // config.seeds
    found = {seed: lanes[k * folds : (k + 1) * folds] for k, seed in enumerate(config.all_seeds)}
    for taken in read_metrics(folder, "branches"):
        for seed, own in found.items():
            for lane, epochs in zip(own, taken["epochs"][str(seed)], strict=True):
                lane[0] = epochs
    return found


def origin_of(branches: Path) -> dict[str, Any]:
    """What a run says of the branches that it takes: whose they are, and the epochs that they took, by seed and fold.

    Raises:
        RunError: there is no finished run.
    """
    digest = read_run(branches, "lightcnn", data={"digests": dict})["model_digest"]
    epochs = epochs_of(branches, load(branches / "config.yaml", Config))
    return {"run": branches.name, "model_digest": digest,
            "epochs": {str(seed): [lane[0] for lane in lanes] for seed, lanes in epochs.items()}}  # fmt: skip


class Finished(NamedTuple):
    """A finished run: its configuration, steps, data and networks."""

    config: Config
    steps: list[Step]
    problem: Problem
    points: Points


def open_run(folder: Path, problem: Problem) -> Finished:
    """A run that another one builds on, which was trained on the same images.

    Raises:
        CheckpointError, RunError: it is missing, unfinished or damaged, or was trained on other images.
    """
    results = read_run(folder, "lightcnn", data={"digests": dict})
    if results["data"]["digests"].get("train") != problem.digest:
        raise RunError(f"{folder}: was not trained on this run's images and split; train it anew")
    config = load(folder / "config.yaml", Config)
    own = load_problem(config, problem.images.device)
    steps = plan(config, own)
    return Finished(config, steps, own, load_points(folder, steps, own))


def once(values: Mapping[str, float], seeds: Sequence[int]) -> list[Figure]:
    """Rows of figures that no test changes."""
    return [{"seed": seed, "at": "once", "split": "-", "metric": metric, "value": value}
            for seed in seeds for metric, value in values.items()]  # fmt: skip


def by_name(figures: Iterable[Figure]) -> dict[str, float]:
    """Seed and metric -> value."""
    return {f"seed {row['seed']}: {row['metric']}": row["value"] for row in figures}


def run_eval(arguments: Sequence[str]) -> int:
    """The command: 0 if every figure is what the run reported, 1 if not."""
    asked = eval_parser("lightcnn", __doc__).parse_args(arguments)
    check_shared(__file__)
    results = read_run(asked.run, "lightcnn", data={"digests": dict})
    config = load(asked.run / "config.yaml", Config)
    device = setup(asked.device if asked.device != "auto" else config.device, config.threads)
    problem, test = load_problem(config, device), load_test(config)
    if results["data"]["digests"] != {"train": problem.digest, "test": test.digest}:
        raise RunError(f"{asked.run}: the data or its split is not what the run was trained on")
    steps = plan(config, problem)
    points = load_points(asked.run, steps, problem)
    check_models(asked.run, steps, points, problem)
    figures = evaluate(steps, points, problem, test, config)[0] + once(sizes(steps, points, problem), config.all_seeds)
    stated = by_name(row for row in results["figures"] if not row["metric"].startswith("epochs."))
    for row in figures:
        print(f"seed {row['seed']}  {row['split']:10} {row['metric']:26} {row['value']:.4f}")
    return tell_changed(stated, by_name(figures))


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_eval, arguments)


if __name__ == "__main__":
    sys.exit(main())
