"""Perplexity, greedy tokens and log-probability errors by `--dtype` and `--quantize`, against transformers in float32.

    python -m bench.serving.perplexity --model demo/model --text demo

scores texts through the engine with prompt log-probabilities, as a client would get them. The reference is plain
transformers in float32 on the same texts.

The text `docs` is windows of the documentation that comes with Python; its wording differs between Python versions, so
compare ratios. It needs a base trained on such text, unlike random weights and the demo's base. The text `demo` is the
demo's held-out tasks, of which the answers are scored.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.machine import describe
from bench.report import json_line, number, table
from bench.serving.engine_throughput import started_engine
from demo.tasks import TASKS, heldout_prompts, instruction
from lora_serve.engine.process_main import EngineCore
from lora_serve.errors import ModelUnsupported
from lora_serve.messages import Generate
from lora_serve.request import Finished, Logprob, Request, Sampling, Tokens

CASES = {  # name → options of `lora-serve serve`
    "float32": "--dtype float32",
    "bfloat16": "--dtype bfloat16",
    "int8, float32": "--dtype float32 --quantize int8",
    "int8, bfloat16": "--dtype bfloat16 --quantize int8",
    "int4, float32": "--dtype float32 --quantize int4",
    "int4, bfloat16": "--dtype bfloat16 --quantize int4",
}
ROUNDING = 1e-3  # largest relative difference of our float32 perplexity from transformers'
INT8_LOSS = 1e-2  # largest relative increase of perplexity with int8 weights
INT4_LOSS = 6e-2  # the same with int4 weights, of a base of 135M parameters: larger ones lose less


class Text(NamedTuple):
    """Token ids, of which those from `start` (at least 1) on are scored."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Scores:
    """A model's scores of the texts: by text, a value per scored token.

    Attributes:
        nll: negative log-likelihood of the token, in nats.
        greedy: the token that greedy decoding would have chosen instead.
    """

    nll: list[list[float]]
    greedy: list[list[int]]

    @property
    def losses(self) -> list[float]:
        """Mean negative log-likelihood of each text."""
        return [statistics.fmean(values) for values in self.nll]


@dataclass(frozen=True)
class Quality:
    """Scores compared with a reference; every text has the same weight.

    Attributes:
        ratio: perplexity ÷ the reference's.
        error: two standard errors of the ratio over the texts; NaN for a single text.
        same: share of the tokens where greedy decoding agrees.
        apart: root mean square over the tokens of what their log-probabilities differ by, in nats.
    """

    perplexity: float
    ratio: float
    error: float
    same: float
    apart: float


def compare(scores: Scores, reference: Scores) -> Quality:
    """Perplexity and agreement, against a reference."""
    more = [ours - theirs for ours, theirs in zip(scores.losses, reference.losses, strict=True)]
    ratio = math.exp(statistics.fmean(more))
    spread = statistics.stdev(more) if len(more) > 1 else math.nan
    greedy = zip(chain(*scores.greedy), chain(*reference.greedy), strict=True)
    pairs = zip(chain(*scores.nll), chain(*reference.nll), strict=True)
    return Quality(
        perplexity=math.exp(statistics.fmean(scores.losses)),
        ratio=ratio,
        error=2 * ratio * spread / math.sqrt(len(more)),
        same=statistics.fmean(ours == theirs for ours, theirs in greedy),
        apart=math.sqrt(statistics.fmean((ours - theirs) ** 2 for ours, theirs in pairs)),
    )


def docs(tokenizer: Any, count: int, length: int) -> list[Text]:
    """`count` non-overlapping windows of `length` tokens, evenly spread over Python's documentation.

    Each begins with the BOS token if the tokenizer adds one. Raises ValueError if there is not that much text.
    """
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    ids: list[int] = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    opening = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    stride, inner = len(ids) // count, length - len(opening)
    if stride < inner:
        raise ValueError(f"{count} windows of {length} tokens are more than the documentation's {len(ids)}")
    return [Text(opening + ids[begin : begin + inner], 1) for begin in range(0, stride * count, stride)]


def demo(tokenizer: Any, count: int, length: int) -> list[Text]:
    """`count` held-out prompts, cycling through the tasks; the answer and the EOS token are scored."""
    texts = []
    for sentence, task in zip(heldout_prompts(count, seed=21), [*TASKS.values()] * count, strict=False):
        asked: list[int] = tokenizer(instruction(task.name, sentence))["input_ids"]
        answered: list[int] = tokenizer(task.answer(sentence))["input_ids"]
        texts.append(Text([*asked, *answered, tokenizer.eos_token_id][:length], len(asked)))
    return texts


TEXTS = {"docs": docs, "demo": demo}


def score_with_transformers(model: str, texts: Sequence[Text]) -> Scores:
    """Scores of plain transformers in float32: the reference."""
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain.eval()
    scores = Scores([], [])
    with torch.inference_mode():
        for ids, start in ((torch.tensor(text.ids), text.start) for text in texts):
            logits = plain(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1]  # [predicted, vocab]
            scores.nll.append(torch.nn.functional.cross_entropy(logits, ids[start:], reduction="none").tolist())
            scores.greedy.append(logits.argmax(-1).tolist())
    return scores


def score_with_engine(engine: EngineCore, texts: Sequence[Text]) -> Scores:
    """Scores from prompt log-probabilities. Raises RuntimeError if a request fails."""
    sampling = Sampling(max_tokens=0, temperature=0.0, prompt_logprobs=1)
    for index, text in enumerate(texts):
        engine.receive(Generate(Request(str(index), text.ids, sampling)))
    found: dict[str, list[Logprob | None]] = {}
    while engine.busy:
        for event in engine.step().events:
            if isinstance(event, Tokens) and event.prompt_logprobs is not None:
                found[event.request_id] = event.prompt_logprobs
            elif isinstance(event, Finished) and event.failure is not None:
                raise RuntimeError(event.failure.message)
    read = [[entry for entry in found[str(i)][text.start :] if entry is not None] for i, text in enumerate(texts)]
    return Scores(
        [[-entry.value for entry in entries] for entries in read],
        [[entry.top[0][0] for entry in entries] for entries in read],
    )


def score(model: str, options: str, texts: Sequence[Text]) -> Scores:
    """Scores from a new engine with these options. Raises ModelUnsupported where the server would not start."""
    with started_engine(model, options) as (engine, _):
        return score_with_engine(engine, texts)


def measure(model: str, texts: Sequence[Text], cases: Mapping[str, str]) -> tuple[dict[str, Quality], dict[str, str]]:
    """Quality by case, transformers itself first; and the reasons where the server does not start."""
    reference = score_with_transformers(model, texts)
    found, refused = {"transformers": compare(reference, reference)}, {}
    for name, options in cases.items():
        try:
            found[name] = compare(score(model, options, texts), reference)
        except ModelUnsupported as error:
            refused[name] = error.message
    return found, refused


def quality_table(found: Mapping[str, Quality]) -> str:
    """A Markdown table with one row per case."""
    rows = [
        [
            name,
            number(each.perplexity, 4),
            number(each.ratio, 5),
            number(each.error, 5),
            number(100 * each.same, 2),
            number(each.apart, 4),
        ]
        for name, each in found.items()
    ]
    return table(["base", "perplexity", "÷ transformers'", "±", "same token %", "log-probability error"], rows)


def verdicts(found: Mapping[str, Quality]) -> list[str]:
    """One sentence for each case with a target: whether it is met."""
    lines = []
    for name, each in found.items():
        if name == "float32":
            lines.append(_verdict(name, abs(each.ratio - 1), ROUNDING, "away from"))
        elif name.startswith("int8"):
            lines.append(_verdict(name, each.ratio - 1, INT8_LOSS, "above"))
        elif name.startswith("int4"):
            lines.append(_verdict(name, each.ratio - 1, INT4_LOSS, "above"))
    return lines


def _verdict(name: str, off: float, most: float, where: str) -> str:
    met = "met" if off <= most else "not met"
    return f"{name}: perplexity {100 * off:.2g} % {where} transformers' in float32, at most {100 * most:g} %: {met}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="folder or hub id")
    parser.add_argument("--text", choices=TEXTS, default="docs")
    parser.add_argument("--texts", type=int, default=16, help="number of windows or prompts")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--serve", default="", metavar="ARGS", help="further options of `lora-serve serve`")
    args = parser.parse_args(arguments)
    texts = TEXTS[args.text](AutoTokenizer.from_pretrained(args.model), args.texts, args.length)
    qualities, refused = measure(args.model, texts, {name: f"{CASES[name]} {args.serve}" for name in args.cases})
    scored = sum(len(text.ids) - text.start for text in texts)
    print(f"{args.model}, {args.text}: {len(texts)} texts, {scored:,} scored tokens\n")
    print(quality_table(qualities), end="\n\n")
    for line in [*verdicts(qualities), *(f"{name}: does not start: {why}" for name, why in refused.items())]:
        print(line)
    found = {"quality": {name: asdict(each) for name, each in qualities.items()}, "refused": refused}
    print("\n" + json_line({"bench": "perplexity", "machine": describe(), **vars(args), "scored": scored, **found}))


if __name__ == "__main__":
    main()
