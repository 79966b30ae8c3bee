"""The curves as SVG elements of the report's page, in colors that follow its light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from markupsafe import Markup

from launch.monitor.curves import DASHES, MARKERS, Curve, Theme, draw_panel, legend, run_legend, title
from launch.monitor.panels import PANELS, TOP1, Axis, Panel, Timeline, has_data

AXES: tuple[Axis, ...] = get_args(Axis)
CURVE_COLORS = 8  # --curve-0 to --curve-7 in report.css
# Drawn in these colors, which are then replaced by variables of report.css.
_PLACEHOLDERS = {
    "#010001": "var(--text)",
    "#010002": "var(--grid)",
    "#010003": "var(--lost)",
    **{f"#0200{number:02x}": f"var(--curve-{number})" for number in range(CURVE_COLORS)},
}
_TEXT, _GRID, _LOST, *_CURVES = _PLACEHOLDERS
_THEME = Theme(text=_TEXT, grid=_GRID, lost=_LOST, curves=_CURVES)
_SIZE = 380, 225  # in CSS pixels at the scale of a phone
_POINT = 72  # matplotlib's SVG has 72 units per inch
_LABEL_OR_DIGITS = re.compile(r">[^<>]+</text>|(?<=\d\.\d)\d+")
_NAMES = re.compile(r' id="(?:figure|patch|axes|matplotlib\.axis|[xy]tick|line2d|text)_\d+"')
_REPEATED = re.compile(r"font-family: 'DejaVu Sans'(, sans-serif)?; |<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)
_HEAD = re.compile(r'^.*?<svg[^>]*viewBox="([^"]+)"[^>]*>', re.DOTALL)
_BLANKS = re.compile(r"\s*\n\s*")


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    label: str
    sample: Markup


@dataclass(frozen=True)
class Chart:
    heading: str
    keys: list[Key]
    pictures: dict[Axis, Markup]


def charts(runs: Sequence[Timeline], references: Sequence[tuple[float, str]] = ()) -> list[Chart]:
    """Draw all panels that have data, over each horizontal axis.

    Args:
        references: top-1 accuracies in percent to draw as lines, with their names.
    """
    import matplotlib

    matplotlib.use("agg")
    settings = _THEME.settings() | {
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "svg.fonttype": "none",
        "path.simplify": False,
    }
    with matplotlib.rc_context(settings):
        return [
            Chart(
                title(panel, runs),
                [Key(entry.label, _sample(entry)) for entry in legend(panel, runs)],
                dict(_pictures(panel, runs, references if panel.title == TOP1 else ())),
            )
            for panel in PANELS
            if has_data(panel, runs)
        ]


def run_keys(runs: Sequence[Timeline]) -> list[Key]:
    """Return the legend of several runs."""
    return [Key(entry.label, _sample(entry)) for entry in run_legend(runs)]


def _pictures(
    panel: Panel, runs: Sequence[Timeline], references: Sequence[tuple[float, str]]
) -> Iterator[tuple[Axis, Markup]]:
    import matplotlib
    import matplotlib.pyplot as plt

    for axis in AXES:
        width, height = _SIZE
        drawing, axes = plt.subplots(figsize=(width / _POINT, height / _POINT))
        drawing.subplots_adjust(left=52 / width, right=1 - 8 / width, bottom=40 / height, top=1 - 8 / height)
        draw_panel(axes, panel, runs, axis, _THEME)
        for value, name in references:
            axes.axhline(value, color=_THEME.text, linestyle=DASHES[1], linewidth=1)
            axes.annotate(name, (0, value), (3, 3), textcoords="offset points", fontsize=9)
        text = io.StringIO()
        # The salt makes names of clip paths and markers unique in the page: a chart that is hidden must not be
        # referred to by another one.
        with matplotlib.rc_context({"svg.hashsalt": f"{panel.title} {axis}"}):
            drawing.savefig(
                text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
            )
        plt.close(drawing)
        yield axis, _embedded(text.getvalue(), f"{panel.title} over {axis}")


def _embedded(svg: str, label: str) -> Markup:
    """Return an SVG document of matplotlib as an element of the page."""
    # Texts of labels stay, numbers of coordinates get one digit after the point.
    svg = _LABEL_OR_DIGITS.sub(lambda found: found[0] if found[0].startswith(">") else "", svg)
    svg = _REPEATED.sub("", _NAMES.sub("", svg))
    for placeholder, variable in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, variable)
    opening = Markup('<svg viewBox="{}" role="img" aria-label="{}">')
    content = _HEAD.sub(lambda found: str(opening.format(found[1], label)), svg)
    return Markup(_BLANKS.sub(" ", content))  # matplotlib escapes the texts in it


def _sample(entry: Curve) -> Markup:
    """Return a short piece of a curve, for a legend."""
    color = "var(--text)" if entry.color < 0 else f"var(--curve-{entry.color % CURVE_COLORS})"
    dash: Any = DASHES[entry.dash % len(DASHES)]
    pattern = "" if dash == "solid" else " ".join(f"{2 * length:g}" for length in dash[1])
    shapes = {"o": Markup('<circle cx="14" cy="6" r="3.5"/>'), "^": Markup('<path d="M14 1 18.5 9.5H9.5Z"/>')}
    shape = shapes.get(MARKERS.get(entry.kind, ""), Markup(""))
    return Markup(
        '<svg class="sample" viewBox="0 0 28 12" style="stroke:{0};fill:{0}" aria-hidden="true">'
        '<path d="M0 6H28" stroke-width="2" stroke-dasharray="{1}"/>{2}</svg>'
    ).format(color, pattern, shape)
