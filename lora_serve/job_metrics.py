"""Prometheus metrics of fine-tuning jobs: how many there are, and how far those are that train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class RunningJob(NamedTuple):
    """A job that trains.

    Attributes:
        step, steps: optimizer steps that are done, and all of them.
        tokens: trained so far.
        train_loss, valid_loss: the last ones; None: not computed since training began or went on.
    """

    id: str
    adapter: str
    step: int
    steps: int
    tokens: int
    train_loss: float | None
    valid_loss: float | None


class JobCollector(Collector):
    """Metrics of jobs.

    Args:
        counts: returns the number of jobs by status.
        running: returns the jobs that train, of which there are few at a time.
    """

    def __init__(self, counts: Callable[[], Mapping[str, int]], running: Callable[[], Iterable[RunningJob]]) -> None:
        self._counts, self._running = counts, running

    def collect(self) -> Iterator[Metric]:
        """The metrics; those of a job end with it."""
        gauge = GaugeMetricFamily("lora_serve_fine_tuning_jobs", "Fine-tuning jobs by status.", labels=["status"])
        for status, count in self._counts().items():
            gauge.add_metric([status], count)
        yield gauge
        labels = ["fine_tuning_job", "adapter"]  # `job` is Prometheus's own
        names = {
            "step": "Optimizer steps that a running job has done.",
            "steps": "Optimizer steps of a running job in all.",
            "tokens": "Tokens that a running job has trained on.",
            "train_loss": "Loss of a running job's last step.",
            "valid_loss": "Loss of a running job's last validation.",
        }
        jobs = list(self._running())
        for name, meaning in names.items():
            gauge = GaugeMetricFamily(f"lora_serve_fine_tuning_job_{name}", meaning, labels=labels)
            for job in jobs:
                value = getattr(job, name)
                if value is not None:
                    gauge.add_metric([job.id, job.adapter], value)
            yield gauge
