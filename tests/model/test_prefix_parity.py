"""Virtual tokens in a mixed batch: PEFT's logits, computed once per version, shared, and recomputed after eviction."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from driver import Driver
from parity import check_parity, load_peft, logits, make_adapter, read_adapter
from peft import PeftConfig, PeftModel
from support import reference, save

TASK = {"task_type": "CAUSAL_LM"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT talks about defaults


def methods(architecture: str) -> list[PeftConfig]:
    """One of each, with lengths that are no multiple of the block size, and an ordinary adapter."""
    targets = ["c_attn"] if architecture == "gpt2" else ["o_proj"]
    return [
        peft.PromptTuningConfig(num_virtual_tokens=5, **TASK),
        peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=24, **TASK),
        peft.PromptEncoderConfig(
            num_virtual_tokens=9, encoder_reparameterization_type="LSTM", encoder_hidden_size=16, **TASK
        ),
        peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=architecture == "gpt2", **TASK),
        peft.CPTConfig(
            cpt_token_ids=[7, 8, 9, 10, 11, 12], cpt_mask=[1] * 6, cpt_tokens_type_mask=[1, 2, 2, 3, 3, 4], **TASK
        ),
        peft.PrefixTuningConfig(num_virtual_tokens=6, **TASK),
        peft.PrefixTuningConfig(num_virtual_tokens=11, prefix_projection=True, encoder_hidden_size=20, **TASK),
    ]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2", "phi3", "mistral"])
def test_virtual_tokens_of_every_method_equal_peft_row_by_row(architecture: str, tmp_path: Path) -> None:
    check_parity(architecture, tmp_path, methods(architecture))


def test_virtual_tokens_equal_peft_on_the_reference_kernels(tmp_path: Path) -> None:
    check_parity("llama", tmp_path, methods("llama"), native=False)


@pytest.mark.parametrize("method", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_in_bf16_virtual_tokens_are_as_close_to_exact_as_peft_in_bf16(method: type[PeftConfig], tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"), dtype="bfloat16")
    exact = make_adapter("llama", tmp_path / "a", 0, method(num_virtual_tokens=5, **TASK))
    route = [(driver.load_adapter(read_adapter(driver, tmp_path / "a")), 1.0)]
    rows = driver.teach([[5, 9, 33, 60, 21, 7, 8, 40]] * 2, decode=3, adapters=[route, []])[0].float()
    truth = logits(exact, driver.sequences[0])
    theirs = logits(load_peft("llama", tmp_path / "a", torch.bfloat16), driver.sequences[0]).float()
    assert (rows - truth).norm() <= 1.25 * (theirs - truth).norm()


def test_cartridges_and_prompts_of_a_single_task_are_served(tmp_path: Path) -> None:
    configs = [
        peft.CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=2, **TASK),
        peft.MultitaskPromptTuningConfig(num_virtual_tokens=5, num_tasks=1, num_ranks=2, **TASK),
    ]
    driver = Driver(save("llama", tmp_path / "base"))
    models = [
        make_adapter("llama", tmp_path / str(seed), seed, config, noise=0.3) for seed, config in enumerate(configs)
    ]
    digests = [driver.load_adapter(read_adapter(driver, tmp_path / str(seed))) for seed in range(2)]
    rows = driver.teach([[5, 9, 33, 60, 21, 7, 8]] * 2, decode=3, adapters=[[(digest, 1.0)] for digest in digests])
    cartridge, multitask = (torch.tensor([tokens]) for tokens in driver.sequences)
    with torch.inference_mode():
        truth = [
            models[0](input_ids=cartridge).logits[0],
            models[1](input_ids=multitask, task_ids=torch.tensor([0])).logits[0, 5:],
        ]
    for got, wanted in zip(rows, truth, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_greedy_decoding_gives_what_peft_generates(architecture: str, tmp_path: Path) -> None:
    driver = Driver(save(architecture, tmp_path / "base"), block_size=4)
    configs = [config for config in methods(architecture) if config.is_prompt_learning]
    prompt = [5, 9, 33, 60, 21]
    for seed, config in enumerate(configs):
        model = make_adapter(architecture, tmp_path / str(seed), seed, config)
        digest = driver.load_adapter(read_adapter(driver, tmp_path / str(seed)))
        driver.teach([prompt], decode=8, adapters=[[(digest, 1.0)]])
        assert driver.sequences[0] == generated(model, prompt, 8), config.peft_type


def generated(model: PeftModel, prompt: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        ids = model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    found: list[int] = ids[0].tolist()
    return found


@pytest.mark.parametrize("method", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_modules_to_save_beside_virtual_tokens_are_applied_to_all_rows(
    method: type[PeftConfig], tmp_path: Path
) -> None:
    configs = [
        method(num_virtual_tokens=5, modules_to_save=["lm_head"], **TASK),
        method(num_virtual_tokens=5, modules_to_save=["norm"], **TASK),
    ]
    check_parity("llama", tmp_path, configs)


class Shared:
    """Prompt tuning (6 tokens) and prefix tuning (9) on one base, blocks of 4, found again by digest."""

    def __init__(self, folder: Path, **options: int) -> None:
        self.driver = Driver(save("llama", folder / "base"), **options)
        self.models, self.routes = [], []
        for seed, config in enumerate(
            [
                peft.PromptTuningConfig(num_virtual_tokens=6, **TASK),
                peft.PrefixTuningConfig(num_virtual_tokens=9, **TASK),
            ]
        ):
            self.models.append(make_adapter("llama", folder / str(seed), seed, config))
            self.routes.append([(self.driver.load_adapter(read_adapter(self.driver, folder / str(seed))), 1.0)])

    def rows(self, prompt: list[int], which: int, *, look_up: bool = True) -> int:
        """Serve a prompt, compare it with PEFT, and return how many rows were computed for it."""
        before = self.driver.computed
        got = self.driver.teach([prompt], 2, [self.routes[which]], look_up=look_up)[0]
        truth = logits(self.models[which], self.driver.sequences[0])
        torch.testing.assert_close(got, truth[-len(got) :], atol=1e-4, rtol=1e-4)
        return self.driver.computed - before


def test_virtual_tokens_are_computed_once_and_found_by_every_request(tmp_path: Path) -> None:
    shared = Shared(tmp_path)
    scheduler = shared.driver.scheduler
    assert shared.rows([5, 9, 33], 0) == 6 + 3 + 2
    assert shared.rows([60, 21, 7], 0) == 2 + 3 + 2  # a block of 4 is found, what shares one with the prompt is not
    assert shared.rows([5, 9, 33], 1) == 9 + 3 + 2
    assert shared.rows([60, 21, 7], 1) == 1 + 3 + 2
    assert scheduler.running.prefix_hits == 0  # of the prompts' own tokens
    assert shared.rows([60, 21, 7, 40, 41, 42], 0) == 4 + 2
    assert scheduler.running.prefix_hits == 2  # those that share a block with the last two virtual tokens
    assert shared.rows([60, 21, 7, 40, 41, 42, 43], 0) == 1 + 2
    assert scheduler.running.prefix_hits == 2 + 6


def test_virtual_tokens_are_found_even_if_prompts_are_not_looked_up(tmp_path: Path) -> None:
    shared = Shared(tmp_path)
    assert shared.rows([5, 9, 33], 1, look_up=False) == 9 + 3 + 2
    assert shared.rows([5, 9, 33], 1, look_up=False) == 1 + 3 + 2
    shared.driver.scheduler.running.prefix_cache = False
    assert shared.rows([5, 9, 33], 1) == 1 + 3 + 2
    assert shared.rows([5, 9, 33, 34, 35, 36], 0) == 6 + 6 + 2
    assert shared.rows([5, 9, 33, 34, 35, 36], 0) == 2 + 6 + 2


def test_virtual_tokens_are_recomputed_after_their_blocks_were_reused(tmp_path: Path) -> None:
    shared = Shared(tmp_path, max_tokens=7)
    shared.rows([5, 9, 33], 1)
    pool = shared.driver.scheduler.pool
    taken = pool.allocate(pool.free)
    assert taken is not None
    pool.release(taken)
    assert shared.rows([5, 9, 33], 1) == 9 + 3 + 2


def test_later_batches_of_the_base_are_unaffected(tmp_path: Path) -> None:
    shared = Shared(tmp_path)
    shared.driver.teach([[5, 9, 33]] * 2, 1, [[], shared.routes[0]])
    rows = shared.driver.teach([[0, 0, 5, 9]], 1)[0]  # virtual rows had 0 for a token
    torch.testing.assert_close(rows, logits(reference("llama"), shared.driver.sequences[0]), atol=1e-4, rtol=1e-4)
