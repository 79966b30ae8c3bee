"""Bar chart of the results of `pipeline bench`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from launch.bench.verdict import Figures
from shards.files.output import MARK, write_output

COLORS = {"loader alone": "#7a9cc6", "model alone": "#d39a5b", "both, predicted": "#b9b9b9", "both": "#4f8a5b"}
CAPTION_WIDTH = 110  # characters per line
# If the rates differ by more than this factor, the shortest bar would be a sliver: the axis is logarithmic instead.
LINEAR_SPREAD = 8


def draw(figures: Figures) -> Any:
    """Return a matplotlib figure: throughputs on the left, ratios on the right, the verdict above."""
    import textwrap

    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    chart, (speeds, ratios) = plt.subplots(1, 2, figsize=(11, 3.4), constrained_layout=True)
    rates = (figures.loader.rate, figures.model.rate, figures.predicted, figures.both.rate)
    bars = speeds.barh(list(COLORS), rates, color=list(COLORS.values()))
    speeds.bar_label(bars, labels=[f"{rate:,.1f}" for rate in rates], padding=3)
    speeds.set(xlabel="images/s", title=f"{figures.settings['model']}, batch {figures.settings['batch']}")
    if max(rates) > LINEAR_SPREAD * min(rates) > 0:
        speeds.set(xscale="log", xlim=(min(rates) / 4, max(rates) * 6), xlabel="images/s (logarithmic)")
        # The default labels are powers of ten as formulas, which `write_chart` switches off.
        speeds.xaxis.set_major_formatter(lambda rate, _: f"{rate:,g}")
        speeds.xaxis.set_minor_formatter(lambda *_: "")
    else:
        speeds.margins(x=0.15)
    values = {
        "both / model": figures.both_of_model,
        "waiting for data": figures.both.waiting,
        "model / roofline": figures.model_of_roofline,
        "MFU": figures.mfu,
    }
    bars = ratios.barh(list(values), list(values.values()), color="#8f8f8f")
    ratios.bar_label(bars, labels=[f"{ratio:.1%}" for ratio in values.values()], padding=3)
    ratios.set(xlim=(0, max(1.15, *values.values())), title=f"{figures.machine['device']}")
    for axes in (speeds, ratios):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    chart.suptitle("\n".join(textwrap.wrap(figures.verdict, CAPTION_WIDTH)), fontsize=10)
    return chart


def write_chart(figures: Figures, path: Path) -> None:
    """Write the chart in the format of the file name's extension.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    image = io.BytesIO()
    # matplotlib parses texts when it draws them: without this setting, dollar signs in a device's name start a formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        chart = draw(figures)
        suffix = path.suffix[1:].lower()
        chart.savefig(image, format=suffix, dpi=110, metadata={"Software": MARK} if suffix == "png" else None)
    plt.close(chart)
    write_output(path, image.getvalue(), "--chart")
