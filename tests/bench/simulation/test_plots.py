"""Plots of simulated loads: SVG files with one line per load."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from bench.simulation import scenarios
from bench.simulation.costs import CPU_INT8
from bench.simulation.plots import line_plot, write_plots

SVG = "{http://www.w3.org/2000/svg}"


def points(svg: str) -> list[list[tuple[float, float]]]:
    """The corners of all lines, in pixels."""
    lines = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.get("points", "").split())]
        for line in lines
    ]


def test_a_line_goes_from_left_to_right_and_larger_values_are_higher_up() -> None:
    (rising, flat) = points(
        line_plot("plot", "x", "y", {"rising": [(0, 1), (1, 2), (4, 10)], "flat": [(0, 5), (4, 5)]})
    )
    assert [x for x, _ in rising] == sorted(x for x, _ in rising)
    assert [y for _, y in rising] == sorted((y for _, y in rising), reverse=True)
    assert rising[-1][1] < flat[0][1] == flat[1][1] < rising[0][1]


def test_each_factor_is_as_high_on_a_logarithmic_axis() -> None:
    ((_, low), (_, middle), (_, high)) = points(
        line_plot("plot", "x", "y", {"line": [(0, 1), (1, 10), (2, 100)]}, logarithmic=True)
    )[0]
    assert abs((low - middle) - (middle - high)) < 0.2


def test_names_are_shown_as_they_are_and_nothing_is_drawn_of_nothing() -> None:
    svg = line_plot("<title> & more", "x", "y", {})
    assert "<title> & more" in [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert points(svg) == []


def test_every_device_gets_its_plots(tmp_path: Path) -> None:
    outcomes = [scenarios.throughput(CPU_INT8, clients, 0, 16, 8) for clients in (1, 4)]
    files = write_plots(tmp_path / "plots", outcomes)
    assert [file.name for file in files] == [
        f"CPU-int8-0-5B-{name}.svg" for name in ("throughput", "gaps", "first-token")
    ]
    assert [len(line) for line in points(files[0].read_text())] == [2]  # both numbers of clients
    assert len(points(files[1].read_text())) == 2
    for line in points(files[1].read_text()):
        assert [y for _, y in line] == sorted((y for _, y in line), reverse=True)
