"""Random adapters of all methods and combinations of options give PEFT's logits, or are refused for a known reason.

RANDOM_ADAPTERS in the environment is the number of draws of every test.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from driver import Driver
from parity import alora_offsets, log_probs
from random_adapters import INVOCATION, LORA, ONLY_REMOVED, RandomAdapter, draw_lora, draw_method
from support import VOCABULARY, reference, save

from lora_serve.adapters.adapter import Lowered
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.traits import traits
from lora_serve.errors import AdapterInvalid

pytestmark = [  # PEFT talks about heads, ties, sizes, patterns and missing keys
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DRAWS = int(os.environ.get("RANDOM_ADAPTERS", "0"))
TOLERANCE = 2e-4  # of log-probabilities: PEFT decomposes weights in float32
PROMPTS = [[5, 9, 40, 41, 89, 33, 60, 3], [7, *INVOCATION, 8, 88, 21, 6]]

# Whatever changes the base's weights or tables, or its routers, or acts for some tokens only.
MEETING = [name for name in LORA if name not in ("patterns", "layers by pattern", "all linear")]

# What cannot be served exactly.
REFUSED = re.compile(
    "alora_invocation_tokens in adapter_config.json with (PiSSA|OLoRA|replaced biases)"
    "|alora_invocation_tokens in adapter_config.json: .* is replaced for all tokens and adapted"
    "|PEFT gives a Conv1D that is not square matrices"
    "|takes a part out of both"
    "|whose vocabulary was resized, took a part out of a weight that the files do not have"
    "|(use_dora|lora_bias) on a head together with trainable_token_indices"
    "|the adapter's head makes .* tokens, but its embedding knows"
    "|leaves open what they would be"
    "|the adapter changes nothing"
)
# An untrained adapter with one of these is not the base in PEFT either.
CHANGES_THE_BASE = {"kasa", "initialisation", "vblora", "resized", "new tokens", "head", "parameters", "olora"}


def seeds(count: int) -> range:
    return range(DRAWS or count)


class Drivers:
    """The architectures' bases, each loaded when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._drivers: dict[str, Driver] = {}

    def of(self, architecture: str) -> Driver:
        if architecture not in self._drivers:
            self._drivers[architecture] = Driver(save(architecture, self._folder / architecture), max_tokens=11)
        return self._drivers[architecture]


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Drivers:
    return Drivers(tmp_path_factory.mktemp("bases"))


def lowered_or_refused(adapter: RandomAdapter, driver: Driver) -> Lowered | None:
    """The lowered adapter; None if it was refused for a known reason."""
    try:
        lowered = lower(read(adapter.folder, max_bytes=1 << 30), driver.loaded.shape)
        traits(lowered, driver.loaded.shape)
        return lowered
    except AdapterInvalid as error:
        if not REFUSED.search(error.message):
            pytest.fail(f"{adapter} is refused: {error.message}")
        return None


def check(adapter: RandomAdapter, drivers: Drivers, *, like_the_base: bool = False) -> Lowered | None:
    """Serve an adapter and the base in one batch, and compare every row with PEFT and transformers."""
    driver = drivers.of(adapter.architecture)
    lowered = lowered_or_refused(adapter, driver)
    if lowered is None:
        return None
    digest = driver.load_lowered(lowered)
    prompts = [*PROMPTS, PROMPTS[0]]
    if adapter.size > VOCABULARY:
        prompts[0] = [*prompts[0], adapter.size - 1, 97]
    rows = driver.teach(prompts, decode=2, adapters=[[(digest, 1.0)], [(digest, 1.0)], []])
    driver.device_slots.evict(driver.slots.pop(digest))
    base = reference(adapter.architecture)
    for prompt, tokens, got, model in zip(
        prompts, driver.sequences, rows, (adapter.model, adapter.model, base), strict=True
    ):
        offsets = {} if model is base else alora_offsets(model, tokens, prompt)
        for expected in (log_probs(model, tokens, **offsets), *([log_probs(base, tokens)] if like_the_base else [])):
            known = min(got.shape[1], expected.shape[1])  # PEFT makes up the rows of a resized head that was not saved
            assert (got[:, known:] == -torch.inf).all()
            found, expected = got[:, :known].log_softmax(-1), expected[:, :known].log_softmax(-1)
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0, msg=lambda text: f"{adapter}\n{text}")
    return lowered


@pytest.mark.parametrize("seed", seeds(60))
def test_options_that_meet_give_peft_s_logits(seed: int, drivers: Drivers, tmp_path: Path) -> None:
    check(draw_lora(seed, tmp_path / "a", options=MEETING), drivers)


@pytest.mark.parametrize("seed", seeds(20))
def test_methods_beside_replaced_parameters_give_peft_s_logits(seed: int, drivers: Drivers, tmp_path: Path) -> None:
    check(draw_method(seed, tmp_path / "a"), drivers)


@pytest.mark.parametrize("seed", seeds(40))
def test_an_untrained_adapter_answers_as_the_base_does(seed: int, drivers: Drivers, tmp_path: Path) -> None:
    draw = draw_method if seed % 3 == 0 else draw_lora
    adapter = draw(seed, tmp_path / "a", trained=False)
    in_bfloat16 = any(
        tensor.dtype == torch.bfloat16 for tensor in read(adapter.folder, max_bytes=1 << 30).tensors.values()
    )
    check(adapter, drivers, like_the_base=not in_bfloat16 and not CHANGES_THE_BASE & {*adapter.names})


@pytest.mark.parametrize("seed", seeds(30))
def test_where_weights_and_configuration_contradict_each_other_peft_s_choice_is_served(
    seed: int, drivers: Drivers, tmp_path: Path
) -> None:
    """Tensors of modules that are not targeted are dropped, and modules without tensors are the base's."""
    adapter = draw_lora(seed, tmp_path / "a", contradicted=True)
    lowered = check(adapter, drivers)
    if lowered is not None and ONLY_REMOVED in adapter.names:
        assert any("have no tensors" in warning for warning in lowered.report["warnings"])
