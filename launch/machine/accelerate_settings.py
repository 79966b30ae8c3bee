"""Overrule accelerate's own configuration: the recipe alone decides how a model is trained.

`accelerate launch` reads HF_HOME/accelerate/default_config.yaml, which a user may have saved for another project, and
passes it on as environment variables. accelerate would obey them in this process beside the recipe: compile, shard or
cast the model, or move it to the CPU. What remains of the configuration is the topology: processes, machines, ports.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from shards.errors import UserError

# Variable -> (entry of the configuration, option of the recipe that decides instead).
_DECIDED_HERE = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "--zero"),
    "ACCELERATE_USE_FSDP": ("FSDP", "--zero"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "--zero"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("parallelism_config", "--zero"),
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "--precision"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "--compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "--micro-batch"),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "--clip-grad"),
    "ACCELERATE_CPU_AFFINITY": ("enable_cpu_affinity", "--numa-binding"),
    "ACCELERATE_TORCH_DEVICE": ("device", "CUDA_VISIBLE_DEVICES"),
}
_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# How accelerate logs, and what this project sets itself.
_KEPT = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_DISABLE_RICH", "ACCELERATE_DEBUG_MODE", "ACCELERATE_BYPASS_DEVICE_MAP")
_SAYS_YES = ("true", "1", "yes", "on", "y", "t")
_SAYS_NOTHING = ("", "no", "none", "false", "0", "off", "auto")


def override_accelerate(environ: MutableMapping[str, str], *, cuda: bool) -> str:
    """Remove from `environ` what accelerate would do beside the recipe; call it before accelerate is imported.

    Args:
        environ: the process's environment, which is changed.
        cuda: this process trains on a GPU.

    Returns:
        One line that names what is overruled and the option that decides instead; empty where nothing is.

    Raises:
        UserError: the configuration asks for the CPU where there is a GPU.
    """
    if cuda and environ.get("ACCELERATE_USE_CPU", "").lower() in _SAYS_YES:
        raise UserError(
            "accelerate was told to use the CPU (use_cpu in its configuration, or --cpu), but here is a GPU, and that "
            "is what trains; leave that out ('accelerate config'), or hide the GPUs: CUDA_VISIBLE_DEVICES=''"
        )
    overruled = []
    for variable, (entry, option) in _DECIDED_HERE.items():
        value = environ.get(variable, "").strip()
        # One step of accumulation is none.
        if value.lower() in _SAYS_NOTHING or (value == "1" and entry == "gradient_accumulation_steps"):
            continue
        shown = entry if value.lower() in _SAYS_YES else f"{entry} {value}"
        overruled.append(f"{shown} ({option})")
    for name in list(environ):
        if name.startswith(_PREFIXES) and name not in _KEPT:
            del environ[name]
    if not overruled:
        return ""
    return f"note: accelerate's configuration is overruled by the options in brackets: {', '.join(overruled)}"
