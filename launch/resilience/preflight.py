"""Preflight checks of a run on several nodes: all must have the same data, run folder, code and libraries.

The first rank of each node collects the properties of its node, and all ranks exchange them. The error names the nodes
that differ from the majority. If they are a minority, RUN/status lists them, so that the next start excludes them.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from launch.config.recipe import Recipe
from launch.machine.provenance import libraries
from launch.machine.world import World, broadcast_from_rank0
from launch.run.files import read_regular, unwritable
from launch.run.status import write_status
from shards.errors import UserError
from shards.files.durable import durable_write
from shards.files.temporary import temporary_folder
from shards.format.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from shards.memory import GIB

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shards", "pipeline", "fat", "launch")
# Five checkpoints of B3 (the newest three, the best, and one being written) take 1.7 GiB.
MIN_FREE_IN_RUN = 4 * GIB
# Libraries unpack and compile files in /tmp; when it is full, they raise errors that do not mention it.
MIN_FREE_IN_TMP = GIB
# A network file system may cache the absence of a file for some seconds.
VISIBLE_WITHIN_SECONDS = 15.0
MIN_CORES_PER_GPU = 2


class PreflightFailed(UserError):
    """Some nodes differ from the majority; another start may succeed without them."""

    exit_code = 1


@dataclass(frozen=True)
class Facts:
    """Properties of one node; the fields in `COMPARED` must be equal on all nodes."""

    data: str
    """Hash of the shard set's manifest and index sizes, the URL of a remote set, or the error of a failed read."""
    run_folder: str
    code: str
    libraries: str
    host: str
    run_free: int
    tmp_free: int
    cores: int


COMPARED = ("data", "run_folder", "code", "libraries")


def preflight(recipe: Recipe, world: World) -> list[str]:
    """Compare the nodes, and return warnings. Collective.

    Raises:
        PreflightFailed: some nodes differ from the majority; the message names them and the differences.
    """
    if world.local_size == world.size:
        return []
    run = recipe.run.out
    token = broadcast_from_rank0(lambda: write_token(run), world)
    own = collect_facts(recipe, world, token) if world.local_rank == 0 else None
    nodes = [facts for facts in world.gather(own) if facts is not None]
    if world.is_main:
        token_file(run).unlink(missing_ok=True)
    bad = differences(nodes)
    if bad:
        reason = "; ".join(f"{host}: {', '.join(what)}" for host, what in bad.items())
        if world.is_main:
            write_status(run, "failed", reason=reason, nodes=minority(bad, len(nodes)))
        raise PreflightFailed(f"nodes that differ from the others: {reason}; correct or exclude these nodes, and retry")
    return shortages(nodes, gpus=world.device.type == "cuda")


def collect_facts(recipe: Recipe, world: World, token: str) -> Facts:
    """Collect the properties of this node."""
    return Facts(
        data=data_hash(recipe),
        run_folder="shared" if finds_token(recipe.run.out, token) else "not shared with rank 0",
        code=source_hash(),
        libraries=libraries(),
        host=world.host,
        run_free=_free(recipe.run.out),
        tmp_free=_free(temporary_folder()),
        cores=world.cores,
    )


def differences(nodes: list[Facts]) -> dict[str, list[str]]:
    """Return the differences from the majority, by host.

    The first node is the reference if there is no majority, and always for the run folder: rank 0 writes to it.
    """
    bad: dict[str, list[str]] = {}
    for name in COMPARED:
        seen = [(facts.host, getattr(facts, name)) for facts in nodes]
        for host, difference in unlike_majority(name.replace("_", " "), seen, first_is_right=name == "run_folder"):
            bad.setdefault(host, []).append(difference)
    return bad


def unlike_majority(
    what: str, values: Sequence[tuple[str, object]], *, first_is_right: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield (host, difference) of the hosts whose value differs from that of the majority.

    Args:
        what: name of the property.
        values: (host, value) of each node.
        first_is_right: whether the value of the first node is the expected one, instead of the most frequent one.
    """
    seen = [value for _, value in values]
    if not seen:
        return
    expected = seen[0] if first_is_right else Counter(seen).most_common(1)[0][0]
    for host, value in values:
        if value != expected:
            yield host, f"{what} {value}, expected {expected}"


def minority(bad: Collection[str], count: int) -> list[str]:
    """Return the hosts that the next start should exclude: those in `bad`, if they are a minority of `count` nodes."""
    return list(bad) if 2 * len(bad) < count else []


def shortages(nodes: list[Facts], *, gpus: bool) -> list[str]:
    """Return warnings about nodes with little disk space or few cores."""
    lines = []
    requirements = (("run_free", MIN_FREE_IN_RUN, "run folder"), ("tmp_free", MIN_FREE_IN_TMP, "temporary folder"))
    for name, minimum, what in requirements:
        free = {facts.host: getattr(facts, name) for facts in nodes}
        short = [f"{host} ({found / GIB:.1f} GiB)" for host, found in free.items() if found < minimum]
        if short:
            lines.append(f"warning: less than {minimum / GIB:.0f} GiB free in the {what} on {', '.join(short)}")
    short_of_cores = [facts.host for facts in nodes if gpus and facts.cores < MIN_CORES_PER_GPU]
    if short_of_cores:
        lines.append(f"warning: {one_core_per_gpu(short_of_cores)}")
    return lines


def one_core_per_gpu(hosts: Sequence[str]) -> str:
    """Return the message about hosts with fewer than `MIN_CORES_PER_GPU` cores per GPU."""
    return (
        f"only one CPU core per GPU on {', '.join(hosts)}, which slows the input pipeline; "
        "request more from SLURM (--exclusive or --cpus-per-task)"
    )


def data_hash(recipe: Recipe) -> str:
    """Hash the manifest of the shard set, which holds the hashes of all other files, and the sizes of the indexes.

    Instead of the hash, return the URL of a set on a server, or the error if the files cannot be read.
    """
    location = recipe.data.location()
    if not isinstance(location, Path):
        return location
    try:
        digest = xxhash.xxh3_64(read_regular(location / MANIFEST_NAME, limit=MAX_MANIFEST_BYTES))
        for index in sorted(location.glob("*.index.npy")):
            digest.update(f"{index.name} {index.stat().st_size}".encode())
        return digest.hexdigest()
    except OSError as error:
        return f"{location}: {error.strerror}"


def write_token(run: Path) -> str:
    """Write a random token to a file in the run folder for the other nodes to find, and return the token."""
    token = secrets.token_hex(8)
    try:
        run.mkdir(parents=True, exist_ok=True)
        durable_write(token_file(run), token.encode())
    except OSError as error:
        raise unwritable(run, error) from error
    return token


def token_file(run: Path) -> Path:
    return run / ".preflight"


def finds_token(run: Path, token: str, within: float = VISIBLE_WITHIN_SECONDS) -> bool:
    """Return whether rank 0's token appears in this node's run folder within `within` seconds."""
    end = time.monotonic() + within
    while True:
        try:
            if read_regular(token_file(run), limit=len(token)) == token.encode():
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def source_hash() -> str:
    """Hash this project's source files, of which nodes may have different copies."""
    digest = xxhash.xxh3_64()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def _free(folder: Path) -> int:
    """Return the free bytes of the file system that holds `folder`, which may not exist yet."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free
