"""aLoRA: PEFT's logits, active from the invocation tokens on, and the base's KV reused before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import alora_offsets, logits, make_adapter, read_adapter
from support import reference, save
from torch import Tensor

from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.errors import AdapterInvalid

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

INVOCATION = [11, 12, 13]
LONG = list(range(40, 59))


def truth(model: Any, tokens: list[int], prompt: list[int]) -> Tensor:
    """PEFT's logits, the adapter active from where the prompt (not what was generated) invokes it."""
    with torch.inference_mode():
        found: Tensor = model(
            input_ids=torch.tensor([tokens]), use_cache=False, **alora_offsets(model, tokens, prompt)
        ).logits[0]
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
    assert driver.scheduler.running.prefix_hits == 16  # the 4 whole blocks of 19 tokens
    assert driver.computed - before == len(prompt) - 16 + 4
    torch.testing.assert_close(got, truth(invoked.model, driver.sequences[0], prompt)[-5:], atol=1e-4, rtol=1e-4)


def test_kv_after_the_invocation_is_shared_by_the_adapter_s_requests_only(tmp_path: Path) -> None:
    invoked = Invoked("llama", tmp_path)
    driver, prompt = invoked.driver, [*LONG, *INVOCATION, *LONG]
    driver.teach([prompt], decode=0, adapters=[[(invoked.digest, 1.0)]], look_up=True)
    for routes, hits in (([], 16), ([(invoked.digest, 1.0)], 40), ([(invoked.other, 1.0)], 0)):
        before = driver.scheduler.running.prefix_hits
        got = driver.teach([prompt], decode=1, adapters=[routes], look_up=True)[0]
        assert driver.scheduler.running.prefix_hits - before == hits
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
    assert driver.scheduler.running.prefix_hits == 16
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


PARTS: dict[str, dict[str, Any]] = {
    "a bias that is invoked": {"lora_bias": True},
    "token rows": {"trainable_token_indices": [5, 12, 60]},
    "token rows of the head": {"trainable_token_indices": {"lm_head": [5, 12, 60]}},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "a head and an embedding": {"modules_to_save": ["lm_head", "embed_tokens"], "lora_bias": True},
    "a linear module": {"modules_to_save": ["o_proj"]},
}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("part", PARTS)
def test_what_an_alora_replaces_is_there_for_all_tokens_and_what_it_adds_from_its_invocation_on(
    part: str, architecture: str, tmp_path: Path
) -> None:
    alora = Replacing(architecture, tmp_path, PARTS[part])
    rows = alora.driver.teach([*PROMPTS, PROMPTS[0]], decode=4, adapters=[[(alora.digest, 1.0)]] * len(PROMPTS) + [[]])
    for prompt, tokens, got in zip(PROMPTS, alora.driver.sequences, rows, strict=False):
        torch.testing.assert_close(got, truth(alora.model, tokens, prompt), atol=1e-4, rtol=1e-4)
    base = logits(reference(architecture), alora.driver.sequences[-1])
    torch.testing.assert_close(rows[-1], base, atol=1e-4, rtol=1e-4)


def test_an_alora_that_replaces_parts_of_the_base_shares_kv_with_itself_only(tmp_path: Path) -> None:
    alora = Replacing("llama", tmp_path, {"modules_to_save": ["norm", "input_layernorm"]})
    driver, own = alora.driver, [(alora.digest, 1.0)]
    driver.teach([LONG], decode=0, look_up=True)
    for prompt, routes, hits in (
        ([*LONG, *INVOCATION, 7], own, 0),  # the base's KV is not its own
        ([*LONG, 30, *INVOCATION, 7], own, 16),  # its own is, wherever it is invoked
        ([*LONG, 31], [], 16),
    ):
        before = driver.scheduler.running.prefix_hits
        got = driver.teach([prompt], decode=2, adapters=[routes], look_up=True)[0]
        assert driver.scheduler.running.prefix_hits - before == hits
        model = alora.model if routes else reference("llama")
        expected = truth(model, driver.sequences[0], prompt) if routes else logits(model, driver.sequences[0])
        torch.testing.assert_close(got, expected[-3:], atol=1e-4, rtol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights=True"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights=True"),
    "biases": ({"bias": "all", "target_modules": ["q_proj", "v_proj"]}, "bias='none' and lora_bias=True"),
    "tied head": (
        {"target_modules": ["lm_head"], "trainable_token_indices": [3]},
        "lm_head is replaced for all tokens",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_alora_that_changes_one_module_for_some_tokens_and_for_all_is_refused(what: str, tmp_path: Path) -> None:
    options, advice = REFUSED[what]
    with pytest.raises(AdapterInvalid, match=f"alora_invocation_tokens in adapter_config.json.*{advice}"):
        Replacing("qwen2", tmp_path, options)


class Replacing:
    """An aLoRA with an option beside it."""

    def __init__(self, architecture: str, folder: Path, options: dict[str, Any]) -> None:
        self.driver = Driver(save(architecture, folder / "base"), max_tokens=11)
        config: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        made = peft.LoraConfig(**config | options, alora_invocation_tokens=INVOCATION)
        self.model = make_adapter(architecture, folder / "a", 1, made)
        self.digest = self.driver.load_lowered(lower(read(folder / "a", max_bytes=1 << 30), self.driver.loaded.shape))
