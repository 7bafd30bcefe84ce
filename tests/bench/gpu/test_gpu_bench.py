"""GPU figures follow from the measurements; the benchmark itself runs on the CPU at its smallest size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import benchmark, check, wheels
from bench.gpu.figures import (
    Limits,
    Step,
    adapter_bytes,
    kv_bytes,
    load_stall,
    overhead,
    step_bytes,
    step_table,
    weights_read,
)
from bench.gpu.goals import PROMPT_FLOOR, PROMPT_KEPT
from bench.shapes import SHAPES

LLAMA = SHAPES["llama-3.1-8b"]
LIMITS = Limits(read=4e12, copy=4e12, host_to_device=5e10, flops=8e14)
ROOT = Path(__file__).resolve().parents[3]


def steps(none: float, one: float, distinct: float, rows: int = 32) -> list[Step]:
    return [Step(mix, rows, s, 16e9) for mix, s in (("none", none), ("one", one), ("distinct", distinct))]


def test_the_byte_floor_of_a_known_model() -> None:
    assert weights_read(LLAMA) == 8_030_261_248 - 128256 * 4096  # all but the embedding
    assert kv_bytes(LLAMA, 1) == 128 << 10
    assert adapter_bytes(LLAMA, 16) == 2 * 41_943_040
    assert step_bytes(LLAMA, 2, 512, [16, 8]) == 2 * weights_read(LLAMA) + kv_bytes(LLAMA, 1024) + 1.5 * adapter_bytes(
        LLAMA, 16
    )
    assert weights_read(SHAPES["tiny"]) == sum(
        math.prod(size)
        for group in [*map(SHAPES["tiny"].tensors, range(4)), SHAPES["tiny"].ends()]
        for _, size in group
    )


def test_overhead_is_relative_to_the_base_and_ratio_to_the_floor() -> None:
    found = steps(5e-3, 5.2e-3, 5.5e-3)
    assert overhead(found, "one", 32) == pytest.approx(0.04)
    assert overhead(found, "distinct", 32) == pytest.approx(0.10)
    assert math.isnan(overhead(found, "distinct", 64))
    assert found[0].ratio(LIMITS) == pytest.approx(1.25)


def test_a_load_stall_is_the_worst_gap_during_a_load_over_the_usual_worst_gap() -> None:
    steady = [0.01 * tick for tick in range(400)]
    held = [*steady[:301], *(time + 0.02 for time in steady[301:])]  # one gap of 30 ms, at 3 s
    found = load_stall([steady, held], loads=[(2.5, 2.6), (2.95, 3.05), (3.5, 3.6)], quiet=(0.5, 2.0))
    assert found.usual == pytest.approx(0.01)
    assert found.loading == pytest.approx(0.01)  # the median load stalls no stream
    assert found.worst == pytest.approx(0.03)
    assert found.loads == 3
    assert load_stall([held], loads=[(2.95, 3.05)], quiet=(0.5, 0.55)).ratio == pytest.approx(3.0)


def test_the_table_has_a_row_per_batch_size_and_one_for_mixed_ranks() -> None:
    mixed = Step("ranks 8…128", 32, 6e-3, 20e9)
    lines = step_table([*steps(5e-3, 5.2e-3, 5.5e-3), mixed, Step("none", 64, 7e-3, 18e9)], LIMITS).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert "10.0" in lines[2]  # the overhead of all distinct, in percent
    assert "–" in lines[3]  # only the base was measured
    assert lines[4].startswith("| 32 ranks 8…128")


def test_the_largest_shape_that_fits_is_measured() -> None:
    names = list(SHAPES)
    assert benchmark.largest_fitting(names, "llama-3.1-8b", benchmark.Sizes(), 75e9) == (
        "llama-3.1-8b",
        benchmark.Sizes().rows,
    )
    name, rows = benchmark.largest_fitting(names, "llama-3.1-8b", benchmark.Sizes(), 36e9)
    assert name == "llama-3.1-8b"
    assert 32 <= rows[-1] < 256
    assert benchmark.largest_fitting(names, "llama-3.1-8b", benchmark.Sizes(), 15e9)[0] == "qwen2.5-1.5b"
    with pytest.raises(ValueError, match="no shape fits"):
        benchmark.largest_fitting(names, "llama-3.1-8b", benchmark.Sizes(), 1e9)


def test_the_whole_benchmark_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "gpu.json"), "--png", str(tmp_path / "gpu.png")]
    benchmark.main(["--quick", "--shape", "tiny", "--device", "cpu", *files])
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out.strip()
    line = (tmp_path / "gpu.json").read_text().strip()
    assert shown.endswith(line)
    found = json.loads(line)
    assert found["failures"] == []
    assert [(step["mix"], step["rows"]) for step in found["steps"]] == [
        *[(mix, rows) for rows in (1, 4) for mix in ("none", "one", "distinct")],
        ("ranks 8…128", 4),
    ]
    assert found["operations"].keys() == {f"RoPE and KV write, {rows} rows" for rows in (1, 4)}
    assert all(each["fused"] > 0 < each["apart"] for each in found["operations"].values())
    assert found["engine"]["decode"].keys() == {"none", "one", "uniform"}
    assert found["engine"]["stall"]["loads"] == 2
    assert [list(each) for each in found["training"].values()] == [["one adapter", "4 adapters"], ["kernels", "torch"]]
    assert {goal["number"] for goal in found["goals"]} == {0, 1, 2, 3, 6, 11}
    assert {goal["name"] for goal in found["goals"] if goal["value"] is None} == {
        name for tokens in ("512", "2,048") for name in (PROMPT_FLOOR.format(tokens), PROMPT_KEPT.format(tokens))
    }  # the quick run has shorter prompts


def test_a_failing_part_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no such memory")

    monkeypatch.setattr(benchmark, "measure_forward_passes", fails)
    monkeypatch.setattr(benchmark, "measure_engine", fails)
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--quick", "--shape", "tiny", "--device", "cpu"])
    assert ended.value.code == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["failures"] == [f"{part}: RuntimeError: no such memory" for part in ("steps", "engine")]
    assert found["limits"]["read"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_commands_say_so_and_exit_with_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main([])
    assert ended.value.code == 3
    assert "sees no GPU here" in capsys.readouterr().err
    ran = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu" / "check.py"), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 3
    assert "sees no GPU here, so there is nothing to check" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_the_check_creates_an_environment_on_top_of_the_installed_packages(tmp_path: Path) -> None:
    python = check.environment(tmp_path / "env", "9.9")
    program = "import torch, lora_serve, importlib.metadata as m; print(m.version('lora-serve'), torch.__version__)"
    shown = subprocess.run(
        [str(python), "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert shown.split() == ["9.9", torch.__version__]


def test_the_wheels_are_those_that_an_image_lacks() -> None:
    lines = [
        "# pins",
        "-r serve.txt",
        "fastapi==0.1",
        "torch==2.13.0",
        "uvloop==0.23.0; sys_platform != 'win32'",
        "ruff==1",
    ]
    assert wheels.pinned(lines) == ["fastapi==0.1", "uvloop==0.23.0"]
    project = {
        "dependencies": ["torch>=2"],
        "optional-dependencies": {"test": ["pytest>=9,<10", "openai>=2", "peft==1"]},
    }
    assert check.requirements(project) == ["torch>=2", "pytest>=9,<10", "peft==1"]


def test_the_counts_are_those_of_pytests_summary_line() -> None:
    assert check.test_counts("...\n3 failed, 70 passed, 2 skipped in 9.1s\n") == {
        "failed": 3,
        "passed": 70,
        "skipped": 2,
    }
    assert check.test_counts("nothing ran") == {}


def test_a_command_that_takes_too_long_is_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    slow = [sys.executable, "-c", f"import os, time; print(os.environ['PYTHONPATH'] == {str(ROOT)!r}); time.sleep(30)"]
    assert check.run(slow, tmp_path / "log", 3.0) == 124
    assert (tmp_path / "log").read_text() == capfd.readouterr().out == f"True{os.linesep}"
