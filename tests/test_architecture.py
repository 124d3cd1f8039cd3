"""What the repository promises about its own code, read from the code."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAPERS = ("fedloge", "mdcs", "lightcnn", "sparsevit")
PACKAGES = [name for name in PAPERS if (REPOSITORY / name / "__init__.py").exists()]
SCRIPTS = {"benchmarks": set[str](), "results": {"markdown_it"}}  # folder -> what it may import of the dev group
ROOTS = ["shared", *PACKAGES, *(name for name in SCRIPTS if (REPOSITORY / name).exists())]
FILES = sorted(path for root in ROOTS for path in (REPOSITORY / root).rglob("*.py"))
SLOW_IMPORTS = {"torchvision", "matplotlib", "PIL", "rich", "onnxruntime"}
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}  # a distribution's module, where the name differs
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_SHARED_LINES = 350, 60, 2000

Function = ast.FunctionDef | ast.AsyncFunctionDef
ids = [str(path.relative_to(REPOSITORY)) for path in FILES]
each_file = pytest.mark.parametrize("path", FILES, ids=ids)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level module) of every import below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.lineno, str(node.module).partition(".")[0]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute, `?` for what is neither."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: no function bodies, no `if TYPE_CHECKING`."""
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        yield node
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not isinstance(node, Function | ast.Lambda) and not guarded:
            stack += ast.iter_child_nodes(node)


def dependencies() -> set[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    optional = [item for items in project["optional-dependencies"].values() for item in items]
    names = {re.match(r"[\w.-]+", item)[0].lower() for item in [*project["dependencies"], *optional]}
    return {MODULES.get(name, name.replace("-", "_")) for name in names} | (
        {"PIL"} if "torchvision" in names else set()
    )


def test_there_is_something_to_check():
    assert "fedloge/method.py" in ids
    assert "shared/run.py" in ids


@each_file
def test_a_file_imports_its_own_package_shared_and_declared_dependencies_only(path):
    root = path.relative_to(REPOSITORY).parts[0]
    ours = {"shared"} if root == "shared" else {"shared", root}
    if root in SCRIPTS:  # they may use all packages and the scripts beside them
        ours = {"shared", *PACKAGES, *(other.stem for other in path.parent.glob("*.py")), *SCRIPTS[root]}
    allowed = ours | dependencies() | set(sys.stdlib_module_names)
    assert [found for found in imports_of(tree_of(path)) if found[1] not in allowed] == []


@pytest.mark.parametrize("path", sorted((REPOSITORY / "shared").rglob("*.*")), ids=str)
def test_shared_names_no_paper(path):
    if path.suffix not in (".py", ".md"):
        pytest.skip("not a text")
    pattern = re.compile("|".join([*PAPERS, "sparse.?vit", "light.?cnn", "sparse then prune"]), re.IGNORECASE)
    assert [line for line in path.read_text(encoding="utf-8").splitlines() if pattern.search(line)] == []


@each_file
def test_nothing_is_unpickled_or_evaluated(path):
    tree, wrong = tree_of(path), []
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
    wrong += [f"{line}: import {name}" for line, name in imports_of(tree) if name in modules]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, named = dotted(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        last = name.rpartition(".")[2]
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            wrong.append(f"{node.lineno}: {name}")
        if name.startswith("yaml.") and last in ("load", "load_all", "unsafe_load", "full_load"):
            wrong.append(f"{node.lineno}: {name}")
        if name == "torch.load" and named.get("weights_only") != "True":
            wrong.append(f"{node.lineno}: {name} without weights_only=True")
        if name in ("np.load", "numpy.load") and named.get("allow_pickle", "False") != "False":
            wrong.append(f"{node.lineno}: {name} with allow_pickle")
        if named.get("shell") == "True":
            wrong.append(f"{node.lineno}: {name} with a shell")
    assert wrong == []


@each_file
def test_every_function_is_typed(path):
    wrong = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, Function):
            arguments = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            bare = [a.arg for a in arguments if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
            wrong += [f"{node.lineno}: {node.name}({name})" for name in bare]
            wrong += [] if node.returns is not None else [f"{node.lineno}: {node.name} -> ?"]
    assert wrong == []


@each_file
def test_every_module_and_every_public_class_and_function_says_what_it_is(path):
    """A method that a class of the same file declares with a docstring (a protocol, a base) need not repeat it."""
    tree, wrong = tree_of(path), []
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    said = {"forward"} | {n.name for c in classes for n in c.body if isinstance(n, Function) and ast.get_docstring(n)}
    if not ast.get_docstring(tree):
        wrong.append("1: the module")
    for owner in [tree, *classes]:
        for node in owner.body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_") or ast.get_docstring(node):
                continue
            if owner is tree or node.name not in said:
                wrong.append(f"{node.lineno}: {node.name}")
    assert wrong == []


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_of_tests_are_as_short_as_those_of_code():
    tests = list((REPOSITORY / "tests").rglob("*.py"))
    assert len(tests) > 50
    assert [f"{path.name}: {lines_of(path)}" for path in tests if lines_of(path) > MAX_FILE_LINES] == []


@each_file
def test_files_and_functions_fit_on_few_screens(path):
    assert lines_of(path) <= MAX_FILE_LINES
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, Function)]
    long = [
        f"{f.name}: {f.end_lineno - f.lineno + 1}" for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    lines: set[int] = set()
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        starts = before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        before = token.type
        if token.string.strip() and not (starts and token.type == tokenize.STRING):
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def test_mypy_reads_every_package_and_every_script_of_the_results():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["packages"] == ["shared", *PACKAGES]
    assert settings["modules"] == sorted(path.stem for path in (REPOSITORY / "results").glob("*.py"))


def test_shared_is_thin():
    assert sum(code_lines(path) for path in (REPOSITORY / "shared").rglob("*.py")) < MAX_SHARED_LINES


@each_file
def test_what_takes_seconds_to_import_is_imported_where_it_is_used(path):
    if path.parent.name == "benchmarks":
        pytest.skip("a script, not imported by others")
    top = ast.Module([node for node in at_import(tree_of(path)) if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert [found for found in imports_of(top) if found[1] in SLOW_IMPORTS] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_the_rooms_that_all_have(package):
    rooms = {
        "README.md",
        "config.py",
        "model.py",
        "method.py",
        "baselines.py",
        "train.py",
        "eval.py",
        "reproduce.py",
        "export.py",
        "predict.py",
        "configs",
    }
    assert {name for name in rooms if not (REPOSITORY / package / name).exists()} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_method_file_has_the_ideas_and_no_training(package):
    calls = [dotted(n.func) for n in ast.walk(tree_of(REPOSITORY / package / "method.py")) if isinstance(n, ast.Call)]
    wrong = [
        name
        for name in calls
        if name.startswith("torch.optim") or name.endswith((".backward", ".step")) or name == "open"
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_an_installed_package_has_its_commands(package):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    for command in ("train", "eval", "reproduce", "export", "predict"):
        assert project["project"]["scripts"][f"{package}-{command}"] == f"{package}.{command}:main"
    assert package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def committed() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git repository")
    return [REPOSITORY / name for name in done.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


def test_no_committed_text_names_a_package_index_or_a_path_of_one_machine():
    hosts = re.compile(
        r"pypi\.org|pythonhosted|download\.pytorch\.org/whl|--(extra-)?index-url|conda\.anaconda", re.IGNORECASE
    )
    paths = re.compile(r"(?<![\w./<-])/(work|root|home|Users)/")
    wrong = []
    for path in committed():
        if path == Path(__file__) or path.suffix in (".npz", ".png"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if hosts.search(line) or paths.search(line):
                wrong.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:80]}")
    assert wrong == []


def test_no_committed_file_is_large():
    assert [str(path) for path in committed() if path.stat().st_size > 8 * 2**20] == []


def test_the_ignored_folders_are_those_of_the_root_only():
    lines = (REPOSITORY / ".gitignore").read_text().splitlines()
    assert [line for line in lines if line.strip("/") in ("data", "runs") and not line.startswith("/")] == []
