"""Before a run of several nodes starts: do all of them see the same data, run folder, code and libraries?

Each node's first rank looks, all exchange what they saw, and what most see is the yardstick. Nodes that differ are
named; if they are the minority, RUN/status lists them, so that the next start goes without them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

import torch.distributed as dist
import xxhash

from launch.config.recipe import Recipe
from launch.machine.network import host_name
from launch.machine.provenance import versions
from launch.machine.world import World, broadcast_from_rank0
from launch.run.files import unwritable
from launch.run.status import write_status
from pipeline.storage.remote_client import is_remote
from shards.errors import UserError
from shards.files.temporary import temporary_folder
from shards.format.manifest import MANIFEST_NAME

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shards", "pipeline", "fat", "launch")
GIB = 2**30
# The newest three checkpoints of B3, the best, and one being written take 1.7 GiB.
WANTED_IN_RUN = 4 * GIB
# What libraries unpack and compile there; a full /tmp fails runs in strange places.
WANTED_IN_TMP = GIB
# A network file system may go on saying for some seconds that a new file is not there.
SEEN_WITHIN_SECONDS = 15.0


class PreflightFailed(UserError):
    """Some nodes are not fit for the run, which may start without them."""

    exit_code = 1


@dataclass(frozen=True)
class Facts:
    """What one node sees. Equal on all nodes, but for the last four."""

    data: str
    run_folder: str
    code: str
    libraries: str
    host: str
    run_free: int
    tmp_free: int
    cores: int


def preflight(recipe: Recipe, world: World) -> list[str]:
    """Compare the nodes; returns warnings. Collective.

    Raises:
        PreflightFailed: names the nodes and what is wrong with them.
    """
    if world.local_size == world.size:
        return []
    run = recipe.run.out
    token = broadcast_from_rank0(lambda: leave_token(run), world)
    mine = look(recipe, world, token) if world.local_rank == 0 else None
    everyone: list[Facts | None] = [mine] * world.size
    dist.all_gather_object(everyone, mine)
    nodes = [facts for facts in everyone if facts is not None]
    if world.is_main:
        token_file(run).unlink(missing_ok=True)
    bad = differences(nodes)
    if bad:
        reason = "; ".join(f"{host}: {', '.join(what)}" for host, what in bad.items())
        if world.is_main:
            write_status(run, "failed", reason=reason, nodes=to_leave_out(bad, len(nodes)))
        raise PreflightFailed(f"nodes that differ from the others: {reason}")
    return shortages(nodes, gpus=world.device.type == "cuda")


def look(recipe: Recipe, world: World, token: str) -> Facts:
    """This node's facts."""
    return Facts(
        data=seen_data(recipe),
        run_folder="shared" if sees(recipe.run.out, token) else "not the one that rank 0 writes to",
        code=source_hash(),
        libraries=", ".join(f"{name} {found}" if found else f"no {name}" for name, found in versions().items()),
        host=host_name(),
        run_free=_free(recipe.run.out),
        tmp_free=_free(temporary_folder()),
        cores=world.cores,
    )


def differences(nodes: list[Facts]) -> dict[str, list[str]]:
    """Per node that does not see what most see: what it sees instead. The first node is right where there is no
    majority, and about the run folder: its is the one that is written to."""
    bad: dict[str, list[str]] = {}
    for field in fields(Facts)[:4]:
        seen = [getattr(facts, field.name) for facts in nodes]
        right = seen[0] if field.name == "run_folder" else Counter(seen).most_common(1)[0][0]
        for facts, value in zip(nodes, seen, strict=True):
            if value != right:
                bad.setdefault(facts.host, []).append(f"{field.name.replace('_', ' ')} {value}, not {right}")
    return bad


def to_leave_out(bad: Collection[str], count: int) -> list[str]:
    """Hosts that the next start should do without: those of `count` that differ, if they are the minority."""
    return list(bad) if 2 * len(bad) < count else []


def shortages(nodes: list[Facts], *, gpus: bool) -> list[str]:
    """Warnings about what may not suffice."""
    lines = []
    looked = (("run_free", WANTED_IN_RUN, "run folder"), ("tmp_free", WANTED_IN_TMP, "temporary folder"))
    for name, wanted, what in looked:
        free = {facts.host: getattr(facts, name) for facts in nodes}
        short = [f"{host} ({there / GIB:.1f} GiB)" for host, there in free.items() if there < wanted]
        if short:
            lines.append(f"warning: less than {wanted / GIB:.0f} GiB free in the {what} on {', '.join(short)}")
    starved = [facts.host for facts in nodes if gpus and facts.cores < 2]
    if starved:
        lines.append(
            f"warning: one core per GPU on {', '.join(starved)}: SLURM gives no more unless asked (--exclusive, "
            "--cpus-per-task)"
        )
    return lines


def seen_data(recipe: Recipe) -> str:
    """A hash of the shard set's manifest, which holds those of everything else, with the sizes of the indices."""
    location = recipe.data.location()
    if not isinstance(location, Path) or is_remote(str(location)):
        return str(location)
    try:
        digest = xxhash.xxh3_64((location / MANIFEST_NAME).read_bytes())
        for index in sorted(location.glob("*.index.npy")):
            digest.update(f"{index.name} {index.stat().st_size}".encode())
        return digest.hexdigest()
    except OSError as error:
        return f"{location}: {error.strerror}"


def leave_token(run: Path) -> str:
    """Write a word into the run folder that other nodes should find there."""
    token = f"{os.uname().nodename} {os.getpid()} {time.time_ns()}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        token_file(run).write_text(token, encoding="utf-8")
    except OSError as error:
        raise unwritable(run, error) from error
    return token


def token_file(run: Path) -> Path:
    return run / ".preflight"


def sees(run: Path, token: str, within: float = SEEN_WITHIN_SECONDS) -> bool:
    """Whether rank 0's word arrives here."""
    end = time.monotonic() + within
    while True:
        try:
            if token_file(run).read_text(encoding="utf-8") == token:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def source_hash() -> str:
    """Of the project's own code, which nodes may have copies of."""
    digest = xxhash.xxh3_64()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def _free(folder: Path) -> int:
    """Bytes free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free
