"""A user's saved accelerate configuration does not change training, whatever `accelerate launch` derives from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.machine.accelerate_settings import override_accelerate
from shards.errors import UserError

BASE = "compute_environment: LOCAL_MACHINE\nmachine_rank: 0\nnum_machines: 1\nnum_processes: 1\nrdzv_backend: static\n"
NO = "distributed_type: 'NO'\n"

# Name -> (content of the saved configuration, settings that the note must name).
SAVED = {
    "fp16": (NO + "mixed_precision: fp16\n", ["mixed_precision fp16 (--precision)"]),
    "dynamo": (
        NO + "mixed_precision: 'no'\ndynamo_config:\n  dynamo_backend: INDUCTOR\n  dynamo_mode: max-autotune\n",
        ["dynamo_backend INDUCTOR (--compile)"],
    ),
    "cpu": (NO + "mixed_precision: 'no'\nuse_cpu: true\n", []),
    "plain": (NO + "mixed_precision: 'no'\n", []),
    "fsdp": (
        "distributed_type: FSDP\nmixed_precision: bf16\nfsdp_config:\n  fsdp_sharding_strategy: FULL_SHARD\n",
        ["FSDP (--zero)", "mixed_precision bf16 (--precision)"],
    ),
    "deepspeed": (
        "distributed_type: DEEPSPEED\nmixed_precision: bf16\ndeepspeed_config:\n  zero_stage: 2\n"
        "  gradient_accumulation_steps: 4\n  gradient_clipping: 1.0\n",
        ["DeepSpeed (--zero)", "gradient_accumulation_steps 4 (--micro-batch)", "gradient_clipping 1.0 (--clip-grad)"],
    ),
}
# Program that prints the settings that accelerate uses, and the variables that are left.
SHOW = """
import os, sys
from launch.machine.world import connect
connect()
from accelerate import Accelerator
accelerator = Accelerator()
state = accelerator.state
print(state.mixed_precision, state.dynamo_plugin.backend.value, accelerator.gradient_accumulation_steps,
      accelerator.distributed_type.value, sorted(n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))))
"""


def launched(home: Path, text: str, script: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with `accelerate launch` and a saved configuration."""
    (home / "accelerate").mkdir(parents=True)
    (home / "accelerate" / "default_config.yaml").write_text(BASE + text)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", str(script)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"HF_HOME": str(home), "PYTHONPATH": path}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("fp16", "plain", "deepspeed"))) for name in SAVED],
)
def test_a_saved_configuration_is_overridden_with_one_note(tmp_path: Path, name: str) -> None:
    text, facts = SAVED[name]
    (tmp_path / "show.py").write_text(SHOW)
    done = launched(tmp_path / "hf", text, tmp_path / "show.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "no NO 1 NO []"
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: these settings of accelerate")]
    assert len(notes) == bool(facts), done.stderr
    for fact in facts:
        assert fact in notes[0]


@pytest.mark.parametrize("value", ["true", "True", "1", "yes"])
def test_a_configuration_for_the_cpu_is_rejected_on_a_gpu(value: str) -> None:
    with pytest.raises(UserError, match=r"configured to use the CPU .* has a GPU.*CUDA_VISIBLE_DEVICES=''"):
        override_accelerate({"ACCELERATE_USE_CPU": value}, cuda=True)
    assert override_accelerate({"ACCELERATE_USE_CPU": value}, cuda=False) == ""


def test_options_of_the_launcher_are_overridden_too() -> None:
    environ = {"ACCELERATE_CPU_AFFINITY": "1", "ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_TP_DEGREE": "2"}
    line = override_accelerate(environ, cuda=False)
    assert line.endswith(": Megatron-LM (--zero), enable_cpu_affinity (--numa-binding)")
    assert environ == {}


def test_other_variables_are_kept() -> None:
    kept = {"PATH": "/bin", "RANK": "1", "ACCELERATE_LOG_LEVEL": "debug", "ACCELERATE_BYPASS_DEVICE_MAP": "true"}
    environ = kept | {"ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "FSDP_X": "1"}
    assert override_accelerate(environ, cuda=False) == ""
    assert environ == kept
