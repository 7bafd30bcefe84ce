"""KV tensors on the CPU, small ones and those of more than a huge page."""

from __future__ import annotations

import pytest
import torch

from lora_serve.kv.tensors import HUGE_PAGE, KVTensors, LayerShape


@pytest.mark.parametrize("blocks", [3, HUGE_PAGE // 256])
def test_keys_and_values_are_zeroed_tensors_of_their_own(blocks: int) -> None:
    kv = KVTensors([LayerShape(2, 8, 4)] * 2, blocks, 16, torch.bfloat16, torch.device("cpu"))
    kv.keys[0].fill_(1.0)
    assert kv.keys[0].shape == (blocks + 1, 16, 2, 8)
    assert kv.values[1].shape == (blocks + 1, 16, 2, 4)
    assert not any(each.any() for each in (kv.keys[1], *kv.values))
