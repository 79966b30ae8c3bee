"""Tasks that srun starts become ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.machine.slurm_tasks import adopt_slurm_task, first_host, tasks_per_node
from shards.errors import UserError

TASK = {
    "SLURM_STEP_NUM_TASKS": "18", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),2", "SLURM_STEP_NODELIST": "gpu[07-08,12]", "SLURM_JOB_ID": "123456",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")


def adopted(**changes: str | None) -> dict[str, str]:
    environment = {name: value for name, value in (TASK | changes).items() if value is not None}
    before = dict(environment)
    adopt_slurm_task(environment)
    return {name: value for name, value in environment.items() if before.get(name) != value}


def test_a_task_of_several_becomes_a_rank() -> None:
    assert adopted() == {
        "RANK": "9", "WORLD_SIZE": "18", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(10000 + 123456 % 20000),
    }  # fmt: skip
    assert adopted(SLURM_NODEID="2", SLURM_PROCID="17")["LOCAL_WORLD_SIZE"] == "2"


def test_a_rendezvous_that_is_set_is_kept() -> None:
    found = adopted(MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    assert not {"MASTER_ADDR", "MASTER_PORT"} & found.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"WORLD_SIZE": "4"},  # torchrun, or a choice of the user
        {"SLURM_STEP_NUM_TASKS": None},  # a batch script
        {"SLURM_STEP_NUM_TASKS": "1"},  # one task per node that runs a launcher, on one node
    ],
)
def test_other_processes_keep_their_environment(changes: dict[str, str | None]) -> None:
    assert adopted(**changes) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID: not set, although srun started several tasks"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID=x: expected a number"),
        ({"SLURM_NODEID": "3"}, "SLURM_NODEID=3: expected less than the 3 nodes of SLURM's step"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2"}, "SLURM_STEP_TASKS_PER_NODE=8(x2: expected a list such as 8(x2),4"),
    ],
)
def test_an_incomplete_environment_is_an_error(changes: dict[str, str | None], message: str) -> None:
    with pytest.raises(UserError) as error:
        adopted(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n0", "n0"), ("n0,n1", "n0"), ("n[0-3]", "n0"), ("gpu[07-09,12],x3", "gpu07"), ("a[3,5]-ib", "a3-ib"),
        ("rack[1-2]node[05-08]", "rack1node05"), ("x3,n[0-3]", "x3"),
    ],
)  # fmt: skip
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("text", "counts"), [("1", [1]), ("8(x3)", [8, 8, 8]), ("2,1", [2, 1]), ("4(x2),3", [4, 4, 3])]
)
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


def test_the_address_is_the_one_that_slurm_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$3 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=$3"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert adopted()["MASTER_ADDR"] == "10.1.2.3"
