"""The class list is stored in checkpoints, weights and run folders, and checked on resume, evaluation, fine-tuning."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fat
from launch.class_mapping import map_classes
from launch.config.model import ModelConfig
from launch.config.recipe import Recipe
from launch.engine.build import build_model
from launch.engine.initial_weights import load_initial_weights
from launch.evaluate import main as evaluate
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.progress import Progress
from launch.run.weights_files import best_weights_file
from launch.train import main as train
from shards.errors import UserError
from tests.support.damage import edit_manifest
from tests.support.tiny_fat import TINY

SMALL = ("--size", "32", "--augment", "light", "--global-batch", "32", "--epochs", "1", "--warmup-epochs", "0")
QUICK = ("--batch", "64", "--limit", "64")
FOLDERS = ["0_zero", "1_one", "2_two", "3_three", "4_four", "5_five", "6_six", "7_seven", "8_eight", "9_nine"]

Edit = Callable[[list[dict[str, Any]]], object]


def run(main: Callable[[], int], *args: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, args)])
        return main()


def with_classes(digits: Path, out: Path, edit: Edit) -> Path:
    """Copy the digits data set and edit its class list; the images keep their labels."""
    shutil.copytree(digits, out)
    edit_manifest(out, lambda manifest: edit(manifest["classes"]))
    return out


def rename(entries: list[dict[str, Any]]) -> None:
    for entry in entries[:2]:
        entry["folder"] = f"other_{entry['folder']}"


def swap(entries: list[dict[str, Any]]) -> None:
    entries[0], entries[1] = entries[1], entries[0]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of two training steps at 32 pixels, with a crop_pct that is not the default."""
    out = tmp_path_factory.mktemp("run") / "run"
    options = ("--data", digits, "--out", out, "--stop-after", "2", "--crop-pct", "0.9", "--drop-path", "0")
    assert run(train, *SMALL, *options) == 0
    return out


def constant_weights(path: Path, output: int, *, info: fat.WeightsInfo | None) -> Path:
    """Save weights of a model that always predicts the same output."""
    torch.manual_seed(0)
    model = fat.create_model("fat_b0", num_classes=10)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.eye(10)[output]
    fat.save_weights(model, path, info=info)
    return path


# -- ClassList ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, ["crane", "crane", None]], ids=["folders", "human-readable names, one twice"])
def test_a_class_list_survives_a_round_trip(names: list[str | None] | None) -> None:
    written = fat.ClassList.of(["n02", 'q"\\', "日本"], names)
    assert fat.ClassList.loads(written.dumps()) == written
    short = fat.ClassList.loads(written.dumps(limit=10))
    assert (short.count, short.digest, short.folders) == (3, written.digest, None)


def test_the_digest_depends_on_folders_and_order_but_not_on_names() -> None:
    digests = {fat.ClassList.of(folders).digest for folders in (["a", "b"], ["b", "a"], ["a,b"], ["a", "b", "c"])}
    assert len(digests) == 4
    assert fat.ClassList.of(["a"], ["x"]).digest == fat.ClassList.of(["a"], ["y"]).digest


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"count": 3}, "folders: expected a list of 3 strings"),
        ({"count": True}, "count: expected an integer"),
        ({"count": 10**9}, "count: expected an integer"),
        ({"digest": "0" * 64}, "digest: does not match the folders"),
        ({"digest": 5}, "digest: expected 64 hex digits"),
        ({"folders": ["a", 5]}, "folders: expected a list of 2 strings"),
        ({"names": ["a", {}]}, "names: expected a list of 2 strings"),
    ],
)
def test_an_inconsistent_class_list_is_rejected(change: dict[str, Any], fact: str, tmp_path: Path) -> None:
    text = json.dumps(json.loads(fat.ClassList.of(["a", "b"]).dumps()) | change)
    save_file(fat.FAT(TINY).state_dict(), tmp_path / "w.safetensors", {"fat_classes": text})
    with pytest.raises(ValueError, match=f"fat_classes in its header is not a class list.*{fact}"):
        fat.read_info(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "training", ['{"size": 31}', '{"size": 1e9}', '{"crop_pct": 0}', '{"crop_pct": NaN}', "[]", "{"]
)
def test_invalid_training_facts_are_rejected(training: str, tmp_path: Path) -> None:
    save_file(fat.FAT(TINY).state_dict(), tmp_path / "w.safetensors", {"fat_training": training})
    with pytest.raises(ValueError, match="fat_training in its header does not describe a training"):
        fat.read_info(tmp_path / "w.safetensors")


@pytest.mark.parametrize(("count", "complete"), [(21_841, True), (1_000_000, False)])
def test_a_weights_file_stays_readable_with_any_number_of_classes(count: int, complete: bool, tmp_path: Path) -> None:
    classes = fat.ClassList.of([f"n{i:08}" for i in range(count)], [f"name of {i}, or another" for i in range(count)])
    path = tmp_path / "w.safetensors"
    fat.save_weights(fat.FAT(TINY), path, info=fat.WeightsInfo(classes=classes, size=64))
    info = fat.read_info(path)
    assert info.classes is not None
    assert (info.classes.count, info.classes.digest) == (count, classes.digest)
    assert (info.classes == classes) == complete
    assert (info.config, info.size) == (TINY, 64)
    assert fat.load_model(path).config == TINY


# -- files of a run ----------------------------------------------------------------------------------------------


def test_checkpoint_weights_and_run_folder_contain_the_classes_and_the_image_size(trained: Path) -> None:
    (checkpoint,) = (trained / "checkpoints").iterdir()
    for path in (trained / "weights-last.safetensors", checkpoint / "state.safetensors"):
        info = fat.read_info(path)
        assert info.classes is not None
        assert info.classes.folders == tuple(FOLDERS)
        assert (info.size, info.crop_pct) == (32, 0.9)
        assert info.config is not None
        assert info.config.drop_path == 0
    assert fat.read_info(trained / "weights-last.safetensors").step == 2
    assert fat.ClassList.loads((trained / "classes.json").read_text()).folders == tuple(FOLDERS)


def test_the_state_of_a_checkpoint_can_be_loaded_as_a_weights_file(trained: Path) -> None:
    (checkpoint,) = (trained / "checkpoints").iterdir()
    with pytest.warns(UserWarning, match="removed 'model/' from the parameter names"):
        loaded = fat.load_model(checkpoint / "state.safetensors")
    assert torch.equal(loaded.head.weight, load_file(trained / "weights-last.safetensors")["head.weight"])


# -- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "fact"),
    [
        (rename, "2 removed: 0_zero, 1_one; 2 added: other_0_zero, other_1_one"),
        (swap, "in another order: class 0 was 0_zero and is now 1_one"),
        (lambda entries: entries.append({"folder": "ten", "name": None}), "1 added: ten"),
    ],
)
def test_a_run_is_not_resumed_with_other_classes(
    *, edit: Edit, fact: str, trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    other = with_classes(digits, tmp_path / "set", edit)
    assert run(train, *SMALL, "--data", other, "--out", out, "--stop-after", "3", "--crop-pct", "0.9") == 2
    assert f"saved by a run with other classes ({fact})" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_another_validation_split(
    trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best accuracy so far would be compared with the accuracy on other images."""
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.copytree(digits, tmp_path / "set")
    options = ("--out", out, "--stop-after", "3", "--crop-pct", "0.9")

    def other_index(manifest: dict[str, Any]) -> None:
        manifest["splits"]["val"]["index_hash"] = "0" * 16

    def without(manifest: dict[str, Any]) -> None:
        del manifest["splits"]["val"]

    for edit, now in ((other_index, "0000000000000000"), (without, "None")):
        edit_manifest(tmp_path / "set", edit)
        assert run(train, *SMALL, "--data", tmp_path / "set", *options) == 2
        error = capsys.readouterr().err
        assert "saved by a run with other options (val_index was " in error
        assert f", now {now})" in error


def test_a_validation_split_can_be_added_on_resume_with_a_warning(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits, tmp_path / "set")
    edit_manifest(tmp_path / "set", lambda manifest: manifest["splits"].pop("val"))
    options = (*SMALL, "--out", tmp_path / "run")
    assert run(train, *options, "--data", tmp_path / "set", "--stop-after", "1") == 0
    assert run(train, *options, "--data", digits, "--stop-after", "2", "--crop-pct", "0.8") == 0
    shown = "".join(capsys.readouterr().err.split())
    assert "warning:thedatasethadnovalidationsplit,andhasonenow" in shown
    assert "warning:crop_pctwas0.875,now0.8" in shown


# -- evaluation --------------------------------------------------------------------------------------------------


def test_the_size_and_crop_of_the_training_are_used_and_printed(
    trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = (trained / "checkpoints").iterdir()
    figures = []
    for model in (trained, checkpoint, trained / "weights-last.safetensors"):
        out = tmp_path / "figures.json"
        assert run(evaluate, model, "--data", digits, *QUICK, "--json", out) == 0
        shown = capsys.readouterr()
        assert ", step 2: 64 images of split 'val'" in shown.out
        assert "size 32, crop 0.9" in shown.out
        assert "note:" not in shown.err
        figures.append(json.loads(out.read_text()))
    assert {(entry["loss"], entry["size"], entry["crop_pct"], entry["step"]) for entry in figures} == {
        (figures[0]["loss"], 32, 0.9, 2)
    }
    assert list(figures[0]["classes"]) == FOLDERS


def test_evaluating_the_newest_checkpoint_names_the_best_one(
    trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = CheckpointFolder(Path(shutil.copytree(trained, tmp_path / "run")) / "checkpoints")
    best, _ = folder.newest()
    assert best is not None
    folder = CheckpointFolder(folder.folder, info=best.info())
    newest = folder.save(best.load(), Progress(step=3, epoch_step=3, best=best.progress.best), best.fingerprint)
    for model in (tmp_path / "run", best.path):
        assert run(evaluate, model, "--data", digits, *QUICK, "--size", "32") == 0
        err = capsys.readouterr().err
        note = f"note: {newest} is the newest checkpoint; the best weights are those of step 2 (--best)"
        assert (note in err) == (model != best.path)


def classes_of(*folders: str) -> fat.ClassList:
    return fat.ClassList.of(folders)


def test_the_same_classes_in_another_order_are_mapped_by_folder(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = fat.WeightsInfo(classes=classes_of(*FOLDERS[::-1]), size=32)
    path = constant_weights(tmp_path / "w.safetensors", 0, info=info)
    out = tmp_path / "figures.json"
    assert run(evaluate, path, "--data", digits, "--json", out) == 0
    assert "has the model's classes in another order; mapped by folder name" in capsys.readouterr().err
    classes = json.loads(out.read_text())["classes"]
    assert {folder: entry["top1"] for folder, entry in classes.items()} == {f: float(f == "9_nine") for f in FOLDERS}


def test_with_a_subset_of_the_models_classes_only_their_outputs_are_compared(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's first choice is always a class that the set does not have, its second the set's third class."""
    classes = classes_of("a", "b", *FOLDERS)
    torch.manual_seed(0)
    model = fat.create_model("fat_b0", num_classes=12)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([5.0, 4, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0])
    fat.save_weights(model, tmp_path / "w.safetensors", info=fat.WeightsInfo(classes=classes, size=32))
    out = tmp_path / "figures.json"
    assert run(evaluate, tmp_path / "w.safetensors", "--data", digits, "--json", out) == 0
    assert "has 10 of the model's 12 classes: only their outputs are compared" in capsys.readouterr().err
    result = json.loads(out.read_text())
    assert {f for f, entry in result["classes"].items() if entry["top1"]} == {"2_two"}
    assert result["classes"]["2_two"]["name"] is None
    assert any("only their outputs" in note for note in result["notes"])


@pytest.mark.parametrize("where", ["run", "weights"])
def test_classes_that_the_model_was_not_trained_on_are_rejected_by_name(
    where: str, trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_classes(digits, tmp_path / "set", rename)
    model = trained if where == "run" else trained / "weights-last.safetensors"
    assert run(evaluate, model, "--data", other, *QUICK) == 2
    error = capsys.readouterr().err
    assert f"{model}: was not trained on 2 of the 10 classes of {other}: other_0_zero, other_1_one; its 10" in error
    assert error.count("\n") == 1


def test_weights_without_class_names_are_evaluated_with_a_note_if_the_number_of_classes_matches(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = constant_weights(tmp_path / "w.safetensors", 3, info=None)
    assert run(evaluate, path, "--data", digits, *QUICK, "--size", "32") == 0
    assert "w.safetensors has no class names: its 10 outputs are assumed to be the classes" in (capsys.readouterr().err)
    fewer = with_classes(digits, tmp_path / "set", lambda entries: entries.append({"folder": "ten", "name": None}))
    assert run(evaluate, path, "--data", fewer, *QUICK, "--size", "32") == 2
    assert "has 10 outputs and no class names" in capsys.readouterr().err


def test_evaluating_weights_of_another_tool_names_the_chosen_model(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fat.create_model("fat_b0", num_classes=10)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "state_dict_ema": dict(state)}, tmp_path / "w.pth")
    assert run(evaluate, tmp_path / "w.pth", "--data", digits, *QUICK, "--size", "32") == 0
    said = capsys.readouterr().err
    assert "note: " in said
    assert "weights of 'state_dict_ema.module' (a moving average" in said
    assert "does not record the image size of its training" in said


def test_classes_with_the_same_human_readable_name_are_counted_separately(
    trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def use_one_name(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            entry["name"] = "crane"

    other, out = with_classes(digits, tmp_path / "set", use_one_name), tmp_path / "figures.json"
    assert run(evaluate, trained, "--data", other, "--json", out) == 0
    result = json.loads(out.read_text())
    assert sum(entry["samples"] for entry in result["classes"].values()) == result["samples"] == 360
    assert {entry["name"] for entry in result["classes"].values()} == {"crane"}
    table = capsys.readouterr().out.split("hardest classes")[1].split("most frequent confusions")[0]
    assert table.count("crane") == 5
    assert sum(folder in table for folder in FOLDERS) == 5


def test_two_classes_of_one_folder_are_rejected(trained: Path, digits: Path, tmp_path: Path, capsys: Any) -> None:
    other = with_classes(digits, tmp_path / "set", lambda entries: entries[1].update(folder="0_zero"))
    assert run(evaluate, trained, "--data", other, *QUICK) == 2
    assert "several classes have the same folder name (0_zero)" in capsys.readouterr().err


def test_a_digest_is_accepted_for_the_same_classes_and_rejected_for_other_classes() -> None:
    model, data = Path("w.safetensors"), Path("set")
    full = classes_of("a", "b", "c")
    short = fat.ClassList.loads(full.dumps(limit=0))
    assert map_classes(short, 3, full, model=model, data=data) == (None, [])
    with pytest.raises(UserError, match="only a digest of its 3 class names; evaluate the run folder"):
        map_classes(short, 3, classes_of("a", "b"), model=model, data=data)


def test_a_run_whose_checkpoints_have_only_a_digest_reads_the_names_from_classes_json(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fat.weights.header.MAX_TEXT", 100)
    out = tmp_path / "run"
    assert run(train, *SMALL, "--data", digits, "--out", out, "--stop-after", "1") == 0
    info = fat.read_info(out / "weights-last.safetensors")
    assert info.classes is not None
    assert info.classes.folders is None
    other = with_classes(digits, tmp_path / "set", swap)
    assert run(evaluate, out, "--data", other, *QUICK) == 0
    assert "mapped by folder name" in capsys.readouterr().err
    assert run(train, *SMALL, "--data", other, "--out", out, "--stop-after", "2") == 2
    assert "in another order: class 0 was 0_zero and is now 1_one" in capsys.readouterr().err


# -- fine-tuning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "bias", "message"),
    [
        (FOLDERS, 3, "kept; the 10 classes are the same"),
        (FOLDERS[::-1], 6, "kept, with reordered rows; the 10 classes are the same in another order"),
        (["a", *FOLDERS[1:]], None, "newly initialized, because the weights have other classes (1 removed: a; 1 added"),
        (FOLDERS[:9], None, "newly initialized, because the weights have other classes (1 added: 9_nine)"),
        (None, 3, "kept, because it has the same number of outputs (10); the weights contain no class names"),
    ],
    ids=["same", "another order", "one other class", "one class fewer", "no names"],
)
def test_fine_tuning_keeps_reorders_or_replaces_the_classifier_by_its_classes(
    known: list[str] | None, bias: int | None, message: str, tmp_path: Path
) -> None:
    info = None if known is None else fat.WeightsInfo(classes=fat.ClassList.of(known))
    weights = constant_weights(tmp_path / "w.safetensors", 3, info=info)
    recipe = Recipe(model=ModelConfig(weights=weights))
    model = build_model(recipe, 10)
    messages = load_initial_weights(model, recipe, fat.ClassList.of(FOLDERS), file_of_run=best_weights_file)
    assert [line for line in messages if message in line]
    ones = (model.head.bias == 1).nonzero().flatten().tolist()
    assert ones == ([] if bias is None else [bias])


@pytest.mark.parametrize("how", ["dry run", "training"])
def test_fine_tuning_reports_the_decision_on_the_classifier_before_training(
    how: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = constant_weights(tmp_path / "w.safetensors", 3, info=fat.WeightsInfo(classes=classes_of(*FOLDERS[::-1])))
    still = ("--lr", "0", "--min-lr", "0", "--warmup-lr", "0", "--stop-after", "1", "--out", tmp_path / "run")
    options = (*SMALL, *still, "--data", digits, "--weights", weights)
    assert run(train, *options, *(["--dry-run"] if how == "dry run" else [])) == 0
    shown = capsys.readouterr()
    assert "classifier: kept, with reordered rows" in " ".join((shown.out + shown.err).split())
    if how == "training":
        assert load_file(tmp_path / "run" / "weights-last.safetensors")["head.bias"].argmax() == 6
        assert run(train, *options) == 0  # resumes: the weights come from the checkpoint
        assert "classifier:" not in capsys.readouterr().err


def test_a_folder_without_weights_is_rejected_as_weights(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train, *SMALL, "--data", digits, "--weights", tmp_path, "--out", tmp_path / "run") == 2
    assert f"--weights {tmp_path}: contains no weights file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
