"""Pictures in one style, as SVG: panels side by side. matplotlib is imported when one is drawn, not before.

draw("curve.svg", lines("training loss", "nats", {"loss": [(1, 9.1), (2, 7.4)]}), bars(...))
"""

import itertools
import math
import sys
import textwrap

import numpy as np

from minidistil import files

WIDTH, HEIGHT = 8.4, 3.2  # inches: about as wide as GitHub shows a README
BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY = PALETTE = (  # told apart by the colour-blind too (Okabe and Ito 2008)
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c959f",
)  # fmt: skip
INK = "#24292f"
COLOURS = {  # of what is in several pictures; anything else takes what is left of the palette
    "ours": BLUE, "ours, all rows": BLUE, "distilled": BLUE, "student": BLUE, "model": BLUE, "ours, masked rows": GREEN,
    "ours, int8": GREEN, "ours, unpadded rows": SKY, "ours, all rows, no kernels": SKY, "torch.compile": ORANGE,
    "transformers": ORANGE, "eager": GREY, "original's way": GREY, "teacher": GREY, "Liger": PINK,
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "minidistil",  # text stays text; the same data give the same bytes
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"], "font.size": 9, "text.color": INK, "legend.fontsize": 8.5,
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "grid.color": "#e4e8ec", "legend.frameon": False, "legend.handlelength": 1.4, "errorbar.capsize": 2.5,
}  # fmt: skip
DASHED = dict(color=INK, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1.5)
NUMBER = "{x:,g}"


def draw(path, *panels, widths=None, height=HEIGHT):
    """Draws panels side by side and writes them atomically; where matplotlib is missing, says so and draws nothing."""
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn, for want of matplotlib: pip install matplotlib", file=sys.stderr)
        return
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
        for axes, (title, paint) in zip(grid, panels, strict=True):
            paint(axes, axes.get_position().width * WIDTH)
            room = 12 * axes.get_position().width * WIDTH  # in letters
            handles, names = axes.get_legend_handles_labels()
            lengths = [5 + len(name) for name in names] or [1]
            columns = len(lengths) if sum(lengths) <= room else max(1, int(room / max(lengths)))
            axes.legend(handles, names, title=title, title_fontproperties={"weight": "bold", "size": 9.5},
                        alignment="left", ncols=columns, loc="lower left", bbox_to_anchor=(0, 1),
                        borderpad=0)  # fmt: skip
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})


def colours(names):
    """Returns {name: colour}, each name's own where it has one."""
    taken = {COLOURS.get(name) for name in names}
    left = itertools.cycle([colour for colour in PALETTE if colour not in taken] or PALETTE)
    return {name: COLOURS.get(name) or next(left) for name in names}


def percent(share, _=None):
    return f"{100 * share:.6g}%"


def lines(title, unit, series, dashed=None, window=1, form=NUMBER):
    """Curves {name: [(update, y), ...]}; a running mean over `window` points has the points, faint, behind it.

    `dashed` (name, y) is a level to compare with. Points that are not finite are left out.
    """

    def paint(axes, width):
        for name, colour in colours(series).items():
            x, y = np.array([p for p in series[name] if all(map(math.isfinite, p))]).reshape(-1, 2).T
            if 1 < window <= len(y):
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
                x, y = x[window - 1 :], np.convolve(y, np.full(window, 1 / window), "valid")
            axes.plot(x, y, color=colour, linewidth=1.6, marker="o" if len(y) < 40 else "", markersize=3, label=name)
        if dashed:
            axes.axhline(dashed[1], label=dashed[0], **DASHED)
        axes.set(xlabel="update", ylabel=unit)
        axes.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
        axes.xaxis.set_major_formatter(NUMBER)
        axes.yaxis.set_major_formatter(form)

    return title, paint


def bars(title, unit, series, value="{:,.0f}".format, form=NUMBER, dashed=None):
    """Bars in groups: {name: {group: [low, middle, high], or a word where there is no figure}}.

    A bar is as high as its middle, which `value` writes above the line from low to high. `dashed` is as in `lines`.
    """
    groups = list(dict.fromkeys(group for row in series.values() for group in row))
    members = {group: [name for name in series if group in series[name]] for group in groups}
    step = 0.8 / len(series)

    def paint(axes, width):
        inches, rise = width / len(groups), 0.15  # of a group; of the tallest text
        for name, colour in colours(series).items():
            places = [g + (members[group].index(name) - (len(members[group]) - 1) / 2) * step
                      for g, group in enumerate(groups) if group in series[name]]  # fmt: skip
            found = [(0, 0, 0) if isinstance(v, str) else v for v in series[name].values()]
            axes.bar(places, [v[1] for v in found], 0.92 * step, color=colour, label=name)
            for x, v, (low, middle, high) in zip(places, series[name].values(), found, strict=True):
                if low < high:
                    axes.errorbar(x, middle, [[middle - low], [high - middle]], color=INK, linewidth=1)
                text = v if isinstance(v, str) else value(middle)
                upright = 0.075 * len(text) > step * inches
                rise = max(rise, 0.075 * len(text) * (upright and text != v))
                axes.annotate(text, (x, max(high, 0)), (0, 3), textcoords="offset points", fontsize=8, ha="center",
                              va="bottom", rotation=90 * upright, bbox=dict(color="white", pad=0.3))  # fmt: skip
        if dashed:
            axes.axhline(dashed[1], label=dashed[0], **DASHED)
        axes.set(ylabel=unit, xlim=(-0.5, len(groups) - 0.5))
        axes.set_ylim(top=axes.dataLim.y1 / (1 - rise / 1.7))
        axes.set_xticks(range(len(groups)), [textwrap.fill(group, max(8, int(12 * inches))) for group in groups])
        axes.tick_params(axis="x", length=0)
        axes.yaxis.set_major_formatter(form)

    return title, paint


def stacks(title, unit, rows):
    """A horizontal bar a row, of parts end to end: {row: {part: length}}."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    longest = max((sum(row.values()) for row in rows.values()), default=1)

    def paint(axes, width):
        ends = [0] * len(rows)
        for part, colour in colours(parts).items():
            lengths = [row.get(part, 0) for row in rows.values()]
            drawn = axes.barh(list(rows), lengths, 0.6, ends, color=colour, label=part)
            written = [f"{x:,.0f}" if x > 0.07 * longest else "" for x in lengths]
            axes.bar_label(drawn, written, label_type="center", fontsize=8)
            ends = [end + x for end, x in zip(ends, lengths, strict=True)]
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.set_xlabel(unit)
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(NUMBER)

    return title, paint
