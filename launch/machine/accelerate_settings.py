"""Override accelerate's own configuration, so that the recipe alone decides how a model is trained.

`accelerate launch` reads HF_HOME/accelerate/default_config.yaml, which a user may have saved for another project, and
passes it on as environment variables. These would make accelerate compile, shard or cast the model, or move it to
the CPU, whatever the recipe says. Only the topology is kept: the numbers of processes and machines, and the ports.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from shards.errors import UserError

# Environment variable -> (entry of accelerate's configuration, option of the recipe that takes precedence).
_OVERRIDDEN = {
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
# Variables to keep: settings of accelerate's logging, and those that this project sets itself.
_KEPT = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_DISABLE_RICH", "ACCELERATE_DEBUG_MODE", "ACCELERATE_BYPASS_DEVICE_MAP")
_TRUE = ("true", "1", "yes", "on", "y", "t")
_UNSET = ("", "no", "none", "false", "0", "off", "auto")


def override_accelerate(environ: MutableMapping[str, str], *, cuda: bool) -> str:
    """Remove accelerate's training settings from `environ`. Call this before importing accelerate.

    Args:
        environ: environment of the process, modified in place.
        cuda: whether this process trains on a GPU.

    Returns:
        One line that names the overridden settings and the options of the recipe that replace them; empty if none.

    Raises:
        UserError: accelerate is configured to use the CPU, but this process trains on a GPU.
    """
    if cuda and environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE:
        raise UserError(
            "accelerate is configured to use the CPU (use_cpu in its configuration, or --cpu), but this machine has a "
            "GPU, which training would use; remove that setting ('accelerate config'), or hide the GPU with "
            "CUDA_VISIBLE_DEVICES=''"
        )
    overridden = []
    for variable, (entry, option) in _OVERRIDDEN.items():
        value = environ.get(variable, "").strip()
        # One accumulation step means no accumulation.
        if value.lower() in _UNSET or (value == "1" and entry == "gradient_accumulation_steps"):
            continue
        shown = entry if value.lower() in _TRUE else f"{entry} {value}"
        overridden.append(f"{shown} ({option})")
    for name in list(environ):
        if name.startswith(_PREFIXES) and name not in _KEPT:
            del environ[name]
    if not overridden:
        return ""
    return (
        "note: these settings of accelerate's configuration are ignored; the training option in brackets applies: "
        f"{', '.join(overridden)}"
    )
