"""Supervision of the engine process: heartbeat and restart backoff."""

from __future__ import annotations

from lora_serve.engine.supervisor import Heartbeat, backoff, failures_after


def test_silence_grows_with_ticks_and_a_beat_resets_it() -> None:
    heartbeat = Heartbeat(interval=1.0, now=0.0)
    for now in (1.0, 2.0, 3.0):
        heartbeat.tick(now)
    assert heartbeat.silence == 3.0
    heartbeat.beat()
    assert heartbeat.silence == 0.0


def test_time_in_which_this_process_did_not_run_is_not_counted_as_silence() -> None:
    heartbeat = Heartbeat(interval=1.0, now=0.0)
    heartbeat.tick(3600.0)
    assert heartbeat.silence == 2.0


def test_the_first_restart_is_immediate_and_later_ones_back_off_up_to_a_bound() -> None:
    assert [backoff(failures) for failures in range(1, 9)] == [0, 1, 2, 4, 8, 16, 30, 30]
    assert backoff(10_000) == 30


def test_after_a_long_life_the_failure_count_starts_over() -> None:
    assert failures_after(4, lived=1.0) == 5
    assert failures_after(4, lived=600.0) == 1
