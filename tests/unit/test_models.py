"""Models by name: FAT, timm and functions; their cost, their weights and their errors."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import fat
from launch.config.model import ModelConfig
from launch.engine.sync_batchnorm import GlobalBatchNorm, GlobalBatchNormAct, check_batch_norms, convert_sync_batchnorm
from launch.machine.world import World
from launch.models.cost import count
from launch.models.create import check_model, create_model
from launch.models.specification import ModelSpec, spec_in_file
from launch.models.weights import load_model_file, load_weights, restore_model
from launch.optim.fine_tuning import classifier_of
from shards.errors import UserError
from tests.support import models
from tests.support.tiny_fat import TINY
from tests.support.vision_libraries import vision_libraries  # noqa: F401 - a fixture

HERE = "tests.support.models"


def spec(name: str) -> ModelSpec:
    return ModelSpec.parse(name)


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("fat_b3", "fat", "fat_b3"),
        ("timm/resnet50.a1_in1k", "timm", "resnet50.a1_in1k"),
        ("nets:tiny", "function", "nets:tiny"),
        ("my.nets_2:_tiny", "function", "my.nets_2:_tiny"),
    ],
)
def test_names_of_models(text: str, kind: str, name: str) -> None:
    assert spec(text) == ModelSpec(kind, name)
    assert str(spec(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "b0", "fat_b9", "resnet50", "timm/", "timm/hf-hub:a/b", "timm/local-dir:/x", "timm/../x", "hf-hub:a/b",
     "a:b:c", "a.:b", ".a:b", "a:b.c", "a b:c", "a\nb:c", "../a:b", "os:system('x')", "é:b", "timm/" + "a" * 300],
)  # fmt: skip
def test_other_names_are_refused_before_anything_is_imported(text: str) -> None:
    with pytest.raises(UserError, match=r"expected fat_b0 to fat_b3, timm/NAME or package\.module:function") as refused:
        ModelConfig(model=text)
    assert "\n" not in str(refused.value)


def test_variant_is_short_for_the_model_of_this_name() -> None:
    assert ModelConfig().spec == ModelConfig(variant="b0").spec == ModelConfig(model="fat_b0").spec
    assert ModelConfig(variant="b2", model="fat_b2").spec == spec("fat_b2")
    with pytest.raises(UserError, match="--variant b2 and --model timm/resnet18 are different models"):
        ModelConfig(variant="b2", model="timm/resnet18")


def test_function_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    Path("my_nets.py").write_text("from torch import nn\ndef tiny(num_classes): return nn.Linear(1, num_classes)\n")
    assert create_model(spec("my_nets:tiny"), num_classes=7).out_features == 7


ERRORS = {
    "no_such_nets:tiny": "no_such_nets cannot be imported (ModuleNotFoundError: No module named 'no_such_nets')",
    f"{HERE}:smal": "models.py has no function smal; did you mean small?",
    f"{HERE}:HERE": "has no function HERE",
    f"{HERE}:fails": "cannot be created with num_classes=10 (OSError: no such layer)",
    f"{HERE}:no_module": "returned a Random; expected a torch.nn.Module",
    f"{HERE}:tuple_of_logits": "its output is a tuple; expected a float tensor of shape [2, 10]",
    f"{HERE}:too_many_outputs": "its output is a float32 tensor of shape [2, 11]; expected",
    f"{HERE}:feature_map": "its output is a float32 tensor of shape [2, 10, 62, 62]; expected",
    f"{HERE}:idle_parameter": "the loss does not depend on 1 parameters (idle)",
    f"{HERE}:for_one_size": "fails for images [2, 3, 64, 64]",
    f"{HERE}:tied_layers": "1.weight and 2.weight are the same parameter; expected different ones",
    f"{HERE}:half_precision": "the parameter 0.weight is bfloat16; expected float32",
    f"{HERE}:without_parameters": "has no parameters to train",
}


@pytest.mark.parametrize("name", ERRORS)
def test_models_that_cannot_be_trained_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError) as refused:
        check_model(create_model(spec(name), num_classes=10), spec(name), size=64, num_classes=10)
    assert ERRORS[name] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_drop_path_is_passed_on() -> None:
    assert create_model(spec(f"{HERE}:small"), num_classes=2, drop_path=0.25)[5].p == 0.25
    assert create_model(spec("fat_b0"), num_classes=2, drop_path=0.25).config.drop_path == 0.25
    with pytest.raises(UserError, match=r"cannot be created with num_classes=2, drop_path_rate=0.25.*omit --drop-path"):
        create_model(spec(f"{HERE}:without_drop_path"), num_classes=2, drop_path=0.25)
    create_model(spec(f"{HERE}:without_drop_path"), num_classes=2, drop_path=0.0)  # it has none


@pytest.mark.parametrize("name", ["small", "needs_values"])
def test_check_changes_neither_the_model_nor_the_generator(name: str) -> None:
    model = create_model(spec(f"{HERE}:{name}"), num_classes=10)
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    check_model(model, spec(f"{HERE}:{name}"), size=64, num_classes=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# -- cost ------------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """Hides that a model is a FAT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def test_count_equals_that_of_fat_for_the_same_network() -> None:
    model = fat.FAT(TINY)
    found, expected = count(Wrapped(model), 64), fat.count(model, 64)
    assert (found.conv_macs, found.attention_macs) == (expected.conv_macs, expected.attention_macs)
    assert (found.parameters, found.activation_bytes) == (expected.parameters, expected.activation_bytes)
    assert found.training_flops == expected.training_flops


@pytest.mark.parametrize("name", ["small", "needs_values"])  # on the meta device, and on the CPU
def test_count_of_a_small_network_is_exact(name: str) -> None:
    cost = count(create_model(spec(f"{HERE}:{name}"), num_classes=10), 66)
    assert cost.macs == 8 * 16 * 16 * 27 + 8 * 10
    assert cost.parameters == 8 * 27 + 16 + 90
    assert cost.product_elements == 3 * 66 * 66 + 8 * 16 * 16 + 8 + 10


@pytest.mark.usefixtures("vision_libraries")
def test_operations_of_resnet18_are_those_of_its_paper() -> None:
    """1.8 billion multiply-adds, Table 1 of arXiv 1512.03385; 1,814,073,344 exactly, with the 1x1 shortcuts."""
    cost = count(create_model(spec("timm/resnet18"), num_classes=1000), 224)
    assert cost.macs == 1_814_073_344
    assert cost.training_flops == 6 * cost.macs
    assert cost.parameters == 11_689_512


@pytest.mark.usefixtures("vision_libraries")
def test_attention_products_of_a_vision_transformer_are_counted() -> None:
    cost = count(create_model(spec("timm/vit_tiny_patch16_224"), num_classes=10), 224)
    tokens, width, depth = 197, 192, 12
    assert cost.attention_macs == depth * 2 * tokens * tokens * width


# -- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("vision_libraries")
def test_models_of_timm_are_created_without_pretrained_weights() -> None:
    torch.manual_seed(0)
    model = create_model(spec("timm/test_resnet.r160_in1k"), num_classes=3, drop_path=0.1)
    torch.manual_seed(1)
    other = create_model(spec("timm/test_resnet"), num_classes=3)
    assert model.training
    assert model.num_classes == 3
    assert not torch.equal(next(model.parameters()), next(other.parameters()))  # hence random


@pytest.mark.usefixtures("vision_libraries")
def test_unknown_models_of_timm_are_refused() -> None:
    with pytest.raises(UserError, match="has no model of this name; did you mean resnet18"):
        create_model(spec("timm/resnet8"), num_classes=3)
    with pytest.raises(UserError, match=r"drop_path_rate.*omit --drop-path"):
        create_model(spec("timm/vgg11"), num_classes=3, drop_path=0.1)


def test_missing_timm_is_an_error_that_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm cannot be imported .*; run pip install 'fat-pipeline\[timm\]'"):
        create_model(spec("timm/resnet18"), num_classes=3)


# -- names in weights files ------------------------------------------------------------------------------------------


def test_a_file_cannot_choose_a_function_to_import() -> None:
    program = (
        "import sys; from launch.models.specification import spec_in_file\n"
        "try: spec_in_file('antigravity:fly', None)\n"
        "except Exception as error: assert 'add --model antigravity:fly' in str(error), error\n"
        "else: raise AssertionError\n"
        "assert 'antigravity' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_file_may_name_models_without_foreign_code_and_the_one_that_the_user_named() -> None:
    assert spec_in_file("timm/resnet18", None) == spec("timm/resnet18")
    assert spec_in_file("nets:tiny", spec("nets:tiny")) == spec("nets:tiny")
    with pytest.raises(UserError, match="names the model timm/resnet18, not nets:tiny"):
        spec_in_file("timm/resnet18", spec("nets:tiny"))
    for name in ("timm/hf-hub:a/b", "os.system", "a\nb:c"):
        with pytest.raises(UserError, match="its header names the model") as refused:
            spec_in_file(name, None)
        assert "\n" not in str(refused.value)


# -- weights ---------------------------------------------------------------------------------------------------------

CLASSES = fat.ClassList.of(["ant", "bee", "cat"])


def saved(path: Path, model: nn.Module, classes: fat.ClassList | None = CLASSES) -> Path:
    fat.save_weights(model, path, info=fat.WeightsInfo(classes=classes))
    return path


@pytest.mark.parametrize(
    ("folders", "rows"),
    [
        (["ant", "bee", "cat"], [0, 1, 2]),
        (["cat", "ant", "bee"], [2, 0, 1]),
        (["ant", "bee", "dog"], None),
        (["ant"], None),
    ],
)
def test_the_classifier_is_kept_reordered_or_replaced_by_class_names(
    tmp_path: Path, folders: list[str], rows: list[int] | None
) -> None:
    before = models.with_classifier(3)
    path, model = saved(tmp_path / "w.safetensors", before), models.with_classifier(len(folders))
    new = model.fc.weight.detach().clone()
    (*_, note) = load_weights(model, path, classes=fat.ClassList.of(folders))
    assert torch.equal(model.body[0].weight, before.body[0].weight)
    assert torch.equal(model.fc.weight, new if rows is None else before.fc.weight[rows])
    assert note.startswith("classifier: newly initialized" if rows is None else "classifier: kept")


def test_the_last_layer_of_a_classifier_with_a_usual_name_is_replaced(tmp_path: Path) -> None:
    """The option --freeze-backbone finds the same classifier."""
    before, model = models.like_torchvision(3), models.like_torchvision(2)
    new = model.classifier[2].weight.clone()
    path = saved(tmp_path / "w.safetensors", before)
    (note,) = load_weights(model, path, classes=fat.ClassList.of(["x", "y"]))
    assert note.startswith("classifier: newly initialized")
    assert torch.equal(model.classifier[2].weight, new)
    assert torch.equal(model.classifier[0].weight, before.classifier[0].weight)
    assert classifier_of(model) is model.classifier
    name = f"{HERE}:like_torchvision"
    assert restore_model(spec(name), path, load_file(path), outputs=2).classifier[2].out_features == 3


def test_a_model_whose_classifier_is_unknown_keeps_it_or_is_refused(tmp_path: Path) -> None:
    before, model = models.small(3), models.small(3)
    path = saved(tmp_path / "w.safetensors", before)
    load_weights(model, path, classes=CLASSES)
    assert torch.equal(model[6].weight, before[6].weight)
    with pytest.raises(ValueError, match=r"has other classes .*get_classifier\(\)"):
        load_weights(models.small(3), path, classes=fat.ClassList.of(["ant", "bee", "dog"]))
    with pytest.raises(ValueError, match=r"wrong shape: 6.weight has \[3, 8\], expected \[2, 8\]"):
        load_weights(models.small(2), saved(path, before, None), classes=fat.ClassList.of(["x", "y"]))


@pytest.mark.usefixtures("vision_libraries")
def test_the_classifier_of_a_model_of_timm_is_replaced(tmp_path: Path) -> None:
    import timm

    before = timm.create_model("test_resnet", num_classes=3)
    path = saved(tmp_path / "w.safetensors", before)
    model = timm.create_model("test_resnet", num_classes=5)
    (note,) = load_weights(model, path, classes=fat.ClassList.of(list("abcde")))
    assert "newly initialized" in note
    kept, loaded = (dict(m.named_parameters()) for m in (before, model))
    assert all(torch.equal(loaded[name], kept[name]) for name in kept if not name.startswith("fc."))


@pytest.mark.usefixtures("vision_libraries")
def test_a_file_of_another_program_is_used_with_the_preprocessing_of_timm(tmp_path: Path) -> None:
    import timm

    network = timm.create_model("test_vit", num_classes=3)
    torch.save(network.state_dict(), path := tmp_path / "downloaded.pth")
    _, info, notes = load_model_file(path, spec("timm/test_vit"))
    assert (info.model, info.size) == ("timm/test_vit", network.default_cfg["input_size"][-1])
    assert (info.mean, info.std, info.crop_pct) == (
        network.default_cfg["mean"], network.default_cfg["std"], network.default_cfg["crop_pct"],
    )  # fmt: skip
    assert "does not record its preprocessing completely; timm's of timm/test_vit is used: " in notes[0]
    facts = {"size": 64, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "crop_pct": 0.5}
    fat.save_weights(
        network, path := tmp_path / "own.safetensors", info=fat.WeightsInfo(model="timm/test_vit", **facts)
    )
    _, info, notes = load_model_file(path)
    assert {name: getattr(info, name) for name in facts} == facts
    assert notes == []


def test_a_model_is_restored_with_as_many_outputs_as_its_classifier_has(tmp_path: Path) -> None:
    name, before = f"{HERE}:with_classifier", models.with_classifier(5)
    path = saved(tmp_path / "w.safetensors", before)  # 5 outputs for 3 classes, as with --classes 5
    model = restore_model(spec(name), path, load_file(path), outputs=3)
    assert not model.training
    assert torch.equal(model.fc.weight, before.fc.weight)
    with pytest.raises(ValueError, match="not this model's weights"):
        restore_model(spec(f"{HERE}:small"), path, load_file(path), outputs=10**6)


# -- BatchNorm over ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.BatchNorm1d(4), (6, 4)), (nn.BatchNorm1d(4), (2, 4, 5)), (nn.BatchNorm3d(4), (2, 4, 3, 2, 2))],
)
def test_batchnorm_of_other_dimensions_is_synchronized(norm: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    same_with_global_statistics(norm, x)


@pytest.mark.usefixtures("vision_libraries")
def test_timms_batchnorm_with_activation_is_synchronized() -> None:
    from timm.layers import BatchNormAct2d

    x = torch.randn((2, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    assert type(same_with_global_statistics(BatchNormAct2d(4), x)) is GlobalBatchNormAct


def same_with_global_statistics(norm: nn.Module, x: torch.Tensor) -> GlobalBatchNorm:
    """Check that a norm, converted for a group of one rank, computes the same with the same names; return it."""
    nn.init.normal_(norm.weight)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        twin = copy.deepcopy(norm)
        world = World(0, 2, 0, 1, torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("launch.engine.sync_batchnorm.dist.new_group", lambda ranks: dist.group.WORLD)
            converted = convert_sync_batchnorm(nn.Sequential(twin), "group:1", world)[0]
        assert isinstance(converted, GlobalBatchNorm)
        for training in (True, False):
            found, expected = (m.train(training)(x.clone()) for m in (converted, norm))
            torch.testing.assert_close(found, expected)
        found, expected = (gradients(m.train(), x) for m in (converted, norm))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(converted.state_dict(), norm.state_dict())
        return converted
    finally:
        dist.destroy_process_group()


def gradients(norm: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    weights = torch.linspace(-1, 1, x.numel()).view_as(x)
    return list(torch.autograd.grad((norm(x) * weights).sum(), [x, norm.weight, norm.bias]))


class OwnNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("norm", [OwnNorm(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, momentum=None)])
def test_batchnorm_that_cannot_be_synchronized_is_refused(norm: nn.Module) -> None:
    world = World(0, 2, 0, 2, torch.device("cpu"))
    with pytest.raises(UserError, match=r"--sync-bn on: the statistics of 0 .*use --sync-bn off"):
        check_batch_norms(nn.Sequential(norm), "on", world)
    check_batch_norms(nn.Sequential(norm), "off", world)
