"""What a user of the network relies on: any image size, features, layout, the conventions' switches, clear refusals."""

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
def test_images_under_the_last_stride_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"images of {size[0]}x{size[1]}: at least 32 per side"):
        fat.FAT(TINY)(images(1, size))


@pytest.mark.parametrize("size", [(64, 64), (97, 65), (33, 33)], ids=str)
def test_features_are_four_maps_of_known_channels_and_strides(size: tuple[int, int]) -> None:
    model = fat.create_model(TINY, features_only=True)
    maps = model(images(2, size))
    info = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    expected = [(2, c, -(-size[0] // r), -(-size[1] // r)) for c, r in info]
    assert [tuple(m.shape) for m in maps] == expected


def test_features_are_the_classifiers_own() -> None:
    classifier = fat.FAT(TINY).eval()
    backbone = fat.create_model(TINY, features_only=True).eval()
    backbone.load_state_dict(classifier.state_dict(), strict=False)
    with torch.no_grad():
        last = backbone(images())[-1]
        assert torch.equal(classifier.forward_head(classifier.norm(last)), classifier(images()))


def test_every_parameter_of_a_feature_extractor_is_used() -> None:
    model = fat.create_model(TINY, features_only=True).train()
    sum(m.sum() for m in model(images())).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_parts_make_the_whole() -> None:
    model = fat.FAT(TINY).eval()
    with torch.no_grad():
        x = model.forward_features(images())
        assert torch.equal(model.forward_head(x), model(images()))
        assert model.forward_head(x, pre_logits=True).shape == (2, model.num_features)


def test_reset_classifier_changes_nothing_else() -> None:
    model = fat.FAT(TINY).double().eval()
    body = {name: t.clone() for name, t in model.state_dict().items() if not name.startswith("head.")}
    model.reset_classifier(7)
    assert model(images().double()).shape == (2, 7)
    assert model.config.num_classes == model.num_classes == 7
    assert all(torch.equal(model.state_dict()[name], t) for name, t in body.items())
    model.reset_classifier(0)
    assert model(images().double()).shape == (2, model.num_features)


def test_weight_decay_spares_exactly_norms_and_biases() -> None:
    model = fat.FAT(TINY)
    spared = model.no_weight_decay()
    assert {name for name, p in model.named_parameters() if p.ndim == 1} == spared
    assert "stages.0.blocks.0.cpe.weight" not in spared  # depthwise weights are decayed
    assert {"head.bias", "norm.weight", "stem.convs.0.bn.weight"} <= spared


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_channels_last_is_kept_at_every_module(autocast: bool, training: bool) -> None:
    """With weights and images as torch makes them, in NCHW."""
    model = fat.FAT(TINY).train(training)
    broken = []

    def look(name: str, output: torch.Tensor) -> None:
        if output.ndim == 4 and not output.is_contiguous(memory_format=torch.channels_last):
            broken.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(images())
    assert not broken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_in_one_dtype_computes_in_it(dtype: torch.dtype) -> None:
    assert fat.FAT(TINY).to(dtype)(images().to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (16, 32, 48)}, "widths: 4 positive integers"),
        ({"heads": (3, 4, 6, 8)}, "3 heads do not divide a width of 16"),
        ({"widths": (15, 32, 48, 64), "heads": (1, 4, 6, 8)}, "the first must be even"),
        ({"kernels": (3, 4, 7, 9)}, "odd sides expected, not 4"),
        ({"windows": (8, 3, 2, 1)}, "powers of two expected, not 3"),
        ({"drop_path": 1.0}, r"a probability in \[0, 1\) expected"),
        ({"num_classes": -1}, "num_classes: integers from 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_dimensions_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fat.create_model(TINY, **change)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"fat_b9: no such model; there are fat_b0, fat_b1, fat_b2, fat_b3"):
        fat.create_model("fat_b9")
