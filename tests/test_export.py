"""Every package's networks leave the house as they were measured, and name what is in a picture."""

import json
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from PIL import Image

from shared import data
from shared.config import load
from shared.export import load_exported

SMALL = {
    "mdcs": ("data.n_max=16", "model.width=2", "batch_size=24", "epochs=2"),
    "lightcnn": ("stage1.epochs=1", "stage2.max_epochs=1"),
    "sparsevit": ("data.train_images=120", "data.test_images=50", "data.val_images=20", "epochs=1"),
}
CHOICES = {  # arguments -> the name of the network, a figure of it in the results
    "fedloge": {"": ("generic", "generic.accuracy"), "--model generic_etf": ("generic_etf", "generic_etf.accuracy"),
                "--client 1": ("client-1", None)},
    "mdcs": {"": ("ensemble", "ensemble.accuracy"), "--expert 3": ("expert3", "expert3.accuracy")},
    "lightcnn": {"": ("s0", "accuracy"), "--seed 1": ("s1", "accuracy")},
    "sparsevit": {"": ("dense", "dense.accuracy"), "--pruned neurons_heads.50": ("neurons_heads.50",) * 2},
}  # fmt: skip
NONE = {
    "fedloge": {"--client 3": "0 to 2", "--model best": "generic, generic_raw, generic_etf"},
    "mdcs": {"--expert 0": "1 to 3", "--expert 4": "1 to 3"},
    "lightcnn": {"--seed 9": "s0, s1", "--fold 1": "s0, s1"},
    "sparsevit": {"--pruned neurons.10": "neurons.25, neurons.50"},
}
EACH = [(package, arguments) for package, choices in CHOICES.items() for arguments in choices]
each_network = pytest.mark.parametrize(("package", "arguments"), EACH, ids=[" ".join(item) for item in EACH])
each_package = pytest.mark.parametrize("package", CHOICES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_overrides):
    """A finished run of each package, in half a second."""
    out, found = tmp_path_factory.mktemp("runs"), {}
    for package in CHOICES:
        overrides = tiny_overrides("fedloge") if package == "fedloge" else SMALL[package]
        main = import_module(f"{package}.train").main
        assert main(["--config", "smoke", "--out", str(out), *overrides]) == 0
        found[package] = next((out / package).glob("smoke-*"))
    return found


def taken(package, run, arguments):
    module = import_module(f"{package}.export")
    parser = import_module("shared.export").parser_of(package, "export", "", module.options)
    return module.take(parser.parse_args([str(run), *arguments.split()]))


def exported(package, run, folder, *arguments):
    return import_module(f"{package}.export").main([str(run), "--out", str(folder), *arguments])


def test_images(package, run):
    """The run's own test images [N, C, H, W] uint8 and their labels."""
    config = load(run / "config.yaml", import_module(f"{package}.config").Config)
    problem = import_module(f"{package}.problem")
    if package == "lightcnn":
        found = problem.load_test(config)
    else:
        found = problem.load_problem(config.data if package == "sparsevit" else config, torch.device("cpu")).test
    return found.images, found.labels


test_images.__test__ = False


@each_network
def test_an_exported_network_has_the_accuracy_that_its_card_states(package, arguments, runs, tmp_path, capsys):
    run, (name, metric) = runs[package], CHOICES[package][arguments]
    assert exported(package, run, tmp_path / "out", *arguments.split()) == 0
    whole, config = load_exported(tmp_path / "out", package, import_module(f"{package}.export").build)
    results = json.loads((run / "results.json").read_text())
    assert (config["model"], config["run"]["commit"]) == (name, results["commit"])
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (results["commit"], results["device"], results["config"], *config["classes"]):
        assert part in card
    images, labels = test_images(package, run)
    assert list(images.shape[1:]) == config["input"]["shape"][1:]
    if metric is None:  # one client, on its own test images
        problem = import_module("fedloge.problem").load_problem(
            load(run / "config.yaml", import_module("fedloge.config").Config), torch.device("cpu")
        )
        images, labels = images[problem.local_tests[1]], labels[problem.local_tests[1]]
        stated = results["details"]["personal.clients"][1]
    else:
        metric = f"{metric}.accuracy" if metric == name else metric
        rows = [row for row in results["figures"] if row["metric"] == metric and row["at"] in ("final", "last_epoch")]
        stated = next(row["value"] for row in rows if row.get("seed") in (None, config["run"]["seed"]))
    assert f"| {stated:.6g} |" in card
    right = torch.cat([whole(x.float() / 255) for x in images.split(500)]).argmax(1) == labels
    assert float(right.double().mean()) == pytest.approx(stated, abs=1.5 / len(labels))  # rounding may turn one


@each_package
def test_every_format_computes_what_the_network_does(package, runs, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    arguments = list(CHOICES[package])[-1].split()
    assert exported(package, runs[package], tmp_path / "out", *arguments, "--format", "onnx", "pt2", "safetensors") == 0
    assert capsys.readouterr().out.count("same: at most") == 3
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content, path.name
        assert str(import_module(package).__path__[0]).encode() not in content, path.name


def test_pt2_and_onnx_files_need_nothing_of_this_repository(runs, tmp_path, clean_environment):
    pytest.importorskip("onnxscript")
    assert exported("mdcs", runs["mdcs"], tmp_path / "out", "--format", "onnx", "pt2") == 0
    code = """
import sys, numpy, onnxruntime, torch
images = torch.linspace(0, 1, 3 * 14 * 14).view(3, 1, 14, 14)
found = torch.export.load("model.pt2").module()(images)
other, = onnxruntime.InferenceSession("model.onnx").run(None, {"images": images.numpy()})
assert not {"shared", "mdcs"} & set(sys.modules)
assert numpy.abs(found.detach().numpy() - other).max() < 1e-5
print(found.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", env=clean_environment, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    images = torch.linspace(0, 1, 3 * 14 * 14).view(3, 1, 14, 14)
    wanted = taken("mdcs", runs["mdcs"], "").whole(images)
    assert torch.tensor(json.loads(done.stdout)).allclose(wanted, atol=1e-5)


@each_package
def test_a_picture_of_the_test_set_is_named_as_the_network_names_it(package, runs, tmp_path, capsys):
    sample = data.load("sample", "test")
    paths = [tmp_path / f"{n}.png" for n in (0, 1700, 4999)]
    for path in paths:
        Image.fromarray(sample.images[int(path.stem), 0].numpy()).save(path)
    assert exported(package, runs[package], tmp_path / "out") == 0
    capsys.readouterr()
    main = import_module(f"{package}.predict").main
    printed = []
    for source in (runs[package], tmp_path / "out"):
        assert main([str(source), *map(str, paths), "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert list(printed[0]) == [str(path) for path in paths]
    found = taken(package, runs[package], "")
    images = sample.images[[0, 1700, 4999]]
    if found.image[1] != 28:
        images = import_module("shared.batches").resize_mean(images, found.image[1])
    probabilities = found.whole(images.float() / 255).softmax(1)
    for top, wanted in zip(printed[0].values(), probabilities, strict=True):
        assert len(top) == 5
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert list(top.values()) == pytest.approx(wanted.topk(5).values.tolist(), abs=0.02)  # PIL rounds otherwise
    assert main([str(runs[package]), str(paths[0])]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in printed[0][str(paths[0])])
    assert table.count(" %") == 5


@each_package
def test_what_a_run_does_not_have_is_refused_with_what_it_has(package, runs, tmp_path, capsys):
    for arguments, has in NONE[package].items():
        assert exported(package, runs[package], tmp_path / "out", *arguments.split()) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --")
        assert arguments in error
        assert has in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@each_package
def test_what_cannot_be_named_or_exported_is_told_in_one_line(package, runs, tmp_path, capsys):
    main, export = import_module(f"{package}.predict").main, import_module(f"{package}.export").main
    (tmp_path / "text.png").write_text("no picture")
    picture = tmp_path / "picture.png"
    Image.new("L", (28, 28)).save(picture)
    other = runs["mdcs" if package != "mdcs" else "fedloge"]
    assert exported(package, runs[package], tmp_path / "out") == 0
    one_of_a_run = list(CHOICES[package])[-1].split()
    capsys.readouterr()
    for call, given, reason in (
        (main, [runs[package], tmp_path / "text.png"], "is not a picture"),
        (main, [runs[package], tmp_path / "none.png"], "there is no such file"),
        (main, [tmp_path, picture], "is not a finished run"),
        (main, [tmp_path / "out", *one_of_a_run, picture], "is one exported network"),
        (main, [other, picture], f"not of {package}"),
        (export, [other], f"not of {package}"),
        (export, [runs[package], "--out", tmp_path], "is no export of this network"),
    ):
        assert call([str(word) for word in given]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "has"), [("fedbn", True), ("ditto", True), ("fedrod", True), ("fedper", True), ("fedavg_ft", False)]
)
def test_a_clients_model_is_exported_where_the_run_keeps_it(method, has, tiny_arguments, tmp_path, capsys):
    assert import_module("fedloge.train").main(tiny_arguments(tmp_path, method)) == 0
    (run,) = (tmp_path / "fedloge").iterdir()
    assert exported("fedloge", run, tmp_path / "generic") == 0
    assert exported("fedloge", run, tmp_path / "out", "--client", "2") == (0 if has else 2)
    if not has:
        assert "makes a client's model when it is tested" in capsys.readouterr().err
        return
    whole, _ = load_exported(tmp_path / "out", "fedloge", import_module("fedloge.export").build)
    config = load(run / "config.yaml", import_module("fedloge.config").Config)
    problem = import_module("fedloge.problem").load_problem(config, torch.device("cpu"))
    place = problem.local_tests[2]
    right = whole(problem.test.images[place].float() / 255).argmax(1) == problem.test.labels[place]
    stated = json.loads((run / "results.json").read_text())["details"]["personal.clients"][2]
    assert float(right.double().mean()) == pytest.approx(stated, abs=1.5 / len(place))


def test_the_network_of_a_fold_is_exported_by_its_number(tmp_path, capsys):
    arguments = ["--config", "smoke", "--out", str(tmp_path), "method={name: two_stage, kfold: honest, folds: 2}",
                 "stage1.epochs=1", "stage2.max_epochs=1", "seeds=1"]  # fmt: skip
    assert import_module("lightcnn.train").main(arguments) == 0
    (run,) = (tmp_path / "lightcnn").iterdir()
    assert exported("lightcnn", run, tmp_path / "out") == 2
    assert "it has s0-fold1, s0-fold2" in capsys.readouterr().err
    assert exported("lightcnn", run, tmp_path / "out", "--fold", "2") == 0


@pytest.mark.parametrize("method", ["submodel", "bn_gap", "lenet5", "squeezenet", "linear_head", "budget"])
def test_the_network_of_every_kind_of_method_is_built_again(method):
    from lightcnn.algorithm import network_of
    from lightcnn.baselines import ImageShape
    from lightcnn.config import Config
    from lightcnn.export import build
    from shared.config import parse

    settings = "{name: budget, layout: c16 s32 P s48}" if method == "budget" else method
    config = parse(f"paper: lightcnn\ndata: {{name: sample}}\nmethod: {settings}\n", Config)
    kind = network_of(config.method, ImageShape(1, 28, 10))
    state = kind.to_module(kind.initial(3)).state_dict()
    architecture = {"method": json.loads(config.method.model_dump_json()), "in_channels": 1, "image_size": 28,
                    "num_classes": 10}  # fmt: skip
    network = build(architecture)
    network.load_state_dict(state)
    assert network.eval()(torch.rand(2, 1, 28, 28)).shape == (2, 10)


READ = {  # of the data, by the commands that evaluate a run and that use its networks
    "fedloge": {"eval": ["digests"], "predict": ["images", "class_counts", "client_sizes", "local_test_sizes"]},
    "mdcs": {"eval": ["class_counts", "digests"], "predict": ["images", "class_counts"]},
    "lightcnn": {"eval": ["digests"], "predict": ["train_images", "val_images"]},
    "sparsevit": {"eval": ["digests"], "predict": ["images"]},
}


@pytest.mark.parametrize("command", ["eval", "predict"])
@each_package
def test_results_that_lack_a_key_are_refused_by_its_name(runs, tmp_path, capsys, package, command):
    run, picture = tmp_path / "run", tmp_path / "picture.png"
    shutil.copytree(runs[package], run)
    Image.new("L", (28, 28)).save(picture)
    whole = json.loads((run / "results.json").read_text())

    def said(results):
        (run / "results.json").write_text(json.dumps(results))
        asked = [str(run), *([str(picture)] if command == "predict" else [])]
        assert import_module(f"{package}.{command}").main(asked) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {run / 'results.json'}: is damaged (")
        assert error.count("\n") == 1
        return error

    said({"paper": package})
    for key in ("figures", "data", "config", "method", "device", "command", "model_digest"):
        assert f"({key} is missing)" in said({name: value for name, value in whole.items() if name != key})
        assert f"({key}" in said({**whole, key: 1})
    for key in READ[package][command]:
        kept = {name: value for name, value in whole["data"].items() if name != key}
        assert f"(data.{key} is missing)" in said({**whole, "data": kept})
        assert f"(data.{key}" in said({**whole, "data": {**kept, key: ["no"]}})


def test_a_client_whose_accuracy_is_not_in_the_results_is_refused(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs["fedloge"], run)
    whole = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**whole, "details": {}}))
    assert exported("fedloge", run, tmp_path / "out", "--client", "1") == 2
    assert "is damaged (details.personal.clients is missing)" in capsys.readouterr().err
    assert exported("fedloge", run, tmp_path / "out") == 0, "the generic model needs none"
