"""Weights files of this project and of the released code: loaded strictly, without executing anything."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fat
from fat.config import LIMITS
from fat.weights.released_names import to_released
from tests.support.hostile_weights import CHECKPOINTS, SAFETENSORS
from tests.support.measured import run_measured
from tests.support.tiny_fat import TINY


@pytest.fixture
def model() -> fat.FAT:
    """A model in which every tensor differs from its initial value."""
    model = fat.FAT(TINY)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape).mul(3).abs().add(1))
    return model.eval()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Settings(dict[str, Any]):
    """Like yacs' CfgNode: a dict subclass with attributes, from a module that the reader cannot import."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)
        self.__dict__["immutable"] = True


class Trap:
    """An object that creates a folder when `pickle` loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_saved_file_contains_the_config(model: fat.FAT, tmp_path: Path) -> None:
    fat.save_weights(model, tmp_path / "w.safetensors")
    loaded = fat.load_model(tmp_path / "w.safetensors")
    assert loaded.config == TINY
    assert same(loaded, model)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert '"widths": [16, 32, 48, 64]' in file.metadata()["fat_config"]


def test_a_moving_average_can_be_saved_instead_of_the_weights(model: fat.FAT, tmp_path: Path) -> None:
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
    created = tmp_path / "created"
    torch.save({"model": model.state_dict(), "config": Trap(created)}, tmp_path / "w.pth")
    assert same(fat.create_model(TINY, weights=tmp_path / "w.pth"), model)
    assert not created.exists()

    torch.load(tmp_path / "w.pth", weights_only=False)
    assert created.exists()  # torch.load executes the pickle, so the test can fail


def test_a_pickled_object_in_place_of_a_tensor_is_not_executed(model: fat.FAT, tmp_path: Path) -> None:
    state: dict[str, Any] = {**model.state_dict(), "head.bias": Trap(tmp_path / "created")}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing: head\.bias"):
        fat.create_model(TINY, weights=tmp_path / "w.pth")
    assert not (tmp_path / "created").exists()


def test_a_head_of_another_size_is_rejected_unless_replace_head_is_set(model: fat.FAT, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    fat.save_weights(model, path)
    expected = f"{path}: the weights have 10 classes, but the model has 7; create the model with num_classes=10"
    with pytest.raises(ValueError, match=re.escape(expected)):
        fat.create_model(TINY, num_classes=7, weights=path)
    torch.manual_seed(0)
    replaced = fat.create_model(TINY, num_classes=7, weights=path, replace_head=True)
    torch.manual_seed(0)
    fresh = fat.create_model(TINY, num_classes=7)
    assert torch.equal(replaced.head.weight, fresh.head.weight)
    assert torch.equal(replaced.norm.weight, model.norm.weight)


def test_a_head_of_the_right_size_is_loaded_even_with_replace_head(model: fat.FAT, tmp_path: Path) -> None:
    fat.save_weights(model, tmp_path / "w.safetensors")
    assert same(fat.create_model(TINY, weights=tmp_path / "w.safetensors", replace_head=True), model)


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"features_only": True}], ids=str)
def test_a_backbone_loads_a_classifiers_file(model: fat.FAT, tmp_path: Path, options: dict[str, Any]) -> None:
    fat.save_weights(model, tmp_path / "w.safetensors")
    backbone = fat.create_model(TINY, weights=tmp_path / "w.safetensors", **options)
    assert torch.equal(backbone.stages[3].blocks[0].cpe.weight, model.stages[3].blocks[0].cpe.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": None}, "missing: norm.bias"),
        ({"mask_token": torch.zeros(1)}, "unknown: mask_token"),
        ({"stem.proj.bias": torch.zeros(5)}, "wrong shape: stem.proj.bias has [5], expected [16]"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_tensors_that_do_not_fit_the_model_are_named(
    model: fat.FAT, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    state = {name: t for name, t in {**model.state_dict(), **change}.items() if t is not None}
    save_file(state, tmp_path / "w.safetensors")
    expected = re.escape(f"{tmp_path / 'w.safetensors'}: not this model's weights; {message}")
    with pytest.raises(ValueError, match=expected):
        fat.create_model(TINY, weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize("kind", ["with a config", "without metadata", "released names"])
def test_weights_of_another_variant_are_recognized(tmp_path: Path, kind: str) -> None:
    """The message is one line that names the file's variant, instead of hundreds of tensors."""
    other = fat.create_model("fat_b1", num_classes=10)
    path = tmp_path / ("w.safetensors" if kind == "with a config" else "w.pth")
    if kind == "with a config":
        fat.save_weights(other, path)
    else:
        state = other.state_dict()
        torch.save(to_released(state, other.config) if kind == "released names" else state, path)
    expected = (
        f"{path}: not this model's weights, but those of fat_b1 (the model is fat_b0): widths (48, 96, 192, 384) "
        "instead of (32, 80, 160, 256)"
    )
    for options in ({"num_classes": 10}, {"num_classes": 3, "replace_head": True}, {"features_only": True}):
        with pytest.raises(ValueError, match=re.escape(expected)) as error:
            fat.create_model("fat_b0", weights=path, **options)
        assert str(error.value).endswith("; use fat.create_model('fat_b1'), or in training --variant b1")


def test_weights_with_other_dimensions_than_any_variant_are_recognized(model: fat.FAT, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    fat.save_weights(model, path)
    with pytest.raises(ValueError, match=r"a FAT model with other dimensions: depths .*; create the model with"):
        fat.create_model(TINY, depths=(1, 2, 2, 2), weights=path)
    with pytest.raises(ValueError, match="other dimensions: in_chans 3 instead of 1; create"):
        fat.create_model(TINY, in_chans=1, weights=path)
    fat.create_model(TINY, drop_path=0.3, weights=path)  # no tensor depends on it


def test_a_message_about_tensors_names_only_some(model: fat.FAT, tmp_path: Path) -> None:
    state = {name: t[:1] if t.ndim and "head" not in name else t for name, t in model.state_dict().items()}
    torch.save({name: t for name, t in state.items() if "cpe" not in name}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more; wrong shape: .* and \d+ more$") as error:
        fat.create_model(TINY, weights=tmp_path / "w.pth")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.pth", b"no zip archive"),
        ("w.pth", b""),
        ("w.safetensors", b"no safetensors at all"),
    ],
)
def test_an_error_for_a_file_of_another_format_names_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        fat.create_model(TINY, weights=tmp_path / name)


def test_a_corrupt_checkpoint_is_rejected(model: fat.FAT, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a checkpoint")):
        fat.create_model(TINY, weights=path)


def test_a_checkpoint_without_weights_is_rejected(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "model": {"lr": 0.1}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="contains no weights"):
        fat.create_model(TINY, weights=tmp_path / "w.pth")


def test_a_missing_file_raises_file_not_found_error(tmp_path: Path) -> None:
    for name in ("w.pth", "w.safetensors"):
        with pytest.raises(FileNotFoundError):
            fat.create_model(TINY, weights=tmp_path / name)


def test_load_model_requires_a_config_or_a_variant(model: fat.FAT, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="contains no config, and its tensors are not those of fat_b0"):
        fat.load_model(tmp_path / "w.pth")


def test_hostile_files_are_rejected_in_one_line_with_bounded_memory(tmp_path: Path) -> None:
    """Load every malicious file in a process with 120 s of CPU time, and 120 MiB of memory beyond its imports."""
    code = f"""
        import json, pathlib, resource
        import fat
        from tests.support.hostile_weights import CHECKPOINTS, SAFETENSORS
        folder = pathlib.Path({str(tmp_path)!r})
        model = fat.FAT(fat.FATConfig(widths=(8, 8, 16, 16), depths=(1, 1, 1, 1), heads=(1, 2, 2, 4)))
        resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
        found, peak = {{}}, 0
        for suffix, bombs in ((".pth", CHECKPOINTS), (".safetensors", SAFETENSORS)):
            for name, write in bombs.items():
                path = folder / (str(len(found)) + suffix)
                write(path)
                measure()
                try:
                    fat.load_weights(model, path)
                    found[name + suffix] = "loaded"
                except ValueError as error:
                    found[name + suffix] = str(error)
                    assert str(path) in str(error), error
                peak = max(peak, grown())
        print(json.dumps([peak, found]))
    """
    peak, found = json.loads(run_measured(code))
    assert len(found) == len(CHECKPOINTS) + len(SAFETENSORS)
    for name, message in found.items():
        assert message != "loaded", name
        assert "\n" not in message
        assert len(message) < 1000, name
        assert re.search("not a checkpoint|not a readable|not this model|contains no weights", message), (name, message)
    assert peak < 120 * 2**20


def test_memory_is_bounded_by_the_size_of_the_file(tmp_path: Path) -> None:
    """Memory while loading: about twice the file, and the model. Also for 300 tensors that share one storage, and for a
    config whose model is far larger than its file."""
    huge = {**TINY.to_dict(), "widths": [16384] * 4, "heads": [16] * 4, "ffn_ratio": 64}
    code = f"""
        import json, os, torch, fat
        from fat.weights.load import read_weights
        from pathlib import Path
        from tests.support.hostile_weights import Claim, program, write_checkpoint
        found = {{}}
        folder = Path({str(tmp_path)!r})
        model = fat.create_model("fat_b1")
        torch.save(model.state_dict(), folder / "b1.pth")
        fat.save_weights(model, folder / "b1.safetensors")
        del model
        size = os.path.getsize(folder / "b1.pth")
        for name in ("b1.pth", "b1.safetensors"):
            measure()
            fat.create_model("fat_b1", weights=folder / name)
            found[name] = grown() / size
        claim = Claim((10_000_000,), (1,))
        write_checkpoint(
            folder / "w.pth", program({{str(i): claim for i in range(300)}}), [("0", bytes(40_000_000))]
        )
        measure()
        assert len(read_weights(folder / "w.pth").tensors) == 300
        found["one storage"] = grown() / 40_000_000
        measure()
        try:
            fat.load_model({str(with_config(tmp_path / "huge.safetensors", huge))!r})
        except ValueError as error:
            found["message"] = str(error)
        found["config"] = grown() / 20_000_000
        print(json.dumps(found))
    """
    found = json.loads(run_measured(code))
    expected = f"{tmp_path / 'huge.safetensors'}: not this model's weights; wrong shape: stem.convs.0.conv"
    assert found.pop("message").startswith(expected)
    assert max(found.values()) < 4, found


def with_config(path: Path, config: object) -> Path:
    """Write a complete weights file with `config` as the config in its header."""
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(fat.FAT(TINY).state_dict(), path, {"fat_config": text})
    return path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{{{", "is not a config"),
        ('{"a":' * 100_000, "is not a config"),
        ([], "expected a mapping of fields, got []"),
        (None, "expected a mapping of fields, got None"),
        ({**TINY.to_dict(), "evil": 1}, "unknown field 'evil'"),
        ({k: v for k, v in TINY.to_dict().items() if k != "depths"}, "missing field 'depths'"),
        ({**TINY.to_dict(), "drop_path": "x"}, "drop_path: expected a probability"),
        ({**TINY.to_dict(), "drop_path": None}, "drop_path: expected a probability"),
        ({**TINY.to_dict(), "drop_path": float("nan")}, "drop_path: expected a probability"),
        ({**TINY.to_dict(), "drop_path": True}, "drop_path: expected a probability"),
    ],
)
def test_an_invalid_config_is_rejected(tmp_path: Path, config: object, message: str) -> None:
    path = with_config(tmp_path / "w.safetensors", config)
    with pytest.raises(
        ValueError, match=f"{re.escape(str(path))}: fat_config in its header is not a config.*"
    ) as error:
        fat.load_model(path)
    assert message in str(error.value)


@pytest.mark.parametrize("field", LIMITS)
@pytest.mark.parametrize("value", ["x", None, -1, 1.5, True, 10**9, 10**30, {}, [1, 2, 3]], ids=repr)
def test_a_dimension_that_is_not_an_integer_in_range_is_rejected_by_name(field: str, value: object) -> None:
    fields = TINY.to_dict()
    fields[field] = [value] * 4 if isinstance(fields[field], list) else value
    with pytest.raises(ValueError, match=f"^{field}: "):
        fat.FATConfig.from_dict(fields)


def saved(model: fat.FAT, path: Path, change: Any) -> Path:
    """Save the model's config and its floating-point tensors, to which `change` was applied."""
    state = {name: change(t).contiguous() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    save_file(state, path, {"fat_config": json.dumps(TINY.to_dict())})
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensors_with_values_that_are_not_finite_are_named(model: fat.FAT, tmp_path: Path, value: float) -> None:
    with torch.no_grad():
        model.head.weight[3, 2] = value
    fat.save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: head\.weight contains NaN or infinite values"):
        fat.load_model(tmp_path / "w.safetensors")


def test_float64_is_converted_to_float32_with_a_warning_if_digits_are_lost(model: fat.FAT, tmp_path: Path) -> None:
    path = saved(model, tmp_path / "w.safetensors", torch.Tensor.double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(fat.load_model(path), model)
    path = saved(model, tmp_path / "w.safetensors", lambda t: t.double() + 1e-12)
    with pytest.warns(UserWarning, match=r"float64 weights are rounded to float32: head\.bias.* and \d+ more"):
        fat.load_model(path)
    path = saved(model, tmp_path / "w.safetensors", lambda t: t.double() * 1e300)
    with pytest.raises(ValueError, match="NaN or infinite values"):
        fat.load_model(path)


def test_half_precision_is_converted(model: fat.FAT, tmp_path: Path) -> None:
    model.bfloat16().float()
    assert same(fat.load_model(saved(model, tmp_path / "w.safetensors", torch.Tensor.bfloat16)), model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_in_integer_and_float8_dtypes_are_rejected(model: fat.FAT, tmp_path: Path, dtype: torch.dtype) -> None:
    path = saved(model, tmp_path / "w.safetensors", lambda t: t.to(dtype))
    with pytest.raises(
        ValueError, match=rf"wrong dtype: stem\.convs\.0\.conv\.weight has {dtype}, expected torch\.float32"
    ):
        fat.load_model(path)
