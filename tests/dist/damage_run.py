"""Train, or read a set, after damage. Forked by test_damage.py.

    damage_run.py train [options of launch/train.py]
    damage_run.py read OUT [options of launch/train.py]

`read` writes a hash of all batches of one epoch and of the evaluation to OUT.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch
import xxhash

from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import World, run_command
from launch.resilience.stop_signals import StopSignals
from launch.train import run_recipe
from pipeline.batch import Batch

_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2
_CAPABILITY_VERSION_3 = 0x20080522


def main() -> None:
    become_a_user()
    torch.set_num_threads(1)
    mode, *arguments = sys.argv[1:]
    commands = {
        "train": lambda: run_recipe(parse(arguments), StopSignals()),
        "read": lambda: read(Path(arguments[0]), arguments[1:]),
    }
    sys.exit(run_command(commands[mode]))


def read(out: Path, options: list[str]) -> int:
    feed = Feed.of(parse(options), World(0, 1, 0, 1, torch.device("cpu")))
    digest = xxhash.xxh3_128()

    def add(batch: Batch) -> None:
        for content in (batch.ids, batch.labels.numpy(), batch.images.contiguous().numpy()):
            digest.update(content.tobytes())

    with feed.train_loader(step=0, dtype=torch.float32) as loader:
        for _ in range(feed.plan.steps_per_epoch):
            add(next(loader))
    evaluation = feed.eval_loader(dtype=torch.float32)
    assert evaluation is not None
    with evaluation:
        for batch in evaluation:
            add(batch)
    out.write_text(digest.hexdigest())
    return 0


def become_a_user() -> None:
    """Drop root's capability to ignore file modes, which would hide the effect of `chmod 000`."""
    if os.geteuid() != 0:
        return

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Data(ctypes.Structure):
        _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))

    libc = ctypes.CDLL(None, use_errno=True)
    header, data = Header(_CAPABILITY_VERSION_3, 0), (Data * 2)()
    if libc.capget(ctypes.byref(header), data):
        raise OSError(ctypes.get_errno(), "capget")
    keep = ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    data[0].effective &= keep
    data[0].permitted &= keep
    if libc.capset(ctypes.byref(header), data):
        raise OSError(ctypes.get_errno(), "capset")
