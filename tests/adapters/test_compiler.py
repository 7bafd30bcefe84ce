"""Compiler processes: bounded, disposable, and apart from the process that serves."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from peft_folders import BASE, HEAD, tensors, write
from torch import Tensor

from lora_serve.adapters import lowered_file
from lora_serve.adapters.compiler import Compiler, CompilerLimits
from lora_serve.adapters.lowering_job import LoweringContext, LoweringJob
from lora_serve.errors import AdapterInvalid, EngineFault


def head(path: str) -> Tensor:
    return HEAD


def crash(path: str) -> Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return HEAD


def take_memory(path: str) -> Tensor:
    return torch.ones(1 << 28)


def take_time(path: str) -> Tensor:
    while True:
        pass


def wait(path: str) -> Tensor:
    time.sleep(60)
    return HEAD


class HeldToLess:
    """Weights in a process that may run for less than a compiler's time, which nobody may raise."""

    def __reduce__(self) -> tuple[Callable[[], Callable[[str], Tensor]], tuple[()]]:
        return hold_to_less, ()

    def __call__(self, path: str) -> Tensor:
        raise AssertionError("it is another one where it is read")


def hold_to_less() -> Callable[[str], Tensor]:
    resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
    return head


def compiler(weight: Callable[[str], Tensor] = head) -> Compiler:
    """A compiler for a base whose weights are read so."""
    base = replace(BASE, weight=weight, parameter=head)
    context = LoweringContext(base, "a base", torch.float32, 1 << 20, 1 << 20)
    return Compiler(context, CompilerLimits(memory=256 << 20, seconds=2))


def dora(folder: Path) -> LoweringJob:
    """An adapter for which the base's weights are read."""
    vectors = {f"base_model.model.{name}.lora_magnitude_vector": torch.ones(12) for name in BASE.sites}
    return LoweringJob(str(write(folder, tensors() | vectors, use_dora=True)))


def test_a_folder_becomes_a_version_s_folder(tmp_path: Path) -> None:
    staged = tmp_path / "staged"
    staged.mkdir()
    source = write(tmp_path / "source")
    version = compiler().lower(LoweringJob(str(source), str(staged)))
    assert sorted(path.name for path in staged.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "lowered",
    ]  # fmt: skip
    assert lowered_file.read_summary(staged) == version.summary
    assert lowered_file.read(staged, version.record.digest).offsets.keys() == BASE.sites.keys()
    assert (source / "adapter_config.json").exists()
    moved = tmp_path / "moved"
    moved.mkdir()
    assert compiler().lower(LoweringJob(str(source), str(moved), move=True)).record.digest == version.record.digest
    assert not (source / "adapter_config.json").exists()


def test_what_is_wrong_with_an_adapter_is_told_as_if_it_was_lowered_here(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="use_dora"):
        compiler().lower(LoweringJob(str(write(tmp_path / "a", tensors(), use_dora=True))))


def test_an_adapter_that_takes_too_much_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=r"needs more than 268435456 bytes of memory \(--compiler-memory\)"):
        compiler(take_memory).lower(dora(tmp_path / "a"))


def test_an_adapter_that_takes_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=r"needs more than 2 s of CPU time \(--compiler-cpu-time\)"):
        compiler(take_time).lower(dora(tmp_path / "a"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s of CPU time"),
        ("{{ ('x' * 10 ** 10) | length }}", "more than 268435456 bytes of memory"),
    ],
)
def test_a_chat_template_that_takes_too_much_is_refused_with_its_adapter(
    tmp_path: Path, template: str, what: str
) -> None:
    folder = write(tmp_path / "source")
    (folder / "serve.yaml").write_text(f'chat_template: "{template}"')
    with pytest.raises(AdapterInvalid, match=what):
        compiler().lower(LoweringJob(str(folder), trust_settings=True))


def test_limits_of_the_system_that_are_lower_stay(tmp_path: Path) -> None:
    assert compiler(HeldToLess()).lower(dora(tmp_path / "a")).summary.rank == 4


def test_a_crash_costs_one_adapter(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match="ended"):
        compiler(crash).lower(dora(tmp_path / "a"))
    assert compiler().lower(dora(tmp_path / "b")).summary.rank == 4


def test_adapters_are_lowered_at_the_same_time(tmp_path: Path) -> None:
    slow = compiler(wait)
    jobs = [dora(tmp_path / str(number)) for number in range(2)]
    threads = [threading.Thread(target=_lower_and_fail, args=(slow, job)) for job in jobs]
    for thread in threads:
        thread.start()
    children = _wait_for_children(2)
    for child in children:
        child.kill()
    for thread in threads:
        thread.join()


def test_beside_requests_lowering_runs_in_slices_and_ends_all_the_same(tmp_path: Path) -> None:
    computing = compiler(take_time)
    computing.is_busy = lambda: True
    thread = threading.Thread(target=_lower_and_fail, args=(computing, dora(tmp_path / "a")))
    thread.start()
    (child,) = _wait_for_children(1)
    begin, before = time.monotonic(), child.cpu_times()
    time.sleep(1.0)
    after, seconds = child.cpu_times(), time.monotonic() - begin
    assert 0 < after.user + after.system - before.user - before.system < 0.5 * seconds
    child.kill()  # perhaps while it is stopped
    thread.join()
    sliced = compiler()
    sliced.is_busy = lambda: True
    assert sliced.lower(dora(tmp_path / "b")).summary.rank == 4


@pytest.mark.parametrize("busy", [False, True])
def test_no_process_outlives_the_one_that_started_it(tmp_path: Path, busy: bool) -> None:
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_compiler import compiler, dora, wait
waiting = compiler(wait)
waiting.is_busy = lambda: {busy}
waiting.lower(dora(Path({str(tmp_path / "a")!r})))
"""
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        children = _wait_for_children(1, psutil.Process(parent.pid))
        while busy and children[0].status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        os.kill(parent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def _lower_and_fail(slow: Compiler, job: LoweringJob) -> None:
    with pytest.raises(EngineFault):
        slow.lower(job)


def _wait_for_children(count: int, parent: psutil.Process | None = None) -> list[psutil.Process]:
    """The processes that lower adapters, once there are so many: children of the process that was forked from."""
    parent, deadline = parent or psutil.Process(), time.monotonic() + 30
    while time.monotonic() < deadline:
        running = (child for each in parent.children() for child in each.children())
        found = [child for child in running if child.status() != psutil.STATUS_ZOMBIE]
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError("the processes did not start")
