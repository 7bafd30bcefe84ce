"""Quality figures follow from the scores, and the engine scores texts as transformers does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.serving.perplexity import CASES, Quality, Scores, Text, compare, demo, docs, main, measure, score, verdicts

MODEL = str(Path(__file__).parents[3] / "demo" / "model")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_quality_is_of_means_over_texts_and_of_tokens_that_agree() -> None:
    reference = Scores([[1.0, 3.0], [2.0]], [[5, 6], [7]])
    worse = Scores([[1.0, 3.2], [2.3]], [[5, 9], [7]])
    found = compare(worse, reference)
    assert found.perplexity == pytest.approx(math.exp(2.2))
    assert found.ratio == pytest.approx(math.exp(0.2))
    assert found.error == pytest.approx(2 * math.exp(0.2) * 0.1)  # 0.1 and 0.3 more: a standard error of 0.1
    assert found.same == pytest.approx(2 / 3)
    assert found.apart == pytest.approx(math.sqrt((0.2**2 + 0.3**2) / 3))
    itself = compare(reference, reference)
    assert (itself.ratio, itself.error, itself.same, itself.apart) == (1, 0, 1, 0)


def test_the_error_of_a_single_text_is_unknown() -> None:
    one = Scores([[1.0]], [[5]])
    assert math.isnan(compare(one, one).error)


def test_windows_are_spread_over_the_documentation_and_do_not_overlap(tokenizer: Any) -> None:
    found = docs(tokenizer, 5, 40)
    assert found == docs(tokenizer, 5, 40)
    assert [(len(text.ids), text.start) for text in found] == [(40, 1)] * 5
    assert len({tuple(text.ids) for text in found}) == 5
    assert tokenizer.decode(found[0].ids).startswith("The ")
    with pytest.raises(ValueError, match="more than the documentation's"):
        docs(tokenizer, 10**5, 40)


def test_windows_begin_with_the_bos_token_if_the_tokenizer_adds_one() -> None:
    class WithBos:
        """A tokenizer of single letters with BOS token 1."""

        bos_token_id = 1

        def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [2 + ord(letter) for letter in text]}

    first, second = docs(WithBos(), 2, 8)
    assert first.ids[0] == second.ids[0] == 1
    assert 1 not in first.ids[1:] + second.ids[1:]
    assert len(first.ids) == len(second.ids) == 8


def test_of_the_demos_tasks_the_answers_are_scored(tokenizer: Any) -> None:
    first, second, *_ = demo(tokenizer, 4, 256)
    asked, answered = tokenizer.decode(first.ids[: first.start]), tokenizer.decode(first.ids[first.start :])
    task, _, sentence = asked.partition(": ")
    assert (task, answered) == ("shout", sentence.strip().upper() + tokenizer.eos_token)
    assert tokenizer.decode(second.ids).startswith("reverse: ")


def test_float32_scores_as_transformers_and_quantised_bases_are_close(tokenizer: Any) -> None:
    texts = [*docs(tokenizer, 3, 48), *demo(tokenizer, 3, 256)]
    costs, refused = measure(MODEL, texts, CASES | {"too long": "--max-model-len 4096"})
    assert list(costs) == ["transformers", *CASES]
    assert costs["float32"].ratio == pytest.approx(1, abs=1e-5)
    assert costs["float32"].same == 1
    for name in ("bfloat16", "int8, float32", "int8, bfloat16"):
        assert 0 < abs(costs[name].ratio - 1) < 0.1, name
        assert costs[name].same > 0.95, name
    for name in ("int4, float32", "int4, bfloat16"):
        assert costs[name].same > 0.85, name
    assert "--max-model-len 4096 is more" in refused["too long"]


def test_a_text_that_is_too_long_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="512"):
        score(MODEL, "", [Text([5] * 600, 1)])


def test_verdicts_compare_each_case_with_its_target() -> None:
    def near(ratio: float) -> Quality:
        return Quality(20.0, ratio, 0.0, 1.0, 0.0)

    costs = {"float32": near(0.998), "bfloat16": near(1.5), "int8, float32": near(0.9), "int8, bfloat16": near(1.02)}
    costs |= {"int4, float32": near(1.05), "int4, bfloat16": near(1.07)}
    assert verdicts(costs) == [
        "float32: perplexity 0.2 % away from transformers' in float32, at most 0.1 %: not met",
        "int8, float32: perplexity -10 % above transformers' in float32, at most 1 %: met",
        "int8, bfloat16: perplexity 2 % above transformers' in float32, at most 1 %: not met",
        "int4, float32: perplexity 5 % above transformers' in float32, at most 6 %: met",
        "int4, bfloat16: perplexity 7 % above transformers' in float32, at most 6 %: not met",
    ]


def test_the_command_prints_a_table_for_people_and_a_line_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", MODEL, "--text", "demo", "--texts", "2", "--cases", "float32"])
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("| base ")
    assert [line.split()[1] for line in said[4:6]] == ["transformers", "float32"]
    record = json.loads(said[-1])
    assert record["bench"] == "perplexity"
    assert record["quality"]["float32"]["same"] == 1
    assert record["refused"] == {}
