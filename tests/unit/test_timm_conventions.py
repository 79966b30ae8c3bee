"""FAT models behave like timm's own, through timm's functions and by its names (fat/features.py, timm_registry.py)."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fat
from pipeline.augment.recipe import AugmentRecipe
from pipeline.jobs import CROP_PCT
from tests.support.tiny_fat import TINY, images, set_running_stats
from tests.support.vision_libraries import vision_libraries  # noqa: F401

MAPS = [(16, 16), (32, 8), (48, 4), (64, 2)]
"""Channels and side of TINY's feature maps of images of 64 x 64 pixels."""


@pytest.fixture
def timm(vision_libraries: None) -> Any:  # noqa: F811
    import timm

    fat.register_with_timm()
    return timm


@pytest.fixture(scope="module")
def classifier() -> fat.FAT:
    return set_running_stats(fat.FAT(TINY))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of FAT-B0 with 5 classes, trained at 96 pixels."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    info = fat.WeightsInfo(size=96, crop_pct=0.95, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    fat.save_weights(fat.create_model("fat_b0", num_classes=5), path, info=info)
    return path


def test_timm_creates_the_registered_models_with_its_options(timm: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fat.register_with_timm()  # again
    assert timm.list_models("fat_*") == fat.list_models()
    model = timm.create_model("fat_b0", num_classes=3, in_chans=4, drop_path_rate=0.3, drop_rate=0.0)
    assert (model.num_classes, model.config.in_chans, model.config.drop_path) == (3, 4, 0.3)
    assert model.pretrained_cfg["architecture"] == "fat_b0"
    assert timm.create_model("fat_b0", num_classes=0, global_pool="")(images()).shape == (2, 256, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": True}, "no weights are published; pass weights=FILE"),
        ({"img_size": 384, "drop_block_rate": 0.1}, "fat_b0: unknown img_size, drop_block_rate; the options of a FAT"),
        ({"drop_rate": 0.1}, "drop_rate: FAT has no dropout"),
        ({"global_pool": "max"}, "global_pool: expected 'avg' or '' .*, got 'max'"),
        ({"global_pool": ""}, "global_pool: '' .* requires num_classes=0"),
        ({"out_indices": (1, 2)}, "out_indices selects feature maps and requires features_only=True"),
        ({"features_only": True, "out_indices": (1, 4)}, r"out_indices: expected .* from 0 to 3 .*, got \(1, 4\)"),
        ({"features_only": True, "out_indices": 5}, "out_indices: expected .*, got 5"),
        ({"features_only": True, "out_indices": (2, 1)}, r"out_indices: expected .* in ascending order, got \(2, 1\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_invalid_options_are_named(timm: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        timm.create_model("fat_b0", **options)


def test_timms_data_config_is_the_preprocessing_of_evaluation(timm: Any) -> None:
    recipe = AugmentRecipe()
    expected = {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "crop_pct": CROP_PCT,
        "crop_mode": "center",
        "mean": recipe.mean,
        "std": recipe.std,
    }
    for options in ({}, {"features_only": True}):
        assert timm.data.resolve_model_data_config(timm.create_model("fat_b0", **options)) == expected
    assert timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("fat_b0").to_dict()) == expected


def test_timms_data_config_is_that_of_the_weights_file(timm: Any, weights: Path) -> None:
    model = timm.create_model("fat_b0", weights=weights, num_classes=5)
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"], config["mean"]) == ((3, 96, 96), 0.95, (0.5, 0.5, 0.5))
    assert model.default_cfg is model.pretrained_cfg


def test_timm_loads_weights_files(timm: Any, weights: Path) -> None:
    expected = fat.load_model(weights)
    by_path = timm.create_model("fat_b0", num_classes=5, checkpoint_path=str(weights))
    by_overlay = timm.create_model(
        "fat_b0", pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, num_classes=7
    )
    assert torch.equal(by_path.head.weight, expected.head.weight)
    assert torch.equal(by_overlay.norm.weight, expected.norm.weight)
    assert by_overlay.head.weight.shape == (7, 256)  # another number of classes: a new classifier, as in timm


@pytest.mark.parametrize("out_indices", [None, (0, 2), 2], ids=str)
def test_feature_extractors_equal_those_that_timm_builds_from_the_classifier(
    timm: Any, weights: Path, out_indices: Any
) -> None:
    from timm.models._features import FeatureGetterNet

    selected = {} if out_indices is None else {"out_indices": out_indices}
    ours = timm.create_model("fat_b0", features_only=True, weights=weights, **selected).eval()
    timms = FeatureGetterNet(fat.load_model(weights), out_indices=out_indices or (0, 1, 2, 3)).eval()
    with torch.no_grad():
        assert all(map(torch.equal, ours(images()), timms(images())))
    for name in ("channels", "reduction", "module_name", "get_dicts"):
        assert getattr(ours.feature_info, name)() == getattr(timms.feature_info, name)()
        assert getattr(ours.feature_info, name)(idx=3) == getattr(timms.feature_info, name)(idx=3)
        assert getattr(ours.feature_info, name)(idx=[0, 2]) == getattr(timms.feature_info, name)(idx=[0, 2])
    assert ours.feature_info.from_other(2).channels() == timms.feature_info.from_other(2).channels()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in timms.parameters())


def test_methods_have_timms_signatures(timm: Any) -> None:
    from timm.models.convnext import ConvNeXt

    def parameters(function: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    for name in (
        "forward_intermediates",
        "prune_intermediate_layers",
        "group_matcher",
        "get_classifier",
        "forward_head",
    ):
        assert parameters(getattr(fat.FAT, name)) == parameters(getattr(ConvNeXt, name)), name
    assert parameters(fat.FAT.reset_classifier) == parameters(ConvNeXt.reset_classifier)[:3]


def test_timm_groups_parameters_by_block_for_layer_decay(timm: Any) -> None:
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("fat_b0")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    blocks = sum(model.config.depths)
    assert groups["stem.proj.weight"] == 0
    assert groups["stages.0.blocks.0.cpe.weight"] == 1
    assert groups["norm.weight"] == groups["stages.3.blocks.1.cpe.weight"] == blocks
    assert groups["head.weight"] == blocks + 1
    assert len(groups) == len(list(model.parameters()))
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert [coarse[f"stages.{i}.blocks.1.cpe.weight"] for i in range(4)] == [1, 2, 3, 4]
    scales = [group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)]
    assert (min(scales), max(scales)) == (0.5 ** (blocks + 1), 1)


INDICES = st.none() | st.integers(1, 4) | st.lists(st.integers(-4, 3), min_size=1, max_size=5)


@given(indices=INDICES, norm=st.booleans(), stop_early=st.booleans())
@settings(max_examples=15, deadline=None)
def test_intermediates_are_the_selected_feature_maps(
    classifier: fat.FAT, indices: Any, norm: bool, stop_early: bool
) -> None:
    """As in timm, they come finest first and at most once; only the last one can be normalized."""
    with torch.no_grad():
        x, found = classifier.forward_intermediates(images(), indices, norm=norm, stop_early=stop_early)
        only = classifier.forward_intermediates(
            images(), indices, norm=norm, stop_early=stop_early, intermediates_only=True
        )
        everything = classifier.forward_intermediates(images(), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in everything] == [(channels, side, side) for channels, side in MAPS]
    taken = (
        range(4) if indices is None else range(4 - indices, 4) if isinstance(indices, int) else {i % 4 for i in indices}
    )
    expected = [everything[i] for i in sorted(taken)]
    final = expected[-1] if stop_early and max(taken) < 3 else classifier.norm(everything[-1])
    if norm and 3 in taken:
        expected[-1] = classifier.norm(everything[-1])
    assert torch.equal(x, final)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, only, expected))
    assert len(found) == len(only) == len(expected)


def test_the_first_result_of_forward_intermediates_is_that_of_forward_features(classifier: fat.FAT) -> None:
    with torch.no_grad():
        x, _ = classifier.forward_intermediates(images())
        assert torch.allclose(x, classifier.forward_features(images()), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": [4]}, r"indices: expected numbers of stages from 0 to 3 .*, got \[4\]"),
        ({"indices": []}, "indices: expected"),
        ({"indices": 0}, "indices: expected"),
        ({"output_fmt": "NLC"}, "output_fmt: expected 'NCHW', got 'NLC'"),
    ],
    ids=str,
)
def test_invalid_arguments_of_forward_intermediates_are_named(
    classifier: fat.FAT, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        classifier.forward_intermediates(images(), **options)


@pytest.mark.parametrize("indices", [[0], [0, 2], 1], ids=str)
def test_a_pruned_model_computes_the_same_feature_maps_with_every_parameter(indices: Any) -> None:
    model = fat.FAT(TINY).train()
    expected = model.forward_intermediates(images(), indices, intermediates_only=True)
    kept = model.prune_intermediate_layers(indices, prune_norm=True)
    found = model.forward_intermediates(images(), kept, intermediates_only=True)
    assert all(map(torch.equal, found, expected))
    model(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model(images()).shape[1] == model.num_features == TINY.widths[kept[-1]]


def test_the_classifier_is_that_of_get_classifier_and_default_cfg(classifier: fat.FAT) -> None:
    assert classifier.get_classifier() is classifier.get_submodule(classifier.default_cfg["classifier"])
    first = classifier.get_submodule(classifier.default_cfg["first_conv"])
    assert first.in_channels == classifier.default_cfg["input_size"][0] == 3
    assert classifier.feature_info.channels() == [channels for channels, _ in MAPS]
    assert "classifier" not in fat.create_model(TINY, features_only=True).pretrained_cfg
