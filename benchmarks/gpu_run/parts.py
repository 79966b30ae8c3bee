"""The parts of `benchmarks/gpu.py` (tests, benchmarks and training runs) in the order in which they run.

`contact` runs everything once: first tests in parallel, then timed parts one at a time. `measure` has only timed parts,
the most important first. Both together are expected to take at most `BUDGET` seconds. `sweep` (launch configurations),
`short-recipes` (stored pixels, progressive resizing) and `peers` (other models under torch.compile, a minute each) are
for additional time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / ".kit"  # folder of packages and compiled kernels for machines without access to a package index
PROFILES = ("contact", "measure", "sweep", "short-recipes", "peers")
BUDGET = 590.0  # seconds for `contact` and `measure` together
LIMIT = 2.0  # time limit of a part, as a multiple of its expected time
LEAST_LIMIT = 30.0  # minimum time limit in seconds: a cold disk or driver delays short parts by more than LIMIT allows

Command = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A test, benchmark or training run.

    Words of the commands may contain {out} (JSON file for results), {run} (empty folder for other output), {data},
    {site}, {caches} and {parts} (folders), {photos} (number of photos). The command `python` stands for
    `sys.executable`.
    """

    name: str
    profile: str
    commands: tuple[Command, ...]
    """Commands, run in sequence until one fails."""
    expected: float
    """Expected seconds on an H100 with 16 cores."""
    least: float
    """Seconds that must be left to start the part."""
    together: bool = False
    """Run in parallel with adjacent parts that also set this. Only for parts that time nothing."""
    after: tuple[str, ...] = ()
    """Names of parallel parts that must have ended before."""
    makes: tuple[str, ...] = ()
    """Paths in the work folder that the part creates for other parts. The part runs again if one of them is missing."""
    uses: tuple[str, ...] = ()
    """Paths in the work folder that other parts create."""
    files: tuple[Path, ...] = ()
    """Required files: if one is missing, the part is skipped."""
    modules: tuple[str, ...] = ()
    """Required modules: if one cannot be imported, the part is skipped."""
    environment: dict[str, str] = field(default_factory=dict)
    shown: int = 0
    """Number of output lines to print if the part passes."""
    on_cpu: Command = ()
    """Options that --cpu appends to the last command, to keep a rehearsal without a GPU small."""

    @property
    def available(self) -> bool:
        """Whether all required files exist."""
        return all(file.exists() for file in self.files)

    @property
    def limit(self) -> float:
        """Time limit in seconds."""
        return max(LIMIT * self.expected, LEAST_LIMIT)


def parts() -> list[Part]:
    """Return all parts in order."""
    return [*contact(), *measure(), *sweep(), *short_recipes(), *peers()]


def parts_of(profile: str) -> Callable[..., Part]:
    """Return a function that creates a part of the profile: `part(name, *commands, expected=..., ...)`."""

    def part(name: str, *commands: Command, **settings: Any) -> Part:
        return Part(name=name, profile=profile, commands=commands, **settings)

    return part


def contact() -> Iterator[Part]:
    """Yield the parts of `contact`. Longest chain of parallel parts: kit, photos-data, dali-check, digits-zero1."""
    part = parts_of("contact")
    yield part("facts", python("benchmarks/gpu_run/facts.py", "--out", "{out}"), expected=3, least=1, shown=24)
    packed_kernels = KIT / "triton-cache.tar.xz"
    yield part(
        "kernel-cache",
        python("-m", "tarfile", "-e", str(packed_kernels), "{caches}"),
        expected=3,
        least=1,
        makes=("{cache}",),
        files=(packed_kernels,),
        environment={"PYTHONWARNINGS": "ignore"},
    )
    yield part(
        "kit",
        ("bash", str(KIT / "unpack.sh"), "{site}", *map(str, sorted(KIT.glob("kit.tar.xz*")))),
        expected=10,
        least=5,
        together=True,
        makes=("site",),
        files=(KIT / "unpack.sh",),
    )
    yield part(
        "kernels-right",
        gpu_tests(5, *KERNEL_TESTS),
        expected=100,
        least=20,
        together=True,
        after=("kit",),
        environment=FEW_THREADS,
    )
    yield part(
        "digits-data",
        pipeline("sample", "digits", "{data}/digits"),
        pipeline("shard", "{data}/digits", "--out", "{data}/digits-shards"),
        expected=12,
        least=5,
        together=True,
        after=("kit",),
        makes=("data/digits", "data/digits-shards"),
    )
    yield part(
        "photos-data",
        pipeline("sample", "photos", "{data}/photos", "--count", "{photos}"),
        pipeline("shard", "{data}/photos", "--out", "{data}/photos-shards", "--shard-size", "32"),
        expected=12,
        least=5,
        together=True,
        after=("kit",),
        makes=("data/photos", "data/photos-shards"),
    )
    yield part(
        "dali-check",
        python("benchmarks/dali_check.py", "{data}/photos", "--out", "{out}"),
        expected=25,
        least=10,
        together=True,
        after=("photos-data",),
        uses=("data/photos",),
        shown=14,
        on_cpu=("--device", "cpu", "--batch", "16"),
    )
    # The other tests in test_training.py take minutes: each starts training several times.
    pixels = "tests/gpu/test_training.py::test_pixels_decoded_on_the_gpu_are_those_of_the_cpu"
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/gpu").glob("test_*.py"))
    others = [file for file in files if file not in KERNEL_TESTS and not pixels.startswith(file)]
    yield part(
        "loader-right",
        gpu_tests(4, *others, pixels),
        expected=55,
        least=20,
        together=True,
        after=("kit", "digits-data", "dali-check"),
        environment=FEW_THREADS,
    )
    yield part(
        "digits-zero1",
        train(
            "--recipe",
            "launch/recipes/digits.toml",
            "--data",
            "{data}/digits-shards",
            "--out",
            "{run}",
            "--zero",
            "1",
        ),
        expected=70,
        least=20,
        together=True,
        after=("digits-data", "dali-check"),
        uses=("data/digits-shards",),
        # ZeRO on a CPU needs DeepSpeed's CPU operators, whose sources are not in the kit.
        on_cpu=("--zero", "0", "--stop-after", "2", "--global-batch", "8"),
    )
    yield part("step-b0", step("fat_b0"), expected=22, least=20, on_cpu=SMALL)
    yield part(
        "kernels-b0",
        python("benchmarks/kernels.py", "--variants", "fat_b0", "--rounds", "5", "--out", "{out}"),
        expected=25,
        least=25,
        shown=60,
    )
    yield part("bench-b0", bench("b0", steps=15), expected=32, least=25, uses=("data/photos-shards",), on_cpu=FEW)
    yield part(
        "jpeg-decoders",
        python("benchmarks/jpeg_decoders.py", "{data}/photos-shards", "--out", "{out}"),
        expected=12,
        least=10,
        uses=("data/photos-shards",),
    )
    yield part(
        "decode",
        decode("--operators", "slice", "--loads", "0", "0.9", "1"),
        expected=14,
        least=12,
        uses=("data/photos",),
        on_cpu=FEW_PHOTOS,
    )


def measure() -> Iterator[Part]:
    """Yield the timed parts of `measure`, the most important first."""
    part = parts_of("measure")
    # The memory of an H100 is too small for two modes of FAT-B3 at the same time, hence --alone.
    yield part("step-b3", step("fat_b3", "--alone"), expected=25, least=25, on_cpu=SMALL)
    yield part("bench-b3", bench("b3", steps=10), expected=42, least=40, uses=("data/photos-shards",), on_cpu=FEW)
    yield part("step-b1", step("fat_b1"), expected=20, least=20, on_cpu=SMALL)
    yield part("step-b2", step("fat_b2"), expected=20, least=20, on_cpu=SMALL)
    yield part(
        "kernel-times",
        python(
            *("benchmarks/kernel_times.py", "--models", "fat_b0", "fat_b3", "--loader", "{data}/photos-shards"),
            *("--out", "{out}"),
        ),
        expected=32,
        least=25,
        uses=("data/photos-shards",),
        shown=130,
        on_cpu=("--models", "fat_b0", "--batch", "2", "--size", "64", "--steps", "1"),
    )
    yield part(
        "photos",
        train(
            *("--variant", "b0", "--data", "{data}/photos-shards", "--out", "{run}", "--global-batch", "256"),
            *("--stop-after", "60", "--log-every", "10"),
        ),
        expected=35,
        least=30,
        uses=("data/photos-shards",),
        on_cpu=("--stop-after", "1", "--global-batch", "4", "--size", "64"),
    )
    fat_models = ("fat_b0", "fat_b1", "fat_b2", "fat_b3")
    yield part(
        "peers-graph",
        python("benchmarks/peers.py", "--models", *fat_models, *PEERS, "--ways", "graph", "--out", "{out}"),
        expected=48,
        least=30,
        modules=("timm",),
        on_cpu=("--models", "fat_b0", *(name for name in PEERS if name != CRASHES_ON_CPU), *EAGER),
    )
    yield part(
        "kernels-b3",
        python(
            *("benchmarks/kernels.py", "--variants", "fat_b3", "--stages", "1", "2", "3", "--rounds", "5"),
            *("--out", "{out}"),
        ),
        expected=29,
        least=25,
        shown=60,
    )
    yield part(
        "augment",
        python("benchmarks/augment.py", "--device", "cuda", "--pairs", "2", "--out", "{out}"),
        expected=15,
        least=15,
        on_cpu=("--device", "cpu", "--batch", "2", "--size", "64", "--pairs", "1"),
    )
    yield part(
        "decode-more",
        decode("--operators", "slice", "--loads", "0.5", "0.8"),
        expected=10,
        least=10,
        uses=("data/photos",),
        on_cpu=FEW_PHOTOS,
    )
    yield part(
        "decode-cached",
        decode("--operators", "reader", "cached", "--loads", "0", "0.9"),
        expected=12,
        least=12,
        uses=("data/photos",),
        on_cpu=FEW_PHOTOS,
    )
    yield part(
        "compiled-b0",
        python(
            *("benchmarks/step.py", "--models", "fat_b0", "--modes", "training", "--ways", "channels-last", "compiled"),
            *("--rounds", "5", "--out", "{out}"),
        ),
        expected=60,
        least=60,
        on_cpu=("--ways", "channels-last", *SMALL),  # compilation for a CPU takes minutes
    )


def sweep() -> Iterator[Part]:
    """Yield the sweep of the depthwise kernels' launch configurations, used to update fat/kernels/impl/tiles.py."""
    yield Part(
        name="sweep",
        profile="sweep",
        commands=(python("benchmarks/sweep.py", "--seconds", "60", "--out", "{out}"),),
        expected=70,
        least=40,
        shown=150,
    )


def short_recipes() -> Iterator[Part]:
    """Yield the parts that measure what short recipes need: input for fast models, and training at several sizes."""
    part = parts_of("short-recipes")
    yield part(
        "loader-pixels",
        python(
            *("benchmarks/loader.py", "--data", "{data}", "--count", "{photos}", "--rounds", "2", "--images", "16384"),
            *("--loaders", "ours, DALI", "ours, DALI, fat", "ours, pixels", "DALI's own", "--out", "{out}"),
        ),
        expected=40,
        least=25,
        uses=("data/photos", "data/photos-shards"),
        shown=14,
        # A batch needs 64 training images, more than a rehearsal has.
        on_cpu=(
            *("--data", "{run}", "--count", "160", "--images", "64", "--rounds", "1"),
            *("--loaders", "ours, pixels"),
        ),
    )
    yield part(
        "sizes",
        train(
            *("--variant", "b0", "--data", "{data}/photos-shards", "--out", "{run}", "--global-batch", "256"),
            *("--epochs", "12", "--warmup-epochs", "1", "--log-every", "7"),
            *("--size-schedule", "0:128,34:128,34:192,67:192,67:224"),
        ),
        expected=70,
        least=50,
        uses=("data/photos-shards",),
        on_cpu=("--stop-after", "1", "--global-batch", "4"),
    )


def peers() -> Iterator[Part]:
    """Yield one part per other model under torch.compile. The ratios use FAT's results from the part peers-graph."""
    for name in PEERS:
        yield Part(
            name=f"peer-{name}",
            profile="peers",
            commands=(
                python(
                    *("benchmarks/peers.py", "--models", name, "--ways", "compiled"),
                    *("--fat-figures", "{parts}/peers-graph.json", "--out", "{out}"),
                ),
            ),
            expected=70,
            least=60,
            modules=("timm",),
            on_cpu=(*EAGER, "--size", "64") if name == CRASHES_ON_CPU else EAGER,
        )


KERNEL_TESTS = ("tests/gpu/test_kernels.py", "tests/gpu/test_randaugment.py")
PEERS = ("efficientnet_b0", "convnext_tiny", "repvit_m1", "fastvit_t8", "swin_tiny", "resnet50")
CRASHES_ON_CPU = "fastvit_t8"  # PyTorch 2.11 crashes in its channels-last convolutions at 224 pixels
FEW_THREADS = {"OMP_NUM_THREADS": "3", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # several test processes run in parallel
SMALL = ("--batch", "2", "--size", "64", "--rounds", "1")
EAGER = ("--ways", "eager", "--batch", "2", "--rounds", "1", "--steps", "1")
FEW = ("--global-batch", "4", "--size", "64")
FEW_PHOTOS = ("--batch", "16", "--batches", "1")


def python(*words: str) -> Command:
    return ("python", *words)


def pipeline(*words: str) -> Command:
    return python("-m", "launch.cli", *words)


def train(*words: str) -> Command:
    return python("-m", "accelerate.commands.launch", "launch/train.py", *words)


def step(model: str, *more: str) -> Command:
    ways = ("--ways", "library", "graph")
    return python(
        *("benchmarks/step.py", "--models", model, "--modes", "training", *ways, "--rounds", "3"),
        *(*more, "--out", "{out}"),
    )


def bench(variant: str, *, steps: int) -> Command:
    options = ("--steps", str(steps), "--json", "{out}", "--chart", "{run}/chart.png")
    return pipeline("bench", "{data}/photos-shards", *options, "--", "--variant", variant, "--zero", "0")


def decode(*words: str) -> Command:
    return python(
        "benchmarks/decode.py", *words, "--rounds", "1", "--batches", "12", "--data", "{data}", "--out", "{out}"
    )


def gpu_tests(workers: int, *tests: str) -> Command:
    """Return the pytest command for GPU tests, parallel and with a timeout per test if the plugins are installed."""
    side_by_side = ("-n", str(workers)) if importlib.util.find_spec("xdist") else ()
    limit = ("--timeout", "120") if importlib.util.find_spec("pytest_timeout") else ()
    return python("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *limit, *side_by_side, *tests)


def longest_chain(together: list[Part]) -> float:
    """Return the expected seconds of parallel parts: the longest path through `after`."""
    ends: dict[str, float] = {}
    for part in together:
        ends[part.name] = max((ends[name] for name in part.after if name in ends), default=0.0) + part.expected
    return max(ends.values())
