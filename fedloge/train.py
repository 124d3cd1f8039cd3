"""Train one federated model with its personal heads: `python -m fedloge.train --config fedloge/configs/smoke.yaml`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import run_main, train_command
from shared.errors import InterruptedRunError

if TYPE_CHECKING:
    from fedloge.config import Config
    from fedloge.federated import Server
    from fedloge.problem import Problem
    from shared.run import Run


def train(config: "Config", run: "Run[Config]", previous: bool = False) -> dict[str, Any]:
    """Train one federated model; an interrupted run goes on exactly where it stopped, between any two clients."""
    from fedloge import federated
    from fedloge.algorithm import build_method
    from fedloge.problem import load_problem
    from shared.gpu import NotFiniteError, setup, stream

    device = setup(config.device, config.threads)
    problem = load_problem(config, device)
    method = build_method(config, problem.shape)
    server = federated.start(method, config.clients.count, device)
    if saved := run.restore(previous):
        run.check_data(problem.digests)
        server.restore(saved)
        print(f"continuing in round {server.round + 1} of {config.rounds}", flush=True)
        if is_unread(run, server, config):
            log_evaluation(run, server, problem, config)
    else:
        run.log("start", **problem.facts())

    for round in run.steps(range(server.round, config.rounds), config.rounds, "round", server.round):
        chosen = federated.choose_clients(round, config)
        images_of_round = sum(problem.clients[k].size for k in chosen)
        for k in chosen[server.position :]:
            client, draws = problem.clients[k], stream(config.seed, "message", round, k, device=device)
            federated.load_client(server, k)
            began = time.monotonic()
            extra = method.extra_message(server.network, problem.train, client, draws)
            try:
                losses = federated.train_client(
                    server, problem.train, client, method.phases(), config, ("train", round, k), method.loss, run.check
                )
            except NotFiniteError as error:
                images = federated.batch_of_step(client, method.phases(), config, ("train", round, k), error.step)
                raise run.not_finite(error, round=round, client=k, seed=config.seed, images=images) from None
            except InterruptedRunError:
                run.save(server.snapshot(), force=True)
                raise
            federated.add_client(server, client, client.size / images_of_round, extra)
            seconds = time.monotonic() - began
            run.log("client", round=round, client=k, loss=sum(losses) / len(losses), seconds=seconds)
            run.save(server.snapshot())
        federated.finish_round(server)
        if due(round, config):
            log_evaluation(run, server, problem, config)
        run.save(server.snapshot())

    return finish(run, server, problem, config)


def due(round: int, config: "Config") -> bool:
    """Whether the round ends with an evaluation: every so many rounds, and each of the last ones."""
    return (round + 1) % config.evaluate.every == 0 or round >= config.rounds - config.evaluate.last


def is_unread(run: "Run[Config]", server: "Server", config: "Config") -> bool:
    """Whether the run was stopped between a round's end and its evaluation."""
    from shared.run import read_metrics

    between = server.position == 0 and server.round > 0 and due(server.round - 1, config)
    return between and all(row["round"] != server.round for row in read_metrics(run.folder, "evaluate"))


def log_evaluation(run: "Run[Config]", server: "Server", problem: "Problem", config: "Config") -> None:
    """Append all figures of this moment to the run's log."""
    from fedloge.eval import evaluate, geometry

    try:
        figures, details = evaluate(server, problem, config, run.check)
    except InterruptedRunError:  # the server stands at the round's end; what was trained in here is for the test alone
        run.save(server.snapshot(), force=True)
        raise
    lengths = {k: v for k, v in geometry(server, problem, config)[0].items() if k.startswith(("psi.", "phi."))}
    last = server.round == config.rounds
    run.log("evaluate", round=server.round, figures={**figures, **lengths}, details=details if last else {})


def finish(run: "Run[Config]", server: "Server", problem: "Problem", config: "Config") -> dict[str, Any]:
    """Write the results: the mean over the last rounds (the headline), the last round, and what needs no rounds."""
    from fedloge.eval import geometry
    from shared.checkpoint import save_model
    from shared.gpu import resolve_precision
    from shared.run import read_metrics, state_digest

    evaluations = [e for e in read_metrics(run.folder, "evaluate") if e["round"] > config.rounds - config.evaluate.last]
    final = evaluations[-1]["figures"]
    constant, drawn = geometry(server, problem, config)
    headline = {name: mean([e["figures"][name] for e in evaluations]) for name in final}
    figures = [
        {"at": at, "split": "test", "metric": name, "value": value}
        for at, values in ((config.headline, headline), ("final", final))
        for name, value in values.items()
    ]
    once = {name: value for name, value in constant.items() if name not in final}
    figures += [{"at": "once", "split": "-", "metric": name, "value": value} for name, value in once.items()]
    tensors = {f"global.{e}": t for e, t in server.state.items()} | {
        f"client.{e}": t for e, t in server.private.items()
    }
    description = {
        "paper": "fedloge", "method": config.method.name, "round": server.round, "classes": list(problem.classes),
        "feature_dim": server.network.feature_dim, "config": config.model_dump(mode="json"),
    }  # fmt: skip
    save_model(run.folder / "model", tensors, description)
    device = problem.test.labels.device
    return run.finish(
        {
            "paper": "fedloge", "config": run.folder.name.partition(f"-{config.method.name}-")[0],
            "method": config.method.name, "seed": config.seed, "figures": figures, "data": problem.facts(),
            "details": evaluations[-1]["details"] | drawn, "model_digest": state_digest(tensors),
            "images_per_second": round(speed(read_metrics(run.folder, "client"), server, problem), 1),
        },
        device, resolve_precision(config.precision, device),
    )  # fmt: skip


def speed(clients: list[dict[str, Any]], server: "Server", problem: "Problem") -> float:
    """Images trained a second, over all local training of the run (the client's message and the averaging included)."""
    epochs = sum(phase.epochs for phase in server.method.phases())
    images = epochs * sum(problem.clients[entry["client"]].size for entry in clients)
    return float(images / sum(entry["seconds"] for entry in clients))


def mean(values: list[float | None]) -> float | None:
    """Mean over evaluations; None where a group has no class."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def show(config: "Config", results: dict[str, Any], folder: Path) -> None:
    """Print the headline figures of a finished run."""
    values = {row["metric"]: row["value"] for row in results["figures"] if row["at"] == config.headline}
    for kind, names in (("generic", ("accuracy", "many", "medium", "few")), ("personal", ("accuracy", "worst_decile"))):
        found = {name: values[f"{kind}.{name}"] for name in names}
        cells = "  ".join(f"{name} {'-' if v is None else f'{100 * v:.2f}'}" for name, v in found.items())
        print(f"{kind:9} {cells}   (%, mean of the last {min(config.evaluate.last, config.rounds)} rounds)")
    print(f"{results['seconds']:.0f} s, {results['images_per_second']:.0f} training images/s on {results['device']}")
    print(f"results and model in {folder}")


def dry_run(config: "Config") -> None:
    """Print what would run, with its size; train nothing."""
    from fedloge.algorithm import build_method
    from fedloge.federated import message, start
    from fedloge.problem import load_problem
    from shared.config import dump
    from shared.gpu import describe, setup

    print(dump(config), end="", flush=True)
    device = setup(config.device, config.threads)
    problem = load_problem(config, device)
    server = start(build_method(config, problem.shape), config.clients.count, device)
    count = sum(p.numel() for p in server.network.parameters())
    sizes = [client.size for client in problem.clients]
    clients = max(1, int(config.clients.fraction * config.clients.count + 0.5))
    steps = config.rounds * config.local_epochs * sum(-(-n // config.batch_size) for n in sizes) * clients // len(sizes)
    model_bytes = sum(t.numel() * t.element_size() for t in server.state.values())
    private_bytes = sum(t.numel() * t.element_size() for t in server.private.values())
    sent = sum(tensor.numel() for tensor in message(server).values() if tensor.is_floating_point())
    print(f"# device           {describe(device)}")
    print(f"# data             {sum(sizes)} images, {min(sizes)} to {max(sizes)} a client; {len(problem.test)} to test")
    print(f"# parameters       {count:,} ({sent:,} values sent by a client in a round)")
    print(f"# local steps      {steps:,} in {config.rounds} rounds")
    print(f"# memory           {(5 * model_bytes + private_bytes) / 2**20:.1f} MiB for models, before activations")


def config_class() -> "type[Config]":
    """The configuration of this package's runs; imported late, for torch takes seconds."""
    from fedloge.config import Config

    return Config


def run_train(arguments: Sequence[str]) -> int:
    """The command."""
    return train_command(__file__, arguments, config_class, train, dry_run, show)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_train, arguments)


if __name__ == "__main__":
    sys.exit(main())
