"""Every command in a README works as it is written there, in small."""

import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
PAPERS = ("fedloge", "mdcs", "lightcnn", "sparsevit")
READMES = [path for path in [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("*/README.md"))] if path.exists()]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """(file, command) of each line in a fence and each code span that begins with `make` or `python -m`."""
    found: dict[tuple[str, str], None] = {}
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        lines = [line for fence in FENCE.findall(text) for line in fence.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
        for line in lines:
            command = re.sub(r"\s+#.*$", "", line.strip().removeprefix("$ ")).replace(".venv/bin/python", "python")
            command = re.sub(r"^(?:\w+=\S+ +)+(?=python )", "", command)  # DATA_ROOT=... python -m ...
            if re.match(r"make\b(?! sure)|python -m\b", command) and "..." not in command and "<" not in command:
                found[(str(path.relative_to(REPOSITORY)), command)] = None
    return list(found)


COMMANDS = commands()
TARGETS = dict(re.findall(r"^([a-z][\w-]*):(.*)$", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def of(start: str) -> list[tuple[str, str]]:
    return [(path, command) for path, command in COMMANDS if command.startswith(start)]


def cases(start: str) -> pytest.MarkDecorator:
    found = of(start)
    return pytest.mark.parametrize(("path", "command"), found, ids=[" ".join(item) for item in found])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_arguments, papers) -> dict[str, Path]:
    """A finished run of a package, to stand for the folder that a README names."""
    out = tmp_path_factory.mktemp("readme")
    assert import_module("fedloge.train").main(tiny_arguments(out, "fedavg")) == 0
    found = {"fedloge": next((out / "fedloge").iterdir())}
    for paper in papers:
        if paper not in found:
            assert import_module(f"{paper}.train").main(["--config", "smoke", "--out", str(out)]) == 0
            found[paper] = next((out / paper).glob("*/results.json")).parent
    return found


def test_there_are_commands_to_check():
    assert of("make")
    assert of("python -m")


@cases("make")
def test_a_make_target_that_a_readme_names_is_there_and_takes_its_variables(path, command):
    _, *words = shlex.split(command)
    variables = [word.partition("=")[0] for word in words if "=" in word]
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for name in variables:
        assert re.search(rf"^{name}\s*\?=", makefile, re.MULTILINE), f"{path}: {name} is no variable of the Makefile"
    for value in (word.partition("=")[2] for word in words if word.startswith("SCALE=")):
        assert value in ("auto", "smoke", "mini", "paper", "auto|smoke|mini|paper")
    for target in (word for word in words if "=" not in word):
        assert target in TARGETS, f"{path}: make {target}"


@cases("python -m")
def test_a_python_command_of_a_readme_works(path, command, finished_run, tmp_path, monkeypatch, capsys, papers):
    module, *arguments = shlex.split(command)[2:]
    package, _, name = module.partition(".")
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    if package not in papers:
        assert module == "pytest", f"{path}: {command}"
        for argument in arguments:
            assert argument.startswith("-") or (REPOSITORY / argument.partition("::")[0]).exists(), argument
        return
    main = import_module(module).main
    if name == "train" and "--config" in arguments:
        arguments = [word.replace("download=true", "download=false") for word in arguments]  # there is no network
        code = main([*arguments, *([] if {"--dry-run", "--schema"} & set(arguments) else ["--dry-run"])])
        printed = capsys.readouterr()
        missing_data = code == 2 and printed.err.startswith("error: ") and str(tmp_path / "data") in printed.err
        assert code == 0 or missing_data, printed.err
    elif name == "reproduce":
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--help"])  # every option must be known before the help is reached
        assert stop.value.code == 0
        known = capsys.readouterr().out
        assert [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in known] == []
    elif name == "latency":  # networks of random values; small ones here, in another folder
        nets, table = str(tmp_path / "nets"), tmp_path / "latency.md"
        assert main(["--make", nets, "--arch", "s0", "--image", "28"]) == 0
        named = {"nets": nets} | {word: str(table) for word in arguments if word.endswith(".md")}
        if "--make" not in arguments:
            assert main([*(named.get(word, word) for word in arguments), "--repeats", "2"]) == 0
            assert table.exists() == (str(table) in named.values())
    else:
        folders = [word for word in arguments if word.startswith("runs/")]
        assert len(folders) == (0 if "--schema" in arguments or "--help" in arguments else 1), f"{path}: {command}"
        for folder in folders:
            assert folder.split("/")[1] == package, f"{path}: {folder} is not where runs of {package} are"
        ready = [str(finished_run[package]) if word in folders else word for word in arguments]
        for place, word in enumerate(ready):
            if word.endswith(".png"):
                ready[place] = str(tmp_path / word)
                Image.new("L", (28, 28)).save(ready[place])
        assert main(ready) == 0, capsys.readouterr().err


@pytest.mark.parametrize("paper", ["fedloge", "mdcs", "lightcnn", "sparsevit"])
def test_the_study_that_the_readmes_begin_with_runs_at_the_smallest_scale(paper, papers, tmp_path, python):
    if paper not in papers or not (REPOSITORY / paper / "reproduce.py").exists():
        pytest.skip(f"{paper} is not built yet")
    done = python("-m", f"{paper}.reproduce", "--scale", "smoke", "--out", str(tmp_path), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smoke" in done.stdout.splitlines()[0]
    assert "not run" in done.stdout
    assert list(tmp_path.rglob("*.csv"))


def test_every_link_of_a_readme_to_a_file_leads_somewhere():
    wrong = []
    for path in READMES:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists():
                wrong.append(f"{path.relative_to(REPOSITORY)}: {target}")
    assert wrong == []


def test_the_help_of_make_names_every_target_that_is_meant_for_people(repository):
    meant = {name for name, rest in TARGETS.items() if "##" in rest}
    phony = re.search(r"^\.PHONY: (.*)$", (repository / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == meant


def test_a_schema_that_cannot_be_made_leaves_the_one_that_is_there(tmp_path, clean_environment):
    """With a Python that writes half a schema for all papers but the first."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    (tmp_path / "schemas").mkdir()
    for paper in PAPERS:
        (tmp_path / "schemas" / f"{paper}.json").write_text("old")
    (tmp_path / "python").write_text('#!/bin/sh\necho "half of $2"\ntest $2 = fedloge.train\n')
    (tmp_path / "python").chmod(0o755)
    command = ["make", "-o", "setup", "schema", f"BIN={tmp_path}"]  # nothing is installed
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    found = {path.name: path.read_text() for path in (tmp_path / "schemas").iterdir()}
    assert found == {f"{paper}.json": "half of fedloge.train\n" if paper == "fedloge" else "old" for paper in PAPERS}
