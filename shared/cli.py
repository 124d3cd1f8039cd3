"""What the entry points of all packages have in common: arguments, exit codes, one-line errors."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.errors import ConfigError, InterruptedRunError, UserError

REPOSITORY = Path(__file__).resolve().parents[1]


def run_main(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run an entry point: 0 done, 2 something the user can mend (one line on stderr), 130 / 143 interrupted."""
    try:
        return main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        lines = str(error).splitlines()
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
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
