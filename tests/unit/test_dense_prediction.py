"""Libraries for segmentation and detection train on FAT's feature maps: segmentation_models_pytorch and torchvision."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fat
from tests.support.tiny_fat import images
from tests.support.vision_libraries import vision_libraries  # noqa: F401

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the weights file of a classifier."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    fat.save_weights(fat.create_model("fat_b0", num_classes=5), path)
    return path


@pytest.fixture
def smp(vision_libraries: None) -> Any:  # noqa: F811
    import segmentation_models_pytorch

    fat.register_with_timm()
    return segmentation_models_pytorch


@pytest.fixture
def detection(vision_libraries: None) -> dict[str, Any]:  # noqa: F811
    return runpy.run_path(str(EXAMPLES / "detection.py"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # its empty map of stride 2
@pytest.mark.parametrize("architecture", ["Unet", "FPN"])
def test_a_segmentation_model_of_timms_encoder_trains(smp: Any, weights: Path, architecture: str) -> None:
    model = getattr(smp, architecture)("tu-fat_b0", encoder_weights=None, classes=3)
    notes = fat.load_weights(model.encoder.model, weights)
    assert not notes
    before = model.encoder.model.stem.proj.weight.clone()
    assert torch.equal(before, fat.load_model(weights).stem.proj.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(images(2, (64, 96)))
    assert logits.shape == (2, 3, 64, 96)
    F.cross_entropy(logits, torch.randint(3, (2, 64, 96))).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.encoder.model.stem.proj.weight, before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_unet_predicts_every_pixel_of_images_of_odd_size(smp: Any) -> None:
    model = smp.Unet("tu-fat_b0", encoder_weights=None, classes=3).eval()
    with torch.no_grad():
        assert model(images(1, (97, 65))).shape == (1, 3, 97, 65)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_other_segmentation_models_require_multiples_of_32(smp: Any) -> None:
    """The documentation says so; if this fails, the library has changed."""
    model = smp.FPN("tu-fat_b0", encoder_weights=None, classes=3).eval()
    with pytest.raises(RuntimeError, match="Expected image height and width divisible by 32"):
        model(images(1, (97, 65)))


def test_retinanet_trains_and_detects(detection: dict[str, Any], weights: Path) -> None:
    model = detection["build"](weights=weights, size=64).train()
    pictures, objects = detection["draw"](2, 64, torch.Generator().manual_seed(0))
    statistics = {name: t.clone() for name, t in model.named_buffers() if "running" in name}
    losses = model(pictures, objects)
    assert losses.keys() == {"classification", "bbox_regression"}
    sum(losses.values()).backward()
    backbone = model.backbone.backbone
    assert backbone.feature_info.out_indices == (1, 2, 3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
    assert all(torch.equal(t, statistics[name]) for name, t in model.named_buffers() if name in statistics)
    with torch.no_grad():
        (found,) = model.eval()([torch.rand(3, 97, 65)])
    assert found["boxes"].shape == (len(found["labels"]), 4)
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= torch.tensor([65, 97, 65, 97])).all()


@pytest.mark.slow
def test_the_detection_example_learns(detection: dict[str, Any]) -> None:
    _, recall = detection["train"](steps=100)
    assert recall > 0.5  # an untrained detector finds none


@pytest.mark.parametrize("out_indices", [None, (0, 1), (1, 2, 3)], ids=str)
def test_feature_maps_of_a_classifiers_file_equal_those_of_the_classifier(weights: Path, out_indices: Any) -> None:
    classifier = fat.load_model(weights)
    backbone = fat.create_model("fat_b0", features_only=True, out_indices=out_indices, weights=weights).eval()
    with torch.no_grad():
        expected = classifier.forward_intermediates(images(), out_indices, intermediates_only=True)
        assert all(map(torch.equal, backbone(images()), expected))


def test_a_feature_extractor_still_rejects_unknown_and_missing_tensors(tmp_path: Path) -> None:
    state = fat.create_model("fat_b0").state_dict()
    del state["stages.1.blocks.1.cpe.bias"]
    torch.save({**state, "stages.1.blocks.1.mask": torch.zeros(1)}, tmp_path / "w.pth")
    expected = "not this model's weights; missing: stages.1.blocks.1.cpe.bias; unknown: stages.1.blocks.1.mask"
    with pytest.raises(ValueError, match=re.escape(expected)):
        fat.create_model("fat_b0", features_only=True, out_indices=(0, 1), weights=tmp_path / "w.pth")


def test_nms_in_python_keeps_the_best_of_overlapping_boxes(vision_libraries: None) -> None:  # noqa: F811
    """tests/support/torchvision_nms.py, where it is used, else torchvision's own."""
    from torchvision.ops import batched_nms, nms

    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 11], [0, 5, 10, 15], [30, 30, 40, 40.0]])
    scores = torch.tensor([0.5, 0.9, 0.7, 0.6])
    assert nms(boxes, scores, 0.5).tolist() == [1, 2, 3]
    assert nms(boxes, scores, 0.1).tolist() == [1, 3]
    assert batched_nms(boxes, scores, torch.tensor([0, 1, 0, 0]), 0.1).tolist() == [1, 2, 3]
