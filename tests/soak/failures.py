"""The failures: each function makes one happen, and returns how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

from tests.soak.job import Allocation
from tests.soak.nodes import Node
from tests.soak.storage import Storage
from tests.support.damage import flip_a_bit
from tests.support.damages import KINDS as DAMAGES
from tests.support.damages import damage

SHORT_SECONDS = (1.0, 4.0)
"""Of short stops and link cuts: much shorter than the hang timeout."""
DEGRADED_SECONDS = (3.0, 6.0)
"""Of slow links, and of slow and full disks."""
QUEUE_SECONDS = (1.0, 3.0)
"""Between a preemption or requeue and the next start."""
GRACE_SECONDS = 60.0
"""For which a preempted run may save, as SLURM's KillWait and GraceTime; on a busy machine."""


class Scene(Protocol):
    """What failures act on."""

    nodes: list[Node]
    storage: Storage
    run: Path
    data: Path
    pids: dict[int, int]
    """Process ids by rank."""
    placement: list[int]
    next: Allocation

    def running(self) -> list[int]:
        """Return the ranks that are running."""

    def damage_samples(self, ids: list[int]) -> None:
        """Note that samples are damaged from now on."""


@dataclass
class Effect:
    """A failure that has happened."""

    detail: str
    seconds: float | None = 0.0
    """After which it ends by itself or is undone; None: when no other rank runs any more."""
    undo: Callable[[], object] = lambda: None
    stopped: tuple[int, ...] = ()
    """Processes that are stopped, and cannot end by themselves."""
    kill_after: float | None = None
    """Seconds after which SLURM would kill all ranks."""


def kill_rank(scene: Scene, draw: Random) -> Effect:
    rank = draw.choice(scene.running())
    _signal(scene.pids[rank], signal.SIGKILL)
    return Effect(f"rank {rank} of {len(scene.placement)}")


def kill_all(scene: Scene, draw: Random) -> Effect:
    for pid in scene.pids.values():
        _signal(pid, signal.SIGKILL)
    return Effect(f"{len(scene.pids)} ranks")


def short_stop(scene: Scene, draw: Random) -> Effect:
    rank, seconds = draw.choice(scene.running()), draw.uniform(*SHORT_SECONDS)
    pid = scene.pids[rank]
    _signal(pid, signal.SIGSTOP)
    return Effect(f"rank {rank} for {seconds:.1f} s", seconds, lambda: _signal(pid, signal.SIGCONT))


def long_stop(scene: Scene, draw: Random) -> Effect:
    rank, way = draw.choice(scene.running()), draw.choice((signal.SIGCONT, signal.SIGKILL))
    pid = scene.pids[rank]
    _signal(pid, signal.SIGSTOP)
    return Effect(f"rank {rank}, then {way.name}", None, lambda: _signal(pid, way), stopped=(pid,))


def short_link_cut(scene: Scene, draw: Random) -> Effect:
    node, seconds = _node(scene, draw), draw.uniform(*SHORT_SECONDS)
    node.host.unplug()
    return Effect(f"{node.name} for {seconds:.1f} s", seconds, node.host.plug_in)


def long_link_cut(scene: Scene, draw: Random) -> Effect:
    node = _node(scene, draw)
    node.host.unplug()
    return Effect(node.name, None, node.host.plug_in)


def slow_link(scene: Scene, draw: Random) -> Effect:
    node, seconds, rate = _node(scene, draw), draw.uniform(*DEGRADED_SECONDS), draw.choice(("4mbit", "8mbit", "16mbit"))
    node.host.limit_rate(rate)
    return Effect(f"{node.name} at {rate} for {seconds:.1f} s", seconds, node.host.unlimit_rate)


def slow_disk(scene: Scene, draw: Random) -> Effect:
    seconds = draw.uniform(*DEGRADED_SECONDS)
    scene.storage.slow_down(draw)
    return Effect(f"for {seconds:.1f} s", seconds, scene.storage.speed_up)


def full_disk(scene: Scene, draw: Random) -> Effect:
    seconds = draw.uniform(*DEGRADED_SECONDS)
    scene.storage.fill()
    return Effect(f"for {seconds:.1f} s", seconds, scene.storage.free)


def damaged_checkpoint(scene: Scene, draw: Random) -> Effect:
    """Kill all ranks, and damage a file of the newest checkpoint in the run folder or on rank 0's node."""
    kill_all(scene, draw)
    on_node = draw.random() < 0.4
    damages = tuple(kind for kind in DAMAGES if kind != "forbid")  # root may read everything
    effect = Effect("")

    def apply() -> None:
        folders = [scene.nodes[scene.placement[0]].local] if on_node else [scene.run / "checkpoints"]
        found = sorted(
            (path for folder in folders for path in folder.rglob("step-*") if path.is_dir()), key=lambda path: path.name
        )
        if found and any(path.is_file() for path in found[-1].iterdir()):
            where = "local " if on_node else ""
            effect.detail = f"{where}{found[-1].name}: {damage(found[-1], draw, kinds=damages)}"
        else:
            effect.detail = "there was no checkpoint"

    scene.next.before.append(apply)
    return effect


def damaged_shard(scene: Scene, draw: Random) -> Effect:
    ids = sorted(draw.sample(range(100, 900), 3))
    for sample in ids:
        flip_a_bit(scene.data, sample)
    scene.damage_samples(ids)
    return Effect(f"samples {ids}")


def node_removed(scene: Scene, draw: Random) -> Effect:
    index = draw.choice(scene.placement)
    node = scene.nodes[index]
    node.host.unplug()
    node.kill()
    scene.next.placement = [other for other in scene.placement if other != index]

    def repair() -> None:
        node.wipe()
        node.host.plug_in()

    return Effect(node.name, None, repair)


def node_added(scene: Scene, draw: Random) -> Effect:
    free = [index for index in range(len(scene.nodes)) if index not in scene.placement]
    index, place = draw.choice(free), draw.randint(0, len(scene.placement))
    (scene.run / "PREEMPT").touch()
    scene.next.placement = [*scene.placement[:place], index, *scene.placement[place:]]
    return Effect(f"{scene.nodes[index].name} as rank {place}", kill_after=GRACE_SECONDS)


def preemption(scene: Scene, draw: Random) -> Effect:
    way = draw.choice(("SIGTERM", "SIGUSR2", "PREEMPT"))
    if way == "SIGTERM":
        for pid in scene.pids.values():
            _signal(pid, signal.SIGTERM)
    elif way == "SIGUSR2":
        _signal(scene.pids[draw.choice(scene.running())], signal.SIGUSR2)
    else:
        (scene.run / "PREEMPT").touch()
    _requeue(scene, draw)
    return Effect(f"{way}, {scene.next.wait:.1f} s in the queue", kill_after=GRACE_SECONDS)


def requeue(scene: Scene, draw: Random) -> Effect:
    kill_all(scene, draw)
    _requeue(scene, draw)
    names = [scene.nodes[index].name for index in scene.next.placement]
    return Effect(f"to {', '.join(names)}, {scene.next.wait:.1f} s in the queue")


def clock_step(scene: Scene, draw: Random) -> Effect:
    seconds = draw.choice((-1, 1)) * draw.choice((2.0, 60.0, 3600.0, 86400.0))
    nodes = scene.nodes if draw.random() < 0.4 else [_node(scene, draw)]
    for node in nodes:
        node.clock.step(seconds)
    return Effect(f"{' '.join(node.name for node in nodes)} by {seconds:+.0f} s")


def _requeue(scene: Scene, draw: Random) -> None:
    """Start on other nodes, which have no local checkpoints, after some time in the queue."""
    scene.next.placement = draw.sample(range(len(scene.nodes)), len(scene.next.placement))
    scene.next.wait = max(scene.next.wait, draw.uniform(*QUEUE_SECONDS))
    scene.next.wipe = True


def _node(scene: Scene, draw: Random) -> Node:
    return scene.nodes[scene.placement[draw.choice(scene.running())]]


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


INJECT: dict[str, Callable[[Scene, Random], Effect]] = {
    function.__name__.replace("_", " "): function
    for function in (
        *(kill_rank, kill_all, short_stop, long_stop, short_link_cut, long_link_cut, slow_link, slow_disk, full_disk),
        *(damaged_checkpoint, damaged_shard, node_removed, node_added, preemption, requeue, clock_step),
    )
}
