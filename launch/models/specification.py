"""The name of a model on the command line, in recipes and in weights files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from shards.command import suggestion
from shards.errors import UserError
from shards.redact import printable

Variant = Literal["b0", "b1", "b2", "b3"]
Kind = Literal["fat", "timm", "function"]

TIMM_PREFIX = "timm/"
FORMS = "fat_b0 to fat_b3, timm/NAME or package.module:function"
MAX_LENGTH = 200
# Neither "hf-hub:" nor "local-dir:", with which timm would read a configuration and weights from elsewhere.
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.]+")
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class ModelSpec:
    """A model by name. `str` returns the name in the form in which it is set."""

    kind: Kind
    name: str
    """Name of a FAT model, such as fat_b0; name of a model of timm; or package.module:function."""

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Parse a name. Nothing is imported.

        Raises:
            UserError: the name has none of the forms; the message has the name and the forms.
        """
        if text in FAT_MODELS:
            return cls("fat", text)
        if len(text) <= MAX_LENGTH and text.startswith(TIMM_PREFIX):
            name = text.removeprefix(TIMM_PREFIX)
            if _TIMM_NAME.fullmatch(name):
                return cls("timm", name)
        elif len(text) <= MAX_LENGTH and _FUNCTION.fullmatch(text):
            return cls("function", text)
        near = suggestion(text, FAT_MODELS)
        raise UserError(f"--model {printable(text[:MAX_LENGTH])}: no name of a model{near}; expected {FORMS}")

    @classmethod
    def of_variant(cls, variant: Variant) -> ModelSpec:
        """Return the specification of a FAT variant, such as b0."""
        return cls("fat", f"fat_{variant}")

    @property
    def is_fat(self) -> bool:
        return self.kind == "fat"

    def __str__(self) -> str:
        return TIMM_PREFIX + self.name if self.kind == "timm" else self.name


FAT_MODELS = tuple(f"fat_{variant}" for variant in get_args(Variant))
DEFAULT = ModelSpec("fat", "fat_b0")


def spec_in_file(name: str, given: ModelSpec | None, *, request: str = "add --model {}") -> ModelSpec:
    """Return the specification of a model that a weights file names. The file is not trusted.

    Creating the model of a function imports its module, that is, runs code. A file must not choose that code, so the
    user has to name the function too.

    Args:
        name: name of the model in the file's header.
        given: model that the user named on the command line; None: the user named none.
        request: how the user can name the model, with {} for its name.

    Raises:
        UserError: the name is invalid, differs from the given one, or is that of a function that the user did not name.
    """
    try:
        spec = ModelSpec.parse(name)
    except UserError:
        shown = printable(name[:MAX_LENGTH])
        raise UserError(f"its header names the model {shown}, which is none of {FORMS}") from None
    if given is not None and spec != given:
        raise UserError(f"its header names the model {spec}, not {given}; name that model, or use other weights")
    if given is None and spec.kind == "function":
        raise UserError(
            f"its model is created by the function {spec}, which is only called on request, because that runs its "
            f"code; if you trust this code, {request.format(spec)}"
        )
    return spec
