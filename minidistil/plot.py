"""Charts as SVG text: enough for a training curve or a benchmark, and nothing to install."""

import math
from xml.sax.saxutils import escape

from minidistil import files

COLOURS = ["#1f6feb", "#d1570a", "#1a7f37", "#8250df", "#cf222e", "#57606a"]
WIDTH, HEIGHT = 380, 240  # of one panel, px
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 30, 40  # margins inside it, px


def ticks(low, high, count=5):
    """About `count` round numbers from low to high."""
    span = (high - low) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda s: abs(span / s - count))
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def line_chart(path, panels):
    """Writes panels side by side, atomically.

    A panel is {"title", "x", "lines": {name: [(x, y), ...]}} and may fix {"y_min", "y_max"}; a line whose name ends
    with " (dashed)" is drawn dashed. Points that are not finite are left out.
    """
    parts = [_panel(panel, column * WIDTH) for column, panel in enumerate(panels)]
    files.write_text(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts) + "\n</svg>\n",
    )  # fmt: skip


def _panel(panel, shift):
    lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in panel["lines"].items()}
    points = [p for line in lines.values() for p in line] or [(0.0, 0.0)]
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_low = panel.get("y_min", min(p[1] for p in points))
    y_high = panel.get("y_max", max(p[1] for p in points))
    x_high, y_high = x_high + (x_high == x_low), y_high + (y_high == y_low)

    def at(x, y):
        return (
            shift + LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    svg = [f'<text x="{shift + LEFT}" y="16" font-weight="bold">{escape(panel["title"])}</text>']
    for y in ticks(y_low, y_high):
        px, py = at(x_low, y)
        svg.append(f'<path d="M{px:.1f} {py:.1f}H{shift + WIDTH - RIGHT}" stroke="#d8dee4"/>')
        svg.append(f'<text x="{px - 6:.1f}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x_low, x_high, 4):
        px, py = at(x, y_low)
        svg.append(f'<text x="{px:.1f}" y="{py + 15:.1f}" text-anchor="middle">{x:g}</text>')
    svg.append(f'<text x="{shift + WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(panel["x"])}</text>')
    for i, (name, line) in enumerate(lines.items()):
        colour, dashed = COLOURS[i % len(COLOURS)], name.endswith(" (dashed)")
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(*p) for p in line))
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        svg.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>')
        label = escape(name.removesuffix(" (dashed)"))
        svg.append(f'<text x="{shift + LEFT + 6}" y="{TOP + 10 + 13 * i}" fill="{colour}">{label}</text>')
    return "\n".join(svg)


def bar_chart(path, title, bars):
    """Writes horizontal bars, atomically: (label, share of the ceiling, or a word). The axis ends at the ceiling."""
    row, label_width, width = 22, 300, 380
    height = TOP + row * len(bars) + BOTTOM
    svg = [f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, dash = label_width + share * width, ' stroke-dasharray="5 4"' if share == 1 else ""
        svg.append(f'<path d="M{x:.1f} {TOP}V{height - BOTTOM}" stroke="{"#57606a" if dash else "#d8dee4"}"{dash}/>')
        svg.append(f'<text x="{x:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{share:.0%}</text>')
    for i, (label, share) in enumerate(bars):
        y = TOP + i * row
        svg.append(f'<text x="{label_width - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
        text = share if isinstance(share, str) else f"{share:.1%}"
        length = 0 if text is share else min(share, 1) * width
        svg.append(f'<rect x="{label_width}" y="{y + 4}" width="{length:.1f}" height="{row - 8}" fill="{COLOURS[0]}"/>')
        svg.append(f'<text x="{label_width + length + 6:.1f}" y="{y + 15}">{text}</text>')
    files.write_text(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{label_width + width + 60}" height="{height}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(svg) + "\n</svg>\n",
    )  # fmt: skip
