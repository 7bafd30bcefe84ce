"""Reading and refusing an adapter takes time in proportion to its files, and little of it, whatever they say."""

from __future__ import annotations

import gc
import json
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from peft_folders import BASE, PREFIX, tensors, write

from lora_serve.adapters.adapter import BaseShape, Site
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.formats.fields import MOST_NAMES, MOST_PATTERNS, Patterns
from lora_serve.adapters.vocabulary import MAX_COUNTS, vocabulary_digest
from lora_serve.errors import AdapterInvalid

NAMES = [f"model.layers.{n}.self_attn.{leaf}" for n in range(120) for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
SITES = {name: Site(name, 8, 12) for name in NAMES}
DEEP: BaseShape = replace(BASE, sites=SITES, groups=(), modules={name: {"weight": (12, 8)} for name in NAMES})
SECONDS = 1.0  # of computing time; what this guards against took from 2 to 50


@contextmanager
def quickly() -> Iterator[None]:
    gc.disable()  # collecting walks all that other tests of this process have left
    start = time.process_time()
    try:
        yield
    finally:
        gc.enable()
    assert time.process_time() - start < SECONDS


def refused(folder: Path, match: str, weights: Any = None, **fields: Any) -> None:
    write(folder, weights, **fields)
    with quickly(), pytest.raises(AdapterInvalid, match=match):
        lower(read(folder, max_bytes=1 << 30), DEEP)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_a_configuration_of_a_megabyte_is_refused_in_no_time(tmp_path: Path) -> None:
    weights = tensors(names=tuple(NAMES))
    many = {f"(a|b){n}": 4 for n in range(50_000)}
    refused(tmp_path, f"rank_pattern .* more than {MOST_PATTERNS} different patterns", weights, rank_pattern=many)
    forms = {"a" * (n % 100 + 1) + "." * (n // 100 + 1): 4 for n in range(9_000)}
    refused(tmp_path, f"alpha_pattern .* more than {MOST_PATTERNS}", weights, alpha_pattern=forms)
    for field in ("modules_to_save", "target_parameters"):
        names = [f"name{n}" for n in range(80_000)]
        refused(tmp_path, f"{field} .* has 80000 names; at most {MOST_NAMES} are read", weights, **{field: names})
    refused(tmp_path, "unknown fields", weights, **{f"field{n}": 1 for n in range(50_000)})
    refused(tmp_path, "no usable nblocks", weights, use_bdlora={f"field{n}": 1 for n in range(50_000)})


def test_a_rank_for_each_of_many_modules_by_path_is_served_quickly(tmp_path: Path) -> None:
    """As EVA writes them, and more."""
    given = dict.fromkeys(NAMES, 4) | {f"other.{n}.q_proj": 8 for n in range(20_000)}
    write(tmp_path, tensors(names=tuple(NAMES)), r=8, rank_pattern=given)
    with quickly():
        assert lower(read(tmp_path, max_bytes=1 << 30), DEEP).report["ranks"] == [4]


def test_expressions_that_take_exponential_time_elsewhere_do_not_here() -> None:
    patterns = Patterns(
        {"rank_pattern": {"(a+)+b": 1, "(a|a)*c": 2, "(.*)*d": 3, ".*a.*a.*a.*a.*e": 4}}, "rank_pattern"
    )
    with quickly():
        assert patterns.get("a" * 10_000, 9) == 9


PARTS = ("layers", "1", "12", "2", "q_proj", "k_proj", "mlp", "mlp_2", "q.proj", "a", "")
MARKS = (".", r"\.", "[0-9]+", ".*", "(1|2)", "^", "_", "$", "?")


@pytest.mark.parametrize("seed", range(20))
def test_the_first_pattern_that_peft_finds_is_found(seed: int) -> None:
    generator = random.Random(seed)

    def words(of: tuple[str, ...], most: int) -> str:
        return ".".join(generator.choice(of) for _ in range(generator.randint(1, most)))

    keys = {words(PARTS, 3): n + 1 for n in range(12)}
    for key in list(keys):
        at = generator.randint(0, len(key))
        keys[generator.choice(["^", ""]) + key[:at] + generator.choice(MARKS) + key[at:]] = len(keys) + 1
    keys = {key: value for key, value in keys.items() if _compiles(key)}
    generator.shuffle(order := list(keys))
    keys = {key: keys[key] for key in order}
    patterns = Patterns({"rank_pattern": keys}, "rank_pattern")
    for _ in range(300):
        name = words(PARTS[:-2], 4)
        assert patterns.get(name, 0) == keys.get(get_pattern_key(keys.keys(), name), 0), (name, keys)


def _compiles(key: str) -> bool:
    try:
        re.compile(key)
        Patterns({"rank_pattern": {key: 1}}, "rank_pattern")
    except (re.error, AdapterInvalid):
        return False
    return True


# --- weights ---------------------------------------------------------------------------------------------------------


def test_tens_of_thousands_of_tensors_are_refused_in_no_time(tmp_path: Path) -> None:
    few = replace(DEEP, sites=dict(list(SITES.items())[:4]), modules={})
    write(tmp_path, {f"{PREFIX}{n}": torch.ones(1) for n in range(30_000)})
    start = time.process_time()
    with pytest.raises(AdapterInvalid, match="the adapter has 30000 tensors; this base has modules for"):
        lower(read(tmp_path, max_bytes=1 << 30), few)
    assert time.process_time() - start < 2 * SECONDS


# --- tokenizer -------------------------------------------------------------------------------------------------------


def words_by_id(count: int) -> str:
    return '{"model":{"vocab":{' + ",".join(f'"{n:x}":{n}' for n in range(count)) + "}}}"


@pytest.mark.parametrize(
    "text",
    [
        words_by_id(2_000_000),
        '{"model":{"vocab":[' + ",".join(f'["{n:x}",0]' for n in range(2_000_000)) + "]}}",
        '{"model":{"vocab":{}},"added_tokens":[' + ",".join(f'{{"id":{n},"content":""}}' for n in range(10**6)) + "]}",
    ],
    ids=["words", "words with scores", "added words"],
)
def test_a_vocabulary_larger_than_any_is_not_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with quickly():
        assert vocabulary_digest(tmp_path) == ""


def test_the_largest_vocabularies_in_use_are_read(tmp_path: Path) -> None:
    """Of Gemma's size: 262,144 words, 514,906 merges, 6,415 added words."""
    added = [{"id": n, "content": f"<unused{n}>", "special": True, "lstrip": False} for n in range(6_415)]
    model = {"vocab": {f"word{n}": n for n in range(262_144)}, "merges": [["wor", "d1"]] * 514_906}
    text = json.dumps({"model": model, "added_tokens": added, "post_processor": {"a": {"b": 1}}}).encode()
    assert all(text.count(character) < most for character, most in MAX_COUNTS.items())
    (tmp_path / "tokenizer.json").write_bytes(text)
    assert vocabulary_digest(tmp_path)
