"""`timm.create_model("fat_b3")` for those who use timm, which is never imported for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fat.config import VARIANTS
from fat.model import Trunk


def register_with_timm() -> None:
    """Adds the variants to timm's registry. Imports timm."""
    from timm.models import register_model

    for name in VARIANTS:
        register_model(_entry_point(name))


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Calls `action` as soon as the top-level module `name` is imported, by whomever; at once if it already is."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Lookout(name, action))


def _entry_point(name: str) -> Callable[..., Trunk]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: object = None,
        pretrained_cfg_overlay: object = None,
        cache_dir: object = None,
        drop_path_rate: float | None = None,
        **options: Any,
    ) -> Trunk:
        from fat.factory import create_model

        if pretrained:
            raise ValueError(f"{name}: no weights are published; pass weights=FILE")
        return create_model(name, drop_path=drop_path_rate, **options)

    create.__name__ = create.__qualname__ = name  # the registry goes by them
    return create


class _Lookout(MetaPathFinder):
    """Finds the module as the other finders do, and has the action follow its execution."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
