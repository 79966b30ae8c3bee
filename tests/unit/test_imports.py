"""The house's import rules (docs/architecture.md): who may know whom, read from the source itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shards", "pipeline", "fat", "launch")

# Our packages: what each may import of the others.
ALLOWED = {
    "shards": set(),
    "pipeline": {"shards"},
    "fat": set(),
    "launch": {"pipeline", "shards", "fat"},
}
# Files that may, inside a function only, reach further.
LAZY_EXCEPTIONS = {"pipeline/cli.py": {"fat", "launch"}}
TRITON_ROOMS = ("attention", "batchnorm", "convolution", "correlation", "gating", "groupnorm", "normrelu", "sums")
# Heavy libraries that one room alone may touch.
ONLY_IN = {
    "nvidia": {"pipeline/dali.py"},
    "ffcv": {"pipeline/ffcv.py", "shards/beton.py"},
    "triton": {
        *(f"fat/kernels/{room}.py" for room in TRITON_ROOMS),
        *(f"fat/kernels/prefill/{room}.py" for room in ("compile_ahead", "compiler", "launches")),
        "pipeline/augment/finishing.py",
        "pipeline/augment/randaugment.py",
    },
    "accelerate": {"launch/wrapping.py"},
    "deepspeed": {"launch/masters.py", "launch/wrapping.py"},
}
TORCH_FREE = ("shards",)
FAT_TOP_LEVEL = {"torch"}


def _sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(top-level module, whether it is imported at module level) of every import statement."""
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


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    package = name.split("/", maxsplit=1)[0]
    for module, top in _imports(path):
        if module in PACKAGES and module != package:
            lazily = not top and module in LAZY_EXCEPTIONS.get(name, set())
            assert module in ALLOWED[package] or lazily, f"{name} imports {module}"
        if module in ONLY_IN:
            assert name in ONLY_IN[module], f"{name} imports {module}"
        if package in TORCH_FREE:
            assert module != "torch", f"{name} imports torch"
        if package == "fat" and top and module not in {*FAT_TOP_LEVEL, "fat"} and name not in ONLY_IN["triton"]:
            import sys

            assert module in sys.stdlib_module_names, f"{name} imports {module} at module level"


def test_ffcv_is_imported_lazily() -> None:
    for path in _sources():
        if str(path.relative_to(ROOT)) == "shards/beton.py":
            assert not any(module == "ffcv" and top for module, top in _imports(path))


@pytest.mark.parametrize(
    "path",
    [path for path in _sources() if str(path.relative_to(ROOT)) not in ONLY_IN["triton"]],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_that_import_triton_are_imported_lazily(path: Path) -> None:
    rooms = {room.removesuffix(".py").replace("/", ".") for room in ONLY_IN["triton"]}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        assert not names & rooms, f"{path.relative_to(ROOT)}: {names & rooms} at module level"
