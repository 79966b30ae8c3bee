"""Checkpoints of other trainers and wrappers: the model that is loaded, its names, and the messages about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fat
from fat.weights.released_names import to_released
from tests.support.hostile_weights import Claim, program, write_checkpoint
from tests.support.tiny_fat import TINY

State = dict[str, Tensor]


def filled(value: float) -> State:
    """Return a tiny model's state dict in which all values are equal, so that a mixture of two models is detected."""
    return {
        name: torch.full_like(t, value if t.is_floating_point() else 0)
        for name, t in fat.FAT(TINY).state_dict().items()
    }


def under(prefix: str, state: Mapping[str, Any]) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def load(path: Path, **options: Any) -> tuple[float, str]:
    """Load a file; return the value of the model's tensors, and the messages."""
    model = fat.FAT(TINY)
    notes = "; ".join(fat.load_weights(model, path, **options))
    values = {float(t.flatten()[0]) for t in model.state_dict().values() if t.is_floating_point()}
    assert len(values) == 1, f"tensors of several models: {values}"
    return values.pop(), notes


def compiled_blocks(state: State) -> State:
    """Rename parameters as if each block had been wrapped by torch.compile or activation checkpointing."""
    wrapped = {}
    for number, (name, value) in enumerate(state.items()):
        wrapper = ("_orig_mod", "_checkpoint_wrapped_module")[number % 2]
        parts = name.split(".")
        wrapped[".".join([*parts[:4], wrapper, *parts[4:]]) if name.startswith("stages.") else name] = value
    return wrapped


PREFIXED: dict[str, Callable[[State], State]] = {
    "DistributedDataParallel": lambda state: under("module.", state),
    "torch.compile": lambda state: under("_orig_mod.", state),
    "compiled, then DDP": lambda state: under("module._orig_mod.", state),
    "DDP, then compiled": lambda state: under("_orig_mod.module.", state),
    "Lightning": lambda state: under("model.", state) | {"criterion.weight": torch.ones(3)},
    "Lightning of a compiled net": lambda state: under("net._orig_mod.", state),
    "a backbone": lambda state: under("backbone.", state),
    "wrappers of wrappers": lambda state: under("model.module.backbone.", state),
    "FSDP": lambda state: under("_fsdp_wrapped_module.", state),
    "unknown prefix": lambda state: under("visual_tower.", state),
    "each block compiled": compiled_blocks,
    "released names in DDP": lambda state: under("module.", to_released(state, TINY)),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("wrapper", PREFIXED)
def test_prefixes_of_wrappers_are_removed_and_named(tmp_path: Path, wrapper: str, suffix: str) -> None:
    path, state = tmp_path / f"w{suffix}", PREFIXED[wrapper](filled(2.0))
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    value, notes = load(path)
    assert value == 2.0
    assert "from the parameter names, which a wrapper had added" in notes
    assert ("criterion.weight" in notes) == (wrapper == "Lightning")


def test_a_plain_state_dict_is_loaded_without_messages(tmp_path: Path) -> None:
    for number, saved in enumerate((filled(2.0), {"model": filled(2.0), "epoch": 3})):
        torch.save(saved, tmp_path / f"{number}.pth")
        assert load(tmp_path / f"{number}.pth") == (2.0, "")


NESTED: dict[str, tuple[Callable[[State, State], Any], float, str]] = {
    # (trained weights, their moving average) -> content of the file; the expected value; the expected message
    "Lightning": (lambda raw, _: {"state_dict": under("model.", raw), "hyper_parameters": {}}, 1, "'state_dict"),
    "custom training loop": (
        lambda raw, _: {"model_state_dict": raw, "optimizer_state_dict": {}},
        1,
        "model_state_dict",
    ),
    "another custom loop": (lambda raw, _: {"network": raw, "epoch": 1}, 1, "'network'"),
    "DeepSpeed": (lambda raw, _: {"module": raw, "dp_world_size": 8}, 1, "'module'"),
    "Composer": (lambda raw, _: {"state": {"model": under("module.", raw)}, "rng": []}, 1, "state.model"),
    "timm": (
        lambda raw, average: {"state_dict": raw, "state_dict_ema": average, "arch": "fat_b0"},
        2,
        "'state_dict_ema' (a moving average of the weights); not used: state_dict",
    ),
    "Swin": (lambda raw, average: {"model": raw, "model_ema": average}, 2, "'model_ema' (a moving average"),
    "key ema": (lambda raw, average: {"model": raw, "ema": under("module.", average)}, 2, "'ema.module'"),
    "average in the same state dict": (
        lambda raw, average: under("online_model.", raw) | under("ema_model.", average),
        2,
        "'ema_model' (a moving average",
    ),
    "average without buffers": (
        lambda raw, average: {"model": raw, "ema": {n: t for n, t in average.items() if "running_" not in n}},
        1,
        "the moving average 'ema' lacks",
    ),
    "average without batch counters": (
        lambda raw, average: {"model": raw, "ema": {n: t for n, t in average.items() if "batches" not in n}},
        2,
        "'ema' (a moving average",
    ),
    "key ema without tensors": (lambda raw, _: {"model": raw, "ema": {"decay": 0.9}}, 1, ""),
}


@pytest.mark.parametrize("tool", NESTED)
def test_the_model_is_found_among_nested_state_dicts(tmp_path: Path, tool: str) -> None:
    create, expected, note = NESTED[tool]
    torch.save(create(filled(1.0), filled(2.0)), tmp_path / "w.pth")
    value, notes = load(tmp_path / "w.pth")
    assert value == expected
    assert note in notes


def test_the_requested_entry_is_loaded(tmp_path: Path) -> None:
    torch.save({"state_dict": under("model.", filled(1.0)), "state_dict_ema": filled(2.0)}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth", entry="state_dict")[0] == 1.0
    with pytest.raises(ValueError, match=r"contains no entry 'x'; expected one of .*state_dict_ema"):
        load(tmp_path / "w.pth", entry="x")


def test_a_file_with_two_unknown_models_is_rejected_and_names_them(tmp_path: Path) -> None:
    torch.save(under("student.", filled(1.0)) | under("teacher.", filled(2.0)), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"contains several models \(student, teacher\); choose one with entry="):
        load(tmp_path / "w.pth")
    assert load(tmp_path / "w.pth", entry="teacher")[0] == 2.0


def test_torchs_averaged_model_is_loaded(tmp_path: Path) -> None:
    model = fat.FAT(TINY)
    model.load_state_dict(filled(3.0))
    torch.save(AveragedModel(model, use_buffers=True).state_dict(), tmp_path / "w.pth")
    value, notes = load(tmp_path / "w.pth")
    assert value == 3.0
    assert "n_averaged" in notes


def test_missing_and_unknown_tensors_are_named_without_the_wrappers_prefix(tmp_path: Path) -> None:
    state = filled(1.0)
    del state["norm.weight"]
    torch.save({"state_dict": under("module.", state | {"mask_token": torch.ones(1)})}, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"w\.pth: not this model's weights; missing: norm\.weight; unknown: mask_token"
    ):
        load(tmp_path / "w.pth")


def test_another_architecture_is_rejected_and_its_parameters_named(tmp_path: Path) -> None:
    state = {f"conv{i}.weight": torch.ones(1) for i in range(7)}
    torch.save({"state_dict": state, "other": {"x": torch.ones(1)}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more; unknown: conv0\.weight, .* and 2 more"):
        load(tmp_path / "w.pth")


def test_a_backbone_without_classifier_is_rejected_with_the_remedy(tmp_path: Path) -> None:
    torch.save(under("backbone.", {n: t for n, t in filled(1.0).items() if "head" not in n}), tmp_path / "w.pth")
    remedy = r"the file has no classifier: create the model with num_classes=0, or pass replace_head=True"
    with pytest.raises(ValueError, match=rf"missing: head\.weight, head\.bias; {remedy}"):
        load(tmp_path / "w.pth")
    model = fat.create_model(TINY, num_classes=3)
    fat.load_weights(model, tmp_path / "w.pth", replace_head=True)
    assert (model.norm.weight == 1).all()


def test_a_file_without_tensors_is_rejected_with_the_remedy(tmp_path: Path) -> None:
    torch.save({"model": nn.Identity(), "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="contains no weights; save the model's state_dict"):
        load(tmp_path / "w.pth")


def test_create_model_and_load_model_warn_about_a_choice_among_models(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    model = fat.create_model("fat_b0", num_classes=7)
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": under("module.", model.state_dict())}, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = fat.load_model(path)  # the file has no config: FAT-B0 is recognized by its tensors
        fat.create_model("fat_b0", num_classes=7, weights=path)
    messages = [str(warning.message) for warning in caught]
    assert {warning.filename for warning in caught} == {__file__}
    assert sum("w.pth: loaded the weights of 'state_dict_ema.module' (a moving average" in m for m in messages) == 2
    assert sum("removed 'module.' from the parameter names" in m for m in messages) == 2
    assert loaded.config == model.config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(model.state_dict(), path)
        assert fat.load_model(path).num_classes == 7


@pytest.mark.parametrize(
    "saved",
    [
        {"a" * 1_000_000: {str(i): {"x": Claim()} for i in range(2000)}},
        {f"p{i}.stem.proj.weight": Claim() for i in range(20_000)},
        {"_orig_mod." * 1000 + "stem.proj.weight": Claim()},
    ],
    ids=["a long key over many dicts", "thousands of prefixes", "a name of wrappers"],
)
def test_hostile_nesting_and_names_are_rejected_quickly(tmp_path: Path, saved: Any) -> None:
    write_checkpoint(tmp_path / "w.pth", program(saved))
    with pytest.raises(ValueError, match=r"w\.pth: ") as error:
        load(tmp_path / "w.pth")
    assert len(str(error.value)) < 5000


def test_a_dict_that_contains_itself_is_read_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "w.pth", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.")
    with pytest.raises(ValueError, match="contains no weights"):
        load(tmp_path / "w.pth")


def test_mmengine_checkpoints_load_the_average_from_state_dict(tmp_path: Path) -> None:
    """MMEngine's EMAHook saves the average as `state_dict`, and the weights, with a step count, as `ema_state_dict`."""
    raw = under("module.", filled(1.0)) | {"steps": torch.tensor(9)}
    torch.save({"meta": {}, "state_dict": filled(2.0), "ema_state_dict": raw}, tmp_path / "w.pth")
    value, notes = load(tmp_path / "w.pth")
    assert value == 2.0
    assert "MMEngine keeps the weights themselves in 'ema_state_dict'" in notes


@pytest.mark.parametrize("path", [("optimizer", "moving_average"), ("optim", "ema"), ("optimizer_state", "swa")])
def test_optimizer_state_is_not_loaded_as_a_model(tmp_path: Path, path: tuple[str, str]) -> None:
    torch.save({"model": filled(1.0), path[0]: {path[1]: filled(2.0)}}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth")[0] == 1.0


def test_an_average_without_batch_counters_can_be_requested(tmp_path: Path) -> None:
    average = {name: value for name, value in filled(2.0).items() if not name.endswith("num_batches_tracked")}
    torch.save({"model": filled(1.0), "ema": average}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth", entry="ema")[0] == 2.0


def test_among_equally_likely_models_none_is_chosen(tmp_path: Path) -> None:
    torch.save({"encoder": filled(1.0), "backbone": filled(2.0)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"contains several models \(.*encoder.*choose one with entry="):
        load(tmp_path / "w.pth")
    assert load(tmp_path / "w.pth", entry="backbone")[0] == 2.0
    torch.save({"encoder": filled(1.0), "model": filled(2.0)}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth")[0] == 2.0
