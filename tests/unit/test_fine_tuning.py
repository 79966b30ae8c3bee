"""Layer-wise learning rates, linear probes and activation checkpointing (launch/optim/fine_tuning.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fat
from launch.config.command_line import parse
from launch.config.errors import RecipeError
from launch.config.optim import OptimConfig
from launch.engine.engine import Engine
from launch.engine.execution import Execution
from launch.engine.input_shapes import InputShape
from launch.machine.world import World
from launch.optim.fine_tuning import backbone_modules, classifier_of, layers_of, number_layers
from launch.optim.optimizers import parameter_groups
from launch.prepare import check_fine_tuning
from tests.support.batches import SIZE, random_batch
from tests.support.tiny_fat import TINY
from tests.support.vision_libraries import vision_libraries  # noqa: F401 - a fixture

CPU = torch.device("cpu")
ROWS = 4


CONFIG = replace(TINY, drop_path=0.3)


def engine_of(*options: str, seed: int = 0) -> Engine:
    torch.manual_seed(seed)
    recipe = parse(["--size", str(SIZE), *options])
    return Engine(fat.create_model(CONFIG), recipe, World(0, 1, 0, 1, CPU), shapes=[InputShape(ROWS, SIZE, 1)])


def train(engine: Engine, steps: int = 2) -> list[float]:
    return [engine.step([random_batch(step, range(ROWS))], step=step, lr=1e-2).loss.item() for step in range(steps)]


# -- layers ------------------------------------------------------------------------------------------------------------


def test_layers_of_fat_are_the_stem_each_block_and_the_head() -> None:
    layers = layers_of(fat.create_model(TINY))  # depths 1, 2, 2, 1
    expected = {
        "stem.convs.0.conv.weight": 0,
        "stem.norm.bias": 0,
        "stages.0.blocks.0.attn.q.weight": 1,
        "stages.1.blocks.0.cpe.weight": 2,
        "stages.1.blocks.1.shortcut.1.bias": 3,
        "stages.2.blocks.0.norm1.weight": 4,
        "stages.2.blocks.1.norm2.weight": 5,
        "stages.3.blocks.0.cpe.bias": 6,
        "norm.weight": 6,
        "head.weight": 7,
        "head.bias": 7,
    }
    assert {name: layers[name] for name in expected} == expected
    assert layers.keys() == dict(fat.create_model(TINY).named_parameters()).keys()


@pytest.mark.parametrize(
    ("matcher", "expected"),
    [
        ({"stem": "^a", "blocks": r"^b\.(\d+)"}, [0, 1, 2, 3, 3]),
        ({"stem": "^a", "blocks": [(r"^b\.(\d+)", None), ("^norm", (99999,))]}, [0, 1, 2, 2, 3]),
        ({"stem": [("^a", (0,)), (r"^b\.2", (1,))], "blocks": r"^b\.(\d+)"}, [0, 1, 2, 3, 3]),
        ({"stem": "^a", "absent": None, "blocks": r"^b"}, [0, 1, 1, 2, 2]),
        (lambda name: {"a": 3, "b": 4}.get(name[0], 9), [0, 1, 1, 2, 2]),
    ],
)
def test_numbers_of_layers_follow_the_conventions_of_timm(matcher: object, expected: list[int]) -> None:
    names = ["a.weight", "b.2.weight", "b.10.weight", "norm.weight", "head.weight"]
    assert list(number_layers(names, matcher).values()) == expected


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0"])
@pytest.mark.usefixtures("vision_libraries")
def test_layer_wise_learning_rates_equal_timm_s(name: str) -> None:
    import timm
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    optim = OptimConfig(layer_decay=0.75, weight_decay=0.05)
    expected = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=getattr(model, "no_weight_decay", set)(), layer_decay=0.75
    )

    def settings(groups: list[dict[str, object]]) -> dict[int, tuple[float, float]]:
        return {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    found = settings(parameter_groups(model, optim))
    assert found == settings(expected)
    assert len(found) == len(list(model.parameters()))


def test_classifier_has_its_own_learning_rate_and_others_are_unchanged() -> None:
    model = fat.create_model(TINY)
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5, head_lr_scale=10))
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {scales[id(p)] for p in model.head.parameters()} == {10.0}
    assert {scales[id(p)] for p in model.stem.parameters()} == {0.5**7}
    assert scales[id(model.norm.weight)] == 0.5
    assert len(parameter_groups(model, OptimConfig())) == 2


def test_first_step_of_sgd_is_proportional_to_the_learning_rate_of_each_layer() -> None:
    sgd = ("--optimizer", "sgd", "--weight-decay", "0", "--clip-grad", "0")
    plain, scaled = engine_of(*sgd), engine_of(*sgd, "--layer-decay", "0.5", "--head-lr-scale", "4")
    start = {name: value.clone() for name, value in plain.model.named_parameters()}
    for engine in (plain, scaled):
        train(engine, steps=1)
    layers = layers_of(plain.model)
    for name, value in start.items():
        factor = 4.0 if name.startswith("head.") else 0.5 ** (7 - layers[name])
        moved, expected = (dict(engine.model.named_parameters())[name] - value for engine in (scaled, plain))
        torch.testing.assert_close(moved, factor * expected, rtol=1e-2, atol=1e-7)


# -- linear probe ------------------------------------------------------------------------------------------------------


def test_linear_probe_changes_only_the_classifier() -> None:
    engine = engine_of("--freeze-backbone", "--ema", "0.9")
    start = {name: value.clone() for name, value in engine.model.state_dict().items()}
    train(engine)
    engine.evaluate([random_batch(9, range(ROWS))], average=True)
    train(engine)
    for name, value in engine.model.state_dict().items():
        assert torch.equal(value, start[name]) is not name.startswith("head."), name
    for name, parameter in engine.model.named_parameters():
        assert parameter.requires_grad is name.startswith("head."), name


def test_linear_probe_trains_on_the_features_of_evaluation() -> None:
    """Its loss does not depend on drop path, and equals that of the classifier alone on features in eval mode."""
    engine = engine_of("--freeze-backbone", "--label-smoothing", "0")
    (loss,) = train(engine, steps=1)
    torch.manual_seed(0)
    model, batch = fat.create_model(TINY).eval(), random_batch(0, range(ROWS))
    with torch.no_grad():
        assert loss == pytest.approx(nn.functional.cross_entropy(model(batch.images), batch.labels).item(), rel=1e-5)


def test_linear_probe_saves_and_loads_the_whole_model() -> None:
    engine = engine_of("--freeze-backbone")
    train(engine)
    state = {name: value.clone() for name, value in engine.state_dict().items()}
    assert {
        name.removeprefix("model/") for name in state if name.startswith("model/")
    } == engine.model.state_dict().keys()
    resumed = engine_of("--freeze-backbone", seed=1)
    resumed.load_state_dict(state, steps=2)
    found = [train(engine), train(resumed)]
    assert found[0] == found[1]
    assert all(torch.equal(value, engine.state_dict()[name]) for name, value in resumed.state_dict().items())


class Nested(nn.Module):
    """Classifier within a head, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.pool = nn.Module()
        self.pool.norm, self.pool.fc = nn.LayerNorm(4), nn.Linear(4, 2)

    def get_classifier(self) -> nn.Module:
        return self.pool.fc


def test_backbone_is_all_but_the_classifier_wherever_that_is() -> None:
    model = Nested()
    assert classifier_of(model) is model.pool.fc
    assert list(backbone_modules(model)) == [model.body, model.pool.norm]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer-decay", "0.7"), "--layer-decay: the order of the layers of Sequential is unknown; use"),
        (("--freeze-backbone",), "Sequential has no classifier that can be trained alone"),
        (("--head-lr-scale", "2"), "Sequential has no classifier that can be trained alone"),
        (("--grad-checkpointing",), "--grad-checkpointing: Sequential does not support it"),
        (("--freeze-backbone", "--layer-decay", "0.7"), "--layer-decay: has no effect with --freeze-backbone"),
    ],
)
def test_models_without_what_an_option_needs_are_rejected(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_fine_tuning(nn.Sequential(nn.Linear(2, 2)), parse([*options]))


@pytest.mark.usefixtures("vision_libraries")
def test_a_model_of_timm_without_activation_checkpointing_is_rejected() -> None:
    import timm

    with pytest.raises(RecipeError, match="--grad-checkpointing: VGG does not support it"):
        check_fine_tuning(timm.create_model("vgg11", num_classes=2), parse(["--grad-checkpointing"]))


def test_recalibration_needs_statistics_that_are_not_frozen() -> None:
    recipe = parse(["--model", "timm/vit_tiny_patch16_224", "--recalibrate-bn", "2"])
    with pytest.raises(RecipeError, match="--recalibrate-bn: timm/vit_tiny_patch16_224 has no BatchNorm layers"):
        check_fine_tuning(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), recipe)
    check_fine_tuning(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), recipe)
    for option in ("--freeze-bn", "--freeze-backbone"):
        with pytest.raises(RecipeError, match=f"--recalibrate-bn 2: {option} keeps BatchNorm's statistics"):
            parse(["--recalibrate-bn", "2", option])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--optimizer lamb --zero 1", "--optimizer lamb: needs the norms of whole weight tensors, which ZeRO"),
        ("--optimizer lamb --optimizer-impl foreach", "--optimizer-impl foreach: LAMB has only the fused"),
        ("--freeze-backbone --zero 3", "--freeze-backbone: does not support ZeRO 3; use --zero 0, 1 or 2"),
        ("--grad-checkpointing --compile reduce-overhead", "--compile reduce-overhead: its CUDA graphs contradict"),
        ("--grad-checkpointing --compile cudagraphs", "--compile cudagraphs: --grad-checkpointing runs blocks again"),
    ],
)
def test_options_that_contradict_each_other_are_rejected(options: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Execution.of(parse(options.split()), torch.device("cuda"), accumulation=1, ranks=1)


def test_activation_checkpointing_computes_the_same_and_disables_cuda_graphs() -> None:
    plain, checkpointed = engine_of(), engine_of("--grad-checkpointing")
    assert train(plain) == train(checkpointed)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, checkpointed.model.state_dict()[name]), name
    found = Execution.of(parse(["--grad-checkpointing"]), torch.device("cuda"), accumulation=1, ranks=1)
    assert found.compile == "off"
    assert "--grad-checkpointing" in found.eager_reason
