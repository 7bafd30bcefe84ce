"""What the start-up summary says about the adapters given at start."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from peft_folders import BASE, tensors, write
from registry_harness import RegistryHarness


def test_the_notes_name_adapters_of_another_base_and_folders_without_one(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    write(folder / "mine", tensors(1), base_model_name_or_path="Qwen/Qwen2.5-0.5B")
    write(folder / "elsewhere", tensors(2), base_model_name_or_path="meta-llama/Llama-3.1-8B")
    write(folder / "run" / "checkpoint-80", tensors(3))
    (write(folder / "pickle") / "adapter_model.safetensors").rename(folder / "pickle" / "adapter_model.bin")
    (folder / "empty").mkdir()
    (folder / os.fsdecode(b"\xff")).mkdir()
    (folder / ".cache").mkdir()
    (folder / "notes.txt").touch()
    expected = [
        "adapter pickle is not served: adapter_model.safetensors is missing; adapter_model.bin would run code when "
        "read: save the adapter as adapter_model.safetensors, with PEFT's save_pretrained(..., "
        "safe_serialization=True)",
        "adapter elsewhere: it was trained on meta-llama/Llama-3.1-8B, this base is Qwen/Qwen2.5-0.5B (qwen2)",
        "empty is not served: adapter_config.json is missing",
        "run is not served: the adapter is further inside, in checkpoint-80; put it where it is seen",
        "? is not served: adapter_config.json is missing",
    ]
    for _ in range(2):  # the second time, adapters are unchanged
        harness = RegistryHarness(tmp_path, base=replace(BASE, names=("Qwen/Qwen2.5-0.5B",), model_type="qwen2"))
        assert harness.publish_folders(folder) == expected
        assert [info.name for info in harness.operations.describe_some("")] == ["elsewhere", "mine"]
        harness.registry.close()
