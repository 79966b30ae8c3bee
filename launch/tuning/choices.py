"""Resolve unset performance options of model and loader, and record the source of each value.

For each option, the first of these that has a value counts:

    the command line or recipe file (for the kernels, FAT_KERNELS too)
    what the run began with, as its recipe.json says, if it is resumed on the same device: last bits may depend on it
    what was measured on such a machine (`launch.tuning.tuned`)
    a measurement now, if `--tune` (or, for the torch.compile mode, `--compile auto`) asks for it
    the default
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from launch.config.recipe import Recipe, RecipeError
from launch.engine.execution import GRAPHS, Execution, alternatives, choose
from launch.engine.optimizers import OPTIMIZERS
from launch.feed import Feed
from launch.jpeg_decoder import choose_load, decodes_on_gpu, engines_of
from launch.machine.provenance import device_name
from launch.machine.world import share
from launch.run.saved_recipe import RECIPE_NAME, read_raw
from launch.tuning import loader as input_tuning
from launch.tuning import model as tuning
from launch.tuning import tuned
from launch.tuning.open_options import PLACES, given, option_name, with_values
from launch.tuning.trials import Choice, Value
from launch.tuning.tuned import NAMES, PARTS, Part
from pipeline.options import DaliOptions
from shards.errors import UserError
from shards.ranges import allows
from shards.redact import printable

DEFAULT = "by default"
BEGAN = "as the run began"
SECONDS = 60.0  # that measuring a part may take at the start of a run, if nothing is compiled
MOST_PER_CORE = 2  # decode threads that are ever tried


@dataclass
class Choices:
    """What the open options come to."""

    values: dict[str, Value | None] = field(default_factory=dict)
    """By name; None = the default."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where each value comes from."""
    figures: dict[str, str] = field(default_factory=dict)
    """What was measured now."""
    notes: list[str] = field(default_factory=list)
    """Lines for people."""
    began: dict[str, Value | None] = field(default_factory=dict)
    """What the run began with."""
    given: dict[str, Value] = field(default_factory=dict)
    """What was not open at this start."""
    cores: int = 0
    """Of the rank that chose, rank 0."""
    decoder_began: float | None = None
    """The share of the JPEG engine (hw_decoder_load) that the run began with, on whatever device."""

    def take(self, name: str, value: Value | None, source: str) -> None:
        self.values[name], self.sources[name] = value, source

    @property
    def picks(self) -> dict[str, str]:
        """For people and the log: what comes from where, but for the defaults."""
        groups: dict[str, list[str]] = {}
        for name, source in self.sources.items():
            value = self.values[name]
            if source != DEFAULT:
                groups.setdefault(source, []).append(
                    option_name(name) if value is None else f"{option_name(name)} {value}"
                )
        said = {source: ", ".join(names) for source, names in groups.items()}
        said |= {f"measured {option_name(name)}": figures for name, figures in self.figures.items()}
        return said or {"measured": "nothing here ('pipeline tune' does)"}

    def record(self, feed: Feed) -> dict[str, Any]:
        """For recipe.json, where `resolve` finds it when the run goes on.

        What a run is given later counts for that start only.
        """
        world, values = feed.world, self.given | self.began | self.values
        return {"device": device_name(world.device), "cores": world.cores, "ranks": world.size, "values": values}


def resolve(recipe: Recipe, feed: Feed, model: nn.Module, *, goes_on: bool) -> tuple[Recipe, Feed, Choices]:
    """Recipe and feed with their open options filled in, and what was chosen. Collective: rank 0 looks and measures.

    Args:
        model: as it was built; moved to the device where something is measured.
        goes_on: the run has begun before, in its run folder.
    """
    world = feed.world
    choices = share(_Resolving(recipe, feed, model, goes_on).choose if world.is_main else None, world)
    start = Execution.of(recipe, world.device, accumulation=feed.shape.accumulation, ranks=world.size)
    settled = with_values(recipe, {"compile": start.compile} if recipe.run.compile == "auto" else {})
    settled = with_values(settled, choices.values)
    threads = choices.values.get("decode_threads")
    if threads is not None and world.cores < choices.cores:  # those of rank 0 would flood this rank's smaller machine
        settled = with_values(settled, {"decode_threads": min(int(threads), MOST_PER_CORE * world.cores)})
    if decodes_on_gpu(feed):
        settled = _with_decoder(settled, feed, choices)
    return settled, feed.with_recipe(settled), choices


def _with_decoder(recipe: Recipe, feed: Feed, choices: Choices) -> Recipe:
    """The recipe with the JPEG decoder that all ranks use. Collective."""
    given_load = choices.given.get("hw_decoder_load")
    chosen = choose_load(
        engines_of(feed.world),
        given=None if given_load is None else float(given_load),
        began=choices.decoder_began,
    )
    choices.notes += chosen.notes
    if given_load is None:
        choices.take("hw_decoder_load", chosen.load, chosen.reason)
    elif choices.decoder_began is not None:
        choices.began["hw_decoder_load"] = choices.decoder_began
    return with_values(recipe, {"hw_decoder_load": chosen.load})


def measure(
    part: Part,
    recipe: Recipe,
    feed: Feed,
    model: nn.Module,
    *,
    fixed: Mapping[str, Value | None],
    ranks: int,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Choice]:
    """Time what is open of a part, on this rank alone; see `launch.tuning.model` and `launch.tuning.loader`.

    Args:
        fixed: options which stay as they are; None = at the default.
        ranks: of the training.

    Raises:
        UserError: the recipe cannot be, or the set is damaged.
    """
    zero, precision = choose(recipe, feed.world.device, ranks=ranks)
    settled = with_values(recipe, fixed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if part == "input":
        return input_tuning.tune(feed.with_recipe(settled), fixed, dtype=dtype, seconds=seconds, say=say)
    device, accumulation, optim = feed.world.device, feed.shape.accumulation, recipe.optim
    shape = (feed.shape.micro_rows, 3, recipe.data.size, recipe.data.size)

    def images() -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    bench = tuning.Bench(
        model.to(device),
        images,
        bf16=precision == "bf16",
        optimizer=OPTIMIZERS[optim.optimizer],
        betas=optim.betas,
        eps=optim.eps,
        shares=ranks if zero else 0,
    )
    possible = alternatives(device, zero=zero, accumulation=accumulation, ranks=ranks)
    still_open = {name: values for name, values in possible.items() if name not in fixed}
    start = Execution.of(settled, device, accumulation=accumulation, ranks=ranks)
    return tuning.tune(bench, start, still_open, seconds=seconds, say=say)


@dataclass
class _Resolving:
    """Rank 0's part of `resolve`."""

    recipe: Recipe
    feed: Feed
    model: nn.Module
    goes_on: bool
    choices: Choices = field(default_factory=Choices)

    def choose(self) -> Choices:
        self._given, self._file = given(self.recipe), tuned.file_of(self.recipe.run.tuned)
        self.choices.given, self.choices.cores = dict(self._given), self.feed.world.cores
        if self.goes_on:
            self._go_on()
        for part in PARTS:
            if part == "input" and self.recipe.data.loader.loader == "synthetic":
                continue
            self._look_up(part)
            self._measure(part)
            for name in self._open(part):
                self.choices.take(name, None, DEFAULT)
        self._tell_what_is_not_measured()
        return self.choices

    def _open(self, part: Part) -> list[str]:
        return [name for name in NAMES[part] if name not in self._given and name not in self.choices.sources]

    def _take(self, values: Mapping[str, Value | None], source: str, allowed: Callable[[str, Value], bool]) -> None:
        """Take what is still open, and possible here."""
        for part in PARTS:
            for name in self._open(part):
                if name in values and ((value := values[name]) is None or allowed(name, value)):
                    self.choices.take(name, value, source)

    def _can_be(self, name: str, value: Value) -> bool:
        """A run may go on with another ZeRO stage or more micro-batches than it began with."""
        world, accumulation = self.feed.world, self.feed.shape.accumulation
        try:
            Execution.of(
                with_values(self.recipe, {name: value}), world.device, accumulation=accumulation, ranks=world.size
            )
        except RecipeError:
            return False
        return True

    def _alternatives(self) -> dict[str, tuple[str, ...]]:
        world, accumulation = self.feed.world, self.feed.shape.accumulation
        zero, _ = choose(self.recipe, world.device, ranks=world.size)
        return alternatives(world.device, zero=zero, accumulation=accumulation, ranks=world.size)

    def _key(self, part: Part) -> dict[str, Any]:
        """What is as the run began is as good as given: other runs do not have it."""
        began = {name for name, source in self.choices.sources.items() if source == BEGAN}
        fixed = self._given | {name: self.choices.values[name] for name in began}
        return tuned.key_of(part, self.recipe, self.feed, given=fixed, ranks=self.feed.world.size)

    def _go_on(self) -> None:
        """What the run began with, as far as it was here."""
        path, here = self.recipe.run.out / RECIPE_NAME, self.feed.world
        try:
            record = read_raw(path).get("choices")
            if record is None:  # of a version that had defaults only, which are not to change in mid-run
                self._take(dict.fromkeys(PLACES), BEGAN, self._can_be)
                return
            values = {part: {n: record["values"][n] for n in NAMES[part] if n in record["values"]} for part in PARTS}
            for part in PARTS:
                if not tuned.sensible(part, {name: v for name, v in values[part].items() if v is not None}):
                    raise ValueError(f"no values of these options: {values[part]}")
            device, cores, ranks = record["device"], record["cores"], record.get("ranks", 1)
            load = record["values"].get("hw_decoder_load")
            if load is not None and not allows(DaliOptions, "hw_decoder_load", load):
                raise ValueError(f"hw_decoder_load {load}: a share expected")
            self.choices.decoder_began = None if load is None else float(load)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.choices.notes.append(f"warning: {path}: does not say what the run began with ({error}); chosen anew")
            return
        if device != device_name(here.device):
            self.choices.notes.append(f"note: the run began on {device}: what is fastest is chosen anew")
            return
        self.choices.began = values["model"] | (values["input"] if cores == here.cores else {})
        if ranks == 1 < here.size and values["model"].get("compile") in GRAPHS:
            # Chosen where there were no collectives beside the graphs: only who asks for them has them here.
            del self.choices.began["compile"]
            self.choices.notes.append(
                f"note: the run began on one rank with --compile {values['model']['compile']}, which {here.size} ranks "
                "have only if it is given"
            )
        self._take(self.choices.began, BEGAN, self._can_be)

    def _look_up(self, part: Part) -> None:
        """What was measured on such a machine."""
        if self._file is None or not self._open(part):
            return
        values, line = tuned.find(self._file, part, self._key(part))
        self.choices.notes += [line] if line else []
        tried = self._alternatives()
        self._take(values, f"measured ({self._file})", lambda name, value: value in tried.get(name, (value,)))

    def _measure(self, part: Part) -> None:
        """What is asked to be measured now."""
        run = self.recipe.run
        wanted = [name for name in self._open(part) if run.tune or (name == "compile" and run.compile == "auto")]
        if not wanted:
            return
        if run.dry_run:
            if tried := [name for name in self._tried(part) if name in wanted]:
                self.choices.notes.append(f"{', '.join(map(option_name, tried))}: to be measured at the start")
            return
        fixed = {name: self.choices.values.get(name) for name in NAMES[part] if name not in wanted} | self._given
        ranks = self.feed.world.size
        found = measure(part, self.recipe, self.feed, self.model, fixed=fixed, ranks=ranks, seconds=SECONDS, say=_say)
        for name, choice in found.items():
            self.choices.take(name, choice.value, "measured now")
            self.choices.figures[name] = choice.reason
        if self._file is not None and found:
            try:
                tuned.keep(self._file, tuned.entry_of(part, self._key(part), found))
            except UserError as error:
                self.choices.notes.append(f"warning: {error}")

    def _tried(self, part: Part) -> list[str]:
        """The options of which there is more than one value to try here."""
        if part == "input":
            fixed = {*self._given, *(name for name, source in self.choices.sources.items() if source != DEFAULT)}
            return input_tuning.possible(self.feed, fixed)
        return [name for name, values in self._alternatives().items() if len(values) > 1]

    def _tell_what_is_not_measured(self) -> None:
        """Whoever asks a run that goes on to measure is told why it does not."""
        run, began = self.recipe.run, [name for name, source in self.choices.sources.items() if source == BEGAN]
        asked = [*(["--tune"] if run.tune else []), *(["--compile auto"] if run.compile == "auto" else [])]
        names = began if run.tune else [name for name in began if name == "compile"]
        if asked and names:
            facts = f"not measured, the run goes on as it began: {', '.join(map(option_name, names))}"
            self.choices.notes.append(
                f"note: {' '.join(asked)}: {facts}; give values, or begin another run (--out, or --resume never)"
            )


def _say(line: str) -> None:
    print(f"tuning: {printable(line)}", file=sys.stderr, flush=True)
