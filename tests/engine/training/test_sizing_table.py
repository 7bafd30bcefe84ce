"""Figures of docs/sizing.md for an 8B base in nf4, computed by the functions that the server counts with.

What a layer saves of a token is measured on a base of the same shape at a sixteenth of the width, to which it is in
proportion. Weights are in bitsandbytes' format with nested quantisation: half a byte each, a byte for the scale of 64
of them, and a float32 for 256 scales. Embedding and LM head stay in bf16.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

import pytest
import torch
from training_driver import load_small
from transformers import LlamaConfig, LlamaForCausalLM

from lora_serve.adapters.adapter import BaseShape, Site
from lora_serve.engine.training.fused_pass import pass_bytes
from lora_serve.engine.training.trainable_adapter import adapter_bytes, step_bytes
from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.kernels.select import select
from lora_serve.kv.tensors import LayerShape, bytes_per_token
from lora_serve.model.trainable_base import TrainableBase, unpacked_bytes

PAGE = Path(__file__).parents[3] / "docs" / "sizing.md"
LAYERS, HIDDEN, WIDE, HEADS, KV_HEADS, HEAD, VOCABULARY = 32, 4096, 14336, 32, 8, 128, 128_256
SCALE = 16
CONTEXT = 400 << 20  # CUDA's own, about
GRAPHS = 300 << 20  # CUDA graphs and a step's work, about, with --max-num-seqs 8 and --max-num-batched-tokens 512
PASSES = ((16, 512), (16, 1024), (16, 2048), (8, 512), (8, 1024), (8, 2048))  # rank, tokens
CARDS = (6, 8, 12)  # GiB


class Paper(NamedTuple):
    """What `pass_bytes` reads of a base that is not there."""

    shape: BaseShape
    layers: int
    token_bytes: int
    unpacked_bytes: int

    logit_bytes: int = 2
    vocabulary: int = VOCABULARY
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = torch.device("cuda")


def llama_8b() -> BaseShape:
    """Llama 3.1 8B's linear modules."""
    sites, groups = {}, []
    wide = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for names in (
            {f"{attention}.{name}_proj": (HIDDEN, out) for name, out in wide.items()},
            {f"{attention}.o_proj": (HEADS * HEAD, HIDDEN)},
            {f"{mlp}.{name}_proj": (HIDDEN, WIDE) for name in ("gate", "up")},
            {f"{mlp}.down_proj": (WIDE, HIDDEN)},
        ):
            sites |= {name: Site(name, *shape) for name, shape in names.items()}
            groups.append(tuple(names))
    sites["lm_head"] = Site("lm_head", HIDDEN, VOCABULARY)
    groups.append(("lm_head",))
    return BaseShape(sites, tuple(groups), lambda site: torch.empty(0), head="lm_head", hidden_size=HIDDEN)


def saved_bytes(folder: Path) -> int:
    """What a layer of the 8B base saves of a token, from a narrower one."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN // SCALE,
        intermediate_size=WIDE // SCALE,
        num_hidden_layers=1,
        num_attention_heads=HEADS // SCALE,
        num_key_value_heads=1,
        head_dim=HEAD,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    assert config.num_key_value_heads * SCALE == 2 * KV_HEADS, "one head is the least: keys count twice"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    base = TrainableBase(load_small(folder, "bfloat16"), select(torch.device("cpu"), True), 1)
    base.check()
    return SCALE * base.token_bytes


def rows(token_bytes: int) -> list[str]:
    """The table's lines."""
    shape = llama_8b()
    linear = sum(site.in_features * site.out_features for name, site in shape.sites.items() if name != shape.head)
    base = linear // 2 + linear // 64 + 4 * linear // (64 * 256) + 2 * 2 * VOCABULARY * HIDDEN
    unpacked = unpacked_bytes(shape, torch.bfloat16, external=True)
    paper = cast(TrainableBase, Paper(shape, LAYERS, token_bytes, unpacked))
    kv = bytes_per_token([LayerShape(KV_HEADS, HEAD, HEAD)] * LAYERS, torch.bfloat16)
    found = []
    for rank, tokens in PASSES:
        adapter = adapter_bytes(shape, LoraSettings(r=rank, target_modules="all-linear"))
        parts = (base, CONTEXT + GRAPHS, adapter, step_bytes(adapter), pass_bytes(paper, tokens))
        left = [card * (1 << 30) - sum(parts) for card in CARDS]
        kv_tokens = [f"{each // kv:,}" if each > 0 else f"{-each / (1 << 30):.1f} GiB short" for each in left]
        numbers = [f"{part / (1 << 30):.2f}" for part in parts]
        found.append(f"| {rank} | {tokens:,} | " + " | ".join([*numbers, *kv_tokens]) + " |")
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_table_for_8b_in_nf4_is_what_the_code_counts(tmp_path: Path) -> None:
    page = PAGE.read_text()
    for line in rows(saved_bytes(tmp_path)):
        assert line in page, f"docs/sizing.md should have\n{line}"
