"""What a smaller base costs in quality: perplexity, and how often it would say the same, against float32.

    python -m bench.quality --model demo/model --text demo

reads texts through the engine as it is served with each `--dtype` and `--quantize`, and takes the log-probabilities
that a client would be given for them. Plain transformers in float32 reads the same texts: it is what all else is held
against, our own float32 first.

The text `docs` is windows of the documentation that every Python carries. Its wording is not the same in every version
of Python: compare ratios. It says something only of a base that learnt such text, which excludes random weights and the
demo's base; that one is held to what it did learn by the text `demo`: held-out tasks, of which the answers count.
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

from bench.inprocess import opened
from bench.machine import describe
from bench.report import json_line, number, table
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
ROUNDING = 1e-3  # our float32 perplexity may be this far from transformers', relatively
GOAL = 1e-2  # and one with int8 weights this far above it


class Text(NamedTuple):
    """Token ids; those from `start` on (at least 1) are to be predicted."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Reading:
    """What a model made of texts: by text, a value for each token that was to be predicted.

    Attributes:
        surprise: −log p of the token, in nats.
        likeliest: the token that greedy decoding would have taken in its place.
    """

    surprise: list[list[float]]
    likeliest: list[list[int]]

    @property
    def losses(self) -> list[float]:
        """Mean surprise of each text."""
        return [statistics.fmean(values) for values in self.surprise]


@dataclass(frozen=True)
class Cost:
    """One reading held against a reference; every text counts the same.

    Attributes:
        ratio: perplexity ÷ the reference's.
        error: two standard errors of the ratio, from how much texts differ in it; NaN for a single text.
        same: share of the tokens where both find the same one likeliest.
    """

    perplexity: float
    ratio: float
    error: float
    same: float


def cost(reading: Reading, reference: Reading) -> Cost:
    more = [ours - theirs for ours, theirs in zip(reading.losses, reference.losses, strict=True)]
    ratio = math.exp(statistics.fmean(more))
    spread = statistics.stdev(more) if len(more) > 1 else math.nan
    likeliest = zip(chain(*reading.likeliest), chain(*reference.likeliest), strict=True)
    return Cost(
        perplexity=math.exp(statistics.fmean(reading.losses)),
        ratio=ratio,
        error=2 * ratio * spread / math.sqrt(len(more)),
        same=statistics.fmean(ours == theirs for ours, theirs in likeliest),
    )


def docs(tokenizer: Any, count: int, length: int) -> list[Text]:
    """`count` windows of `length` tokens, evenly spread over Python's documentation, none overlapping.

    Each begins with the token that the tokenizer puts before any text, if it does so. Raises ValueError if that is more
    text than there is.
    """
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    ids: list[int] = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    opening = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    stride, inner = len(ids) // count, length - len(opening)
    if stride < inner:
        raise ValueError(f"{count} windows of {length} tokens are more than the documentation's {len(ids)}")
    return [Text(opening + ids[begin : begin + inner], 1) for begin in range(0, stride * count, stride)]


def demo(tokenizer: Any, count: int, length: int) -> list[Text]:
    """`count` held-out sentences, tasks taking turns; the answer and the end token are to be predicted."""
    texts = []
    for sentence, task in zip(heldout_prompts(count, seed=21), [*TASKS.values()] * count, strict=False):
        asked: list[int] = tokenizer(instruction(task.name, sentence))["input_ids"]
        answered: list[int] = tokenizer(task.answer(sentence))["input_ids"]
        texts.append(Text([*asked, *answered, tokenizer.eos_token_id][:length], len(asked)))
    return texts


TEXTS = {"docs": docs, "demo": demo}


def by_transformers(model: str, texts: Sequence[Text]) -> Reading:
    """The oracle: the model as transformers runs it by itself, in float32."""
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain.eval()
    reading = Reading([], [])
    with torch.inference_mode():
        for ids, start in ((torch.tensor(text.ids), text.start) for text in texts):
            logits = plain(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1]  # [predicted, vocab]
            reading.surprise.append(torch.nn.functional.cross_entropy(logits, ids[start:], reduction="none").tolist())
            reading.likeliest.append(logits.argmax(-1).tolist())
    return reading


def by_engine(engine: EngineCore, texts: Sequence[Text]) -> Reading:
    """The texts as prompts, of which only log-probabilities are asked. Raises RuntimeError if one is not served."""
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
    return Reading(
        [[-entry.value for entry in entries] for entries in read],
        [[entry.top[0][0] for entry in entries] for entries in read],
    )


def read(model: str, options: str, texts: Sequence[Text]) -> Reading:
    """By an engine of its own; raises ModelUnsupported where the server would not start so."""
    with opened(model, options) as (engine, _):
        return by_engine(engine, texts)


def measure(model: str, texts: Sequence[Text], cases: Mapping[str, str]) -> tuple[dict[str, Cost], dict[str, str]]:
    """Costs by case, those of transformers itself first; and why the server does not start in the others."""
    reference = by_transformers(model, texts)
    costs, refused = {"transformers": cost(reference, reference)}, {}
    for name, options in cases.items():
        try:
            costs[name] = cost(read(model, options, texts), reference)
        except ModelUnsupported as error:
            refused[name] = error.message
    return costs, refused


def quality_table(costs: Mapping[str, Cost]) -> str:
    rows = [
        [name, number(each.perplexity, 4), number(each.ratio, 5), number(each.error, 5), number(100 * each.same, 2)]
        for name, each in costs.items()
    ]
    return table(["base", "perplexity", "÷ transformers'", "±", "same token %"], rows)


def verdicts(costs: Mapping[str, Cost]) -> list[str]:
    """Whether each case that has a goal meets it, a sentence a case."""
    said = []
    for name, each in costs.items():
        if name == "float32":
            said.append(_verdict(name, abs(each.ratio - 1), ROUNDING, "away from"))
        elif name.startswith("int8"):
            said.append(_verdict(name, each.ratio - 1, GOAL, "above"))
    return said


def _verdict(name: str, off: float, most: float, where: str) -> str:
    holds = "holds" if off <= most else "does not hold"
    return f"{name}: perplexity {100 * off:.2g} % {where} transformers' in float32, at most {100 * most:g} %: {holds}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="folder or hub id")
    parser.add_argument("--text", choices=TEXTS, default="docs")
    parser.add_argument("--texts", type=int, default=16, help="how many windows, or how many sentences")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--serve", default="", metavar="ARGS", help="further options, as of `lora-serve serve`")
    args = parser.parse_args(arguments)
    texts = TEXTS[args.text](AutoTokenizer.from_pretrained(args.model), args.texts, args.length)
    costs, refused = measure(args.model, texts, {name: f"{CASES[name]} {args.serve}" for name in args.cases})
    predicted = sum(len(text.ids) - text.start for text in texts)
    print(f"{args.model}, {args.text}: {len(texts)} texts, {predicted:,} predicted tokens\n")
    print(quality_table(costs), end="\n\n")
    for line in [*verdicts(costs), *(f"{name}: does not start: {why}" for name, why in refused.items())]:
        print(line)
    found = {"costs": {name: asdict(each) for name, each in costs.items()}, "refused": refused}
    print("\n" + json_line({"bench": "quality", "machine": describe(), **vars(args), "predicted": predicted, **found}))


if __name__ == "__main__":
    main()
