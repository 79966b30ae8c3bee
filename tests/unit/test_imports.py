"""The import rules of this project (docs/architecture.md), checked in the source code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shards", "pipeline", "fat", "launch")

# Packages of this project, and which of the others each may import.
ALLOWED = {
    "shards": set(),
    "pipeline": {"shards"},
    "fat": set(),
    "launch": {"pipeline", "shards", "fat"},
}
TRITON_FILES = (
    "attention", "batchnorm", "channel_sums", "depthwise", "depthwise_weight_grad", "gate", "norm", "norm_relu",
)  # fmt: skip
# Large libraries, and the only folder that may import each.
ONLY_IN = {
    "nvidia": {"pipeline/decode/dali_graph.py"},
    "ffcv": {"pipeline/decode/ffcv.py"},
    "numba": {"pipeline/decode/ffcv.py", "pipeline/augment/numba_impl/compiler.py"},
    "triton": {
        *(f"fat/kernels/impl/{name}.py" for name in TRITON_FILES),
        *(f"fat/kernels/prefill/{room}.py" for room in ("compile_ahead", "compiler", "launches")),
        "pipeline/augment/triton_impl/finishing.py",
        "pipeline/augment/triton_impl/randaugment.py",
    },
    "accelerate": {"launch/engine/accelerate.py", "launch/monitor/tracker_backends.py"},
    "deepspeed": {"launch/optim/zero_state.py"},
}
# Files that may only be imported inside functions.
LAZY = ONLY_IN["triton"] | ONLY_IN["ffcv"]
TORCH_FREE = ("shards",)
# Packages whose root contains files of several layers, which import the folders and are imported by them.
ROOTS_OF_SEVERAL_LAYERS = ("pipeline", "pipeline/storage", "launch", "fat")
# Folder -> folders that it imports although they import it.
FOLDER_EXCEPTIONS = {
    "fat/kernels/ops": {"fat/kernels"},
    "fat/kernels/prefill": {"fat/account", "fat/kernels"},
    "pipeline/augment/numba_impl": {"pipeline/augment"},
    "pipeline/augment/torch_impl": {"pipeline/augment"},
    "pipeline/augment/triton_impl": {"pipeline/augment"},
}
FAT_TOP_LEVEL = {"torch"}


def _sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _imports(path: Path) -> list[tuple[str, bool]]:
    """Return (top-level module, whether it is imported at module level) of every import statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top: set[int] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                at_top.add(id(child))
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                stack.append(child)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], id(node) in at_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.module.split(".")[0], id(node) in at_top))
    return found


def _files_imported() -> dict[str, set[str]]:
    """Return the modules of this project that each module imports, except for type checking."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in _sources()
    }
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        found: set[str] = set()
        while stack:
            for node in ast.iter_child_nodes(stack.pop()):
                if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                    continue
                stack.append(node)
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names = {f"{node.module}.{alias.name}" for alias in node.names}
                    found |= names if names <= paths.keys() else {*names, str(node.module)}
        graph[module] = (found & paths.keys()) - {module}
    return graph


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_rules_of_their_package(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    package = name.split("/", maxsplit=1)[0]
    for module, top in _imports(path):
        if module in PACKAGES and module != package:
            assert module in ALLOWED[package], f"{name} imports {module}"
        if module in ONLY_IN:
            assert name in ONLY_IN[module], f"{name} imports {module}"
        if package in TORCH_FREE:
            assert module != "torch", f"{name} imports torch"
        if package == "fat" and top and module not in {*FAT_TOP_LEVEL, "fat"} and name not in ONLY_IN["triton"]:
            assert module in sys.stdlib_module_names, f"{name} imports {module} at module level"


def test_the_listed_files_import_the_library_they_are_listed_for() -> None:
    for library, names in ONLY_IN.items():
        assert [name for name in names if library not in dict(_imports(ROOT / name))] == [], library


def test_no_folder_contains_more_than_14_source_files() -> None:
    folders = Counter(str(path.parent.relative_to(ROOT)) for path in _sources() if path.name != "__init__.py")
    assert not {folder: count for folder, count in folders.items() if count > 14}


def test_files_have_no_import_cycle() -> None:
    TopologicalSorter(_files_imported()).prepare()


def test_folders_have_no_import_cycle() -> None:
    """The folders of a package are layers. In `shards`, its root is the lowest layer."""
    folders: dict[str, set[str]] = {}
    for module, imported in _files_imported().items():
        folder = _folder(module)
        folders.setdefault(folder, set()).update(map(_folder, imported))
        folders[folder].discard(folder)
    for root in ROOTS_OF_SEVERAL_LAYERS:
        del folders[root]
        for imported in folders.values():
            imported.discard(root)
    for folder, imported in FOLDER_EXCEPTIONS.items():
        assert imported <= folders.get(folder, set()), f"{folder}: remove the exception, it is no longer needed"
        folders[folder] -= imported
    TopologicalSorter(folders).prepare()


def _folder(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    return str((path if path.is_dir() else path.parent).relative_to(ROOT))


def _test_modules_imported(path: Path) -> set[str]:
    """Return the test modules that a test module imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module or ''}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.rpartition(".")[2].startswith("test_") and "tests" in name.split(".")}


def test_no_test_module_imports_another() -> None:
    """Otherwise a change of one test could break another. Shared helpers are in tests/support."""
    paths = list((ROOT / "tests").rglob("*.py"))
    assert not {str(path.relative_to(ROOT)): found for path in paths if (found := _test_modules_imported(path))}


@pytest.mark.parametrize(
    "path",
    [path for path in _sources() if str(path.relative_to(ROOT)) not in LAZY],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_that_import_triton_or_ffcv_are_imported_lazily(path: Path) -> None:
    rooms = {room.removesuffix(".py").replace("/", ".") for room in LAZY}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        assert not names & rooms, f"{path.relative_to(ROOT)}: {names & rooms} at module level"


def test_the_console_script_starts_without_torch() -> None:
    """Importing torch takes seconds, also for `pipeline --help`."""
    program = "import sys, launch.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
