"""When a quantum of training may run: on a simulated clock, steps and quanta of stated durations."""

from __future__ import annotations

import math

import pytest

from lora_serve.engine.training.quantum_costs import QuantumCosts
from lora_serve.engine.training.request_level import RequestLevel
from lora_serve.engine.training.training_pacer import ServingLoad, TrainingPacer

STEP = 0.05
IDLE, DECODING, PREFILLING = ServingLoad(False, False, 0), ServingLoad(True, False, 8), ServingLoad(True, True, 8)


class Served:
    """A loop of steps and quanta.

    Attributes:
        gaps: seconds between the outputs of steps.
    """

    def __init__(self, share: float, quantum: float, itl_target: float | None = None) -> None:
        self.pacer, self.quantum = TrainingPacer(share, itl_target), quantum
        self.now = self.trained = 0.0
        self.gaps: list[float] = []
        self.pacer.ran("backward", 1, IDLE, quantum)

    def run(self, seconds: float, load: ServingLoad = DECODING) -> None:
        """Serve so long, with a step at a time and quanta after each."""
        end = self.now + seconds
        while self.now < end:
            gap = STEP if load.active else 0.0
            self.now += gap
            if load.active:
                self.pacer.served(STEP, load.requests, self.now)
            while self.pacer.allows("backward", 1, load, self.now):
                self.now += self.quantum
                gap += self.quantum
                self.trained += self.quantum
                self.pacer.ran("backward", 1, load, self.quantum)
                if not load.active:
                    break
            self.gaps.append(gap)

    @property
    def longest_usual(self) -> float:
        """The 99th percentile of the gaps."""
        return sorted(self.gaps)[math.floor(0.99 * (len(self.gaps) - 1))]


def test_without_streams_quanta_follow_each_other_whatever_they_take() -> None:
    served = Served(0.0, quantum=10.0)
    served.run(100.0, IDLE)
    assert served.trained == pytest.approx(served.now)


@pytest.mark.parametrize("quantum", [0.001, 0.003, 0.006])
def test_short_quanta_beside_streams_keep_both_bounds(quantum: float) -> None:
    served = Served(0.003, quantum)
    served.run(200.0)
    assert served.longest_usual <= 1.3 * STEP
    assert 0.04 * served.now < served.trained < 0.06 * served.now


@pytest.mark.parametrize("quantum", [0.016, 0.05, 0.4, 0.9])
def test_long_quanta_run_in_fewer_than_one_gap_in_a_hundred(quantum: float) -> None:
    served = Served(0.003, quantum)
    served.run(2000.0)
    assert 0.0029 * served.now < served.trained < 0.06 * served.now
    assert served.longest_usual == STEP


def test_what_takes_longer_than_may_be_saved_up_runs_as_the_share_allows() -> None:
    served = Served(0.003, quantum=5.0)
    served.run(10_000.0)
    assert served.trained == pytest.approx(0.003 * served.now, abs=5.1)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_larger_share_is_given_at_the_streams_expense(share: float) -> None:
    served = Served(share, quantum=0.1)
    served.run(500.0)
    assert served.trained == pytest.approx(share * served.now, rel=0.05)
    assert served.longest_usual == pytest.approx(STEP + 0.1)


def test_while_prompts_wait_only_the_share_runs_and_nothing_at_a_share_of_zero() -> None:
    for share in (0.0, 0.01):
        served = Served(share, quantum=0.004)
        served.run(400.0, PREFILLING)
        assert served.trained == pytest.approx(share * served.now, abs=0.005)


def test_a_stated_gap_takes_the_place_of_the_usual_one() -> None:
    served = Served(0.0, quantum=0.04, itl_target=0.1)
    served.run(200.0)
    assert served.longest_usual == pytest.approx(0.09)
    assert 0.04 * served.now < served.trained < 0.06 * served.now


def test_a_rest_saves_nothing_up() -> None:
    served = Served(0.01, quantum=4.0)
    served.run(90.0)
    served.pacer.rest()
    trained = served.trained
    served.now += 1000.0
    served.run(90.0)
    assert served.trained == trained


def test_without_a_share_a_new_kind_is_tried_when_streams_tolerate_any() -> None:
    pacer = TrainingPacer(0.0)
    assert not pacer.allows("head", 1, DECODING, 0.0)
    assert not pacer.allows("head", 1, PREFILLING, 1.0)
    assert pacer.allows("head", 1, DECODING, 2.0)


def test_what_the_share_pays_for_is_no_debt_for_ever() -> None:
    served = Served(0.5, quantum=0.02)
    served.run(300.0)
    begun, before = served.now, served.trained
    served.pacer._share = 0.0
    served.quantum = 0.004
    for _ in range(50):
        served.pacer.ran("backward", 1, IDLE, 0.004)
    served.run(200.0)
    assert served.trained - before == pytest.approx(0.05 * (served.now - begun), rel=0.15)


def test_the_first_quantum_of_a_kind_is_tried_from_the_share() -> None:
    pacer = TrainingPacer(0.003)
    assert not pacer.allows("head", 1, DECODING, 0.0)
    assert pacer.allows("head", 1, DECODING, 0.05)
    pacer.ran("head", 1, DECODING, 1.0)
    assert not pacer.allows("head", 1, DECODING, 0.1)


def test_passes_are_as_large_as_their_longest_quantum_may_be() -> None:
    served = Served(0.003, quantum=0.001)
    for tokens in (100, 200, 400):
        served.pacer.ran("backward", tokens, IDLE, 0.002 + tokens * 1e-4)
    served.run(5.0)
    served.pacer.costs = QuantumCosts()
    assert served.pacer.pass_tokens("backward", IDLE) is None
    for tokens in (100, 200, 400):
        served.pacer.ran("backward", tokens, IDLE, 0.002 + tokens * 1e-4)
    assert served.pacer.pass_tokens("backward", DECODING) == pytest.approx((0.15 * STEP / 1.1 - 0.002) / 1e-4, abs=1)
    streams = served.pacer.pass_tokens("backward", DECODING)
    assert served.pacer.pass_tokens("backward", IDLE) == streams  # they will come back
    served.pacer.allows("backward", 1, IDLE, served.now + 60.0)
    assert served.pacer.pass_tokens("backward", IDLE) == pytest.approx((0.1 / 1.1 - 0.002) / 1e-4, abs=1)


def test_costs_are_a_line_and_where_sizes_do_not_differ_cautious() -> None:
    costs = QuantumCosts()
    assert costs.seconds("head", 10) is costs.size_within("head", 1.0) is None
    for _ in range(5):
        costs.record("head", 100, 0.2)
    assert costs.seconds("head", 50) == pytest.approx(0.2)
    assert costs.seconds("head", 200) == pytest.approx(0.4)
    assert costs.size_within("head", 0.1) == 50
    for _ in range(40):
        costs.record("head", 50, 0.15)
        costs.record("head", 100, 0.2)
    assert costs.seconds("head", 150) == pytest.approx(0.25)
    assert costs.size_within("head", 0.25) == pytest.approx(150, abs=1)
    assert costs.size_within("head", 0.01) == 0


@pytest.mark.parametrize(("requests", "share"), [(8, 0.05), (7, 0.09375), (4, 0.375), (1, 0.65625)])
def test_with_fewer_requests_than_lately_training_gets_three_quarters_of_what_they_leave(
    requests: int, share: float
) -> None:
    served = Served(0.0, quantum=0.006)
    served.run(60.0)
    served.run(60.0, DECODING._replace(requests=requests))  # the mean of ten seconds
    begun, before = served.now, served.trained
    served.run(200.0, DECODING._replace(requests=requests))
    assert (served.trained - before) / (served.now - begun) == pytest.approx(
        min(share, 0.006 / 0.056), rel=0.1
    )  # one quantum fits in a gap
    assert served.longest_usual <= 1.3 * STEP


def test_after_ten_minutes_fewer_requests_are_all_that_there_are() -> None:
    served = Served(0.0, quantum=0.004)
    served.run(60.0)
    served.run(700.0, DECODING._replace(requests=4))
    begun, before = served.now, served.trained
    served.run(100.0, DECODING._replace(requests=4))
    assert (served.trained - before) / (served.now - begun) == pytest.approx(0.05, rel=0.1)


def test_a_burst_of_requests_leaves_nothing() -> None:
    level = RequestLevel()
    for second in range(100):
        assert level.observe(4, float(second)) == 1.0
    assert level.observe(20, 100.0) == 1.0
    assert level.observe(5, 101.0) == pytest.approx(0.26, abs=0.02)  # 4 in the mean, 5 now, 20 at most
    assert level.observe(0, 140.0) < 0.02
    assert level.observe(0, 2000.0) == 0.0


def test_a_run_that_begins_between_two_requests_knows_how_many_there_were() -> None:
    served = Served(0.0, quantum=0.001)
    for number in range(400):  # nothing is trained
        served.pacer.served(STEP, 4, number * STEP)
    for tokens in (100, 200, 400):
        served.pacer.ran("backward", tokens, IDLE, 0.002 + tokens * 1e-4)
    served.pacer.allows("embed", 1, IDLE, 400 * STEP)
    small = served.pacer.pass_tokens("backward", IDLE)
    assert small is not None
    assert small < 100
