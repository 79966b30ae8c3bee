"""Files of weights: ours and the released layout, read strictly and without executing anything."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fat
from fat.layout import to_released
from tests.unit.test_fat_parity import TINY


@pytest.fixture
def model() -> fat.FAT:
    """A model whose every tensor differs from those of a fresh one."""
    model = fat.FAT(TINY)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape).mul(3).abs().add(1))
    return model.eval()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Settings(dict[str, Any]):
    """As yacs' CfgNode: a dict subclass with attributes, of a module that the reader does not have."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)
        self.__dict__["immutable"] = True


class Trap:
    """Unpickled by `pickle`, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_describes_itself(model: fat.FAT, tmp_path: Path) -> None:
    fat.save_weights(model, tmp_path / "w.safetensors")
    loaded = fat.load_model(tmp_path / "w.safetensors")
    assert loaded.config == TINY
    assert same(loaded, model)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert '"widths": [16, 32, 48, 64]' in file.metadata()["fat_config"]


def test_an_average_is_saved_in_place_of_the_weights(model: fat.FAT, tmp_path: Path) -> None:
    average = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    fat.save_weights(model.to(memory_format=torch.channels_last), tmp_path / "w.safetensors", state=average)
    assert all(t.count_nonzero() == 0 for t in fat.load_model(tmp_path / "w.safetensors").state_dict().values())


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "as the training script saves"])
def test_released_checkpoints_load(model: fat.FAT, tmp_path: Path, wrapped: bool) -> None:
    state = to_released(model.state_dict(), TINY)
    assert "layers.0.blocks.0.attn.local_mixer.weight" in state
    settings = Settings(MODEL=Settings(NAME="FAT", DEPTHS=[1, 2, 2, 1]), OUTPUT=Path("out"), RATES=(0.1, None, True))
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"model": state, "optimizer": optimizer, "config": settings} if wrapped else state, tmp_path / "w.pth")
    assert same(fat.create_model(TINY, weights=tmp_path / "w.pth"), model)


def test_released_safetensors_load(model: fat.FAT, tmp_path: Path) -> None:
    save_file(to_released(model.state_dict(), TINY), tmp_path / "w.safetensors")
    assert same(fat.create_model(TINY, weights=tmp_path / "w.safetensors"), model)


def test_views_and_parameters_in_a_pickle_are_read(model: fat.FAT, tmp_path: Path) -> None:
    state: dict[str, Any] = dict(model.state_dict())
    state["head.weight"] = torch.nn.Parameter(torch.stack([model.head.weight, model.head.weight]).detach()[1])
    state["stem.proj.weight"] = model.stem.proj.weight.detach().to(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "w.pth")
    assert same(fat.create_model(TINY, weights=tmp_path / "w.pth"), model)


def test_a_pickle_is_not_executed(model: fat.FAT, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"model": model.state_dict(), "config": Trap(sprung)}, tmp_path / "w.pth")
    assert same(fat.create_model(TINY, weights=tmp_path / "w.pth"), model)
    assert not sprung.exists()

    torch.load(tmp_path / "w.pth", weights_only=False)
    assert sprung.exists()  # the trap is a real one


def test_a_trap_among_the_weights_is_not_executed_either(model: fat.FAT, tmp_path: Path) -> None:
    state: dict[str, Any] = {**model.state_dict(), "head.bias": Trap(tmp_path / "sprung")}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing: head\.bias"):
        fat.create_model(TINY, weights=tmp_path / "w.pth")
    assert not (tmp_path / "sprung").exists()


def test_another_number_of_classes_is_refused_or_replaced_when_asked(model: fat.FAT, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    fat.save_weights(model, path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: weights of 10 classes, and the model has 7")):
        fat.create_model(TINY, num_classes=7, weights=path)
    torch.manual_seed(0)
    replaced = fat.create_model(TINY, num_classes=7, weights=path, replace_head=True)
    torch.manual_seed(0)
    fresh = fat.create_model(TINY, num_classes=7)
    assert torch.equal(replaced.head.weight, fresh.head.weight)
    assert torch.equal(replaced.norm.weight, model.norm.weight)


def test_a_head_of_the_right_size_is_loaded_even_if_it_might_be_replaced(model: fat.FAT, tmp_path: Path) -> None:
    fat.save_weights(model, tmp_path / "w.safetensors")
    assert same(fat.create_model(TINY, weights=tmp_path / "w.safetensors", replace_head=True), model)


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"features_only": True}], ids=str)
def test_a_backbone_takes_a_classifiers_file(model: fat.FAT, tmp_path: Path, options: dict[str, Any]) -> None:
    fat.save_weights(model, tmp_path / "w.safetensors")
    backbone = fat.create_model(TINY, weights=tmp_path / "w.safetensors", **options)
    assert torch.equal(backbone.stages[3].blocks[0].cpe.weight, model.stages[3].blocks[0].cpe.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": None}, "missing: norm.bias"),
        ({"mask_token": torch.zeros(1)}, "unknown: mask_token"),
        ({"stem.proj.bias": torch.zeros(5)}, "of another shape: stem.proj.bias is [5], expected [16]"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_what_does_not_fit_is_named(
    model: fat.FAT, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    state = {name: t for name, t in {**model.state_dict(), **change}.items() if t is not None}
    save_file(state, tmp_path / "w.safetensors")
    expected = re.escape(f"{tmp_path / 'w.safetensors'}: not this model's weights; {message}")
    with pytest.raises(ValueError, match=expected):
        fat.create_model(TINY, weights=tmp_path / "w.safetensors")


def test_another_variants_file_is_refused_in_one_line(model: fat.FAT, tmp_path: Path) -> None:
    fat.save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more; of another shape: .* and \d+ more$") as refusal:
        fat.create_model("fat_b0", num_classes=10, weights=tmp_path / "w.safetensors")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.pth", b"no zip archive"),
        ("w.pth", b""),
        ("w.safetensors", b"no safetensors at all"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        fat.create_model(TINY, weights=tmp_path / name)


def test_a_damaged_checkpoint_is_refused(model: fat.FAT, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a checkpoint")):
        fat.create_model(TINY, weights=path)


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "model": {"lr": 0.1}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no weights in it"):
        fat.create_model(TINY, weights=tmp_path / "w.pth")


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    for name in ("w.pth", "w.safetensors"):
        with pytest.raises(FileNotFoundError):
            fat.create_model(TINY, weights=tmp_path / name)


def test_no_model_without_a_config(model: fat.FAT, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no config in it"):
        fat.load_model(tmp_path / "w.pth")
