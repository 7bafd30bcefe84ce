"""Plots of simulated loads, as SVG files: throughput by clients, the distribution of gaps, first tokens over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from bench.simulation.scenarios import Outcome

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 400, 70, 320, 40, 50  # pixels; legends are on the right
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
TICKS = 5


def write_plots(folder: Path, outcomes: Sequence[Outcome]) -> list[Path]:
    """Write the plots of each device; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for device in dict.fromkeys(outcome.device for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.device == device]
        gaps = {outcome.name: outcome.gaps for outcome in own if outcome.gaps}
        waits = {outcome.name: outcome.waits for outcome in own if outcome.waits}
        plots = {
            "throughput": line_plot(f"{device}: throughput ÷ best", "clients", "ratio", _by_clients(own), floor=0.0),
            "gaps": line_plot(f"{device}: gaps between tokens", "share of gaps", "ms", gaps, logarithmic=True),
            "first-token": line_plot(f"{device}: time to the first token", "s", "ms", waits, logarithmic=True),
        }
        for name, svg in plots.items():
            slug = "-".join("".join(char if char.isalnum() else " " for char in device).split())
            written.append(folder / f"{slug}-{name}.svg")
            written[-1].write_text(svg, encoding="utf-8")
    return written


def line_plot(
    title: str,
    across: str,
    upwards: str,
    lines: Mapping[str, Points],
    *,
    logarithmic: bool = False,
    floor: float | None = None,
) -> str:
    """An SVG with one line per name.

    Args:
        across, upwards: what the axes show.
        logarithmic: the upward axis; all values are positive.
        floor: where the upward axis begins; None: at the smallest value.
    """
    scale = math.log10 if logarithmic else float
    points = [point for line in lines.values() for point in line]
    xs, ys = [x for x, _ in points] or [0.0], [scale(y) for _, y in points] or [0.0]
    left, right = min(xs), max(xs)
    low, high = min(ys) if floor is None else floor, max(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - left) / ((right - left) or 1.0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        _text(LEFT, TOP / 2, title),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, across),
        _text(5, TOP, upwards),
    ]
    for tick in range(TICKS + 1):
        x, y = left + (right - left) * tick / TICKS, low + (high - low) * tick / TICKS
        (across_at, bottom), (start, up_at) = place(x, low), place(left, y)
        parts.append(_text(across_at, bottom + 18, f"{x:.3g}"))
        parts.append(_text(5, up_at + 4, f"{10**y if logarithmic else y:.3g}"))
        parts.append(f'<path d="M{start:.1f} {up_at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if number >= len(COLOURS) else ""
        path = " ".join("{:.1f},{:.1f}".format(*place(x, scale(y))) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        parts.append(_text(WIDTH - RIGHT + 15, TOP + 18 * number, name, colour))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _by_clients(outcomes: Sequence[Outcome]) -> dict[str, Points]:
    """Throughput ÷ the best of all schedules by clients, of the base and of a set of adapters as large."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        if outcome.clients is not None:
            ratio = outcome.figures["tok/s"] / outcome.figures["best tok/s"]
            lines.setdefault("adapters" if outcome.with_adapters else "base", []).append((outcome.clients, ratio))
    return {name: sorted(line) for name, line in lines.items()}


def _text(x: float, y: float, text: str, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(text)}</text>'
