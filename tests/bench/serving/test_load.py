"""The load generator sends the load it describes and measures real times, against a server with known delays."""

from __future__ import annotations

import json
import statistics
import sys
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from fake_openai import FIRST, GAP, FakeServer

from bench.report import json_line, table
from bench.serving import http_throughput
from bench.serving.client import Job, Server, Timing, stream
from bench.serving.launch import launched
from bench.serving.load import Load, run
from bench.serving.summary import percentile, summarise

FAKE = (sys.executable, str(Path(__file__).with_name("fake_openai.py")))
SLACK = 0.05  # seconds that a busy test machine may add to one delay


async def one(server: Server, job: Job, timeout: float = 10) -> Timing:
    async with server.session() as session:
        return await stream(session, server, job, timeout)


async def test_timings_are_those_of_the_stream(fake: tuple[FakeServer, Server]) -> None:
    seen, server = fake
    timing = await one(server, Job([1, 2, 3], 6))
    assert timing.error is None
    assert timing.tokens == 6
    assert len(timing.chunks) == 6
    assert FIRST <= timing.ttft < FIRST + SLACK
    assert len(timing.gaps) == 5
    assert GAP * 0.8 <= statistics.median(timing.gaps) < GAP + SLACK
    for arrived, sent in zip(timing.chunks, seen.sent[0], strict=True):
        assert 0 <= arrived - sent < SLACK
    assert timing.finished - timing.sent >= FIRST + 5 * GAP


async def test_the_request_is_greedy_exact_and_counted(fake: tuple[FakeServer, Server]) -> None:
    seen, server = fake
    await one(server, Job([7, 8], 2, "a"))
    await one(replace(server, adapter_field="model"), Job([7, 8], 2, "a"))
    await one(server, Job([7, 8], 2))
    first, by_model, base = seen.bodies
    assert first == {
        "model": "base",
        "adapter": "a",
        "prompt": [7, 8],
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert by_model["model"] == "a"
    assert base["model"] == "base"
    assert "adapter" not in by_model | base


@pytest.mark.parametrize(
    ("adapter", "complaint"),
    [
        ("refused", "HTTP 404"),
        ("broken", "the stream broke off"),
        ("error", "in the stream: the engine failed"),
        ("short", "3 tokens instead of 4"),
        ("silent", "not done after 0.5 s"),
    ],
)
async def test_failures_are_counted_not_raised(fake: tuple[FakeServer, Server], adapter: str, complaint: str) -> None:
    _, server = fake
    timing = await one(server, Job([1], 4, adapter), timeout=0.5)
    assert timing.error is not None
    assert complaint in timing.error
    summary = summarise([timing])
    assert (summary.errors, summary.tokens, summary.throughput) == (1, 0, 0.0)
    assert summary.failures[0][1] == 1


async def test_without_usage_the_chunks_are_counted(fake: tuple[FakeServer, Server]) -> None:
    _, server = fake
    timing = await one(server, Job([1], 4, "uncounted"))
    assert (timing.tokens, timing.error) == (4, None)


async def test_a_refused_connection_is_an_error_not_an_exception() -> None:
    timing = await one(Server("http://127.0.0.1:9", "base"), Job([1], 4))
    assert timing.error is not None


async def test_a_closed_loop_keeps_each_client_busy_with_one_request(fake: tuple[FakeServer, Server]) -> None:
    seen, server = fake
    load = Load(mix="distinct", adapters=("a", "b", "c"), clients=3, requests=9, output=(3, 3), prompt=(4, 4))
    summary = summarise(await run(server, load))
    assert (summary.requests, summary.errors, summary.tokens) == (9, 0, 27)
    assert seen.most == 3
    assert Counter(body["adapter"] for body in seen.bodies) == {"a": 3, "b": 3, "c": 3}
    shortest = 3 * (FIRST + 2 * GAP)
    assert shortest <= summary.seconds < shortest + 0.5
    assert summary.throughput == pytest.approx(27 / summary.seconds)


async def test_an_open_loop_sends_at_its_rate_whatever_the_server_does(fake: tuple[FakeServer, Server]) -> None:
    seen, server = fake
    load = Load(rate=100.0, requests=40, output=(5, 5), prompt=(2, 2), seed=3)
    timings = await run(server, load)
    assert len(timings) == 40
    sent = sorted(timing.sent for timing in timings)
    assert sent[-1] - sent[0] > 0.2
    between = sorted(later - sooner for sooner, later in pairwise(sent))
    assert 0.003 < between[len(between) // 2] < 0.014  # 6.9 ms of a Poisson stream; the machine may pause elsewhere
    assert seen.most > 4


@pytest.mark.parametrize("rate", [None, 20.0])
async def test_no_request_begins_after_its_time(fake: tuple[FakeServer, Server], rate: float | None) -> None:
    _, server = fake
    load = Load(clients=2, rate=rate, requests=10_000, seconds=0.4, output=(2, 2), prompt=(2, 2))
    timings = await run(server, load)
    begun = min(timing.sent for timing in timings)
    assert 2 <= len(timings) < 30
    assert all(timing.sent - begun < 0.4 + SLACK for timing in timings)
    assert all(timing.error is None for timing in timings)


def test_equal_loads_are_equal_requests() -> None:
    load = Load(mix="zipf", adapters=tuple("abcdef"), requests=2000, prompt=(8, 16), output=(2, 5), seed=1)
    jobs = load.jobs()
    assert jobs == load.jobs()
    assert jobs != replace(load, seed=2).jobs()
    salted = replace(load, salt=1).jobs()
    assert [len(job.prompt) for job in salted] == [len(job.prompt) for job in jobs]
    assert [(job.adapter, job.max_tokens) for job in salted] == [(job.adapter, job.max_tokens) for job in jobs]
    assert not any(one.prompt[:4] == other.prompt[:4] for one, other in zip(salted, jobs, strict=True))
    assert {len(job.prompt) for job in jobs} == set(range(8, 17))
    assert {job.max_tokens for job in jobs} == {2, 3, 4, 5}
    assert all(300 <= token < 2000 for job in jobs for token in job.prompt)
    shares = Counter(job.adapter for job in jobs)
    assert shares["a"] / shares["b"] == pytest.approx(2, rel=0.3)
    assert shares["a"] / shares["f"] == pytest.approx(6, rel=0.4)
    flat = Counter(job.adapter for job in replace(load, mix="uniform").jobs())
    assert max(flat.values()) < 1.3 * min(flat.values())


def test_each_mix_selects_its_adapters() -> None:
    load = Load(adapters=("a", "b", "c"), clients=2, requests=4)
    assert [job.adapter for job in load.jobs()] == [None] * 4
    assert [job.adapter for job in replace(load, mix="one").jobs()] == ["a"] * 4
    assert [job.adapter for job in replace(load, mix="distinct").jobs()] == ["a", "b", "a", "b"]
    with pytest.raises(ValueError, match="all distinct"):
        replace(load, mix="distinct", clients=4).jobs()
    with pytest.raises(ValueError, match="needs adapters"):
        replace(load, mix="one", adapters=()).jobs()


def test_percentiles_are_measured_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(values, 0.99), percentile(values, 0.5), percentile([3.0], 0.99)) == (99.0, 50.0, 3.0)


def test_a_summary_adds_up() -> None:
    def timing(sent: float, *chunks: float, error: str | None = None) -> Timing:
        return Timing(Job([1], len(chunks)), sent, list(chunks), chunks[-1], len(chunks), error)

    summary = summarise([timing(0, 1.0, 1.5, 2.5), timing(1, 3.0, 3.2), timing(0, 4.0, error="late")])
    assert summary.seconds == 4.0
    assert summary.tokens == 5
    assert summary.throughput == 1.25
    assert summary.ttft_median == 1.5
    assert summary.itl_median == 0.5
    assert summary.itl_worst == 1.0
    assert summary.e2e_p99 == 2.5
    assert (summary.requests, summary.errors) == (3, 1)


def test_the_command_starts_its_server_measures_and_stops_it(capsys: pytest.CaptureFixture[str]) -> None:
    with launched([], command=FAKE, timeout=60) as url:
        http_throughput.main(
            f"--url {url} --mix none,distinct --clients 2 --requests 4 --prompt 4-6 --output 3 --repeats 2".split()
        )
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/ready", timeout=1)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| load")
    record = json.loads(printed[-1])
    assert record["load"]["adapters"] == 2
    assert set(record["results"]) == {"none", "distinct"}
    assert len(record["results"]["none"]["runs"]) == 2
    assert record["results"]["distinct"]["median"]["errors"] == 0
    assert record["results"]["distinct"]["median"]["throughput"] > 0
    assert record["machine"]["cores"] >= 1


def test_launch_raises_with_the_output_of_a_server_that_cannot_start() -> None:
    with pytest.raises(RuntimeError, match="this cannot start"), launched(["--fail"], command=FAKE, timeout=60):
        pass


def test_records_are_valid_json_and_tables_are_aligned() -> None:
    assert json_line({"a": float("nan"), "b": (1.0, 2)}) == '{"a": null, "b": [1.0, 2]}'
    assert table(["load", "x"], [["none", "1.5"], ["distinct", "10.5"]]).splitlines() == [
        "| load     |    x |",
        "|----------|-----:|",
        "| none     |  1.5 |",
        "| distinct | 10.5 |",
    ]
