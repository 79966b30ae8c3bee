"""Register the variants with timm, for `timm.create_model("fat_b3")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fat.config import VARIANTS
from fat.factory import OPTIONS, check_options, create_model
from fat.features import default_cfg
from fat.model import FAT, Trunk

default_cfgs = {name: default_cfg(config) for name, config in VARIANTS.items()}
"""The models' `pretrained_cfg`, which timm looks up under this name in the module of a registered function."""

# timm's names of options. drop_rate is accepted as long as it is 0, because timm's training script always passes it.
TIMM_OPTIONS = ("drop_path_rate", "drop_rate", "global_pool", *(name for name in OPTIONS if name != "drop_path"))


def register_with_timm() -> None:
    """Add the variants to timm's registry. Imports timm, which importing fat does not. Can be called repeatedly.

    Afterwards `timm.create_model("fat_b0")` accepts timm's options `num_classes`, `in_chans`, `drop_path_rate`,
    `global_pool`, `features_only`, `out_indices` and `checkpoint_path`, and those of `fat.create_model`. Weights are
    loaded from `weights=FILE`, or from timm's `pretrained=True, pretrained_cfg_overlay={"file": FILE}`.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    from timm.models import is_model, register_model

    for name in VARIANTS:
        if not is_model(name):
            register_model(_entry_point(name))


def _entry_point(name: str) -> Callable[..., Trunk]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: object = None,
        **options: Any,
    ) -> Trunk:
        check_options(name, options, TIMM_OPTIONS)
        cfg = {**(pretrained_cfg if isinstance(pretrained_cfg, dict) else {}), **(pretrained_cfg_overlay or {})}
        if pretrained:
            if "file" not in cfg:
                raise ValueError(
                    f"{name}: no weights are published; pass weights=FILE, or pretrained_cfg_overlay={{'file': FILE}}"
                )
            # As in timm, a classifier for other classes is initialized.
            options = {"weights": cfg["file"], "replace_head": True, **options}
        if options.pop("drop_rate", 0):
            raise ValueError(f"{name}: drop_rate: FAT has no dropout; use drop_path_rate")
        global_pool = options.pop("global_pool", "avg")
        model: Trunk = create_model(name, drop_path=options.pop("drop_path_rate", None), **options)
        if isinstance(model, FAT) and global_pool != "avg":
            model.reset_classifier(model.num_classes, global_pool)
        model.pretrained_cfg.update(architecture=name, **cfg)
        return model

    create.__name__ = create.__qualname__ = name  # timm registers a model under its function's name
    return create
