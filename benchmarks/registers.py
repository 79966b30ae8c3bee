"""Compare the forms of the depthwise weight gradient by their machine code. Needs no GPU.

    python benchmarks/registers.py [--variants fat_b0 fat_b3] [--size 224] [--capability 90] [--walks]

Both forms (`fat/kernels/impl/tiles.py`) are compiled by the launch code, in bfloat16, for each shape that occurs in
training FAT. Columns of the table:

  kernel        kernel size and stride; "+ statistics": the kernel also applies the gradient of BatchNorm's statistics
  map           side of the gradient's feature map, and channels
  registers     per thread
  spilled       bytes of stack per thread
  shared        bytes of shared memory per program
  warps         warps per multiprocessor (of 64) that registers and shared memory allow
  lanes         fraction of the lanes that compute an element of the feature map
  instructions  of the innermost loop, per thread and element of the gradient, including idle lanes
  bytes         loaded in that loop from the L1 cache, per element of the gradient

Lower bounds per element: k^2 multiply-adds and, from memory, 4 bytes at stride 1 and 10 bytes at stride 2.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from fat.blocks import POOL_KERNEL
from fat.config import VARIANTS
from fat.kernels import ops
from fat.kernels.impl import tiles
from fat.kernels.prefill.launches import cuda_target, record

WARP, REGISTERS, SHARED, WARPS, PROGRAMS = 32, 1 << 16, 227 << 10, 64, 32  # limits of a Hopper multiprocessor
FORMS: dict[str, Callable[..., tiles.Strips | tiles.Patches]] = {"strips": tiles.strips, "patches": tiles.patches}
KERNELS = ("_strips", "_patches")


@dataclass(frozen=True)
class Shape:
    """A weight gradient of a depthwise convolution whose input is a square feature map of `side`."""

    kernel: int
    stride: int
    side: int
    channels: int
    statistics: bool

    @property
    def out(self) -> int:
        """Side of the gradient's feature map."""
        return -(-self.side // self.stride)

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride}" + " + statistics" * self.statistics

    def launch(self) -> None:
        """Call the operator with feature maps of one sample."""
        x, gradient = (
            torch.zeros(1, self.channels, side, side, dtype=torch.bfloat16).contiguous(
                memory_format=torch.channels_last
            )
            for side in (self.side, self.out)
        )
        if self.statistics:
            one = torch.zeros(self.channels)
            ops.depthwise_stats_gradient(gradient, x, gradient, one, one, one, self.kernel, self.stride)
        else:
            ops.depthwise_weight_gradient(gradient, x, self.kernel, self.stride)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["fat_b0", "fat_b3"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--capability", type=int, default=90, help="compute capability of the device: 80, 90")
    parser.add_argument("--walks", action="store_true", help="compare loops over rows of patches")
    options = parser.parse_args()
    columns = ("registers", "spilled", "shared", "warps", "lanes", "instructions", "bytes")
    print("| kernel | map | form | " + " | ".join(columns) + " |")
    print("|-|-|-|" + "-|" * len(columns))
    for shape in shapes(options.variants, options.size):
        forms: list[tuple[str, str, tiles.Walk | None]] = [(form, form, None) for form in FORMS]
        if options.walks:
            forms = [(str(walk), "patches", walk) for walk in tiles.walks(shape.kernel, shape.stride)]
        for name, form, walk in forms:
            found = measure(shape, form, options.capability, walk)
            cells = " | ".join(str(found[column]) for column in columns)
            print(f"| {shape} | {shape.out}x{shape.out}x{shape.channels} | {name} | {cells} |", flush=True)


def shapes(variants: list[str], size: int) -> list[Shape]:
    """Return the distinct shapes of all variants and layers."""
    found: dict[Shape, None] = {}
    for variant in variants:
        config = VARIANTS[variant]
        for stage, (width, kernel, window) in enumerate(
            zip(config.widths, config.kernels, config.windows, strict=True)
        ):
            side, hidden = size >> (stage + 2), width * config.ffn_ratio
            found[Shape(kernel, 1, side, width, False)] = None
            found[Shape(config.ffn_kernel, 1, side, hidden, True)] = None
            if stage + 1 < len(config.widths):
                found[Shape(config.ffn_kernel, 2, side, hidden, True)] = None
                found[Shape(POOL_KERNEL, 2, side, width, True)] = None
            for halved in range(1, window.bit_length() - 1):  # the second and later pooling steps of FASA
                found[Shape(POOL_KERNEL, 2, side >> halved, width, True)] = None
    return list(found)


def measure(shape: Shape, form: str, capability: int = 90, walk: tiles.Walk | None = None) -> dict[str, Any]:
    """Compile one shape in one form and return the columns of the table."""
    choose = FORMS[form] if walk is None else partial(tiles.patches, walk=walk)
    kernel = compiled(shape, choose, capability)
    launch = choose(shape.kernel, shape.stride, shape.out, shape.out, shape.channels)
    usage, instructions = disassemble(kernel.asm["cubin"])
    registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    threads, shared = launch.warps * WARP, kernel.metadata.shared
    programs = min(PROGRAMS, WARPS // launch.warps, REGISTERS // (-(-registers // 8) * 8 * threads))
    programs = min(programs, SHARED // (shared + 1024))
    # Positions and channels that all threads of a program process together in one iteration of the loop.
    if isinstance(launch, tiles.Strips):
        group, across, high = launch.columns, launch.cols, launch.rows
        passes = float(-(-shape.kernel // group))
    else:
        group, across, high = launch.tap_rows, launch.across, launch.walk.together
        passes = sum(walked(shape, launch)) / shape.out
    filled = [-(-length // unit) * unit for length, unit in ((shape.out, across), (shape.out, high))]
    filled.append(-(-shape.channels // launch.channels) * launch.channels)
    lanes = shape.out**2 * shape.channels / (filled[0] * filled[1] * filled[2])
    each = across * high * launch.channels * (launch.cols if isinstance(launch, tiles.Patches) else 1) / threads
    body = innermost(instructions)
    loaded = sum(
        {"U8": 1, "U16": 2, "64": 8, "128": 16}.get(op.split(".")[-1], 4) for op in body if op.startswith("LDG")
    )
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "warps": programs * launch.warps,
        "lanes": f"{lanes:.0%}",
        "instructions": round(len(body) * passes / each / lanes, 1),
        "bytes": round(loaded * passes / each / lanes, 1),
    }


def walked(shape: Shape, launch: tiles.Patches) -> Iterator[int]:
    """Yield the number of rows over which each group of kernel rows iterates: those that overlap the gradient."""
    pad = shape.kernel // 2
    for first in range(0, shape.kernel, launch.tap_rows):
        last = first + launch.tap_rows - 1
        yield min(shape.out, shape.out - (pad - last)) - max(0, first - pad) if shape.stride == 1 else shape.out


def compiled(shape: Shape, choose: Callable[..., tiles.Tile], capability: int) -> Any:
    """Compile the kernel of the chosen form as its launch on a device of that capability would."""
    import triton

    target = cuda_target(divmod(capability, 10))
    with mock.patch.object(tiles, "weight_gradient", choose):
        launch = next(launch for launch in record(shape.launch, target) if launch.name in KERNELS)
    return triton.compile(launch.source, target=target, options=launch.options)


def disassemble(binary: bytes) -> tuple[str, list[tuple[str, str]]]:
    """Return the resource usage printed by cuobjdump, and the code as (instruction, arguments) or (label, "")."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage, code = (
            subprocess.run([tools / tool, option, path], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    pattern = re.compile(
        r"^\s*(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][A-Z0-9_.]*)(.*);", re.MULTILINE
    )
    return usage, [(label or op, rest) for label, op, rest in pattern.findall(code)]


def innermost(code: list[tuple[str, str]]) -> list[str]:
    """Return the instructions of the shortest loop that contains a multiply-add."""
    at = {name: number for number, (name, _) in enumerate(code) if name.startswith(".L")}
    loops = []
    for number, (op, rest) in enumerate(code):
        target = re.search(r"\.L_x_\d+", rest)
        if op.startswith("BRA") and target and at[target[0]] < number:
            body = [name for name, _ in code[at[target[0]] : number + 1] if not name.startswith(".L")]
            if "FFMA" in body:
                loops.append(body)
    return min(loops, key=len)


if __name__ == "__main__":
    main()
