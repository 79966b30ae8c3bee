"""Find a model's tensors in another tool's checkpoint: nested state dicts, wrappers' prefixes, moving averages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fat.weights.safe_pickle import printable

NAMED = 5  # maximum number of names in a message
NAME_SHOWN = 120  # maximum characters of each name

# Beginning of a parameter name, in this implementation and in the released one. Any prefix before it is from a wrapper.
_MODEL = re.compile(
    r"(?:^|(?<=[./]))(?:stem\.(?:convs|proj|norm)|stages\.\d+\.blocks|patch_embed|layers\.\d+\.blocks)\."
)
# Wrappers whose names can be anywhere in a parameter name: torch.compile, FSDP, activation checkpointing.
_WRAPPER = re.compile(r"(?:^|(?<=[./]))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGE = re.compile(r"(?:^|_)(?:ema|swa|average|averaged)(?:_|$)", re.IGNORECASE)
_OPTIMIZER = re.compile(r"optim|exp_avg|momentum", re.IGNORECASE)  # optimizer state has the parameters' names
# A model whose key has only these words is preferred if a file has several trained models.
_PLAIN = frozenset({"", "model", "state_dict", "module", "model_state_dict"})
# Keys of the trained weights (not averages) in checkpoints of DDP, Lightning, timm, MMPretrain, DeepSpeed, Composer.
_TRAINED = frozenset(
    {
        "", "model", "module", "net", "network", "backbone", "encoder", "state", "state_dict", "model_state",
        "model_state_dict", "weights", "params", "online_model", "_forward_module",
    }
)  # fmt: skip
_MAX_MODELS = 64  # maximum models per state dict; limits the time that a malicious file can take
_COUNTER = "num_batches_tracked"  # BatchNorm's batch counter; moving averages often lack it


@dataclass(frozen=True)
class Entry:
    """One model in a checkpoint."""

    key: str
    """Keys of the nested dicts that lead to its state dict, joined by dots; "": the top level."""
    prefix: str
    """Prefix of the parameter names, which a wrapper added."""
    names: dict[str, tuple[str, str]]
    """Parameter name without prefix -> (key of the state dict, name in the state dict)."""
    wrappers: frozenset[str] = frozenset()
    """Wrapper names that were removed from the parameter names."""
    outside: tuple[str, ...] = ()
    """Names in the same state dict that belong to no model."""
    notes: tuple[str, ...] = field(default=())
    """Messages on what was found and why this entry was chosen."""

    @property
    def label(self) -> str:
        """Key and prefix, as shown in messages and accepted by `select`."""
        return ".".join(filter(None, (self.key, self.prefix.rstrip("./"))))

    @property
    def _words(self) -> list[str]:
        return re.split(r"[./]", self.label)

    @property
    def is_average(self) -> bool:
        return any(_AVERAGE.search(word) for word in self._words)

    @property
    def is_trained(self) -> bool:
        return all(word in _TRAINED for word in self._words)

    @property
    def is_plain(self) -> bool:
        return all(word in _PLAIN for word in self._words)

    @property
    def is_of_optimizer(self) -> bool:
        return any(_OPTIMIZER.search(word) for word in self._words)


def select(path: Path, state_dicts: Mapping[str, Collection[str]], wanted: str | None = None) -> Entry:
    """Choose the model to load from the state dicts of a file.

    As in timm, a moving average of the weights is preferred to the weights themselves, if it has all of their tensors.

    Args:
        path: for messages.
        state_dicts: key -> names of the tensors.
        wanted: label of the entry to load, as the notes show it.

    Raises:
        ValueError: the file has no tensors, lacks the wanted entry, or has several models of which none is preferred.
    """
    entries = [entry for key, names in state_dicts.items() for entry in _models(key, names)]
    if not entries:
        entries = _unknown(state_dicts)
    if not entries:
        raise ValueError(f'{path}: contains no weights; save the model\'s state_dict(), directly or under "model"')
    if wanted is not None:
        chosen = next((entry for entry in entries if wanted in (entry.label, entry.key)), None)
        if chosen is None:
            labels = listed(e.label for e in entries)
            raise ValueError(f"{path}: contains no entry {printable(wanted)!r}; expected one of {labels}")
        return _with_notes(_with_counters(chosen, _trained(entries)), entries, "as requested")
    entries = [entry for entry in entries if not entry.is_of_optimizer] or entries
    entries.sort(key=lambda entry: -len(entry.names))
    swapped = next((entry for entry in entries if entry.key == "ema_state_dict" and "steps" in entry.outside), None)
    average_of_mmengine = next((entry for entry in entries if swapped and entry.key == "state_dict"), None)
    if average_of_mmengine is not None:
        # https://github.com/open-mmlab/mmengine, EMAHook.before_save_checkpoint
        why = "a moving average of the weights: MMEngine keeps the weights themselves in 'ema_state_dict'"
        return _with_notes(average_of_mmengine, entries, why)
    trained = _trained(entries)
    averages = [entry for entry in entries if entry.is_average]
    if averages:
        average, original = averages[0], trained[0] if trained else None
        missing = [name for name in original.names if name not in average.names] if original else []
        if original is None or all(name.endswith(_COUNTER) for name in missing):
            return _with_notes(_with_counters(average, trained), entries, "a moving average of the weights")
        label = printable(average.label)
        why = f"the moving average {label!r} lacks {len(missing)} of its tensors, such as {missing[0]}"
        return _with_notes(original, entries, why)
    complete = [entry for entry in trained if len(entry.names) == len(trained[0].names)]
    plain = [entry for entry in complete if entry.is_plain]
    if len(complete) == 1 or len(plain) == 1:
        return _with_notes((plain if len(plain) == 1 else complete)[0], entries, "")
    if len(entries) > 1:
        raise ValueError(
            f"{path}: contains several models ({listed(e.label for e in entries)}); choose one with entry=, or save "
            "one of them in a separate file"
        )
    return _with_notes(entries[0], entries, "the only model in the file")


def _trained(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.is_trained and not entry.is_average]


def _with_counters(entry: Entry, trained: list[Entry]) -> Entry:
    """Add BatchNorm's batch counters, which moving averages often lack, from the trained weights."""
    if not entry.is_average or not trained:
        return entry
    original = trained[0].names
    counters = {name: original[name] for name in original if name not in entry.names and name.endswith(_COUNTER)}
    return Entry(entry.key, entry.prefix, entry.names | counters, entry.wrappers, entry.outside)


def _models(key: str, names: Iterable[str]) -> list[Entry]:
    """Return the models in one state dict. Each has its own prefix."""
    unwrapped: dict[str, tuple[str, str]] = {}  # name without wrappers' prefixes -> (key, name in the file)
    for name in names:
        plain = _WRAPPER.sub("", name)
        if plain in unwrapped:  # strict loading reports the full name as unknown
            plain = name
        unwrapped[plain] = (key, name)
    found = (_MODEL.search(name) for name in unwrapped)
    counts = Counter(match.string[: match.start()] for match in found if match)
    prefixes = sorted((prefix for prefix, _ in counts.most_common(_MAX_MODELS)), key=len, reverse=True)
    models: dict[str, dict[str, tuple[str, str]]] = {prefix: {} for prefix in prefixes}
    outside = []
    for name, location in unwrapped.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            outside.append(name)
        else:
            models[prefix][name.removeprefix(prefix)] = location
    wrappers = frozenset(word for _, name in unwrapped.values() for word in _WRAPPER.findall(name))
    return [Entry(key, prefix, models[prefix], wrappers, tuple(outside)) for prefix in prefixes]


def _unknown(state_dicts: Mapping[str, Collection[str]]) -> list[Entry]:
    """Return the largest state dict of another architecture, if any, whose tensors strict loading then reports."""
    entries = [Entry(key, "", {name: (key, name) for name in names}) for key, names in state_dicts.items() if names]
    return sorted(entries, key=lambda entry: (not entry.is_trained, -len(entry.names)))[:1]


def _with_notes(chosen: Entry, entries: list[Entry], why: str) -> Entry:
    notes = []
    others = [entry.label or "the top level" for entry in entries if entry.label != chosen.label]
    if others or (why and chosen.label not in ("", "model")):
        unused = f"; not used: {listed(others)}" if others else ""
        reason = f" ({why})" if why else ""
        notes.append(f"loaded the weights of {printable(chosen.label) or 'the top level'!r}{reason}{unused}")
    elif chosen.key not in ("", "model"):
        notes.append(f"loaded the weights of {printable(chosen.key)!r}")
    removed = [*sorted(f"{word}." for word in chosen.wrappers), *filter(None, [chosen.prefix])]
    if removed:
        prefixes = ", ".join(repr(printable(text)) for text in removed)
        notes.append(f"removed {prefixes} from the parameter names, which a wrapper had added")
    if chosen.outside:
        notes.append(f"not used, because not part of the model: {listed(chosen.outside)}")
    return Entry(chosen.key, chosen.prefix, chosen.names, chosen.wrappers, chosen.outside, tuple(notes))


def listed(names: Iterable[str]) -> str:
    """Join the first few names, and append how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(printable(name, NAME_SHOWN) for name in names[:NAMED])}{more}"
