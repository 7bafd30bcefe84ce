"""Sequences: virtual tokens, where each adapter becomes active, and which sequences share prefix-cache keys."""

from __future__ import annotations

from lora_serve.adapters.traits import Traits
from lora_serve.engine.sequence import NEVER_ACTIVE, VIRTUAL_TOKEN, ActiveAdapter, Sequence, last_match
from lora_serve.request import Request, Sampling, Served

PROMPT = list(range(20))
INVOKED = {"a": Traits(invocation=(9, 10))}


def sequence(
    *uses: tuple[str, float], prompt: list[int] = PROMPT, traits: dict[str, Traits] | None = None, tenant: str = "t"
) -> Sequence:
    return Sequence(
        request=Request("r", prompt, Sampling(max_tokens=8), tenant=tenant),
        order=0,
        adapters=tuple(Served(digest, digest, weight) for digest, weight in uses),
        seed=0,
        stop_ids=frozenset(),
        limit=100,
        traits=traits or {},
    )


def shared(one: Sequence, other: Sequence, size: int = 4) -> int:
    """Number of full blocks whose prefix keys are the same."""
    keys = [(one.prefix_key(block, size), other.prefix_key(block, size)) for block in range(len(PROMPT) // size)]
    return next((block for block, (a, b) in enumerate(keys) if a != b), len(keys))


def test_virtual_tokens_come_before_the_prompt() -> None:
    seq = sequence(("a", 1.0), prompt=[5, 6], traits={"a": Traits(virtual=3)})
    assert seq.tokens == [VIRTUAL_TOKEN] * 3 + [5, 6]
    assert (seq.virtual, seq.prompt_end, seq.generated, seq.pending) == (3, 5, 0, 5)
    seq.tokens.append(7)
    assert seq.generated == 1


def test_an_adapter_is_active_from_the_last_occurrence_of_its_invocation() -> None:
    traits = {"a": Traits(invocation=(1, 2)), "b": Traits()}
    assert sequence(("a", 1.0), prompt=[1, 2, 3, 1, 2, 4, 1], traits=traits).active == (ActiveAdapter("a", 1.0, 3),)
    assert sequence(("a", 1.0), prompt=[1, 3, 2, 1], traits=traits).active == (ActiveAdapter("a", 1.0, NEVER_ACTIVE),)
    assert sequence(("b", 1.0), ("a", 1.0), prompt=[0, 1, 2], traits=traits).active == (
        ActiveAdapter("a", 1.0, 1),
        ActiveAdapter("b", 1.0, 0),
    )


def test_the_last_match_overlaps_and_touches_both_ends() -> None:
    assert last_match([1, 1, 1], [1, 1]) == 1
    assert last_match([1, 2], (1, 2)) == 0
    assert last_match([2], (1, 2)) is None


def test_weights_of_an_adapter_that_is_named_twice_add_up() -> None:
    seq = sequence(("b", 0.5), ("a", 1.0), ("b", 0.25))
    assert seq.active == (ActiveAdapter("a", 1.0, 0), ActiveAdapter("b", 0.75, 0))
    assert seq.digests == ("a", "b")


def test_kv_of_a_composition_is_shared_in_any_order_but_only_with_the_same_weights() -> None:
    one = sequence(("a", 0.5), ("b", 0.25))
    assert shared(one, sequence(("b", 0.25), ("a", 0.5))) == 5
    assert shared(one, sequence(("b", 0.5), ("a", 0.25))) == 0
    assert shared(one, sequence(("a", 0.5))) == 0
    assert shared(sequence(), sequence(("a", 1.0))) == 0


def test_tenants_do_not_share_kv() -> None:
    assert shared(sequence(), sequence(tenant="u")) == 0
    assert shared(sequence(("a", 1.0), traits=INVOKED), sequence(("a", 1.0), traits=INVOKED, tenant="u")) == 0
    assert shared(sequence(tenant=""), sequence(tenant="tenant")) == 0


def test_an_invoked_adapter_that_replaces_parts_of_the_base_shares_kv_with_itself_only() -> None:
    traits = {"a": Traits(invocation=(9, 10), not_additive="it replaces parts of the base")}
    invoked, elsewhere = sequence(("a", 1.0), traits=traits), sequence(("a", 1.0), traits=INVOKED)
    never = {"a": Traits(invocation=(99,), not_additive="it replaces parts of the base")}
    assert shared(invoked, sequence()) == 0
    assert shared(invoked, elsewhere) == 0
    assert shared(invoked, sequence(("a", 1.0), traits=never)) == shared(elsewhere, sequence())  # up to the invocation


def test_an_invoked_adapter_shares_the_base_s_kv_up_to_the_block_of_its_invocation() -> None:
    invoked = sequence(("a", 1.0), traits=INVOKED)
    assert shared(sequence(), invoked) == 2  # it begins at 9, in the third block of 4
    assert shared(sequence(), sequence(("a", 1.0), traits=INVOKED), size=9) == 1
    assert shared(sequence(("b", 1.0)), sequence(("b", 1.0), ("a", 1.0), traits=INVOKED)) == 2
    assert shared(invoked, sequence(("a", 1.0), traits={"a": Traits(invocation=(10, 11))})) == 2
    never = sequence(("a", 1.0), traits={"a": Traits(invocation=(99,))})
    assert shared(sequence(), never) == 5


def test_blocks_of_virtual_tokens_alone_are_shared_by_all_tenants() -> None:
    traits = {"a": Traits(virtual=10)}
    mine, other = sequence(("a", 1.0), traits=traits), sequence(("a", 1.0), traits=traits, tenant="u")
    assert shared(mine, other) == 2  # the third block of 4 holds the first tokens of the prompt
    assert shared(mine, sequence(("b", 1.0), traits={"b": Traits(virtual=10)})) == 0
