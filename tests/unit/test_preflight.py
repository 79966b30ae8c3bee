"""Preflight checks: comparison of the nodes before a run."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from launch.config.command_line import parse
from launch.machine.world import World
from launch.resilience.preflight import (
    GIB,
    Facts,
    collect_facts,
    data_hash,
    differences,
    finds_token,
    minority,
    shortages,
    source_hash,
    token_file,
    write_token,
)

GOOD = Facts("abc", "shared", "def", "torch 2", "n0", 100 * GIB, 100 * GIB, 8)


def test_equal_nodes_have_no_differences() -> None:
    assert differences([GOOD, dataclasses.replace(GOOD, host="n1", run_free=1, cores=1)]) == {}


def test_a_node_that_differs_is_reported_with_both_values() -> None:
    odd = dataclasses.replace(GOOD, host="n2", libraries="torch 3", data="/set: No such file or directory")
    assert differences([GOOD, dataclasses.replace(GOOD, host="n1"), odd]) == {
        "n2": ["data /set: No such file or directory, expected abc", "libraries torch 3, expected torch 2"]
    }


def test_the_first_node_may_be_the_one_that_differs() -> None:
    """Except for the run folder: the first node writes to it, so its folder is the reference."""
    others = [dataclasses.replace(GOOD, host=f"n{i}", data="def", run_folder="another") for i in (1, 2, 3)]
    found = differences([GOOD, *others])
    assert found["n0"] == ["data abc, expected def"]
    assert all(found[node.host] == ["run folder another, expected shared"] for node in others)


def test_only_a_minority_is_excluded_from_the_next_start() -> None:
    assert minority(["n1"], 3) == ["n1"]
    assert minority(["n1"], 2) == []
    assert minority(["n1", "n2"], 3) == []


def test_warnings_about_shortages_name_the_nodes() -> None:
    poor = dataclasses.replace(GOOD, host="n1", run_free=GIB, tmp_free=0, cores=1)
    disk, tmp, cores = shortages([GOOD, poor], gpus=True)
    assert "less than 4 GiB free in the run folder on n1 (1.0 GiB)" in disk
    assert "temporary folder on n1" in tmp
    assert "only one CPU core per GPU on n1" in cores
    assert shortages([GOOD], gpus=True) == []


def test_the_hash_detects_a_changed_or_missing_set(tmp_path: Path, digits: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    before = data_hash(parse(["--data", str(copy)]))
    assert before == data_hash(parse(["--data", str(digits)]))
    with (copy / "train.index.npy").open("ab") as index:
        index.write(b"more")
    assert data_hash(parse(["--data", str(copy)])) != before
    assert "No such file" in data_hash(parse(["--data", str(tmp_path / "absent")]))


def test_a_different_run_folder_is_detected(tmp_path: Path) -> None:
    token = write_token(tmp_path / "run")
    write_token(tmp_path / "other")
    assert finds_token(tmp_path / "run", token)
    assert not finds_token(tmp_path / "other", token, within=0)
    assert not finds_token(tmp_path / "absent", token, within=0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "link", "garbage"])
def test_a_token_of_another_user_is_neither_read_nor_overwritten(tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"years of work\xff")
    if kind == "fifo":
        os.mkfifo(token_file(tmp_path))
    elif kind == "link":
        token_file(tmp_path).symlink_to(precious)
    else:
        token_file(tmp_path).write_bytes(b"\xff" * 100)
    assert not finds_token(tmp_path, "0" * 16, within=0)
    assert finds_token(tmp_path, write_token(tmp_path))
    assert precious.read_bytes() == b"years of work\xff"


@pytest.mark.timeout(60)
def test_a_manifest_that_is_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "dataset.json")
    assert "not a regular file" in data_hash(parse(["--data", str(tmp_path)]))


def test_facts_of_this_machine(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    recipe = parse(["--data", str(digits), "--out", str(tmp_path / "run")])
    facts = collect_facts(recipe, World(0, 1, 0, 1, torch.device("cpu")), write_token(recipe.run.out))
    assert (facts.host, facts.run_folder, facts.code) == ("n7", "shared", source_hash())
    assert facts.run_free > 0
    assert "torch 2" in facts.libraries
