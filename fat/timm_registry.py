"""Register the variants with timm, for `timm.create_model("fat_b3")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fat.config import VARIANTS
from fat.model import Trunk


def register_with_timm() -> None:
    """Add the variants to timm's registry. Imports timm, which importing fat does not.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    from timm.models import register_model

    for name in VARIANTS:
        register_model(_entry_point(name))


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

    create.__name__ = create.__qualname__ = name  # timm registers a model under its function's name
    return create
