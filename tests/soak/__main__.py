"""Train through hundreds of failures: `python -m tests.soak --minutes 60 --seed 0` (`make soak`)."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from shards.errors import first_line
from tests.soak.data import digits
from tests.soak.nodes import some_nodes
from tests.soak.reference import References
from tests.soak.report import Soak
from tests.soak.round import run_round
from tests.soak.schedule import KINDS, rounds

NODES = 4


def main() -> int:
    args = arguments(sys.argv[1:])
    if os.getuid() != 0:
        raise SystemExit("error: the soak needs root, for network namespaces and mounts")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clean up as after Ctrl-C
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    kinds = tuple(kind for kind in KINDS if not args.kinds or kind.name in args.kinds)
    plans = rounds(args.seed, failures=args.failures, kinds=kinds)
    if args.round is not None:
        plans = itertools.islice(plans, args.round, args.round + 1)
    elif args.rounds is not None:
        plans = itertools.islice(plans, args.rounds)
    soak = Soak(args.seed, args.minutes)
    with some_nodes(NODES, folder) as nodes:
        data, references = digits(folder), References(folder, nodes)
        end = time.monotonic() + 60 * args.minutes
        for plan in plans:
            if time.monotonic() > end:
                break
            say(f"round {plan.number}: {plan.world} ranks, ZeRO {plan.zero}")
            evidence = folder / f"round-{plan.number}"
            try:
                result = run_round(
                    plan, nodes, references, data=data, folder=evidence, seed=args.seed, epochs=args.epochs,
                    pace=args.pace, say=lambda text: say(f"  {text}"),
                )  # fmt: skip
            except Exception as error:  # of the soak itself; the next rounds may still find faults
                traceback.print_exc()
                soak.violations.append(f"round {plan.number}: {type(error).__name__}: {first_line(error)}")
                say(f"  evidence: {evidence}; to repeat: {repetition(args, plan.number)}")
                continue
            soak.add(result)
            say(f"  {soak.progress()}")
            for violation in result.violations:
                say(f"  VIOLATION: {violation}")
            if result.violations:
                say(f"  evidence: {evidence}; to repeat: {repetition(args, plan.number)}")
            if args.json is not None:  # after every round, so that an interrupted soak has a result
                soak.write(args.json)
    print(soak.table())
    for violation in soak.violations:
        print(f"VIOLATION: {violation}")
    if args.json is not None:
        soak.write(args.json)
    if not soak.violations and args.folder is None:
        shutil.rmtree(folder)
    return int(bool(soak.violations))


def arguments(line: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no round after this time")
    parser.add_argument("--seed", type=int, default=0, help="seed of trainings and failures")
    parser.add_argument("--failures", type=int, default=22, help="failures per round")
    parser.add_argument("--round", type=int, help="run only this round, to reproduce it")
    parser.add_argument("--rounds", type=int, help="run at most this many rounds")
    parser.add_argument(
        "--kinds", nargs="+", choices=[kind.name for kind in KINDS], help="only these kinds of failures"
    )
    parser.add_argument("--epochs", type=int, default=4, help="epochs of 20 steps per round")
    parser.add_argument("--pace", type=float, default=0.2, help="minimum duration of a step in seconds")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument(
        "--folder", type=Path, help="folder for the evidence of violated invariants; default: a temporary one"
    )
    return parser.parse_args(line)


def say(text: str) -> None:
    print(text, flush=True)


def repetition(args: argparse.Namespace, number: int) -> str:
    """Return the command that repeats a round."""
    kinds = f" --kinds {' '.join(map(shlex.quote, args.kinds))}" if args.kinds else ""
    return (
        f"python -m tests.soak --seed {args.seed} --round {number} --failures {args.failures} --epochs {args.epochs} "
        f"--pace {args.pace}{kinds}"
    )


if __name__ == "__main__":
    sys.exit(main())
