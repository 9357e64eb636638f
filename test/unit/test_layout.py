"""The shape of the repository that DESIGN.md promises: sizes, import directions, one file for devices."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*REPOSITORY.glob("*.py"), *REPOSITORY.glob("tools/*.py")])
LIBRARY = sorted(REPOSITORY.glob("library/**/*.py"))
# modules of the standard library alone
STANDARD = {"flags", "flags_data", "flags_adapter", "flags_sd3", "flags_validation", "dialects", "config_files", "parser",
            "errors"}
LEAVES = {f"library.data.{name}" for name in ("geometry", "aspect", "captions", "sampler", "draws", "specs")}
# who may import whom, beside the modules that lie directly in library/
MAY_IMPORT = {"data": {"data", "training"}, "training": {"training", "data"}, "diffusion": {"diffusion"},
              "models": {"models", "diffusion", "data", "training"},
              "validation": {"validation", "diffusion", "data", "training"}}
DEVICES = REPOSITORY / "library/training/devices.py"


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it: `from library.data import cache` is library.data.cache."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if (REPOSITORY / f"{module.replace('.', '/')}.py").exists() else node.module for module in modules}
    return found


def files() -> list[Path]:
    """All files that are, or would be, in the repository."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY,
                            capture_output=True)
    if listed.returncode:    # a copy without .git
        hidden = {".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "out"}
        return [path for path in REPOSITORY.rglob("*") if path.is_file() and not hidden & set(path.parts)]
    return [path for name in listed.stdout.decode().split("\0") if name and (path := REPOSITORY / name).is_file()]


@pytest.mark.parametrize("path", SCRIPTS + LIBRARY, ids=name_of)
def test_sizes(path):
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 150 if node.name == "main" and path in SCRIPTS else 100
            assert node.end_lineno - node.lineno + 1 <= limit, f"{node.name} in {path}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_go_one_way(path):
    ours = {name for name in imports_of(path) if name.split(".")[0] == "library"}
    assert not {name for name in imports_of(path) if (REPOSITORY / f"{name.split('.')[0]}.py").exists()}    # no script
    parts = name_of(path).split(".")
    if len(parts) == 2:
        assert parts[1] in STANDARD, f"{path} lies beside the packages: then name it in STANDARD"
        outside = {name for name in imports_of(path) - ours if name.split(".")[0] not in sys.stdlib_module_names | {"tomli"}}
        assert not outside and all(name.split(".")[1] in STANDARD for name in ours)
    else:
        reached = {name.split(".")[1] for name in ours} - STANDARD
        assert reached <= MAY_IMPORT[parts[1]]


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_leaves_import_numpy_and_leaves_alone(name):
    allowed = LEAVES | {"library.errors"}
    found = imports_of(REPOSITORY / f"{name.replace('.', '/')}.py")
    assert all(each in allowed or each.split(".")[0] in sys.stdlib_module_names | {"numpy"} for each in found), found


def test_no_module_imports_in_a_circle():
    graph = {name_of(path): imports_of(path) for path in LIBRARY}
    for _ in graph:    # take away what imports nothing of what is left
        graph = {name: left for name, reached in graph.items() if (left := reached & graph.keys())}
    assert not graph, f"among {', '.join(sorted(graph))}"


def test_nobody_has_utilities():
    names = {path.stem for path in files() if path.suffix == ".py"}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def names_a_device(node: ast.AST) -> bool:
    kinds = {"cuda", "npu", "mps", "xpu"}
    if isinstance(node, ast.Attribute):    # torch.cuda, torch.backends.mps
        return node.attr in kinds and ast.unparse(node.value) in ("torch", "torch.backends")
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = [alias.name for alias in node.names] + [f"{getattr(node, 'module', '')}.{alias.name}" for alias in node.names]
        return any(module in {"torch_npu"} | {f"torch.{kind}" for kind in kinds} or module.startswith("torch_npu.")
                   for module in [*modules, getattr(node, "module", "") or ""])
    if isinstance(node, ast.Call) and node.args:    # importlib.import_module("torch_npu"), getattr(torch, "cuda")
        return any(isinstance(argument, ast.Constant) and argument.value == "torch_npu" for argument in node.args) or (
            ast.unparse(node.func) == "getattr" and ast.unparse(node.args[0]) == "torch")
    return False


@pytest.mark.parametrize("path", SCRIPTS + LIBRARY, ids=name_of)
def test_only_one_file_names_devices(path):
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if names_a_device(node)]
    assert bool(lines) == (path == DEVICES), f"lines {lines}"


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_have_one_order(path):
    tree = ast.parse(path.read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert ast.get_docstring(tree) and path.name in ast.get_docstring(tree), "the command to run it"
    assert names[0] == "parse_args" and names[-1] == "main"
    if path.name.startswith("train_"):
        assert names == ["parse_args", "training_loss", "main"]


def test_no_path_of_the_machine_it_was_written_on():
    places = re.compile("|".join(rf"(?<![\w.-]){place}(?![\w-])" for place in ("/" + "work", "/" + "tmp/w")))
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:    # an image, say
            continue
        found += [f"{path}: {line.strip()[:80]}" for line in text.splitlines() if places.search(line)]
    assert not found, found


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=REPOSITORY, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
