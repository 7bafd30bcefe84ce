"""The sampler equals a slow, obvious one for every row, independent of the other rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_serve.engine.logprobs import logprobs
from lora_serve.engine.sampler import (
    MAX_TOP_K,
    Samples,
    SamplingRow,
    _threshold_by_sorting,
    _threshold_by_top_k,
    uniform,
)
from lora_serve.engine.sampler import sample as launch_sampling
from lora_serve.request import Logprob, Sampling

INF, NAN = float("inf"), float("nan")


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Samples:
    """Sample a token for each row, and wait for it."""
    return launch_sampling(logits, rows).wait()


def row(
    *,
    seed: int = 0,
    position: int = 0,
    stop_ids: Sequence[int] = (),
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    **params: Any,
) -> SamplingRow:
    return SamplingRow(Sampling(**{"max_tokens": 9, **params}), seed, position, frozenset(stop_ids), prompt, output)


def obvious(logits: list[float], row: SamplingRow) -> dict[int, float]:
    """The distribution that a row asks for, token by token: id → probability; one id if greedy."""
    params = row.params
    values = dict(enumerate(logits))
    for token, bias in params.logit_bias.items():
        values[token] += bias
    if row.position < params.min_tokens:
        for token in row.stop_ids:
            values[token] = -INF
    for token in {*row.prompt, *row.output}:
        penalty = params.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in set(row.output):
        values[token] -= params.presence_penalty + params.frequency_penalty * list(row.output).count(token)
    best = max(values.values())
    if params.temperature == 0:
        return {min(token for token, value in values.items() if value == best): 1.0}
    weights = {token: math.exp((value - best) / params.temperature) for token, value in values.items()}
    if params.top_k:
        weights = {t: w for t, w in weights.items() if sum(values[o] > values[t] for o in values) < params.top_k}
    total = sum(weights.values())
    if params.top_p < 1:
        above = {t: sum(other for other in weights.values() if other > w) for t, w in weights.items()}
        weights = {t: w for t, w in weights.items() if above[t] < params.top_p * total or w == max(weights.values())}
    weights = {t: w for t, w in weights.items() if w >= params.min_p}
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items() if weight > 0}


VOCABULARY = 12
IDS = st.integers(0, VOCABULARY - 1)
# Quarters: equal values are common, sums and comparisons are exact, and no filter's edge falls between two roundings.
LOGITS = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=VOCABULARY, max_size=VOCABULARY)
ROWS = st.builds(
    lambda **arguments: row(**arguments),
    seed=st.integers(-(2**63), 2**64),
    position=st.integers(0, 5),
    stop_ids=st.sets(IDS, max_size=3),
    prompt=st.lists(IDS, max_size=5),
    output=st.lists(IDS, max_size=5),
    min_tokens=st.integers(0, 6),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50]),
    top_p=st.sampled_from([1.0, 0.0, 0.313, 0.777]),
    min_p=st.sampled_from([0.0, 0.0, 0.0113, 0.211]),
    logit_bias=st.dictionaries(IDS, st.sampled_from([-100.0, -1.0, 0.5, 100.0]), max_size=3),
    repetition_penalty=st.sampled_from([1.0, 1.0, 2.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5, 0.25]),
)


@given(st.lists(st.tuples(LOGITS, ROWS), min_size=1, max_size=6))
@settings(max_examples=120, deadline=None)
def test_a_token_is_the_inverse_of_the_obvious_distribution_s_cumulative_sum(
    cases: list[tuple[list[float], SamplingRow]],
) -> None:
    sampled = sample(torch.tensor([logits for logits, _ in cases]), [row for _, row in cases])
    assert all(sampled.finite)
    for (logits, drawn), token in zip(cases, sampled.token_ids, strict=True):
        truth = obvious(logits, drawn)
        assert token in truth
        below = sum(probability for other, probability in truth.items() if other < token)
        draw = 0.5 if drawn.greedy else uniform(drawn.seed, drawn.position)
        assert below - 1e-5 <= draw <= below + truth[token] + 1e-5


@given(st.lists(st.tuples(LOGITS, ROWS), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_row_gets_the_same_token_alone_and_beside_others(cases: list[tuple[list[float], SamplingRow]]) -> None:
    logits = torch.tensor([logits for logits, _ in cases])
    together = sample(logits, [row for _, row in cases])
    alone = [sample(logits[i : i + 1], [row]).token_ids[0] for i, (_, row) in enumerate(cases)]
    assert together.token_ids == alone


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 20},
    {"top_k": MAX_TOP_K + 500},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.8, "logprobs": 5},
    {"temperature": 0.0, "logprobs": 1},
    {"logprobs": 3, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_full_vocabulary_a_row_is_bit_identical_in_any_batch(dtype: torch.dtype) -> None:
    logits = (torch.randn(len(MIXED), 50_021, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    before = logits.clone()
    rows = [row(seed=i, position=i, prompt=[1, 2], output=[3], **options) for i, options in enumerate(MIXED)]
    together = sample(logits, rows)
    backwards = sample(logits.flip(0), rows[::-1])
    assert together.token_ids == backwards.token_ids[::-1]
    assert together.logprobs == backwards.logprobs[::-1]
    for i, alone in enumerate(rows):
        result = sample(logits[i : i + 1], [alone])
        assert result.token_ids == together.token_ids[i : i + 1]
        assert result.logprobs == together.logprobs[i : i + 1]
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 8}, {"top_p": 0.85}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9}]
)
def test_token_frequencies_follow_the_distribution(options: dict[str, Any]) -> None:
    logits = torch.randn(16, generator=torch.Generator().manual_seed(5)) * 1.5
    draws = 20_000
    rows = [row(seed=i % 100, position=i // 100, **options) for i in range(draws)]
    counts = torch.tensor(sample(logits.expand(draws, -1), rows).token_ids).bincount(minlength=16)
    truth = obvious(logits.tolist(), rows[0])
    assert {token for token in range(16) if counts[token]} <= set(truth)
    chi_square = sum((int(counts[t]) - draws * p) ** 2 / (draws * p) for t, p in truth.items())
    freedom = len(truth) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8  # beyond the 99.99th percentile for these sizes


def test_a_wide_nucleus_equals_that_of_a_full_sort() -> None:
    logits = torch.randn(5 * MAX_TOP_K, generator=torch.Generator().manual_seed(1)) * 0.3
    share = 0.6
    probabilities, order = logits.double().softmax(-1).sort(descending=True)
    nucleus = order[: int((probabilities.cumsum(-1) < share).sum()) + 1].tolist()
    rows = [row(seed=i, top_p=share) for i in range(300)]
    drawn = set(sample(logits.expand(len(rows), -1), rows).token_ids)
    assert drawn <= set(nucleus)
    assert drawn - set(nucleus[:MAX_TOP_K])


def test_the_random_number_is_a_pure_function_and_uniform() -> None:
    assert uniform(7, 3) == uniform(7, 3)
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
    # Known answers, so that a seed means the same in every release.
    assert [uniform(0, 0), uniform(42, 1)] == [0.8833108082136426, 0.1603653875985772]
    values = torch.tensor([uniform(seed, position) for seed in range(100) for position in range(100)])
    assert values.min() >= 0
    assert values.max() < 1
    counts = (values * 50).long().bincount(minlength=50)
    assert ((counts - 200) ** 2 / 200).sum() < 100
    across = values.view(100, 100)
    for neighbours in (
        torch.stack([across[:-1].flatten(), across[1:].flatten()]),
        torch.stack([across[:, :-1].flatten(), across[:, 1:].flatten()]),
    ):
        assert neighbours.corrcoef()[0, 1].abs() < 4 / math.sqrt(neighbours.shape[1])


def test_filters_keep_or_drop_tied_tokens_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    drawn = {sample(logits, [row(seed=i, top_k=2)]).token_ids[0] for i in range(200)}
    assert drawn == {1, 2, 3, 4}


def test_greedy_takes_the_lowest_id_among_ties() -> None:
    assert sample(torch.tensor([[0.0, 5.0, 5.0]]), [row(temperature=0.0)]).token_ids == [1]
    assert sample(torch.tensor([[0.0, 5.0, 5.0]]), [row(temperature=1e-9)]).token_ids == [1]


def test_very_low_temperatures_and_infinite_gaps_work() -> None:
    logits = torch.tensor([[-INF, 30000.0, -30000.0], [-INF, -INF, 1.0]])
    sampled = sample(logits, [row(temperature=1e-5), row(temperature=100.0)])
    assert (sampled.token_ids, sampled.finite) == ([1, 2], [True, True])


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"top_k": 7},
        {"top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {3: 2.0}},
    ],
)
def test_a_neighbour_s_larger_vocabulary_changes_nothing(params: dict[str, Any]) -> None:
    narrow = torch.randn(1, 6, generator=torch.Generator().manual_seed(4))
    wide = torch.nn.functional.pad(narrow, (0, 3), value=-INF)
    rows = [row(seed=5, prompt=[1, 2], output=[2], logprobs=8, **params)]
    assert sample(wide, rows) == sample(narrow, rows)
    assert prompt_logprobs(wide, [4], 8) == prompt_logprobs(narrow, [4], 8)
    assert len(prompt_logprobs(wide, [4], 8)[0].top) == 6


@pytest.mark.parametrize("poison", [[NAN, 1.0, 0.0], [1.0, INF, 0.0], [-INF, -INF, -INF], [1.0, NAN, INF]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_is_reported_and_affects_no_other(poison: list[float], dtype: torch.dtype) -> None:
    healthy = [[0.5, 1.0, -INF], [1.5, 0.25, 1.0]]
    options: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_p": 0.7, "logprobs": 2}]
    alone = sample(torch.tensor(healthy, dtype=dtype), [row(**each) for each in options])
    for extra in (*options, {"logit_bias": {0: 1.0}}, {"min_tokens": 4}):
        rows = [row(**options[0]), row(stop_ids=[0], **extra), row(**options[1])]
        sampled = sample(torch.tensor([healthy[0], poison, healthy[1]], dtype=dtype), rows)
        assert sampled.finite == [True, False, True]
        assert (sampled.token_ids[1], sampled.logprobs[1]) == (-1, None)
        assert [sampled.token_ids[0], sampled.token_ids[2]] == alone.token_ids
        assert [sampled.logprobs[0], sampled.logprobs[2]] == alone.logprobs


def test_a_row_with_all_tokens_masked_is_reported() -> None:
    sampled = sample(torch.zeros(2, 2), [row(stop_ids=[0, 1], min_tokens=3), row(stop_ids=[0], min_tokens=3)])
    assert sampled.finite == [False, True]
    assert sampled.token_ids == [-1, 1]


def test_stop_ids_outside_the_vocabulary_are_ignored() -> None:
    assert sample(torch.zeros(1, 2), [row(temperature=0.0, stop_ids=[0, 7], min_tokens=3)]).token_ids == [1]


def prompt_logprobs(logits: torch.Tensor, tokens: list[int], top: int) -> list[Logprob]:
    return logprobs(logits, torch.tensor(tokens, dtype=torch.int64), [top] * len(tokens)).wait()


def likeliest(logits: Tensor, count: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))[:count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_are_of_the_raw_logits_with_ties_by_lower_id(dtype: torch.dtype, count: int) -> None:
    logits = (torch.randn(4, 500, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    logits[0, 100:400] = logits[0].max()
    logits[1, ::7] = -0.0
    logits[1, 3::7] = 0.0
    logits[1] = logits[1].minimum(torch.zeros((), dtype=dtype))
    truth = logits.double().log_softmax(-1)
    rows = [row(seed=i, logprobs=count, logit_bias={9: 20.0}, temperature=0.8) for i in range(4)]
    sampled = sample(logits, rows)
    entries = [entry for entry in sampled.logprobs if entry is not None]
    assert [entry.token for entry in entries] == sampled.token_ids
    given = prompt_logprobs(logits, [3, 9, 400, 499], count)
    for entry, values in [*zip(entries, logits, strict=True), *zip(given, logits, strict=True)]:
        assert [token for token, _ in entry.top] == likeliest(values, count)
    for place, entry in [*enumerate(entries), *enumerate(given)]:
        for token, value in [(entry.token, entry.value), *entry.top]:
            assert value == pytest.approx(float(truth[place, token]), abs=1e-6)
        if entry.token in dict(entry.top):
            assert dict(entry.top)[entry.token] == entry.value


def test_each_row_gets_as_many_alternatives_as_it_asked_for() -> None:
    rows = [row(logprobs=None), row(logprobs=0), row(logprobs=3), row(logprobs=99)]
    found = sample(torch.randn(4, 10), rows).logprobs
    assert [None if entry is None else len(entry.top) for entry in found] == [None, 0, 3, 10]


def test_logprobs_of_many_rows_equal_those_of_each_alone() -> None:
    logits = torch.randn(40, 30_000, generator=torch.Generator().manual_seed(4))
    tokens = list(range(40))
    assert prompt_logprobs(logits, tokens, 3) == [prompt_logprobs(logits[i : i + 1], [i], 3)[0] for i in tokens]
    assert prompt_logprobs(logits[:0], [], 3) == []


def test_fixed_point_probabilities_are_precise_enough() -> None:
    """Half of 200,000 equal tokens are below the median: no token is lost to rounding at that size."""
    tokens = sample(torch.zeros(1, 200_000), [row(seed=5)]).token_ids
    assert tokens == [int(Fraction(uniform(5, 0)) * 200_000)]


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999, 1.0])
def test_both_ways_to_find_the_nucleus_agree(share: float) -> None:
    weights = (torch.randn(6, 3 * MAX_TOP_K, generator=torch.Generator().manual_seed(6)) * 4).exp().mul(1e6).long()
    weights[0] = 7
    wanted = share * weights.sum(-1).double()
    assert torch.equal(_threshold_by_sorting(weights, wanted), _threshold_by_top_k(weights, wanted))


def mask_of(allowed: Sequence[int], vocabulary: int) -> Tensor:
    words = [sum(1 << token % 32 for token in allowed if token // 32 == word) for word in range(-(-vocabulary // 32))]
    return torch.tensor([word - (1 << 32 if word >> 31 else 0) for word in words], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_masked_row_samples_allowed_tokens_and_its_neighbours_what_they_do_alone(
    dtype: torch.dtype, temperature: float
) -> None:
    logits = torch.randn(5, 101, generator=torch.Generator().manual_seed(0)).to(dtype)
    allowed = {1: [3, 31, 32, 99], 3: [64]}
    # The mask is of the base's vocabulary, here 70; an adapter's own tokens come after it.
    masks = {i: mask_of([token for token in tokens if token < 70], 70) for i, tokens in allowed.items()}
    plain = [row(temperature=temperature, seed=i, logprobs=2) for i in range(5)]
    rows = [replace(each, mask=masks.get(i)) for i, each in enumerate(plain)]
    free, bound = sample(logits, plain), sample(logits, rows)
    for i in range(5):
        if i not in allowed:
            assert (bound.token_ids[i], bound.logprobs[i]) == (free.token_ids[i], free.logprobs[i])
            continue
        choices = [token for token in allowed[i] if token < 70]
        assert bound.token_ids[i] in choices
        alone = torch.full((1, 101), -INF, dtype=dtype)
        alone[0, choices] = logits[i, choices]
        assert sample(alone, [plain[i]]).token_ids == [bound.token_ids[i]]
        entry, unmasked = bound.logprobs[i], free.logprobs[i]
        assert entry is not None
        assert unmasked is not None
        assert entry.top == unmasked.top  # log-probabilities are those of the model
    assert all(bound.finite)


def test_the_mask_comes_after_bias_and_penalties() -> None:
    logits = torch.zeros(1, 40)
    wants = row(temperature=0.0, logit_bias={5: 100.0, 7: 1.0}, output=[7], presence_penalty=0.5)
    assert sample(logits, [replace(wants, mask=mask_of([6, 7], 40))]).token_ids == [7]


def test_a_mask_that_leaves_no_finite_logit_fails_its_row_only() -> None:
    logits = torch.zeros(2, 40)
    logits[0, 6] = -INF
    found = sample(logits, [replace(row(), mask=mask_of([6], 40)), row()])
    assert found.finite == [False, True]
