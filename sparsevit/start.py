"""Where a run's weights come from: a pretrained file, a pre-training of our own shared by all arms, or nothing."""

import contextlib
import fcntl
import hashlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from shared.checkpoint import load_model, save_model
from shared.config import Section, dump
from shared.data import data_root
from shared.errors import CheckpointError, InterruptedRunError
from shared.gpu import NotFiniteError, Precision, resolve_precision, stream
from shared.run import Run, state_digest
from sparsevit.config import Config, DataConfig, ModelConfig, OursRecipe, PretrainConfig
from sparsevit.fit import Fit, Plan
from sparsevit.measure import accuracies
from sparsevit.model import ARCHS, Size, Vit, build, reset_head, uniform_size
from sparsevit.problem import Problem, load_problem
from sparsevit.weights import load_weights

POLL_SECONDS = 0.2
VERSION = 1  # of what a pre-training computes; another one makes it anew


class PretrainRun(Section):
    """All that a pre-training depends on: its configuration's digest is its folder's name."""

    paper: Literal["sparsevit"]
    data: DataConfig
    model: ModelConfig
    pretrain: PretrainConfig
    precision: Precision
    device: str
    threads: int
    digests: dict[str, str]
    torch: str
    version: int


def network_size(config: ModelConfig, image: int, channels: int, classes: int) -> Size:
    """The size that a configuration names, for images [channels, image, image]; ConfigError where it cannot be."""
    base = ARCHS[config.arch]
    patch, width, depth = config.patch or base.patch, config.width or base.width, config.depth or base.depth
    heads, mlp = config.heads or base.heads, config.mlp or base.mlp
    return uniform_size(image, channels, patch, width, depth, heads, mlp, classes, config.layer_scale, config.ln_eps)


def empty_network(config: Config, problem: Problem, device: torch.device) -> Vit:
    """The run's network with first values of the run's seed."""
    size = network_size(config.model, problem.image, problem.channels, len(problem.classes))
    seed = stream(config.seed, "init").initial_seed()
    return build(size, seed, config.model.dropout, config.model.head_init).to(device)


def starting_network(config: Config, run: "Run[Config]", problem: Problem, device: torch.device) -> Vit:
    """The network that fine-tuning starts from, the same for all arms of a seed; says where it came from in the log."""
    network = empty_network(config, problem, device)
    facts: dict[str, Any] = {"start": "first values"}
    if config.weights is not None:
        path = data_root() / Path(config.weights.path).expanduser()
        loaded = load_weights(path, network, config.weights.pos_resize)
        print(loaded, flush=True)
        facts = {"start": "file", "sha256": loaded.sha256, "layout": loaded.layout, "notes": list(loaded.notes)}
    elif config.pretrain is not None:
        folder, accuracy = pretrain(config, run, problem, device)
        tensors, _ = load_model(folder)
        own_head = config.pretrain.data is None
        if not own_head:
            reset_head(network, stream(config.seed, "init").initial_seed(), config.model.head_init)
        wanted = network.state_dict()
        tensors = {n: t for n, t in tensors.items() if own_head or not n.startswith("head.")}
        missing = [n for n in wanted if n not in tensors and not n.startswith("head.")]
        if missing or any(wanted[n].shape != t.shape for n, t in tensors.items()):
            raise CheckpointError(f"{folder}: holds another network than the run needs; delete it to make it anew")
        network.load_state_dict(tensors, strict=False)
        facts = {"start": "pre-training", "pretrained": folder.name, "pretrained_accuracy": accuracy}
    run.log("weights", **facts, digest=state_digest(network.state_dict()))
    return network


def pretrain(config: Config, run: "Run[Config]", problem: Problem, device: torch.device) -> tuple[Path, float]:
    """Pre-train once for all runs that want the same; gives the folder of the model and its test accuracy.

    The folder lies beside the runs and is named by the digest of all that the result depends on. Who comes first trains
    (and goes on where an interrupted one stopped), the others wait.
    """
    assert config.pretrain is not None
    source = load_problem(config.pretrain.data, device) if config.pretrain.data else problem
    wanted = PretrainRun(
        paper="sparsevit", data=config.pretrain.data or config.data, model=config.model, pretrain=config.pretrain,
        precision=resolve_precision(config.precision, device), device=device.type, threads=torch.get_num_threads(),
        digests=source.digests, torch=torch.__version__, version=VERSION,
    )  # fmt: skip
    name = hashlib.sha256(dump(wanted).encode()).hexdigest()[:16]
    folder = run.folder.parent / "pretrained" / name
    with _waiting(folder.with_name(f"{name}.lock"), run), Run(folder, wanted, run.command) as inner:
        if inner.results is None:
            print(f"pre-training for {config.pretrain.epochs} epochs in {folder}", flush=True)
            try:
                _pretrain(config.pretrain, inner, config, source, device)
            except InterruptedRunError as stop:  # the run that asked for it is the one to go on with
                raise InterruptedRunError(stop.exit_code - 128, run.folder) from None
        accuracy = float(inner.results["accuracy"]) if inner.results else float("nan")
    return folder / "model", accuracy


def _pretrain(settings: PretrainConfig, run: "Run[PretrainRun]", config: Config, source: Problem,
              device: torch.device) -> None:  # fmt: skip
    size = network_size(config.model, source.image, source.channels, len(source.classes))
    network = build(size, stream(settings.seed, "pretrain init").initial_seed(), settings.dropout).to(device)
    recipe = OursRecipe(name="ours", optimizer="adamw", lr=settings.lr, weight_decay=settings.weight_decay,
                        warmup=settings.warmup)  # fmt: skip
    plan = Plan(("pretrain",), settings.epochs, settings.batch_size, recipe, settings.seed, config.precision)
    fit = Fit(network, source.train, plan)
    if saved := run.restore():
        fit.restore(saved)
    with reported(run, fit):
        for _ in run.steps(fit.steps(), fit.total, "step", fit.step):
            if fit.epoch_ended:
                run.log("epoch", step=fit.step, **fit.epoch_means())
            save_or_stop(run, fit, fit.snapshot())
    accuracy = accuracies([network], source.test, config.eval_batch_size, config.precision, run.check)[0]
    save_model(run.folder / "model", network.state_dict(), {"size": size.as_dict(), "accuracy": accuracy})
    run.finish({"accuracy": accuracy}, device, resolve_precision(config.precision, device))


def save_or_stop(run: "Run[Any]", fit: Fit, state: Mapping[str, Any]) -> None:
    """After a step: save every few seconds; when a signal came, save and raise InterruptedRunError."""
    if fit.checked:
        run.save(state)
    try:
        run.check()
    except InterruptedRunError:
        fit.check()
        run.save(state, force=True)
        raise


@contextlib.contextmanager
def reported(run: "Run[Any]", fit: Fit) -> Iterator[None]:
    """A loss that is not finite becomes the run's error, with the step's images in a bundle."""
    try:
        yield
    except NotFiniteError as error:
        where = {"seed": fit.plan.seed, "training": " ".join(fit.plan.names)}
        raise run.not_finite(error, images=fit.images_of_step(error.step), **where) from None


@contextlib.contextmanager
def _waiting(lock: Path, run: "Run[Any]") -> Iterator[None]:
    """Hold a lock file; while another process holds it, wait, but stop when a signal came."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                run.check()
                time.sleep(POLL_SECONDS)
        yield
