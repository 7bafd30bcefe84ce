"""Parity with PEFT: adapters that PEFT creates are served in one mixed batch and compared row by row.

Tests that use it ignore PEFT's warnings: `pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from driver import Driver
from peft.tuners.lora.variants import calculate_alora_offsets
from support import reference, save
from torch import Tensor

from lora_serve.adapters.adapter import Adapter, flatten
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.store.records import describe_folder

LENGTHS = (3, 9, 14, 6, 20, 1, 7, 11)  # of prompts: some fit into one prefill chunk, some do not


def make_adapter(
    architecture: str, folder: Path, seed: int, config: peft.PeftConfig, *, noise: float = 0.08, reload: bool = True
) -> Any:
    """A PEFT model whose adapter, saved to `folder`, is its method's initialisation plus noise everywhere.

    Args:
        noise: standard deviation of the noise added to each trainable parameter.
        reload: return what PEFT loads from `folder` onto a fresh base, as a user would, not the model itself.
    """
    model = save_noisy_adapter(reference(architecture), folder, seed, config, noise=noise)
    return load_peft(architecture, folder) if reload else model


def save_noisy_adapter(base: Any, folder: Path, seed: int, config: peft.PeftConfig, *, noise: float) -> Any:
    """A PEFT model over a copy of `base`, saved to `folder`: its method's initialisation plus noise everywhere."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(folder)
    return model


def load_peft(architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """PEFT's model of an adapter's folder on a fresh base."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(reference(architecture)).to(dtype), folder).eval()


def read_adapter(driver: Driver, folder: Path) -> Adapter:
    """Read, lower and flatten an adapter as a compiler process does."""
    lowered = lower(read(folder, max_bytes=1 << 30), driver.loaded.shape)
    return flatten(describe_folder(folder).digest, lowered, driver.loaded.dtype)


def logits(model: Any, tokens: list[int]) -> Tensor:
    """PEFT's logits of these tokens, without the rows of virtual tokens before them."""
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return found[-len(tokens) :]


def log_probs(model: Any, tokens: list[int], **inputs: Any) -> Tensor:
    """A model's log-probabilities after every token; `inputs` are further arguments of its forward pass."""
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False, **inputs).logits[0].log_softmax(-1)
    return found


def alora_offsets(model: Any, tokens: list[int], prompt: list[int]) -> dict[str, Any]:
    """PEFT's argument for an aLoRA that the prompt, and not what was generated, invokes; none for other adapters."""
    if not getattr(model.active_peft_config, "alora_invocation_tokens", None):
        return {}
    offset = calculate_alora_offsets(model.peft_config, "default", torch.tensor([prompt]))[0]
    return {"alora_offsets": [None if offset is None else offset + len(tokens) - len(prompt)]}


def check_parity(
    architecture: str,
    folder: Path,
    configs: Sequence[peft.PeftConfig],
    *,
    native: bool = True,
    noise: float = 0.08,
    reload: bool = True,
    prompts: Sequence[list[int]] = (),
    tolerance: float = 1e-4,
) -> None:
    """Serve all adapters and the base in one batch, two sequences each, and compare every row with PEFT.

    Args:
        prompts: assigned in turn to the base, the first adapter, the second …; empty: random ones.
    """
    driver = Driver(save(architecture, folder / "base"), native=native, max_tokens=23)
    models = [reference(architecture)]
    routes: list[list[tuple[str, float]]] = [[]]
    for index, config in enumerate(configs):
        models.append(make_adapter(architecture, folder / str(index), index, config, noise=noise, reload=reload))
        routes.append([(driver.load_adapter(read_adapter(driver, folder / str(index))), 1.0)])
    count = 2 * len(models)
    if not prompts:
        generator = torch.Generator().manual_seed(9)
        prompts = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = driver.teach(
        [prompts[i % len(prompts)] for i in range(count)],
        decode=4,
        adapters=[routes[i % len(models)] for i in range(count)],
    )
    moved = [False] * len(models)
    for index, (tokens, got) in enumerate(zip(driver.sequences, rows, strict=True)):
        which = index % len(models)
        torch.testing.assert_close(got, logits(models[which], tokens), atol=tolerance, rtol=tolerance)
        moved[which] |= not torch.allclose(got, logits(models[0], tokens), atol=10 * tolerance)
    assert moved == [False] + [True] * len(configs), "an adapter that changes nothing proves nothing"
