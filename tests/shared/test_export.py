"""A folder for a model hub: nothing of others is overwritten, a file that computes something else is told."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from torch import nn

from shared import export
from shared.errors import CheckpointError, ConfigError, RunError
from shared.export import Portable, check, export_command, load_exported, source_of, write

RESULTS = {"paper": "toy", "config": "mini", "method": "plain", "commit": "c" * 40, "device": "CPU", "seconds": 1.5,
           "command": "python -m toy.train --config mini --out '/a b/c' seed=1", "precision": "float32",
           "model_digest": "d" * 64}  # fmt: skip


def build(architecture):
    torch.manual_seed(architecture["seed"])
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


@pytest.fixture
def toy():
    rows = [{"metric": "accuracy", "split": "test", "at": "final", "value": 0.123456},
            {"metric": "few", "split": "test", "at": "final", "value": None}]  # fmt: skip
    return Portable(
        network=build({"seed": 1}), architecture={"seed": 1}, choice="best", data="cifar10", image=(3, 2, 2),
        mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1], classes=["a", "b|c", "d"], results=RESULTS, seed=1, figures=rows,
        moment="after epoch 3", title="A toy", paper="Nobody, 2025", about="It is small.", tags=["toy-tag"],
        limits=["It knows {nothing}."],
    )  # fmt: skip


def test_the_exported_network_normalises_its_images_itself(toy):
    images = torch.rand(4, 3, 2, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (toy.mean, toy.std))
    assert toy.whole(images).equal(toy.network((images - mean) / std))


def test_what_was_written_is_read_back_with_all_that_is_needed_to_use_it(toy, tmp_path):
    write(toy, tmp_path, ["safetensors"])
    whole, config = load_exported(tmp_path, "toy", build)
    assert whole(torch.ones(2, 3, 2, 2)).equal(toy.whole(torch.ones(2, 3, 2, 2)))
    assert config["input"] == {"name": "images", "shape": ["N", 3, 2, 2], "dtype": "float32", "range": [0, 1]}
    assert config["output"] == {"name": "logits", "shape": ["N", 3], "dtype": "float32"}
    assert config["classes"] == ["a", "b|c", "d"]
    assert config["normalisation"] == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "where": "inside the network"}
    assert config["run"]["command"] == "python -m toy.train --config mini seed=1"


@pytest.mark.parametrize(("given", "shown"), [
    ("seed=1 method.teacher=/data/runs/x/teacher-s0 --out=/b", "seed=1 method.teacher=teacher-s0"),
    ("--config /data/own.yaml 'method.teacher=/data/a run'", "--config own.yaml 'method.teacher=a run'"),
    ("--config toy/configs/mini.yaml --out ../b stage1.branches=runs/toy/a", "--config toy/configs/mini.yaml "
     "stage1.branches=runs/toy/a"),
])  # fmt: skip
def test_the_command_of_an_export_has_no_path_of_one_machine(toy, given, shown):
    run = replace(toy, results={**RESULTS, "command": f"python -m toy.train {given}"})
    assert run.command == f"python -m toy.train {shown}"


def test_the_card_has_what_hubs_ask_for_and_no_folder_of_this_machine(toy):
    _, head, text = toy.card(["safetensors", "onnx"]).split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "mit", "pipeline_tag": "image-classification", "tags": ["toy", "toy-tag"],
        "datasets": ["uoft-cs/cifar10"], "metrics": ["accuracy"],
    }  # fmt: skip
    for part in ("# A toy", "It is small.", "Nobody, 2025", "CIFAR-10", "a, b|c, d", "after epoch 3", "c" * 40,
                 "| accuracy | test | final | 0.123456 |", "seed=1", "- It knows {nothing}.",
                 "model.onnx"):  # fmt: skip
        assert part in text
    assert "few" not in text
    assert "model.pt2" not in text
    assert "/a b" not in text


def test_a_folder_of_another_is_left_alone(toy, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="no export of this network"):
        write(toy, tmp_path, ["safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    write(toy, tmp_path / "new", ["safetensors"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    with pytest.raises(RunError, match="no export of this network"):
        write(replace(toy, results={**RESULTS, "model_digest": "e" * 64}), tmp_path / "new", ["safetensors"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before
    with pytest.raises(RunError, match="no export of this network"):
        write(toy, tmp_path / "notes.txt", ["safetensors"])
    for text in ("[]", "{", '{"files": 3}', '{"files": {}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RunError, match="no export of this network"):
            write(toy, tmp_path, ["safetensors"])


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "model.pt2"])
def test_a_file_that_a_user_changed_or_added_is_not_overwritten(toy, tmp_path, name):
    write(toy, tmp_path, ["safetensors"])
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=f"{name}: is not as it was exported"):
        write(toy, tmp_path, ["safetensors"])
    assert (tmp_path / name).read_text() == "mine"


def test_the_same_export_again_keeps_what_is_there_and_adds_a_format(toy, tmp_path):
    write(toy, tmp_path, ["safetensors"])
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / ".README.md.1.tmp").write_text("of a process that was killed")
    (tmp_path / "more.txt").write_text("mine")
    write(toy, tmp_path, ["safetensors"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {**first, "more.txt": b"mine"}
    write(toy, tmp_path, ["pt2"])
    assert (tmp_path / "model.safetensors").read_bytes() == first["model.safetensors"]
    assert set(json.loads((tmp_path / "config.json").read_text())["files"]) == {
        "model.safetensors", "model.pt2", "README.md"}  # fmt: skip
    assert "model.pt2" in (tmp_path / "README.md").read_text()
    assert load_exported(tmp_path, "toy", build)[0](torch.ones(1, 3, 2, 2)).shape == (1, 3)


def test_an_export_that_was_cut_off_after_its_first_file_is_made_anew(toy, tmp_path):
    write(toy, tmp_path, ["safetensors"])
    for name in ("README.md", "model.safetensors"):
        (tmp_path / name).unlink()
    write(toy, tmp_path, ["safetensors"])
    assert check(toy, tmp_path, "safetensors", build)


def test_an_export_that_fails_while_it_adds_a_format_can_be_made_again(toy, tmp_path, monkeypatch):
    write(toy, tmp_path, ["safetensors"])
    with monkeypatch.context() as patch:

        def full(path, data):
            if path.name == "model.pt2":
                raise RunError(f"{path}: cannot be written: no space")
            atomic_write(path, data)

        atomic_write = export.atomic_write
        patch.setattr(export, "atomic_write", full)
        with pytest.raises(RunError, match="no space"):
            write(toy, tmp_path, ["pt2"])
    write(toy, tmp_path, ["pt2"])
    assert {path.name for path in tmp_path.iterdir()} >= {"README.md", "model.pt2", "model.safetensors"}
    assert check(toy, tmp_path, "pt2", build)


@pytest.mark.parametrize("name", ["safetensors", "pt2", "onnx"])
def test_a_file_of_another_network_is_told_with_exit_code_1_and_taken_away(toy, tmp_path, name, capsys, monkeypatch):
    if name == "onnx":
        pytest.importorskip("onnxscript")
    package = tmp_path / "toy" / "export.py"
    monkeypatch.setattr(export, "check_shared", lambda file: None)
    arguments = ["run", "--format", name, "--out", str(tmp_path / "folder")]
    assert export_command(str(package), arguments, lambda parser: None, lambda asked: toy, build) == 0
    assert re.search(rf"{name} +same: at most [\d.e-]+ from eager in batches of 1 and 7", capsys.readouterr().out)
    with torch.no_grad():
        toy.network[1].bias += torch.tensor([0.0, 1e-4, 0.0])  # the file stays as it was
    assert not check(toy, tmp_path / "folder", name, build)
    assert "DIFFERS" in capsys.readouterr().out
    stale = export.packed(toy, [name])
    with torch.no_grad():
        toy.network[1].bias += torch.tensor([0.0, 1e-4, 0.0])
    monkeypatch.setattr(export, "packed", lambda taken, formats: stale if formats else {})
    assert export_command(str(package), arguments, lambda parser: None, lambda asked: toy, build) == 1
    assert f"taken away again: model.{name}" in capsys.readouterr().out
    left = {path.name for path in (tmp_path / "folder").iterdir()}
    assert left == {"README.md", "config.json"}
    assert set(json.loads((tmp_path / "folder" / "config.json").read_text())["files"]) == {"README.md"}


def test_only_onnx_may_differ_by_a_share_of_a_large_logit_and_says_so(toy, tmp_path, capsys, monkeypatch):
    with torch.no_grad():
        toy.network[1].bias.fill_(100.0)
    monkeypatch.setattr(export, "load", lambda *_: lambda images: toy.whole(images) + 3e-4)
    assert check(toy, tmp_path, "onnx", build)
    assert "of the largest logit, 10" in capsys.readouterr().out
    assert not check(toy, tmp_path, "pt2", build)
    for name, more in (("onnx", 2e-3), ("pt2", 2e-5)):
        monkeypatch.setattr(export, "load", lambda *_, more=more: lambda images: toy.whole(images) + more)
        assert not check(toy, tmp_path, name, build)
    monkeypatch.setattr(export, "load", lambda *_: lambda images: toy.whole(images) * float("nan"))
    assert not check(toy, tmp_path, "onnx", build)


def test_onnx_without_its_packages_is_one_line_with_the_command_that_helps(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "check_shared", lambda file: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^--format onnx: onnx is not installed; uv pip install onnx onnxscript"):
        export_command(str(tmp_path / "toy" / "export.py"), ["run", "--format", "onnx"], lambda parser: None,
                       lambda asked: toy, build)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_foreign_folder_is_refused(toy, tmp_path):
    write(toy, tmp_path, ["safetensors"])
    with pytest.raises(CheckpointError, match="is not an exported network of other, but of 'toy'"):
        load_exported(tmp_path, "other", build)
    with pytest.raises(CheckpointError, match="another network than its config"):
        load_exported(tmp_path, "toy", lambda architecture: nn.Linear(2, 2))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_exported(tmp_path, "toy", build)


@pytest.mark.parametrize("package", ["fedloge", "mdcs", "lightcnn", "sparsevit"])
def test_every_data_set_that_a_configuration_can_name_has_its_words(package):
    from importlib import import_module

    names = import_module(f"{package}.config").DataConfig.model_fields["name"].annotation.__args__
    for name in names:
        assert {"text", "terms", "side"} <= set(source_of(name))
