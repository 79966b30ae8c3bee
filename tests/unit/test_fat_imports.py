"""Importing fat requires only torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
