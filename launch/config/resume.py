"""The value of `--resume`: the checkpoint that a training starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from launch.config.errors import RecipeError

Word = Literal["auto", "never", "best"]
WORDS: tuple[Word, ...] = get_args(Word)
FORMS = "auto, never, best, step:N, or the path of a checkpoint or run folder"
_STEP = "step:"
_MAX_DIGITS = 16


@dataclass(frozen=True)
class ResumeOption:
    """Parsed value of `--resume`."""

    kind: Word | Literal["step", "path"]
    step: int = 0
    """Optimizer steps done, if `kind` is "step"."""
    path: Path = Path()
    """Checkpoint folder or run folder, if `kind` is "path"."""

    @classmethod
    def parse(cls, text: str) -> ResumeOption:
        """Parse the value of `--resume`.

        Raises:
            RecipeError: it has none of the forms in `FORMS`.
        """
        for word in WORDS:
            if text == word:
                return cls(word)
        if text.startswith(_STEP):
            digits = text.removeprefix(_STEP)
            if not (digits.isascii() and digits.isdecimal() and len(digits) <= _MAX_DIGITS):
                hint = "; a path that begins with step: needs ./ in front" if "/" in digits else ""
                raise RecipeError(f"--resume {text}: expected the number of an optimizer step, as in step:5000{hint}")
            return cls("step", step=int(digits))
        if not text or "\0" in text:
            raise RecipeError(f"--resume {text!r}: expected {FORMS}")
        return cls("path", path=Path(text))
