"""Parity of embeddings with PEFT and transformers: models without head, their hidden states, pooled by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from engine.engine_session import Session
from support import reference
from torch import Tensor

from lora_serve.request import Embedded, EmbeddingParams


def describe_pooling(folder: Path, mode: str, *, normalize: bool) -> None:
    """Write sentence-transformers' files into a model's or an adapter's folder."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))


def peft_body(folder: Path, config: peft.PeftConfig, seed: int, architecture: str = "llama") -> Any:
    """A PEFT model around the model without its head, as sentence-transformers trains it; saved to `folder`."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(reference(architecture)).base_model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(folder)
    return model


def hidden_states(model: Any, prompt: Sequence[int]) -> Tensor:
    """Final hidden states [tokens, hidden] of a model without head, without those of virtual tokens."""
    with torch.inference_mode():
        hidden: Tensor = model(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long())[0][0]
    return hidden[-len(prompt) :].double()


def pooled(hidden: Tensor, mode: str, *, normalize: bool, dimensions: int | None = None) -> Tensor:
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[mode][:dimensions]
    return vector / vector.norm() if normalize else vector


def embed(session: Session, id: str, prompt: list[int], **options: Any) -> None:
    session.send(id, prompt, max_tokens=0, embedding=EmbeddingParams(options.pop("dimensions", None)), **options)


def embedding(session: Session, id: str) -> Tensor:
    event = session.events[id][-2]
    assert isinstance(event, Embedded), session.events[id]
    assert session.end(id).reason == "stop"
    return torch.frombuffer(bytearray(event.vector), dtype=torch.float32).double()
