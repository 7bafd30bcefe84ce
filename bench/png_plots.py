"""Plots of a command's line of JSON, as a PNG file: sweeps as lines, ratios from zero beside their goals.

    python -m bench.png_plots gpu.json gpu.png

does the same afterwards, for results of a machine without matplotlib; of a file, its last line is plotted. matplotlib
is imported only where something is drawn. Commands that simulate have SVG files of their own (`bench.simulation`).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]  # what a line of JSON holds
WIDTH, HEIGHT, BAR = 12.0, 3.6, 0.4  # inches: of a plot, and of a row of a plot of goals
MET, MISSED = "#0072b2", "#d55e00"
STYLES = ("--", ":")  # of the lines of goals
KEPT, BYTE_FLOOR = "decode kept with ", "byte floor"  # in names of goals of decode steps
GAP_RATIO = 2.0  # goal of prefills: the worst gap beside them ÷ the usual one
TRAINED_GAP, TRAINED_SERVED = 1.3, 0.9  # goals of training beside streams: P99 of gaps, tokens served; with ÷ without


def add_png_option(parser: argparse.ArgumentParser) -> None:
    """Add --png, which is refused at once, not after the measurement, where there is no matplotlib."""
    parser.add_argument(
        "--png", type=_png_file, metavar="FILE", help="also write plots to this file (needs matplotlib)"
    )


def write_png(line: str, file: Path | None) -> None:
    """Plot a command's line of JSON; nothing without a file."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(json.loads(line)).savefig(file, format="png", dpi=110)


def draw(record: Record) -> Figure:
    """The figure of a command's record. Raises ValueError if that command has none."""
    if record.get("bench") not in PANELS:
        raise ValueError(f"there is no plot of {record.get('bench', 'this')!r}; there are of {', '.join(PANELS)}")
    from matplotlib.figure import Figure  # without pyplot: no window, always the Agg backend

    command, panels = PANELS[record["bench"]]
    heights = [1.2 + BAR * len(record["goals"]) if panel is plot_goals else HEIGHT for panel in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) + 1.0), layout="constrained")
    figure.suptitle(f"{command} {_what_ran(record)}\n{_where(record)}", fontsize="medium")
    rows = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})
    for panel, (axes,) in zip(panels, rows, strict=True):
        panel(axes, record)
    return figure


def plot_goals(axes: Axes, record: Record) -> None:
    """Each goal's measured value ÷ its target as a bar, from zero; the line at 1 is the goal."""
    for place, goal in enumerate(record["goals"]):
        value, target = _or_nan(goal["value"]), _or_nan(goal["target"])
        axes.barh(place, 0.0 if math.isnan(value / target) else value / target, color=MET if goal["met"] else MISSED)
        shown = "not measured" if math.isnan(value) else f"{value:.3g}"
        bound = f"{'≤' if goal['at_most'] else '≥'} {target:g}: {'met' if goal['met'] else 'missed'}"
        at = {"xy": (1.01, place), "xycoords": ("axes fraction", "data"), "va": "center"}
        axes.annotate(f"{shown}, {bound}", fontsize="small", **at)
    axes.axvline(1.0, color="black", linestyle="--", zorder=3)
    axes.set_yticks(
        range(len(record["goals"])),
        [textwrap.fill(f"{goal['number']} {goal['name']}", 44) for goal in record["goals"]],
        fontsize="small",
    )
    axes.invert_yaxis()
    axes.set_xlim(left=0.0)
    axes.set_xlabel("measured ÷ target; dashed: the goal")


def plot_compared_throughput(axes: Axes, record: Record) -> None:
    """Tokens per second of each server and mix, by clients."""
    _plot_lines(axes, _compared(record, "throughput"), "clients", "tokens per second")


def plot_compared_ttft(axes: Axes, record: Record) -> None:
    """Median TTFT of each server and mix, by clients."""
    _plot_lines(axes, _compared(record, "ttft_median"), "clients", "median TTFT, s")


def plot_compared_kept(axes: Axes, record: Record) -> None:
    """What each server keeps of its base's throughput with adapters, by clients."""
    found = _compared(record, "throughput")
    lines = {}
    for name, line in found.items():
        server, mix = name.rsplit(" ", 1)
        base = found.get(f"{server} none", {})
        kept = {clients: value / base[clients] for clients, value in line.items() if clients in base}
        if mix != "none" and kept:
            lines[name] = kept
    _plot_lines(axes, lines, "clients", "throughput ÷ base's", {"as fast as the base": 1.0})


def plot_kept_steps(axes: Axes, record: Record) -> None:
    """What decode steps with adapters keep of the base's speed, by rows."""
    steps = _steps(record, "seconds")
    base = steps.pop("none", {})
    lines = {
        mix: {rows: base[rows] / seconds for rows, seconds in line.items() if rows in base}
        for mix, line in steps.items()
    }
    goals = {
        f"goal ≥ {goal['target']:g} ({goal['name'].removeprefix(KEPT)})": goal["target"]
        for goal in record["goals"]
        if goal["name"].startswith(KEPT)
    }
    _plot_lines(axes, lines, "rows of a decode step", "base's step ÷ step", goals)


def plot_floor_ratios(axes: Axes, record: Record) -> None:
    """Decode steps ÷ the time to read their bytes, by rows."""
    goals = {f"goal ≤ {goal['target']:g}": goal["target"] for goal in record["goals"] if BYTE_FLOOR in goal["name"]}
    _plot_lines(axes, _steps(record, "ratio"), "rows of a decode step", "step ÷ floor", goals)


def plot_prefill_gaps(axes: Axes, record: Record) -> None:
    """Gaps of running streams in milliseconds, by the length of the prompt beside them."""
    names = {"usual": "usual", "worst": "worst of a prompt, median", "worst_of_all": "worst of all"}
    lines = {
        name: {int(tokens): 1e3 * _or_nan(gaps[key]) for tokens, gaps in record["gaps"].items()}
        for key, name in names.items()
    }
    _plot_lines(axes, lines, "tokens of the new prompt", "gap between two tokens, ms")


def plot_prefill_ratios(axes: Axes, record: Record) -> None:
    """Worst ÷ usual gap of running streams, by the length of the prompt beside them."""
    ratios = {int(tokens): _or_nan(gaps["worst"]) / _or_nan(gaps["usual"]) for tokens, gaps in record["gaps"].items()}
    goal = {f"goal ≤ {GAP_RATIO:g}": GAP_RATIO}
    _plot_lines(axes, {"worst ÷ usual": ratios}, "tokens of the new prompt", "worst gap ÷ usual", goal)


def plot_trained_gaps(axes: Axes, record: Record) -> None:
    """Quantiles of the gaps of streams in milliseconds, without and with a run beside them."""
    from matplotlib.ticker import LogFormatter

    for load, states in record["loads"].items():
        for state, figures in states.items():
            if figures["gap_ms"]:
                quantiles = [_quantile(quantile) for quantile in figures["gap_ms"]]
                style = "-" if state == "on" else ":"
                axes.plot(quantiles, [*map(_or_nan, figures["gap_ms"].values())], f"o{style}", label=f"{load}, {state}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2.0, 0.5)))  # where a decade is tall
    axes.set(xlabel="quantile of the gaps", ylabel="gap between two tokens, ms")
    axes.grid(alpha=0.3)
    _add_legend(axes)


def plot_trained_ratios(axes: Axes, record: Record) -> None:
    """By load: P99 of the gaps and tokens served per second, with a run ÷ without."""
    loads = {load: states for load, states in record["loads"].items() if {"off", "on"} <= states.keys()}

    def served(figures: Record) -> float:
        return _or_nan(figures["served"]) / _or_nan(figures["seconds"])

    def p99(figures: Record) -> float:
        return _or_nan(figures["gap_ms"].get("0.99"))

    for side, (name, of, goal, bound) in enumerate(
        (("P99 of gaps", p99, TRAINED_GAP, "≤"), ("tokens served per second", served, TRAINED_SERVED, "≥"))
    ):
        ratios = [of(states["on"]) / of(states["off"]) for states in loads.values()]
        axes.bar([place + 0.4 * side - 0.2 for place in range(len(loads))], ratios, 0.35, label=name)
        axes.axhline(goal, color="black", linestyle=STYLES[side], label=f"goal {bound} {goal:g}, {name}")
    axes.set_xticks(range(len(loads)), list(loads))
    axes.set_xlim(-1.0, len(loads))
    axes.set_ylim(bottom=0.0)
    axes.set(xlabel="load", ylabel="with a run ÷ without")
    _add_legend(axes)


Panel = Callable[["Axes", Record], None]
PANELS: dict[str, tuple[str, tuple[Panel, ...]]] = {  # by `bench` in the JSON: the command, and its plots
    "goals": ("bench.serving.goals", (plot_goals,)),
    "adapter_laws": ("bench.serving.adapter_laws", (plot_goals,)),
    "prefill_interference": ("bench.serving.prefill_interference", (plot_prefill_gaps, plot_prefill_ratios)),
    "compare": ("bench.peers.compare", (plot_compared_throughput, plot_compared_kept, plot_compared_ttft)),
    "training_beside_serving": ("bench.training_beside_serving", (plot_trained_gaps, plot_trained_ratios)),
    "gpu": ("bench.gpu.benchmark", (plot_kept_steps, plot_floor_ratios, plot_goals)),
    "gpu serving": ("bench.gpu.serving_check", (plot_goals,)),
}


def _compared(record: Record, field: str) -> dict[str, dict[int, float]]:
    """A median of `bench.peers.compare` by `SERVER MIX` and clients."""
    lines: dict[str, dict[int, float]] = {}
    for server in record["footprints"]:
        for kind, load in record["loads"].items():
            if f"{server} {kind}" in record["results"]:
                value = _or_nan(record["results"][f"{server} {kind}"]["median"][field])
                lines.setdefault(f"{server} {load['mix']}", {})[load["clients"]] = value
    return lines


def _steps(record: Record, field: str) -> dict[str, dict[int, float]]:
    """A figure of the decode steps of `bench.gpu.benchmark` by mix and rows."""
    lines: dict[str, dict[int, float]] = {}
    for step in record["steps"]:
        lines.setdefault(step["mix"], {})[step["rows"]] = _or_nan(step[field])
    return lines


def _plot_lines(
    axes: Axes,
    lines: Mapping[str, Mapping[int, float]],
    across: str,
    upwards: str,
    goals: Mapping[str, float] | None = None,
) -> None:
    """A line per name from zero upwards, over a logarithmic axis with a tick at every size; goals are dashed."""
    for name, line in lines.items():
        sizes = sorted(line)
        axes.plot(sizes, [line[size] for size in sizes], "o-", label=name)
    for number, (name, value) in enumerate((goals or {}).items()):
        axes.axhline(value, color="black", linestyle=STYLES[number % len(STYLES)], label=name)
    ticks = sorted({size for line in lines.values() for size in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set_ylim(bottom=0.0, top=1.08 * axes.dataLim.ymax if axes.dataLim.ymax > 0 else None)
    axes.set(xlabel=across, ylabel=upwards)
    axes.grid(alpha=0.3)
    _add_legend(axes)


def _add_legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")


def _quantile(text: str) -> str:
    return "longest" if float(text) == 1.0 else f"P{100 * float(text):g}"


def _what_ran(record: Record) -> str:
    """The command's arguments, or the shape where the record has none."""
    text = shlex.join(record["arguments"]) if "arguments" in record else record["shape"]
    return textwrap.fill(textwrap.shorten(text, 280, placeholder=" …"), 120)


def _where(record: Record) -> str:
    """The devices, the commit and the date of a record."""
    machine = record["machine"]
    devices = [machine["gpu"]] if "gpu" in machine else []
    devices.append(f"{machine['cpu']}, {machine['cores']} cores")
    return f"{' · '.join(devices)} · commit {machine['commit']} · {machine['date'][:10]}"


def _or_nan(value: float | None) -> float:
    """JSON's null is a value that was not measured."""
    return math.nan if value is None else float(value)


def _png_file(text: str) -> Path:
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib, which is in the extra `bench`: pip install matplotlib")
    return Path(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what a command printed, or its --json")
    parser.add_argument("png", type=_png_file)
    args = parser.parse_args(arguments)
    write_png(args.json.read_text(encoding="utf-8").splitlines()[-1], args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
