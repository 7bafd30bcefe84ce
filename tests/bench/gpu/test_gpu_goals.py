"""The goals of the GPU path follow from measurements, and one command measures every one of them within its budget."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from bench.gpu import check, goals, serving_check
from bench.gpu.command import Part, run_parts
from bench.gpu.figures import Limits, Stall, Step, weights_read
from bench.gpu.goals import GOALS, quantized_values, reached, stall_value, step_values
from bench.gpu.serving_check import BUDGET, PARTS, Findings, check_parts
from bench.gpu.steps import StepFigures
from bench.shapes import SHAPES

LLAMA = SHAPES["llama-3.1-8b"]
LIMITS = Limits(read=4e12, copy=4e12, host_to_device=5e10, flops=8e14)
CPU = torch.device("cpu")

# As agreed: law, name, and whether at least or at most what.
TABLE = """\
12 HTTP, 64 clients ÷ decode rate of the same batch, small shape ≥ 0.85
12 HTTP, 64 clients ÷ decode rate of the same batch, large shape ≥ 0.85
2 decode kept with one adapter, worst batch size ≥ 0.92
1 decode kept with all distinct, 32 rows ≥ 0.88
1 decode kept with ranks 8…128, 32 rows ≥ 0.75
11 decode step of the base ÷ byte floor, worst up to 32 rows ≤ 1.2
11 prompt of 512 ÷ compute floor ≤ 1.3
11 prompt of 2,048 ÷ compute floor ≤ 1.15
2 prompt of 512 kept with one adapter ≥ 0.93
2 prompt of 2,048 kept with one adapter ≥ 0.93
0 mixed step, base ÷ its two parts ≤ 1.15
0 mixed step, one adapter ÷ its two parts ≤ 1.15
3 base without ÷ with adapters loaded ≥ 0.99
4 registry: many ÷ few adapters in use ≥ 0.97
5 cliff: TTFT, twice as many as fit ÷ all fitting ≤ 2
6 stall: worst token gap while an adapter loads ÷ usual ≤ 1.1
7 cold start: TTFT, host ÷ resident ≤ 1.1
7 cold start: TTFT, disk − read ÷ resident ≤ 1.1
0 start of the large shape with its adapters, files in memory, seconds ≤ 25
0 decode with eight-bit weights ÷ bf16, worst rate ≥ 1.5
0 decode with four-bit weights ÷ bf16, worst rate ≥ 2
"""


def figures() -> StepFigures:
    """Of an 8B shape: what would just reach the goals, or miss one of them."""
    floor = 16e9 / LIMITS.read
    decode = [Step("none", rows, 1.1 * floor, 16e9) for rows in (1, 32, 64)]
    decode += [Step("one", rows, each * floor, 16e9) for rows, each in ((1, 1.15), (32, 1.16), (64, 1.25))]
    decode += [Step("distinct", 32, 1.2 * floor, 17e9), Step("ranks 8…128", 32, 1.4 * floor, 18e9)]
    at_peak = {tokens: goals.compute_floor(LLAMA, tokens, LIMITS) for tokens in (512, 2048)}
    prompts = {
        f"{tokens} {mix}": each * at_peak[tokens] for tokens in at_peak for mix, each in (("base", 1.2), ("one", 1.25))
    }
    mixed = {"base": (0.020, 0.005, 0.014), "one": (0.025, 0.006, 0.015)}
    return StepFigures(decode, 0.995, prompts, mixed)


def test_the_goals_are_those_of_the_table() -> None:
    shown = [f"{row.law} {row.name} {'≤' if row.at_most else '≥'} {row.target:g}" for row in GOALS]
    assert shown == TABLE.splitlines()
    assert {row.part for row in GOALS} == PARTS.keys()


def test_every_value_of_steps_and_quantised_bases_follows_from_its_measurement() -> None:
    found = figures()
    values = step_values(found, LLAMA, LIMITS) | quantized_values(
        found.decode, {"int8": {1: 3.0e-3, 32: 4.0e-3}, "fp8": {1: 2.5e-3, 32: 2.6e-3}, "int4": {1: 2.0e-3, 64: 9.0}}
    )
    by_name = {goal.name: goal for goal in reached(values)}
    measured = {name: round(goal.value, 3) for name, goal in by_name.items() if not math.isnan(goal.value)}
    assert measured == {
        goals.ONE: 0.88,
        goals.DISTINCT: 0.917,
        goals.MIXED: 0.786,
        goals.FLOOR: 1.1,
        "prompt of 512 ÷ compute floor": 1.2,
        "prompt of 2,048 ÷ compute floor": 1.2,
        "prompt of 512 kept with one adapter": 0.96,
        "prompt of 2,048 kept with one adapter": 0.96,
        "mixed step, base ÷ its two parts": 1.053,
        "mixed step, one adapter ÷ its two parts": 1.19,
        goals.IDLE: 0.995,
        goals.EIGHT: 1.692,  # fp8 at 32 rows
        goals.FOUR: 2.2,  # of up to 32 rows
    }
    assert by_name[goals.ONE].of == "4.40 ÷ 5.00 ms, 64 rows"
    assert by_name[goals.EIGHT].of == "4.40 ÷ 2.60 ms, fp8, 32 rows"
    missed = {"prompt of 2,048 ÷ compute floor", "mixed step, one adapter ÷ its two parts", goals.ONE}
    assert {name for name in measured if not by_name[name].met} == missed
    assert by_name[goals.STALL].of == "not measured"


def test_a_missing_measurement_meets_no_goal_and_says_why() -> None:
    nothing = step_values(StepFigures(), LLAMA, LIMITS) | quantized_values([], {"int8": {1: 1.0}})
    assert nothing == {}
    found = reached(nothing, missing={"cliff": "cut: no time"})
    assert not any(goal.met for goal in found)
    assert next(goal.of for goal in found if goal.number == 5) == "cut: no time"
    assert stall_value(Stall(6e-3, 6.6e-3, 7e-3, 9)) == (pytest.approx(1.1), "6.60 ÷ 6.00 ms, 9 loads")


def test_the_compute_floor_of_a_known_prompt() -> None:
    """8 TFLOP/s on 2,048 tokens of the 8B shape's linear modules, and attention's triangle."""
    linear = 2 * (weights_read(LLAMA) - 128256 * 4096 - 65 * 4096) * 2048
    attention = 4 * 32 * 4096 * 2048 * 2049 / 2
    assert goals.compute_floor(LLAMA, 2048, LIMITS) == pytest.approx(
        (linear + attention + 2 * 128256 * 4096) / LIMITS.flops
    )


def test_all_parts_fit_the_budget_of_six_minutes(tmp_path: Path) -> None:
    found = Findings(LIMITS)
    parts = check_parts("tiny", "tiny", CPU, serving_check.QUICK, found, tmp_path, profile=False)
    assert list(parts) == list(PARTS)
    assert sum(part.seconds for part in parts.values()) <= BUDGET - 5 <= 360 - 5  # and 5 for the device's limits


def test_what_would_not_fit_in_the_budget_is_cut_and_says_so() -> None:
    now = 100.0
    done: list[str] = []

    def spends(name: str, seconds: float) -> Part:
        def call() -> None:
            nonlocal now
            now += seconds
            done.append(name)

        return Part(call, 40.0)

    parts = {name: spends(name, seconds) for name, seconds in (("a", 50.0), ("b", 30.0), ("c", 10.0))}
    parts["small"] = Part(lambda: done.append("small"), 5.0)
    missing = run_parts(parts, 200.0, CPU, clock=lambda: now)
    assert done == ["a", "b", "small"]
    assert missing == {"c": "cut: takes about 40 s, and 20 s of the budget were left"}


def test_steps_and_quantised_bases_are_measured_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "check.json"
    run = ["--quick", "--shape", "tiny", "--served-shape", "tiny", "--device", "cpu", "--profile", "--json", str(file)]
    serving_check.main([*run, "--parts", "steps,quantized"])
    shown = capsys.readouterr().out.strip()
    assert shown.splitlines()[-1] == file.read_text().strip()
    found = json.loads(shown.splitlines()[-1])
    assert found["missing"] == dict.fromkeys(
        ["small server", "large server", "cliff", "registry"], "left out by --parts"
    )
    assert found["prompts"].keys() == {f"{tokens} {mix}" for tokens in (48, 64) for mix in ("base", "one")}
    assert found["eager"].keys() == {*found["prompts"], "mixed base", "mixed one"}
    assert found["kernels"].keys() == {*found["eager"], *(f"decode {mix}" for mix in ("base", "one", "distinct"))}
    assert found["quantized"].keys() == {"int8", "int4"}  # a CPU has no fp8
    measured = {goal["name"] for goal in found["goals"] if goal["value"] is not None}
    expected = {row.name for row in GOALS if row.part in ("steps", "quantized") and not row.name.startswith("prompt ")}
    assert measured == expected  # the quick run has shorter prompts
    assert {field.name for field in fields(StepFigures)} <= found.keys()
    assert check.goals_of(file) == {key: found[key] for key in ("machine", "goals", "missing")}
    assert check.goals_of(tmp_path / "none.json") == {}
    with pytest.raises(SystemExit):
        serving_check.main([*run, "--parts", "steps,laws"])


@pytest.mark.slow
def test_the_serving_check_measures_every_goal_of_servers_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    serving_check.main(["--quick", "--shape", "tiny", "--served-shape", "tiny", "--device", "cpu", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["missing"] == {}
    assert [goal["name"] for goal in found["goals"]] == [row.name for row in GOALS]
    missing = {goal["name"] for goal in found["goals"] if goal["value"] is None}
    assert all(name.startswith("prompt of ") for name in missing)
    assert found["served"]["small server"]["errors"] == found["served"]["large server"]["errors"] == 0
