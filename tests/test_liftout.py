"""The trunk may be cut: one package and `shared`, copied into an empty folder, train and export there."""

import shutil

import pytest

CHECK = """
import runpy, sys
from pathlib import Path
sys.argv = [sys.argv[0], *sys.argv[1:]]
try:
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
except SystemExit as stop:
    code = stop.code
import shared
print("shared:", Path(shared.__file__).resolve())
sys.exit(code)
"""


@pytest.mark.parametrize("package", ["fedloge", "mdcs", "lightcnn", "sparsevit"])
def test_a_package_and_shared_in_an_empty_folder_train(tmp_path, repository, papers, python, package):
    if package not in papers:
        pytest.skip(f"{package} is not built yet")
    for name in (package, "shared"):
        shutil.copytree(repository / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = python("-m", f"{package}.train", "--config", "smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs" / package).glob("*/results.json"))
    (run,) = (tmp_path / "runs" / package).glob("smoke-*")
    assert python("-m", f"{package}.export", str(run), "--out", "model", cwd=tmp_path).returncode == 0
    assert (tmp_path / "model" / "README.md").exists()
    found = python("-c", CHECK, f"{package}.train", "--config", "smoke", cwd=tmp_path)  # reports the finished run
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == f"shared: {(tmp_path / 'shared' / '__init__.py').resolve()}"


@pytest.mark.parametrize("package", ["fedloge", "mdcs", "lightcnn", "sparsevit"])
def test_a_package_without_its_shared_beside_it_says_which_was_found(tmp_path, repository, papers, python, package):
    if package not in papers:
        pytest.skip(f"{package} is not built yet")
    shutil.copytree(repository / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys; sys.path.append({str(repository)!r}); from {package}.train import main; "
    code += "sys.exit(main(sys.argv[1:]))"
    done = python("-c", code, "--config", "smoke", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the package 'shared' was imported from {repository / 'shared'}")
    assert done.stderr.count("\n") == 1
