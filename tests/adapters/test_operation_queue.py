"""Operations on one name run in the order of arrival, and each ends exactly once, whatever its steps do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_serve.adapters.operation_queue import Done, OperationQueue, if_successful, next_step
from lora_serve.errors import AdapterInvalid, EngineFault, ServeError

INVALID = AdapterInvalid("invalid")


def test_an_operation_begins_when_the_one_before_it_on_its_name_has_ended() -> None:
    queue, begun, results = OperationQueue(), dict[str, Done](), list[Any]()
    for operation, name in (("first", "a"), ("second", "a"), ("other", "b")):
        queue.run(name, lambda end, operation=operation: begun.update({operation: end}), results.append)
    assert list(begun) == ["first", "other"]
    begun["first"](1)
    assert list(begun) == ["first", "other", "second"]
    begun["second"](2)
    assert results == [1, 2]


def raise_now(error: Exception) -> Callable[[Done], None]:
    def start(end: Done) -> None:
        raise error

    return start


def raise_later(error: Exception, how: Any) -> Callable[[Done], None]:
    def start(end: Done) -> None:
        def step(result: Any) -> None:
            raise error

        how(step, end)(None)

    return start


@pytest.mark.parametrize(
    "start",
    [raise_now, lambda error: raise_later(error, next_step), lambda error: raise_later(error, if_successful)],
    ids=["at once", "in a step", "after a success"],
)
@pytest.mark.parametrize("error", [INVALID, KeyError("a bug")], ids=["refusal", "bug"])
def test_an_operation_that_fails_ends_with_its_error_and_the_next_one_begins(
    error: Exception, start: Callable[[Exception], Callable[[Done], None]]
) -> None:
    queue, results = OperationQueue(), list[Any]()
    queue.run("a", start(error), results.append)
    queue.run("a", lambda end: end("next"), results.append)
    failure, following = results
    assert failure is INVALID or (isinstance(failure, EngineFault) and "KeyError" in failure.message)
    assert following == "next"


def test_a_step_is_left_out_after_a_failure() -> None:
    results = list[Any]()
    if_successful(lambda _: pytest.fail("called"), results.append)(INVALID)
    assert results == [INVALID]


def test_an_operation_that_ends_twice_answers_once_and_lets_one_follow() -> None:
    queue, results, begun = OperationQueue(), list[Any](), list[Done]()

    def end_and_fail(end: Done) -> None:
        end("result")
        raise KeyError("a bug after the end")

    queue.run("a", end_and_fail, results.append)
    queue.run("a", begun.append, results.append)
    queue.run("a", begun.append, results.append)
    assert results == ["result"]
    assert len(begun) == 1


def test_the_next_one_begins_even_if_the_answer_cannot_be_given() -> None:
    queue, results = OperationQueue(), list[Any]()

    def fails(result: Any) -> None:
        raise KeyError("a bug")

    queue.run("a", lambda end: end(1), fails)
    queue.run("a", lambda end: end(2), results.append)
    assert results == [2]


def test_serve_errors_that_are_raised_are_results() -> None:
    results = list[ServeError]()
    next_step(raise_now(INVALID), results.append)(results.append)
    assert results == [INVALID]


def test_thousands_of_operations_that_end_at_once_do_not_nest() -> None:
    queue, results, slow = OperationQueue(), list[Any](), list[Done]()
    queue.run("a", slow.append, results.append)
    for number in range(5000):
        queue.run("a", lambda end, number=number: end(number), results.append)
    slow[0]("slow")
    assert results == ["slow", *range(5000)]
    queue.run("a", lambda end: end("after"), results.append)
    assert results[-1] == "after"
