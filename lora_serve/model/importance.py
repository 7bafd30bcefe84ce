"""Importance of the inputs of linear modules, for rounding their weights to int4: mean squares over a short text.

The untouched base reads `TEXT` once, when it is loaded. A few inputs of a trained model are hundreds of times as large
as the others, at the first token above all, and any text shows which. Powers of four are precise enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from lora_serve.model.expert_rows import DOWN, STACKED
from lora_serve.model.experts import is_stacked
from lora_serve.model.self_check import eager_experts

TOKENS = 256  # at most
LEAST = 1e-2  # of the mean: inputs that the text does not use may be used by another
TEXT = """\
The harbour was quiet when the ferry came in, an hour late and half empty. Two men in yellow coats caught the ropes \
and made them fast, and then there was nothing to do but wait for the gate to open. Maria had waited here every Friday \
since 2009. "You could simply call him," her sister used to say. But some things, she thought, are not said on a \
telephone.

To install the program, download the archive, unpack it and run the script in the top folder:

    $ tar -xf tools-1.4.tar.gz && cd tools
    $ ./install --prefix=/usr/local

def mean(values: list[float]) -> float:
    \"\"\"Return the arithmetic mean of a list of numbers.\"\"\"
    if not values:
        raise ValueError("the mean of no values is undefined")
    return sum(values) / len(values)

Question: Why does ice float on water? Answer: Because water expands when it freezes, so that ice has a lower density \
(about 0.917 g/cm³) than the liquid below it. 1. Fill a glass. 2. Mark the level. 3. Compare.
"""


def text_tokens(name: str, revision: str | None, vocab_size: int) -> list[int] | None:
    """`TEXT` in the tokens of a checkpoint; None if it has no tokenizer that transformers can read."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        ids: list[int] = tokenizer(TEXT)["input_ids"]
    except Exception:  # tokenizers raise errors of their own
        return None
    return ids[:TOKENS] if ids and max(ids) < vocab_size else None


def random_tokens(vocab_size: int) -> list[int]:
    """Tokens to read instead of `TEXT`, always the same ones; what they show of a trained model is worth less."""
    ids: list[int] = torch.randint(0, vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids


@torch.no_grad()  # not inference mode: see `compute_oracle`
def measure_importance(
    model: Any, groups: Iterable[tuple[str, ...]], ids: list[int], device: torch.device
) -> dict[str, Tensor]:
    """Importance [in], float32, by linear module and by parameter of stacked experts; its mean is about 1.

    The inputs of experts' down projections are not measured.

    Args:
        model: untouched, under eager attention.
        groups: names of linear modules that share an input.
    """
    found: dict[str, Tensor] = {}
    hooks = []

    def watch(names: tuple[str, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
            found.update(dict.fromkeys(names, _importance(x.float().flatten(0, -2).square().mean(0))))

        return hook

    for names in groups:
        module = model.get_submodule(names[0])
        hooks.append(module.register_forward_pre_hook(watch(names), with_kwargs=True))
    for name, module in model.named_modules():
        if is_stacked(module):
            own = tuple(f"{name}.{parameter}" for parameter in STACKED if parameter != DOWN)
            hooks.append(module.register_forward_pre_hook(watch(own), with_kwargs=True))
    try:
        with eager_experts(model):
            model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: each for name, each in found.items() if each.isfinite().all()}


def importance_digest(importance: Mapping[str, Tensor]) -> str:
    """Digest of importances, on which the rounding of the weights depends; empty if there are none."""
    if not importance:
        return ""
    digest = sha256()
    for name, each in sorted(importance.items()):
        digest.update(f"{name}\n".encode() + each.numpy().tobytes())
    return digest.hexdigest()


def _importance(squares: Tensor) -> Tensor:
    relative = (squares / squares.mean().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=LEAST)
    return torch.exp2(2 * (relative.log2() / 2).round()).cpu()
