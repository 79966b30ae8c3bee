"""Run a command of the documentation on tiny data: python tiny.py accelerate|python|pipeline ARGUMENTS...

Options that are added last override those of the page: B0, 32 pixels, 8 images per step, two steps. Commands that train
nothing run unchanged.
"""

import os
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
FAT = ["--variant", "b0"]
DATA = ["--size", "32", "--global-batch", "8"]
TRAINING = [*DATA, "--warmup-epochs", "0", "--stop-after", "2", "--log-every", "1"]
PROCESSES = {"8": "2", "16": "2"}


def shortened(name: str, arguments: list[str]) -> list[str]:
    """Return the arguments with those of a short run added."""
    if name == "accelerate":
        arguments = [PROCESSES.get(word, word) for word in arguments]
    script = next((word for word in arguments if word.endswith((".py", "launch.submit"))), "")
    model = [] if "--model" in arguments else FAT
    if script == "launch/train.py":
        sizes = ["--size-schedule", "0:32"] if "--size-schedule" in arguments else []
        return arguments + model + TRAINING + sizes
    if name == "pipeline" and arguments[:1] in (["bench"], ["tune"]):
        end = arguments.index("--") if "--" in arguments else len(arguments)
        shorter = ["--steps", "2"] if arguments[0] == "bench" else ["--seconds", "1"]
        return [*arguments[:end], *shorter, "--", *arguments[end + 1 :], *model, *DATA]
    if name == "pipeline" and arguments[:2] == ["sample", "photos"] and "60" not in arguments:
        return [*arguments, "--count", "40"]
    return arguments


if __name__ == "__main__":
    _, name, *arguments = sys.argv
    os.execv(BIN / name, [str(BIN / name), *shortened(name, arguments)])
