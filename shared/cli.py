"""What the entry points of all packages have in common: arguments, exit codes, one-line errors."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shared.errors import ConfigError, InterruptedRunError, UserError

if TYPE_CHECKING:
    from shared.config import Section
    from shared.run import Run

REPOSITORY = Path(__file__).resolve().parents[1]
C = TypeVar("C", bound="Section")


def run_main(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run an entry point: 0 done, 2 something the user can mend (one line on stderr), 130 / 143 interrupted."""
    try:
        return main(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError, RuntimeError) as error:  # OSError: what no code foresaw, as a full disk
        lines = str(error).splitlines()
        if isinstance(error, RuntimeError):
            if type(error).__name__ != "OutOfMemoryError":  # torch's; importing it takes seconds
                raise
            lines = [f"{' '.join(lines)}; take smaller batches, or device=cpu"]
        print("error:", "\n  ".join([f"{len(lines)} problems", *lines] if len(lines) > 1 else lines), file=sys.stderr)
        return 2
    except InterruptedRunError as stop:
        package = Path(main.__code__.co_filename).parent.name  # under -m, __module__ is only "__main__"
        print(f"stopped by {stop}; the state is saved", file=sys.stderr)
        print(f"continue with: python -m {package}.train --resume {shlex.quote(str(stop.folder))}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130


def train_parser(package: str, example: str) -> argparse.ArgumentParser:
    """The arguments of every `<package>.train`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}.train",
        description=f"Train one model of {package}. The same command again continues an unfinished run.",
        epilog=f"example: python -m {package}.train --config {example} seed=1",
    )
    parser.add_argument("--config", metavar="YAML", help="one complete run: a path, or a name in configs/")
    parser.add_argument("--resume", metavar="RUN", type=Path, help="continue the run in this folder, bit for bit")
    parser.add_argument("--previous", action="store_true", help="with --resume: from the state before the last")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, with its size; train nothing")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("runs"), help="runs go below it (runs)")
    parser.add_argument("--schema", action="store_true", help="print the configuration's JSON schema")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted.key=value, as in the YAML")
    return parser


def train_command(
    file: str,
    arguments: Sequence[str],
    config_class: "Callable[[], type[C]]",
    train: "Callable[[C, Run[C], bool], dict[str, Any]]",
    dry_run: "Callable[[C], None]",
    show: "Callable[[C, dict[str, Any], Path], None]",
) -> int:
    """`<package>.train`: read the arguments, load the configuration, train into the run's folder, show the figures.

    Args:
        file: of the module, in its package's folder.
        config_class: imports the package's `Config`; late, for torch takes seconds that `--help` need not wait for.
    """
    package = Path(file).resolve().parent.name
    asked = train_parser(package, f"{package}/configs/mini.yaml").parse_intermixed_args(arguments)
    check_shared(file)
    from shared.config import load, schema

    if asked.schema:
        print(schema(config_class()), end="")
        return 0
    if (asked.config is None) == (asked.resume is None):
        raise ConfigError(f"give one of --config and --resume; python -m {package}.train --help shows examples")
    path = asked.resume / "config.yaml" if asked.resume else find_config(asked.config, package)
    config = load(path, config_class(), asked.overrides)
    if asked.dry_run:
        dry_run(config)
        return 0
    from shared.run import Run, command_line, folder_name, read_results

    method, seed = config.method, config.seed  # type: ignore[attr-defined]
    name = folder_name(path.stem, getattr(method, "name", method), seed, asked.overrides)
    folder = asked.resume or asked.out / package / name
    with Run(folder, config, command_line(f"{package}.train", arguments)) as run:
        if run.results:
            results = read_results(folder)
            print("already finished; nothing was trained")
        else:
            results = train(config, run, asked.previous)
    show(config, results, folder)
    return 0


def eval_parser(package: str, description: str) -> argparse.ArgumentParser:
    """The arguments of every `<package>.eval`."""
    parser = argparse.ArgumentParser(prog=f"python -m {package}.eval", description=description)
    parser.add_argument("run", type=Path, help=f"folder of a finished run, runs/{package}/...")
    parser.add_argument("--device", default="auto")
    return parser


def study_parser(package: str, description: str, unit: str = "methods") -> argparse.ArgumentParser:
    """The arguments of every `<package>.reproduce`; `unit` is what it calls the columns of its study."""
    parser = argparse.ArgumentParser(prog=f"python -m {package}.reproduce", description=description)
    parser.add_argument("--scale", default="auto", help="smoke (seconds), mini (minutes), paper (hours to months)")
    parser.add_argument("--config", help="one configuration instead of the scale's own")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"some {unit} instead of the scale's own")
    parser.add_argument("--seeds", type=int, help="number of seeds instead of the scale's own")
    parser.add_argument("--workers", type=int, default=0, help="runs side by side (default: one a core; on a GPU one)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="runs and report go below it (runs)")
    parser.add_argument("--publish", action="store_true", help=f"put the report into results/{package}/<config>")
    return parser


def check_study(asked: argparse.Namespace, known: Iterable[str]) -> bool:
    """Whether some methods or seeds only are asked for; ConfigError for what is not there or is not published."""
    if strangers := [name for name in asked.methods or () if name not in known]:
        raise ConfigError(f"--methods {strangers[0]}: unknown; choose from {', '.join(known)}")
    if asked.seeds is not None and asked.seeds < 1:
        raise ConfigError(f"--seeds {asked.seeds}: at least one seed is needed")
    partial = bool(asked.methods or asked.seeds)
    if partial and asked.publish:
        raise ConfigError("--publish: a part of a study is not published; leave --methods and --seeds out")
    return partial


def shown(path: Path) -> str:
    """A path from the repository, so that the recorded command works for others."""
    path = path.resolve()
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def find_config(name: str, package: str) -> Path:
    """A configuration by path (from here or the repository) or name in the package's `configs/`; else ConfigError."""
    folder = REPOSITORY / package / "configs"
    for place in (Path(name), REPOSITORY / name, folder / name, folder / f"{name}.yaml"):
        if os.path.isfile(place):  # unlike is_file, False also for a name that no file can have
            return place
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ConfigError(f"{name}: there is no such configuration; {package} has {known}")


def check_shared(package_file: str) -> None:
    """ConfigError if it was another distribution's `shared` that was imported, not ours beside the package."""
    wanted = Path(package_file).resolve().parents[1] / "shared"
    found = Path(__file__).resolve().parent
    if found != wanted:
        raise ConfigError(f"the package 'shared' was imported from {found}, not from {wanted}; mend PYTHONPATH")
