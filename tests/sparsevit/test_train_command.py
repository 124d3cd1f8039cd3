"""The command: trains, reports, and refuses in one line."""

import pytest
from safetensors.torch import save_file

from sparsevit.model import build
from sparsevit.train import main
from tests.sparsevit.whole_runs import SHORT

# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_trains_reports_a_finished_run_and_refuses_another_configuration(place, tiny, capsys, monkeypatch):
    overrides = [*map(str, tiny.overrides), *SHORT]
    command = ["--config", "smoke", "--out", str(place), *overrides]
    assert main(command) == 0
    (folder,) = (path.parent for path in place.glob("sparsevit/*/results.json"))
    assert "dense" in capsys.readouterr().out
    assert main(command) == 0
    assert "already finished" in capsys.readouterr().out
    assert main(["--resume", str(folder)]) == 0
    assert main(["--resume", str(folder), "epochs=7"]) == 2
    assert "epochs: 2 -> 7" in capsys.readouterr().err


def test_a_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    assert main(["--config", "smoke", "--dry-run", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "# parameters" in out
    assert "# steps            16 of fine-tuning" in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_the_configuration_even_where_the_data_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    assert main(["--config", "smoke", "--dry-run", "data.name=cifar10"]) == 2
    printed = capsys.readouterr()
    assert "name: cifar10" in printed.out
    assert "set DATA_ROOT" in printed.err


def test_a_dry_run_finds_weights_in_the_home_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    from sparsevit.model import uniform_size

    save_file(build(uniform_size(28, 1, 7, 16, 2, 2, 32, 10), 0).state_dict(), tmp_path / "w.safetensors")
    assert main(["--config", "smoke", "--dry-run", "pretrain=null", "weights={path: ~/w.safetensors}"]) == 0
    assert str(tmp_path / "w.safetensors") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [("model.heads=3", "3 heads do not divide a width of 16"), ("model.patch=5", "cannot be cut into patches of 5"),
     ("recipe={name: authors}", "warm-up"), ("data.val_images=33", "not a multiple"),
     ("weights={path: x.safetensors}", "both given")],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_one_line_with_exit_code_2(override, message, capsys):
    assert main(["--config", "smoke", "--dry-run", override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
