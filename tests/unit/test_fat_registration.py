"""Importing fat requires only torch, and models are registered with timm only on request."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fat

OPTIONAL = ("timm", "safetensors", "onnx", "onnxruntime", "onnxscript", "triton")


def test_importing_fat_imports_no_optional_package(tmp_path: Path) -> None:
    """Importing any of the optional packages would end the process."""
    for name in OPTIONAL:
        (tmp_path / f"{name}.py").write_text("import os; os._exit(3)")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fat; fat.create_model('fat_b0')"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_fat_does_not_change_the_import_system() -> None:
    program = "import sys, torch; before = list(sys.meta_path); import fat; assert sys.meta_path == before"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_registered_variants_accept_timms_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a replacement for timm's registry: a decorator that registers a function under its name."""
    registry = {}
    models = ModuleType("timm.models")
    models.register_model = lambda function: registry.setdefault(function.__name__, function)
    monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.models", models)
    fat.register_with_timm()
    assert list(registry) == fat.list_models()
    model = registry["fat_b0"](pretrained=False, num_classes=3, drop_path_rate=0.3)
    assert (model.config.num_classes, model.config.drop_path) == (3, 0.3)
    with pytest.raises(ValueError, match="no weights are published"):
        registry["fat_b0"](pretrained=True)
