"""A command's line of JSON as a PNG: what the axes, lines and titles of each kind of plot say."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from PIL import Image

from bench import png_plots
from bench.gpu.goals import FLOOR, ONE, PROMPT_FLOOR
from bench.png_plots import PANELS, draw, write_png
from bench.report import Goal, goal_records, json_line
from bench.serving import goals
from bench.serving.prefill_interference import Gaps
from bench.serving.summary import Summary, records
from bench.training_beside_serving import Window
from bench.training_beside_serving import record as training_record

MACHINE = {"cpu": "AMD EPYC", "cores": 2, "commit": "ce6f97412345", "date": "2026-11-28T03:56:48Z"}


def recorded(bench: str, **content: Any) -> dict[str, Any]:
    """A record as it is read from a line of JSON."""
    found: dict[str, Any] = json.loads(
        json_line({"bench": bench, "machine": MACHINE, "arguments": ["--model", "a b"]} | content)
    )
    return found


def drawn(record: dict[str, Any], tmp_path: Path) -> list[Axes]:
    """The plots of a record, whose PNG file opens and whose title says what ran where."""
    figure = draw(record)
    title = figure.get_suptitle()
    assert PANELS[record["bench"]][0] in title
    assert "commit ce6f97412345 · 2026-11-28" in title
    write_png(json.dumps(record), tmp_path / "plots" / "plot.png")
    with Image.open(tmp_path / "plots" / "plot.png") as image:
        image.load()
        assert (image.format, image.width) == ("PNG", 1320)
    return figure.axes


def lines_of(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of the lines by name, and of goals the value twice."""
    return {str(line.get_label()): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def labels(axes: Axes) -> tuple[str, str]:
    return axes.get_xlabel(), axes.get_ylabel()


def test_goals_are_bars_from_zero_beside_their_target(tmp_path: Path) -> None:
    found = [
        Goal(1, "mixed batch: all distinct ÷ all same", 0.969, 0.95, "93.0 ÷ 96.0 tok/s"),
        Goal(11, "roofline: decode step, none", 2.1, 1.4, "60.0 ÷ 28.6 ms", at_most=True),
        Goal(12, "HTTP overhead", math.nan, 0.97, ""),
    ]
    (axes,) = drawn(recorded("goals", goals=goal_records(found)), tmp_path)
    assert labels(axes) == ("measured ÷ target; dashed: the goal", "")
    assert axes.get_xlim()[0] == 0
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1.02, 1.5, 0.0], abs=0.001)
    assert [text.get_text() for text in axes.texts] == [
        "0.969, ≥ 0.95: met",
        "2.1, ≤ 1.4: missed",
        "not measured, ≥ 0.97: missed",
    ]
    assert [tick.get_text() for tick in axes.get_yticklabels()][1] == "11 roofline: decode step, none"
    assert list(lines_of(axes).values()) == [[(1, 0), (1, 1)]]


def test_servers_are_lines_by_clients(tmp_path: Path) -> None:
    def summary(throughput: float) -> Summary:
        return Summary(throughput, 0.5, *[math.nan] * 6, 1, 0, 1, 1.0)

    speeds = {"ours none ×8": 100.0, "ours one ×8": 92.0, "ours none ×1": 20.0, "ours one ×1": 19.0, "ov none ×8": 80.0}
    record = recorded(
        "compare",
        loads={f"{mix} ×{clients}": {"mix": mix, "clients": clients} for mix in ("none", "one") for clients in (8, 1)},
        footprints={"ours": {}, "ov": {}},
        results=records({name: [summary(speed)] for name, speed in speeds.items()}),
    )
    speed, kept, ttft = drawn(record, tmp_path)
    assert labels(speed) == ("clients", "tokens per second")
    assert lines_of(speed) == {
        "ours none": [(1, 20), (8, 100)],
        "ours one": [(1, 19), (8, 92)],
        "ov none": [(8, 80)],
    }
    assert lines_of(kept)["ours one"] == [(1, 0.95), (8, 0.92)]
    assert lines_of(ttft)["ov none"] == [(8, 0.5)]
    assert [tick.get_text() for tick in speed.get_xticklabels()] == ["1", "8"]
    assert all(axes.get_ylim()[0] == 0 for axes in (speed, kept, ttft))


def test_decode_steps_are_shown_as_what_they_keep_beside_the_goals(tmp_path: Path) -> None:
    steps = {("none", 1): 4.0, ("one", 1): 5.0, ("none", 32): 6.0, ("one", 32): 6.25, ("distinct", 32): 8.0}
    reached = [
        Goal(2, ONE, 0.8, 0.92, "1 rows"),
        Goal(11, FLOOR, 1.2, 1.35, "", at_most=True),
        Goal(11, PROMPT_FLOOR.format(512), 1.2, 1.3, "", at_most=True),
    ]
    record = recorded(
        "gpu",
        shape="llama-3.1-8b",
        steps=[{"mix": mix, "rows": rows, "seconds": each, "ratio": 1.2} for (mix, rows), each in steps.items()],
        goals=goal_records(reached),
    )
    del record["arguments"]
    record["machine"]["gpu"] = "NVIDIA H100"
    assert draw(record).get_suptitle().splitlines()[0] == "bench.gpu.benchmark llama-3.1-8b"
    assert draw(record).get_suptitle().splitlines()[1].startswith("NVIDIA H100 · AMD EPYC, 2 cores · commit")
    kept, floor, _ = drawn(record, tmp_path)
    assert labels(kept) == ("rows of a decode step", "base's step ÷ step")
    goal = "goal ≥ 0.92 (one adapter, worst batch size)"
    assert {name: [y for _, y in line] for name, line in lines_of(kept).items()} == {
        "one": [0.8, 0.96],
        "distinct": [0.75],
        goal: [0.92] * 2,
    }
    assert [y for _, y in lines_of(floor)["goal ≤ 1.35"]] == [1.35, 1.35]
    assert "goal ≤ 1.3" not in lines_of(floor)  # prompts'
    assert kept.get_ylim()[0] == floor.get_ylim()[0] == 0


def test_gaps_of_streams_are_shown_by_the_prompt_beside_them(tmp_path: Path) -> None:
    gaps = {512: asdict(Gaps(0.02, 0.036, 0.05, 0.9)), 64: asdict(Gaps(0.02, 0.03, 0.04, 0.2))}
    absolute, ratio = drawn(recorded("prefill_interference", gaps=gaps), tmp_path)
    assert labels(absolute) == ("tokens of the new prompt", "gap between two tokens, ms")
    assert lines_of(absolute)["worst of all"] == [(64, 40), (512, 50)]
    assert [y for _, y in lines_of(ratio)["worst ÷ usual"]] == pytest.approx([1.5, 1.8])
    assert [y for _, y in lines_of(ratio)["goal ≤ 2"]] == [2, 2]
    assert ratio.get_ylim()[0] == 0


def test_training_is_shown_as_what_it_does_to_gaps_and_throughput(tmp_path: Path) -> None:
    off = training_record([Window(10.0, [0.025] * 99 + [0.05], 2500)])
    on = training_record([Window(10.0, [0.025] * 50 + [0.06] * 50, 2400, 32, 0.5)])
    alone = training_record([Window(10.0, trained=1500, training=9.8)])
    record = recorded("training_beside_serving", loads={"full": {"off": off, "on": on}, "none": {"on": alone}})
    gaps, ratios = drawn(record, tmp_path)
    assert labels(gaps) == ("quantile of the gaps", "gap between two tokens, ms")
    assert lines_of(gaps)["full, on"] == [("P50", 25), ("P90", 60), ("P99", 60), ("P99.9", 60), ("longest", 60)]
    assert "none, on" not in lines_of(gaps)  # there were no streams
    assert labels(ratios) == ("load", "with a run ÷ without")
    assert [bar.get_height() for bar in ratios.patches] == pytest.approx([2.4, 0.96])
    assert {"goal ≤ 1.3, P99 of gaps", "goal ≥ 0.9, tokens served per second"} <= lines_of(ratios).keys()
    assert ratios.get_ylim()[0] == 0


def test_the_last_line_of_a_file_is_plotted_later(tmp_path: Path) -> None:
    record = recorded("adapter_laws", goals=goal_records([Goal(4, "registry", 0.98, 0.97, "")]))
    (tmp_path / "laws.txt").write_text(f"| a table |\n{json.dumps(record)}\n")
    assert png_plots.main([str(tmp_path / "laws.txt"), str(tmp_path / "laws.png")]) == 0
    with Image.open(tmp_path / "laws.png") as image:
        assert image.format == "PNG"
    with pytest.raises(ValueError, match="there is no plot of 'tune'"):
        draw(recorded("tune"))


def test_without_matplotlib_only_png_is_refused_and_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_png("no JSON", None)
    with pytest.raises(SystemExit):
        goals.main(["--folder", str(tmp_path), "--png", "goals.png"])
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("argument --png: needs matplotlib, which is in the extra `bench`: pip install matplotlib")
    )
