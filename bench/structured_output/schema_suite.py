"""Whether grammars of JSON Schemas allow what the schemas allow, by the JSON-Schema-Test-Suite.

    python -m bench.structured_output.schema_suite --suite JSON-Schema-Test-Suite/tests/draft2020-12

(the suite's files are also in the source distribution of `jsonschema`, below `json`). Every schema is lowered as the
server lowers it; one that is refused is counted. For the others, each of the suite's instances is matched as text
without whitespace: an invalid one that the grammar allows is a fault; a valid one that it does not allow is a
restriction, which a generator may have. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from bench.make_model import make_tokenizer
from bench.report import json_line
from lora_serve.api.openai.structured_output import json_schema_grammar
from lora_serve.engine.grammar_compiler import LIMITS
from lora_serve.errors import BadRequest

VOCABULARY = 4096


def groups(suite: Path) -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """Name, schema and instances of every group of the suite; optional parts are left out."""
    for file in sorted(suite.glob("*.json")):
        for group in json.loads(file.read_text()):
            yield f"{file.stem}: {group['description']}", group["schema"], group["tests"]


def tokenizer() -> LLTokenizer:
    return LLTokenizer(make_tokenizer(VOCABULARY).backend_tokenizer.to_str(), eos_token=VOCABULARY - 1)


def matcher_of(schema: Any, tokens: LLTokenizer) -> LLMatcher | None:
    """A matcher of the schema's documents; None if it is refused."""
    try:
        grammar = json_schema_grammar(schema, "schema")
    except BadRequest:
        return None
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)
    return None if matcher.is_error() else matcher


def allows(matcher: LLMatcher, value: Any, tokens: LLTokenizer) -> bool:
    own = matcher.deep_copy()
    ids = tokens.tokenize_str(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    return own.try_consume_tokens(ids) == len(ids) and own.is_accepting()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True)
    arguments = parser.parse_args()
    tokens = tokenizer()
    counts = dict.fromkeys(("schemas", "refused", "instances", "right"), 0)
    faults: list[str] = []
    restrictions: list[str] = []
    for name, schema, tests in groups(arguments.suite):
        counts["schemas"] += 1
        matcher = matcher_of(schema, tokens)
        if matcher is None:
            counts["refused"] += 1
            continue
        for test in tests:
            counts["instances"] += 1
            allowed = allows(matcher, test["data"], tokens)
            if allowed == test["valid"]:
                counts["right"] += 1
            else:
                (faults if allowed else restrictions).append(f"{name}: {test['description']}")
    print(json_line({**counts, "faults": faults, "restrictions": restrictions}))


if __name__ == "__main__":
    main()
