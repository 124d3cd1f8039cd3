"""The commands in the published rows: each must name a module, a configuration and settings that are there."""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.cli import find_config, study_parser, train_parser
from shared.config import load
from shared.errors import ConfigError
from shared.study import choose_scale


@dataclass(frozen=True)
class Command:
    """A command that was read: of training with its configuration, or of a study (no seeds or method of its own)."""

    paper: str
    config: str | None
    seeds: tuple[int, ...] = ()
    method: str | None = None


@functools.cache
def read_command(text: str) -> Command:
    """Read a row's command as the program would, without running it.

    Raises:
        ConfigError: the module, an argument, the configuration or an override is not known, or a path is one machine's.
    """
    try:
        _, _, module, *arguments = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"cannot be read as a command: {error}") from None
    foreign = [word for word in arguments if word.rpartition("=")[2].startswith(("/", "~"))]
    if foreign:
        raise ConfigError(f"{foreign[0]}: is a path of one machine; name one from the repository")
    paper, _, action = module.partition(".")
    if action not in ("train", "reproduce") or not _exists(module):
        raise ConfigError(f"there is no module {module} that trains or reproduces")
    if action == "reproduce":
        parser = study_parser(paper, "")
        parser.add_argument("--study", default="main")
        asked = _parse(parser, arguments)
        choose_scale(asked.scale)
        return Command(paper, find_config(asked.config, paper).stem if asked.config else None)
    asked = _parse(train_parser(paper, ""), arguments, intermixed=True)
    if asked.config is None:
        raise ConfigError("names no configuration")
    path = find_config(asked.config, paper)
    config: Any = load(path, importlib.import_module(f"{paper}.config").Config, asked.overrides)
    method = getattr(config.method, "name", config.method)
    return Command(paper, path.stem, tuple(getattr(config, "all_seeds", (config.seed,))), method)


@functools.cache
def is_method(paper: str, config: str, name: str) -> bool:
    """Whether a configuration takes it for `method`; the arms of a study may have names of their own."""
    try:
        load(find_config(config, paper), importlib.import_module(f"{paper}.config").Config, (f"method={name}",))
    except ConfigError:
        return False
    return True


def command_problem(line: Mapping[str, str]) -> str | None:
    """What is wrong with a row's command, if anything is: it cannot be read, or it is of another run than the row."""
    try:
        command = read_command(line["command"])
        find_config(line["config"], line["paper"])
    except ConfigError as error:
        return f"command: {'; '.join(str(error).splitlines())}"
    if command.paper != line["paper"]:
        return f"command: is one of {command.paper}, but the row is of {line['paper']}"
    if command.config not in (None, line["config"]):
        return f"command: has the configuration {command.config}, but the row has {line['config']}"
    if command.seeds and int(line["seed"]) not in command.seeds:
        return f"command: trains seed {', '.join(map(str, command.seeds))}, but the row has {line['seed']}"
    if (own := command.method) and own != line["method"] and is_method(line["paper"], line["config"], line["method"]):
        return f"command: trains {own}, but the row has {line['method']}"
    return None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _parse(parser: argparse.ArgumentParser, arguments: list[str], intermixed: bool = False) -> argparse.Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return parser.parse_intermixed_args(arguments) if intermixed else parser.parse_args(arguments)
    except SystemExit:
        raise ConfigError(said.getvalue().strip().rpartition("error: ")[2] or "asks for help only") from None
