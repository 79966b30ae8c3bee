"""The model equals the released one: its weights give the same logits, gradients and buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fat
from fat.weights.released_names import from_released
from tests.support.tiny_fat import PARAMETERS, TINY, relative_error

FIXTURE = Path(__file__).parents[1] / "fixtures" / "fat_tiny_official.npz"
MOMENTUM = 0.1  # of every BatchNorm's running statistics

Group = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def released() -> dict[str, Group]:
    """Load the fixture by group: weight, grad and buffer_after by parameter name; "" has input, logits and cotangent.

    The fixture's weights contain the buffers *after* the training step, equal to buffer_after, but its eval logits were
    computed with the buffers before. These are computed here: before = (after - momentum x batch statistics) /
    (1 - momentum). A wrong batch statistic would change the eval logits.
    """
    groups: dict[str, Group] = {}
    with np.load(FIXTURE) as arrays:
        for key in arrays.files:
            group, _, name = key.rpartition("/")
            groups.setdefault(group, {})[name] = torch.from_numpy(arrays[key])
    groups = {group: from_released(tensors, TINY) for group, tensors in groups.items()}

    model = fat.FAT(TINY).train()
    model.load_state_dict(groups["weight"])
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        model(groups[""]["input"])
        for name, step in model.named_buffers():  # momentum x batch statistics, or 1 for a counter
            keep = 1 - MOMENTUM if step.is_floating_point() else 1
            groups["weight"][name] = ((groups["buffer_after"][name] - step) / keep).to(step.dtype)
    return groups


@pytest.fixture
def model(released: dict[str, Group]) -> fat.FAT:
    model = fat.FAT(TINY)
    model.load_state_dict(released["weight"])
    return model


def test_eval_logits(model: fat.FAT, released: dict[str, Group]) -> None:
    with torch.no_grad():
        logits = model.eval()(released[""]["input"])
    assert relative_error(logits, released[""]["logits_eval"]) < 1e-5


def test_train_logits_gradients_and_buffers(model: fat.FAT, released: dict[str, Group]) -> None:
    logits = model.train()(released[""]["input"])
    (logits * released[""]["cotangent"]).sum().backward()
    assert relative_error(logits, released[""]["logits_train"]) < 1e-4

    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == released["grad"].keys()
    before_norm = {f"{name}.conv" for name, module in model.named_modules() if hasattr(module, "bn")}
    for name, gradient in gradients.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and module in before_norm:  # BatchNorm subtracts any constant, so the true gradient is 0
            assert gradient.norm() < 1e-4 * gradients[f"{module}.weight"].norm(), name
        else:
            assert relative_error(gradient, released["grad"][name]) < 1e-4, name

    buffers = dict(model.named_buffers())
    assert buffers.keys() == released["buffer_after"].keys()
    for name, buffer in buffers.items():
        assert relative_error(buffer, released["buffer_after"][name]) < 1e-4, name


@pytest.mark.parametrize("name", fat.list_models())
def test_parameter_counts_agree_with_the_paper(name: str) -> None:
    with torch.device("meta"):
        model = fat.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
