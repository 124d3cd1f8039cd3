"""Every configuration of the repository loads, dry-runs, fits its schema, and says how it is run."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import jsonschema
import pytest
import yaml

from shared.cli import find_config, train_parser
from shared.config import _read, load, schema

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in REPOSITORY.glob("*/configs/*.yaml"))
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # its package is found wherever DATA_ROOT points
each_file = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(REPOSITORY)) for path in FILES])


def package_of(path: Path) -> str:
    return path.parents[1].name


def offline(path: Path) -> list[str]:
    """Overrides that keep a dry run from downloading."""
    data = yaml.safe_load(path.read_text(encoding="utf-8")).get("data")
    return ["data.download=false"] if isinstance(data, dict) and "download" in data else []


@each_file
def test_a_configuration_loads_and_is_of_its_package(path):
    config = load(path, import_module(f"{package_of(path)}.config").Config)
    assert config.paper == package_of(path)


@each_file
def test_a_configuration_dry_runs_or_says_in_one_line_which_data_is_missing(path, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "nothing here"))
    monkeypatch.chdir(tmp_path)
    main = import_module(f"{package_of(path)}.train").main
    code = main(["--config", str(path), "--dry-run", *offline(path)])
    printed = capsys.readouterr()
    data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    if data["name"] == "sample" or (data["name"] == "fashion_mnist" and DEBIAN.is_dir()):
        assert code == 0, printed.err
        assert "# parameters" in printed.out
    else:
        assert code == 2
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert str(tmp_path / "nothing here") in printed.err
    assert list(tmp_path.iterdir()) == []


@each_file
def test_the_header_says_what_it_is_and_its_command_runs_that_very_file(path):
    text = path.read_text(encoding="utf-8")
    header = text.partition("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    assert len(header[1]) > 10
    package = package_of(path)
    (command,) = re.findall(r"^# run +(python .*)$", text, re.MULTILINE)
    start, module, *arguments = shlex.split(command.partition("python ")[2])
    assert (start, module) == ("-m", f"{package}.train")
    asked = train_parser(package, "-").parse_intermixed_args(arguments)
    assert find_config(asked.config, package).samefile(path)
    load(path, import_module(f"{package}.config").Config, asked.overrides)


@each_file
def test_the_first_line_tells_editors_the_schema_which_the_file_fits(path):
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    place = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert place is not None, first
    committed = (path.parent / place[1]).resolve()
    assert committed == REPOSITORY / "schemas" / f"{package_of(path)}.json"
    jsonschema.validate(_read(rest, path.name)[0], json.loads(committed.read_bytes()))


@pytest.mark.parametrize("package", sorted({package_of(path) for path in FILES}))
def test_the_committed_schema_is_that_of_the_configuration(package):
    fresh = schema(import_module(f"{package}.config").Config)
    committed = (REPOSITORY / "schemas" / f"{package}.json").read_text(encoding="utf-8")
    assert committed == fresh, "stale: make schema writes it anew"
    jsonschema.Draft202012Validator.check_schema(json.loads(fresh))


@pytest.mark.parametrize(("package", "text", "problem"), [
    ("fedloge", "method: fedprx", "fedprx"),
    ("fedloge", "rounds: many", "many"),
    ("mdcs", "method: {name: ce, temprature: 2}", "temprature"),
    ("lightcnn", "epoch: 3", "epoch"),
    ("sparsevit", "recipe: {name: authors, lr: -1}", "-1"),
])  # fmt: skip
def test_the_schema_marks_what_the_loader_refuses(package, text, problem):
    known = json.loads((REPOSITORY / "schemas" / f"{package}.json").read_bytes())
    data = {
        **_read((REPOSITORY / package / "configs" / "smoke.yaml").read_text(), "smoke")[0],
        **_read(text, "text")[0],
    }
    assert any(problem in error.message for error in jsonschema.Draft202012Validator(known).iter_errors(data))
