"""aLoRA: PEFT's logits, active from the invocation tokens on, and the base's KV reused before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import logits, make_adapter, read_adapter
from peft.tuners.lora.variants import calculate_alora_offsets
from support import reference, save
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

INVOCATION = [11, 12, 13]
LONG = list(range(40, 59))


def truth(model: Any, tokens: list[int], prompt: list[int]) -> Tensor:
    """PEFT's logits, the adapter active from where the prompt (not what was generated) invokes it."""
    ids = torch.tensor([tokens])
    offset = calculate_alora_offsets(model.peft_config, "default", torch.tensor([prompt]))[0]
    offsets = [None if offset is None else offset + len(tokens) - len(prompt)]
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids, alora_offsets=offsets, use_cache=False).logits[0]
    return found


class Invoked:
    """An aLoRA, an ordinary LoRA and the base of one architecture."""

    def __init__(self, architecture: str, folder: Path, **options: Any) -> None:
        targets = {"gpt2": ["c_attn", "c_proj"], "phi3": ["qkv_proj", "down_proj"]}.get(
            architecture, ["q_proj", "v_proj", "down_proj"]
        )
        self.driver = Driver(save(architecture, folder / "base"), **options)
        self.base = reference(architecture)
        conv = architecture == "gpt2"
        config = {"r": 4, "target_modules": targets, "fan_in_fan_out": conv, "task_type": "CAUSAL_LM"}
        self.model = make_adapter(
            architecture, folder / "a", 1, peft.LoraConfig(**config, alora_invocation_tokens=INVOCATION)
        )
        self.plain = make_adapter(architecture, folder / "b", 2, peft.LoraConfig(**config))
        self.digest = self.driver.load_adapter(read_adapter(self.driver, folder / "a"), tuple(INVOCATION))
        self.other = self.driver.load_adapter(read_adapter(self.driver, folder / "b"))


PROMPTS = [
    [5, 9, *INVOCATION, 33, 60],
    [5, 9, 33, 60],  # never
    [*INVOCATION, 5],
    [5, *INVOCATION],
    [5, *INVOCATION, *LONG, *INVOCATION, 7, 8],  # twice, over several chunks: the last one counts
    [*LONG, 11, 12],  # not all of it
]


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2", "phi3"])
def test_an_alora_is_active_from_the_last_invocation_of_the_prompt_on(
    architecture: str, native: bool, tmp_path: Path
) -> None:
    invoked = Invoked(architecture, tmp_path, native=native, max_tokens=11)
    routes = [[(invoked.digest, 1.0)]] * len(PROMPTS) + [[], [(invoked.other, 1.0)]]
    rows = invoked.driver.teach([*PROMPTS, PROMPTS[0], PROMPTS[0]], decode=4, adapters=routes)
    for prompt, tokens, got in zip(PROMPTS, invoked.driver.sequences, rows, strict=False):
        torch.testing.assert_close(got, truth(invoked.model, tokens, prompt), atol=1e-4, rtol=1e-4)
    for model, place in ((invoked.base, -2), (invoked.plain, -1)):
        tokens = invoked.driver.sequences[place]
        torch.testing.assert_close(rows[place], logits(model, tokens), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(rows[0][-1], logits(invoked.base, invoked.driver.sequences[0])[-1], atol=1e-3)


def test_an_alora_reuses_the_base_s_kv_up_to_its_invocation(tmp_path: Path) -> None:
    invoked = Invoked("llama", tmp_path)
    driver, prompt = invoked.driver, [*LONG, *INVOCATION, 7]
    driver.teach([LONG], decode=0, look_up=True)
    before = driver.computed
    got = driver.teach([prompt], decode=4, adapters=[[(invoked.digest, 1.0)]], look_up=True)[0]
    assert driver.scheduler.prefix_hits == 16  # the 4 whole blocks of 19 tokens
    assert driver.computed - before == len(prompt) - 16 + 4
    torch.testing.assert_close(got, truth(invoked.model, driver.sequences[0], prompt)[-5:], atol=1e-4, rtol=1e-4)


def test_kv_after_the_invocation_is_shared_by_the_adapter_s_requests_only(tmp_path: Path) -> None:
    invoked = Invoked("llama", tmp_path)
    driver, prompt = invoked.driver, [*LONG, *INVOCATION, *LONG]
    driver.teach([prompt], decode=0, adapters=[[(invoked.digest, 1.0)]], look_up=True)
    for routes, hits in (([], 16), ([(invoked.digest, 1.0)], 40), ([(invoked.other, 1.0)], 0)):
        before = driver.scheduler.prefix_hits
        got = driver.teach([prompt], decode=1, adapters=[routes], look_up=True)[0]
        assert driver.scheduler.prefix_hits - before == hits
        tokens = driver.sequences[0]
        wanted = {
            (): lambda tokens: logits(invoked.base, tokens),
            (invoked.digest,): lambda tokens: truth(invoked.model, tokens, prompt),
            (invoked.other,): lambda tokens: logits(invoked.plain, tokens),
        }[tuple(digest for digest, _ in routes)](tokens)
        torch.testing.assert_close(got, wanted[-2:], atol=1e-4, rtol=1e-4)


def test_an_alora_that_is_never_invoked_shares_all_kv_with_the_base(tmp_path: Path) -> None:
    invoked = Invoked("llama", tmp_path)
    driver = invoked.driver
    driver.teach([LONG], decode=0, adapters=[[(invoked.digest, 1.0)]], look_up=True)
    got = driver.teach([LONG], decode=2, look_up=True)[0]
    assert driver.scheduler.prefix_hits == 16
    torch.testing.assert_close(got, logits(invoked.base, driver.sequences[0])[-3:], atol=1e-4, rtol=1e-4)


def test_an_alora_composes_with_an_adapter_that_is_active_from_the_start(tmp_path: Path) -> None:
    invoked = Invoked("llama", tmp_path, max_tokens=5)
    driver, prompt = invoked.driver, [*LONG, *INVOCATION, 7]
    both = [(invoked.digest, 1.0), (invoked.other, 1.0)]
    rows = driver.teach([prompt, prompt], decode=2, adapters=[both, both[::-1]])
    invoked.model.load_adapter(tmp_path / "b", "b")
    invoked.model.base_model.set_adapter(["default", "b"])
    for tokens, got in zip(driver.sequences, rows, strict=True):
        torch.testing.assert_close(got, truth(invoked.model, tokens, prompt), atol=1e-4, rtol=1e-4)
