"""fat needs torch alone, and waits for others without importing them."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fat.timm_registry import when_imported

OPTIONAL = ("timm", "safetensors", "onnx", "onnxruntime", "onnxscript", "triton")


def test_importing_fat_imports_no_optional_package(tmp_path: Path) -> None:
    """Each is there, and would end the process if it were imported."""
    for name in OPTIONAL:
        (tmp_path / f"{name}.py").write_text("import os; os._exit(3)")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fat; fat.create_model('fat_b0')"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that can be imported and has not been."""
    (tmp_path / "seldom_imported.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "seldom_imported", raising=False)
    return "seldom_imported"


def test_the_action_follows_the_import(module: str) -> None:
    calls = []
    when_imported(module, lambda: calls.append(sys.modules[module].answer))
    importlib.util.find_spec(module)  # asking whether it is installed is no import
    assert calls == []
    importlib.import_module(module)
    assert calls == [42]
    importlib.reload(sys.modules[module])
    assert calls == [42]


def test_the_action_is_immediate_after_the_import(module: str) -> None:
    calls = []
    importlib.import_module(module)
    when_imported(module, lambda: calls.append(1))
    assert calls == [1]


def test_a_module_that_is_not_installed_is_still_not_found() -> None:
    when_imported("no_such_module_anywhere", lambda: pytest.fail("never imported"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_anywhere")
    sys.meta_path.pop(0)
