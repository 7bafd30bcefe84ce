"""Scheduling, pacing, fairness and residency on simulated devices, in virtual time.

    python -m bench.simulation.simulate
    python -m bench.simulation.simulate --device CPU --quick --plots FOLDER

The engine is the real one, without a model: steps take what a cost model says (`bench/simulation/costs.py`). So what is
shown is what the decisions make of a device, and no device is needed. A table of the loads, one of what each must give,
and one line of JSON; returns 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.report import Goal, goal_records, goal_table, json_line, number, table
from bench.simulation.costs import ALL
from bench.simulation.plots import write_plots
from bench.simulation.scenarios import Outcome, all_outcomes

COLUMNS = ("tok/s", "best tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "ITL max")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="", help="part of a cost model's name (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer loads")
    parser.add_argument("--plots", type=Path, help="folder for SVG files: throughput, gaps and first tokens")
    args = parser.parse_args(given)
    outcomes: list[Outcome] = []
    for costs in ALL:
        if args.device in costs.name:
            print(f"# {costs}", file=sys.stderr)
            for outcome in all_outcomes(costs, quick=args.quick):
                print(f"# {_record(outcome)}", file=sys.stderr)
                outcomes.append(outcome)
    for device in dict.fromkeys(outcome.device for outcome in outcomes):
        of_device = [outcome for outcome in outcomes if outcome.device == device]
        print(f"\n## {device} (simulated)\n")
        print(table(["load", *COLUMNS], [_row(outcome) for outcome in of_device]))
        print()
        print(goal_table([goal for outcome in of_device for goal in _named(outcome)]))
    if args.plots is not None:
        for file in write_plots(args.plots, outcomes):
            print(f"# {file}", file=sys.stderr)
    goals = [goal for outcome in outcomes for goal in outcome.goals]
    print(
        json_line(
            {
                "bench": "simulation",
                "arguments": given,
                "costs": [asdict(costs) for costs in ALL if args.device in costs.name],
                "outcomes": [_record(outcome) for outcome in outcomes],
            }
        )
    )
    return int(not all(goal.met for goal in goals))


def _record(outcome: Outcome) -> dict[str, Any]:
    """A load for the line of JSON."""
    named = {"name": outcome.name, "device": outcome.device, "figures": outcome.figures}
    return named | {"goals": goal_records(outcome.goals)}


def _row(outcome: Outcome) -> list[str]:
    """Figures of a load; times in ms."""
    row = [outcome.name]
    for column in COLUMNS:
        figure = outcome.figures.get(column, float("nan"))
        row.append(number(figure, 0) if "tok/s" in column else number(1e3 * figure, 1))
    return row


def _named(outcome: Outcome) -> list[Goal]:
    """The goals of a load, with its name."""
    return [replace(goal, of=f"{outcome.name}: {goal.of}") for goal in outcome.goals]


if __name__ == "__main__":
    sys.exit(main())
