"""The model's interface: image sizes, feature maps, memory format, timm's methods, and errors for invalid arguments."""

from __future__ import annotations

import pytest
import torch

import fat
from tests.support.tiny_fat import TINY, images

SIZES = [(33, 33), (97, 65), (200, 264), (224, 224), (384, 384)]


def check_size(name: str, size: tuple[int, int]) -> None:
    model = fat.create_model(name, num_classes=5).train()
    logits = model(images(2, size))
    logits.sum().backward()
    assert logits.shape == (2, 5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        logits = model.eval()(images(1, size))
    assert logits.shape == (1, 5)
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_trains_and_evaluates(size: tuple[int, int]) -> None:
    check_size("fat_b0", size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fat_b1", "fat_b2", "fat_b3"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_trains_and_evaluates_in_every_variant(name: str, size: tuple[int, int]) -> None:
    check_size(name, size)


@pytest.mark.parametrize("size", [(31, 224), (224, 31), (8, 8)], ids=str)
def test_images_smaller_than_the_last_stride_are_rejected(size: tuple[int, int]) -> None:
    expected = rf"images of {size[0]}x{size[1]} pixels; FAT expects at least 32 pixels per side"
    with pytest.raises(ValueError, match=expected):
        fat.FAT(TINY)(images(1, size))


@pytest.mark.parametrize("size", [(64, 64), (97, 65), (33, 33)], ids=str)
def test_features_have_the_channels_and_strides_of_feature_info(size: tuple[int, int]) -> None:
    model = fat.create_model(TINY, features_only=True)
    features = model(images(2, size))
    info = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    expected = [(2, c, -(-size[0] // r), -(-size[1] // r)) for c, r in info]
    assert [tuple(feature.shape) for feature in features] == expected


def test_the_last_feature_map_is_the_input_of_the_classifiers_norm() -> None:
    classifier = fat.FAT(TINY).eval()
    backbone = fat.create_model(TINY, features_only=True).eval()
    backbone.load_state_dict(classifier.state_dict(), strict=False)
    with torch.no_grad():
        last = backbone(images())[-1]
        assert torch.equal(classifier.forward_head(classifier.norm(last)), classifier(images()))


@pytest.mark.parametrize("out_indices", [None, (0,), (1, 2), (0, 3)], ids=str)
def test_every_parameter_of_a_feature_extractor_is_used(out_indices: tuple[int, ...] | None) -> None:
    """Otherwise, DistributedDataParallel would report unused parameters."""
    model = fat.create_model(TINY, features_only=True, out_indices=out_indices).train()
    sum(m.sum() for m in model(images())).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_forward_features_and_forward_head_compose_to_forward() -> None:
    model = fat.FAT(TINY).eval()
    with torch.no_grad():
        x = model.forward_features(images())
        assert torch.equal(model.forward_head(x), model(images()))
        assert model.forward_head(x, pre_logits=True).shape == (2, model.num_features)


def test_reset_classifier_changes_only_the_classifier() -> None:
    model = fat.FAT(TINY).double().eval()
    body = {name: t.clone() for name, t in model.state_dict().items() if not name.startswith("head.")}
    model.reset_classifier(7)
    assert model(images().double()).shape == (2, 7)
    assert model.config.num_classes == model.num_classes == 7
    assert all(torch.equal(model.state_dict()[name], t) for name, t in body.items())
    model.reset_classifier(0)
    assert model(images().double()).shape == (2, model.num_features)


def test_no_weight_decay_contains_exactly_norms_and_biases() -> None:
    model = fat.FAT(TINY)
    not_decayed = model.no_weight_decay()
    assert {name for name, p in model.named_parameters() if p.ndim == 1} == not_decayed
    assert "stages.0.blocks.0.cpe.weight" not in not_decayed  # depthwise weights are decayed
    assert {"head.bias", "norm.weight", "stem.convs.0.bn.weight"} <= not_decayed


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_module_returns_channels_last_memory(autocast: bool, training: bool) -> None:
    """Weights and images are in PyTorch's default memory format, NCHW."""
    model = fat.FAT(TINY).train(training)
    failing = []

    def check(name: str, output: torch.Tensor) -> None:
        if output.ndim == 4 and not output.is_contiguous(memory_format=torch.channels_last):
            failing.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: check(name, output))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(images())
    assert not failing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_output_has_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    assert fat.FAT(TINY).to(dtype)(images().to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (16, 32, 48)}, "widths: expected 4 positive integers"),
        ({"heads": (3, 4, 6, 8)}, "heads: a width of 16 is not divisible by 3 heads"),
        ({"widths": (15, 32, 48, 64), "heads": (1, 4, 6, 8)}, "widths: expected an even first width .*, got 15"),
        ({"kernels": (3, 4, 7, 9)}, "kernels: expected odd sizes, got 4"),
        ({"windows": (8, 3, 2, 1)}, "windows: expected powers of two, got 3"),
        ({"drop_path": 1.0}, r"drop_path: expected a probability in \[0, 1\), got 1.0"),
        ({"num_classes": -1}, "num_classes: expected integers from 0 to 10,000,000, got -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_dimensions_are_rejected(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fat.create_model(TINY, **change)


def test_the_error_for_an_unknown_name_lists_the_models() -> None:
    with pytest.raises(ValueError, match=r"fat_b9: unknown model; expected one of fat_b0, fat_b1, fat_b2, fat_b3"):
        fat.create_model("fat_b9")
