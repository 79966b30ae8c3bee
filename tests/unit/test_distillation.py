"""Knowledge distillation: the loss, the teacher's classes and images, and runs with a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import fat
from launch.config.command_line import parse
from launch.config.distillation import DistillationConfig
from launch.engine.distillation import Distiller, Teacher, distillation_loss
from launch.engine.engine import Engine
from launch.feed import Feed
from launch.machine.world import World
from launch.teacher import load_teacher
from launch.train import main as train
from shards.errors import UserError
from tests.support import models
from tests.support.commands import SMALL, run
from tests.support.tiny_fat import TINY
from tests.support.vision_libraries import vision_libraries  # noqa: F401 - a fixture

HERE = "tests.support.models"
CPU = torch.device("cpu")
SOFT = DistillationConfig(distillation="soft")
HARD = DistillationConfig(distillation="hard")


# -- the loss --------------------------------------------------------------------------------------------------------


def some_logits(seed: int, rows: int = 4, classes: int = 5) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * 3


def test_soft_loss_is_the_divergence_at_the_temperature_times_its_square() -> None:
    student, teacher, t = some_logits(1), some_logits(2), 3.0
    p, q = (x.div(t).softmax(1).double() for x in (teacher, student))
    expected = t * t * (p * (p.log() - q.log())).sum() / 4
    assert distillation_loss(student, teacher, SOFT).item() == pytest.approx(expected.item(), rel=1e-5)


def test_hard_loss_is_the_cross_entropy_with_the_teachers_prediction() -> None:
    student, teacher = some_logits(1), some_logits(2)
    expected = -student.log_softmax(1)[range(4), teacher.argmax(1)].mean()
    assert distillation_loss(student, teacher, HARD).item() == pytest.approx(expected.item())


@given(st.integers(0, 2**31), st.floats(0.1, 100))
def test_soft_loss_is_positive_except_for_equal_probabilities(seed: int, temperature: float) -> None:
    config = dataclasses.replace(SOFT, distillation_temperature=temperature)
    teacher = some_logits(seed)
    assert distillation_loss(teacher + 7, teacher, config).item() == pytest.approx(0, abs=1e-4 * temperature**2)
    assert distillation_loss(some_logits(seed + 1), teacher, config) > 0


def test_outputs_without_a_class_are_pushed_down() -> None:
    student = torch.cat([some_logits(1), torch.zeros(4, 2)], dim=1).requires_grad_()
    for config in (SOFT, HARD):
        (gradient,) = torch.autograd.grad(distillation_loss(student, some_logits(2), config), student)
        assert (gradient[:, 5:] > 0).all()


class Recorded(nn.Module):
    """A teacher that records its inputs, with a layer whose mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.images: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images.append(images)
        return self.dropout(self.norm(images)).mean((2, 3))


SAME = {"scale": (1.0, 1.0, 1.0), "shift": (0.0, 0.0, 0.0), "digest": "0" * 16, "description": "a test"}


def test_loss_is_the_weighted_sum_without_gradients_or_changes_of_the_teacher() -> None:
    model = Recorded()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    distiller = Distiller(Teacher(model=model, outputs=None, **SAME), HARD, CPU, "fp32")
    student, images = some_logits(1, classes=3).requires_grad_(), torch.rand(4, 3, 2, 2)
    loss = distiller(torch.tensor(5.0), student, images)
    assert torch.equal(model.images[0], images)
    assert loss.item() == pytest.approx(0.5 * 5 + 0.5 * F.cross_entropy(student, images.mean((2, 3)).argmax(1)).item())
    loss.backward()
    assert student.grad is not None
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_teacher_gets_images_with_its_own_normalization() -> None:
    pixels, mean, std = torch.rand(2, 3, 4, 4), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    own_mean, own_std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.125)

    def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    scale = tuple(s / t for s, t in zip(std, own_std, strict=True))
    shift = tuple((m - n) / t for m, n, t in zip(mean, own_mean, own_std, strict=True))
    model = Recorded()
    teacher = Teacher(model=model, outputs=(2, 0), **SAME | {"scale": scale, "shift": shift})
    logits = Distiller(teacher, HARD, CPU, "fp32").logits(normalized(mean, std))
    torch.testing.assert_close(model.images[0], normalized(own_mean, own_std))
    torch.testing.assert_close(logits, normalized(own_mean, own_std).mean((2, 3))[:, [2, 0]], rtol=1e-4, atol=1e-4)


# -- the teacher -----------------------------------------------------------------------------------------------------


@pytest.fixture
def feed(digits: Path, tmp_path: Path) -> Callable[..., Feed]:
    def opened(*options: object) -> Feed:
        args = [*SMALL, "--data", digits, "--out", tmp_path / "run", *options]
        return Feed.of(parse([str(arg) for arg in args]), World(0, 1, 0, 1, CPU))

    return opened


def saved(path: Path, folders: list[str] | None, network: nn.Module | None = None, **facts: Any) -> Path:
    classes = None if folders is None else fat.ClassList.of(folders)
    config = dataclasses.replace(TINY, num_classes=len(folders or range(10)))
    fat.save_weights(network or fat.FAT(config), path, info=fat.WeightsInfo(classes=classes, **facts))
    return path


def folders_of(feed: Feed) -> list[str]:
    return list(feed.class_list.folders or ())


def test_classes_are_matched_by_folder_name(tmp_path: Path, feed: Callable[..., Feed]) -> None:
    path = tmp_path / "t.safetensors"
    names = folders_of(feed())
    same, _ = load_teacher(feed("--teacher", saved(path, names)))
    assert same is not None
    assert same.outputs is None
    more, _ = load_teacher(feed("--teacher", saved(path, names, fat.FAT(dataclasses.replace(TINY, num_classes=12)))))
    assert more is not None
    assert more.outputs == tuple(range(10))  # its outputs without a class teach nothing
    other, messages = load_teacher(feed("--teacher", saved(path, ["zebra", *reversed(names)])))
    assert other is not None
    assert other.outputs == tuple(range(10, 0, -1))
    assert any("10 of the model's 11 classes" in message for message in messages)
    assert other.digest != same.digest
    with pytest.raises(UserError, match="was not trained on 1 of the 10 classes"):
        load_teacher(feed("--teacher", saved(path, ["zebra", *names[1:]])))
    with pytest.raises(UserError, match=r"has 11 outputs and no class names, but .* has 10 classes"):
        load_teacher(feed("--teacher", saved(path, None, fat.FAT(dataclasses.replace(TINY, num_classes=11)))))


def test_normalization_and_size_of_the_teacher_are_those_of_its_file(tmp_path: Path, feed: Callable[..., Feed]) -> None:
    facts = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "size": 64}
    teacher, messages = load_teacher(feed("--teacher", saved(tmp_path / "t.safetensors", folders_of(feed()), **facts)))
    assert teacher is not None
    assert teacher.scale == pytest.approx((0.458, 0.448, 0.45))
    assert teacher.shift == pytest.approx((-0.03, -0.088, -0.188))
    assert "teacher: it was evaluated with images of 64 pixels, and gets images of 32" in messages


def test_a_function_is_only_called_if_the_user_names_it(tmp_path: Path, feed: Callable[..., Feed]) -> None:
    name = f"{HERE}:with_classifier"
    path = saved(tmp_path / "t.safetensors", folders_of(feed()), models.with_classifier(10), model=name)
    with pytest.raises(
        UserError,
        match=f"--teacher: {path}: its model .*if you trust this code, use --teacher {name} --teacher-weights {path}",
    ):
        load_teacher(feed("--teacher", path))
    teacher, (message, *_) = load_teacher(feed("--teacher", name, "--teacher-weights", path))
    assert teacher is not None
    assert message == f"hard distillation from {name} of {path}"


@pytest.mark.usefixtures("vision_libraries")
def test_published_weights_of_timm_teach_with_timms_normalization(tmp_path: Path, feed: Callable[..., Feed]) -> None:
    import timm

    path = tmp_path / "downloaded.pth"
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    teacher, messages = load_teacher(feed("--teacher", "timm/test_resnet", "--teacher-weights", path))
    assert teacher is not None
    assert teacher.converts == (timm.create_model("test_resnet").default_cfg["mean"] != (0.485, 0.456, 0.406))
    assert any("has no class names: its 10 outputs are assumed to be the classes" in message for message in messages)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--teacher", "nowhere.safetensors"), "--teacher nowhere.safetensors: no such file or folder, and no name"),
        (("--teacher", "timm/resnet18"), "set --teacher-weights FILE"),
        (("--teacher", "."), "contains no weights file"),
        (("--teacher", "pyproject.toml"), "--teacher: pyproject.toml: "),
        (("--teacher", "pyproject.toml", "--teacher-weights", "x"), "omit --teacher-weights"),
        (("--teacher", "fat_b0", "--teacher-weights", "nowhere"), "nowhere"),
        (("--teacher-weights", "x"), "--teacher-weights x: requires --teacher"),
    ],
)
def test_teachers_that_cannot_teach_are_refused_before_anything_is_written(
    tmp_path: Path, digits: Path, options: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train, *SMALL, *options, "--data", digits, "--out", tmp_path / "run") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert expected in line
    assert not (tmp_path / "run").exists()


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_from_its_teacher_and_resumes_with_the_same_one_only(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's weights are not in the checkpoints; its hash is."""
    monkeypatch.setattr("launch.train.draw_curves", lambda run: run)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Distiller.logits

    def logits(distiller: Distiller, images: torch.Tensor) -> torch.Tensor:
        seen.append((images, original(distiller, images)))
        return seen[-1][1]

    monkeypatch.setattr(Distiller, "logits", logits)
    trained: list[torch.Tensor] = []
    step = Engine.step
    monkeypatch.setattr(
        Engine, "step", lambda engine, batches, **o: (trained.append(batches[0].images), step(engine, batches, **o))[1]
    )
    common = ("--data", digits, "--model", f"{HERE}:small", "--mixup", "0.8", "--stop-after")
    assert run(train, *SMALL, *common, "1", "--out", tmp_path / "teacher") == 0
    teach = ("--teacher", tmp_path / "teacher")
    named = ("--teacher", f"{HERE}:small", "--teacher-weights", teach[1])
    soft = ("--distillation", "soft", "--distillation-alpha", "0.9")
    assert run(train, *SMALL, *common, "2", "--out", tmp_path / "student", *named, *soft) == 0
    assert len(seen) == 2
    assert all(torch.equal(images, mixed) for (images, _), mixed in zip(seen, trained[1:], strict=True))
    (checkpoint,) = (tmp_path / "student" / "checkpoints").iterdir()
    plain = load_file(next((tmp_path / "teacher" / "checkpoints").iterdir()) / "state.safetensors")
    state = load_file(checkpoint / "state.safetensors")
    assert state.keys() == plain.keys()
    capsys.readouterr()
    assert run(train, *SMALL, *common, "3", "--out", tmp_path / "student") == 2
    assert "teacher was" in capsys.readouterr().err
    again = (*named[:3], tmp_path / "student" / "weights-last.safetensors")
    assert run(train, *SMALL, *common, "3", "--out", tmp_path / "student", *again) == 2
