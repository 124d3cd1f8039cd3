import argparse
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

from shared import cli
from shared.cli import check_shared, find_config, run_main, train_parser
from shared.errors import CheckpointError, ConfigError, DataError, InterruptedRunError, RunError


def raising(error: BaseException):
    def main(arguments):
        raise error

    return main


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, RunError])
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(kind, capsys):
    assert run_main(raising(kind("a.yaml:1: wrong")), []) == 2
    assert capsys.readouterr().err == "error: a.yaml:1: wrong\n"


def test_several_problems_are_counted_and_listed(capsys):
    assert run_main(raising(ConfigError("one\ntwo")), []) == 2
    assert capsys.readouterr().err == "error: 2 problems\n  one\n  two\n"


def test_an_interrupted_run_has_the_shells_exit_code_and_a_command_that_a_shell_can_take(capsys):
    for number, code in ((2, 130), (15, 143)):
        folder = Path("runs/a b/it's")
        assert run_main(raising(InterruptedRunError(number, folder)), []) == code
        last = capsys.readouterr().err.splitlines()[-1]
        command = shlex.split(last.removeprefix("continue with: "))
        assert command[:2] == ["python", "-m"]
        assert command[2].endswith(".train")
        assert command[2] != ".train"
        assert command[3:] == ["--resume", str(folder)]


def test_ctrl_c_before_a_run_is_130_without_a_traceback(capsys):
    assert run_main(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "stopped; the same command continues\n"


def test_a_gpu_without_memory_is_one_line_that_says_what_helps(capsys):
    assert run_main(raising(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")), []) == 2
    told = "error: CUDA out of memory. Tried to allocate 20 GiB.; take smaller batches, or device=cpu\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("shapes"), NotImplementedError()])
def test_an_error_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_main(raising(error), [])


def test_a_closed_pipe_ends_quietly(python):
    code = "import os, sys\nfrom shared.cli import run_main\n"
    code += "def main(a):\n  os.close(1); raise BrokenPipeError\nsys.exit(run_main(main, []))"
    done = python("-c", code)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_arguments_come_from_the_command_line_unless_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "a", "b"])
    seen = []
    assert run_main(lambda arguments: seen.append(list(arguments)) or 0) == 0
    assert run_main(lambda arguments: seen.append(list(arguments)) or 0, ["c"]) == 0
    assert seen == [["a", "b"], ["c"]]


def test_overrides_may_stand_anywhere_among_the_options():
    parser = train_parser("x", "y.yaml")
    for arguments in (["--config", "c", "a=1", "b=2", "--dry-run"], ["a=1", "--config", "c", "--dry-run", "b=2"],
                      ["a=1", "b=2", "--dry-run", "--config", "c"]):  # fmt: skip
        found = parser.parse_intermixed_args(arguments)
        assert (found.overrides, found.config, found.dry_run) == (["a=1", "b=2"], "c", True)
    assert isinstance(parser, argparse.ArgumentParser)


def test_a_configuration_is_found_by_path_and_by_name_from_any_folder(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    wanted = repository / "fedloge" / "configs" / "smoke.yaml"
    for name in ("smoke", "smoke.yaml", "fedloge/configs/smoke.yaml", str(wanted)):
        assert find_config(name, "fedloge").samefile(wanted)
    (tmp_path / "smoke.yaml").write_text("mine: 1")
    assert find_config("smoke.yaml", "fedloge").samefile(tmp_path / "smoke.yaml")


@pytest.mark.parametrize("name", ["none", "", "/", ".", "a" * 5000, "a\0b", "../../x"])
def test_a_configuration_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(ConfigError, match=r"fedloge has .*mini.*smoke"):
        find_config(name, "fedloge")


def test_another_copy_of_shared_is_named(tmp_path, repository):
    check_shared(str(repository / "fedloge" / "train.py"))
    with pytest.raises(ConfigError, match=f"imported from {repository / 'shared'}, not from {tmp_path / 'shared'}"):
        check_shared(str(tmp_path / "fedloge" / "train.py"))
    assert repository == cli.REPOSITORY


def test_the_help_of_training_does_not_load_the_libraries(python, papers):
    for paper in papers:
        code = (
            f"import sys\nfrom {paper}.train import main\n"
            "try: main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0\n"
            "print(sorted({'torch', 'numpy', 'torchvision', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
        )
        done = python("-c", code)
        assert done.stderr == "[]\n"
        assert "key=value" in done.stdout
    assert os.path.isdir(cli.REPOSITORY)
