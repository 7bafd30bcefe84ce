"""The sweep over the JSON-Schema-Test-Suite tells what a grammar allows from what it does not."""

from __future__ import annotations

from bench.structured_output.schema_suite import allows, matcher_of, tokenizer


def test_valid_and_invalid_instances_and_refused_schemas_are_told_apart() -> None:
    tokens = tokenizer()
    matcher = matcher_of({"type": "array", "items": {"enum": ["é", 1]}}, tokens)
    assert matcher is not None
    assert allows(matcher, ["é", 1], tokens)
    assert not allows(matcher, ["e"], tokens)
    assert allows(matcher, [], tokens)
    assert matcher_of({"not": {}}, tokens) is None
    assert matcher_of({"pattern": "(?=a)"}, tokens) is None
