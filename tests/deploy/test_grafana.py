"""The Grafana dashboard asks for metrics that the server has, in queries that Prometheus answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from metrics_server import served_metrics
from prometheus_client.parser import text_string_to_metric_families

from lora_serve.job_metrics import JobCollector, RunningJob
from lora_serve.messages import SharedStatus, Stats, StepReport, Update
from lora_serve.metrics import Metrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "lora-serve.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
SCRAPED = {"job", "instance"}  # labels that Prometheus adds


class Served:
    """Metrics of a server that has done a little of everything; `work` does it again."""

    def __init__(self) -> None:
        self.steps = 0
        self.metrics = Metrics(lambda: self.stats, lambda: 1, jobs=JobCollector(lambda: {"running": 1}, self.jobs))

    def jobs(self) -> list[RunningJob]:
        return [RunningJob("ftjob-1", "a", self.steps, 100, 10 * self.steps, 0.5, 0.6)]

    @property
    def stats(self) -> Stats:
        steps = self.steps
        tiers, seconds = {"host": steps, "device": steps}, {"host": steps / 10, "device": steps / 100}
        quanta = {"forward": steps, "backward": steps}
        return Stats(
            1, 2, 3, 10, steps, steps, steps, steps, tiers, tiers, tiers, tiers, seconds, tiers, ["a"], adapters=3,
            training_runs=1, training_bytes=1 << 20, training_tokens_total=100 * steps, training_quanta_total=quanta,
            training_seconds_total={"forward": steps / 10, "backward": steps / 5},
            shared=SharedStatus(steps, 0, 0.5, steps, True),
        )  # fmt: skip

    def work(self) -> None:
        self.steps += 1
        self.metrics.observe(Update([], step=StepReport(3, 30, 2, 0.1), stats=self.stats))
        timer = self.metrics.begin("chat")
        timer.admitted("a")
        timer.token(2)
        timer.token(1)
        timer.end("stop", 10, 3)
        self.metrics.count_error(429, "overloaded")

    def scrape(self) -> bytes:
        """The metrics; every scrape finds more work done."""
        self.work()
        return self.metrics.render()


def query_text(query: str) -> str:
    """A query as Grafana sends it."""
    return query.replace("$__rate_interval", "5s").replace("$job", ".*").replace("$instance", ".*")


def selectors(node: Any) -> Iterator[tuple[str, set[str]]]:
    """Metric name and labels of every vector selector of a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name, {matcher.name for matcher in node.matchers.matchers}
    for part in ("args", "expr", "lhs", "rhs", "param", "vector_selector"):
        found = getattr(node, part, None)
        for each in found if isinstance(found, list) else [found]:
            if each is not None:
                yield from selectors(each)


@pytest.fixture(scope="module")
def samples() -> dict[str, set[str]]:
    """Labels by name of every sample."""
    served = Served()
    served.work()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(served.metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_query_asks_for_metrics_and_labels_that_there_are(samples: dict[str, set[str]]) -> None:
    assert len(QUERIES) > 30
    for query in QUERIES:
        asked = list(selectors(promql_parser.parse(query_text(query))))
        assert asked, query
        for name, labels in asked:
            assert name in samples, query
            assert labels <= samples[name] | SCRAPED, query
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        assert grouped <= set.union(*(samples[name] for name, _ in asked)), query


def test_panels_have_titles_units_and_places_of_their_own() -> None:
    places = [tuple(panel["gridPos"][side] for side in "xywh") for panel in DASHBOARD["panels"]]
    covered = [(x + i, y + j) for x, y, w, h in places for i in range(w) for j in range(h)]
    assert len(covered) == len(set(covered))
    assert all(x + w <= 24 for x, _, w, _ in places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)


def test_variables_are_read_from_a_metric_that_there_is(samples: dict[str, set[str]]) -> None:
    queries = [each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    assert queries
    for query in queries:
        (name,) = re.findall(r"label_values\((\w+)", query)
        assert name in samples


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no Prometheus here")
def test_prometheus_answers_every_query_with_data(tmp_path: Path) -> None:
    with served_metrics(Served().scrape) as unused:
        pass  # a port that is free again
    with served_metrics(Served().scrape) as port:
        (tmp_path / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s}\n"
            f"scrape_configs: [{{job_name: lora-serve, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}]\n"
        )
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        log = (tmp_path / "log").open("w")
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{unused}"], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{unused}/api/v1/query?"
            missing, deadline = QUERIES, time.monotonic() + 30
            while missing and time.monotonic() < deadline:
                time.sleep(0.5)
                missing = [query for query in missing if not answered(url, query)]
            assert missing == []
        finally:
            process.terminate()
            process.wait(10)
            log.close()


def answered(url: str, query: str) -> bool:
    """Whether a query has a result by now; fails if Prometheus refuses it."""
    try:
        with urllib.request.urlopen(url + urllib.parse.urlencode({"query": query_text(query)}), timeout=5) as answer:
            return bool(json.load(answer)["data"]["result"])
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{query}: {error.read().decode()}") from error
    except OSError:  # it is still starting
        return False
