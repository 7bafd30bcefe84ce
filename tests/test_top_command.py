"""`lora-serve top`: rates and quantiles between two readings of a server's metrics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from metrics_server import served_metrics

from lora_serve.cli import main
from lora_serve.messages import Stats, StepReport, Update
from lora_serve.metrics import Metrics
from lora_serve.top_command import ROWS, AdapterRow, Interval, Reading


class Server:
    """Metrics of a server whose clock and statistics are set by the test."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stats = Stats(adapter_slots=4, kv_blocks=10, kv_blocks_used=5, running=2, waiting=3, adapters=7)
        self.metrics = Metrics(lambda: self.stats, lambda: 0, clock=lambda: self.now)

    def serve(self, adapter: str, tokens: int, first: float, each: float) -> None:
        timer = self.metrics.begin("chat")
        timer.admitted(adapter)
        self.now += first
        timer.token()
        for _ in range(tokens - 1):
            self.now += each
            timer.token()
        timer.end("stop", 10, tokens)

    def read(self, time: float) -> Reading:
        return Reading.of(self.metrics.render().decode(), time)


def test_rates_are_those_between_two_readings() -> None:
    server = Server()
    server.serve("a", 100, 1.0, 0.1)
    before = server.read(10.0)
    server.serve("a", 30, 0.2, 0.01)
    server.serve("b", 10, 0.2, 0.01)
    interval = Interval(before, server.read(12.0))
    assert interval.rate("lora_serve_completion_tokens_total") == pytest.approx(20)
    assert interval.rate("lora_serve_prompt_tokens_total") == pytest.approx(10)
    assert [row[:4] for row in interval.adapters()] == [("a", 15.0, 0.5, 2), ("b", 5.0, 0.5, 1)]


def test_a_counter_that_began_anew_is_not_negative() -> None:
    before, after = Server(), Server()
    before.serve("a", 100, 1.0, 0.1)
    after.serve("a", 10, 1.0, 0.1)
    assert Interval(before.read(0.0), after.read(1.0)).rate("lora_serve_completion_tokens_total") == 10


def test_quantiles_are_of_what_was_observed_in_between() -> None:
    server = Server()
    server.serve("a", 2, 100.0, 3.0)
    before = server.read(0.0)
    for first in (0.02, 0.02, 0.02, 0.4):
        server.serve("a", 2, first, 0.03)
    interval = Interval(before, server.read(1.0))
    first_token = "lora_serve_time_to_first_token_seconds"
    assert 0.01 <= (interval.quantile(first_token, 0.5) or 0) <= 0.025
    assert 0.25 <= (interval.quantile(first_token, 0.99) or 0) <= 0.5
    assert interval.quantile("lora_serve_step_seconds", 0.5) is None
    assert interval.mean("lora_serve_step_seconds") is None


def test_an_observation_beyond_the_last_bucket_is_at_least_its_bound() -> None:
    server = Server()
    before = server.read(0.0)
    server.serve("a", 1, 1e6, 0.0)
    assert Interval(before, server.read(1.0)).quantile("lora_serve_time_to_first_token_seconds", 0.5) == 300


def test_adapters_in_memory_are_shown_with_their_tier_also_if_nobody_used_them() -> None:
    server = Server()
    server.stats = Stats(resident=["a"], resident_in_host=["a", "b"], pinned=["b"])
    before = server.read(0.0)
    server.serve("c", 1, 0.1, 0.1)
    server.serve("base", 1, 0.1, 0.1)
    assert Interval(before, server.read(1.0)).adapters() == [
        AdapterRow("base", 1.0, 1.0, 1, ""),
        AdapterRow("c", 1.0, 1.0, 1, "disk"),
        AdapterRow("a", 0.0, 0.0, 0, "device"),
        AdapterRow("b", 0.0, 0.0, 0, "host, pinned"),
    ]


@pytest.fixture
def url() -> Iterator[str]:
    server = Server()
    for number in range(ROWS + 5):
        server.serve(f"adapter-{number}", 3, 0.1, 0.01)

    def scrape() -> bytes:
        server.serve("busy", 50, 0.1, 0.01)
        server.metrics.observe(Update([], step=StepReport(3, 30, 2, 0.1)))
        return server.metrics.render()

    with served_metrics(scrape) as port:
        yield f"http://127.0.0.1:{port}"


def test_without_a_terminal_it_is_printed_once(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--url", url, "--interval", "0.05"]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0][2:] == ["2", "running", "3", "waiting"]
    assert ["memory", "KV", "50", "%", "0", "of", "4", "slots", "7", "adapters", "published"] in lines
    assert ["batch", "3.0", "sequences", "2.0", "adapters", "100.0", "ms", "a", "step"] in lines
    busiest = lines[lines.index(["adapter", "tokens/s", "requests/s", "requests", "where"]) + 1]
    assert busiest[0] == "busy"
    assert "and 6 more" in shown


def test_a_server_that_does_not_answer_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--url", "http://127.0.0.1:1"]) == 1
    assert "no answer from http://127.0.0.1:1" in capsys.readouterr().err


def test_what_is_no_metrics_is_reported(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Metrics, "render", lambda self: b"<html>{ hello </html>")
    assert main(["top", "--url", url]) == 1
    assert "are not metrics" in capsys.readouterr().err
