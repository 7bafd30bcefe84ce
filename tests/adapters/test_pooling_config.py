"""How a base or an adapter makes embeddings, from PEFT's and sentence-transformers' files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import BASE, PREFIX, tensors, write
from registry_harness import RegistryHarness

from lora_serve.adapters.adapter import Lowered
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.lowering_job import LoweringContext, LoweringJob, run
from lora_serve.adapters.pooling_config import parse_pooling
from lora_serve.adapters.store.records import describe_folder
from lora_serve.errors import AdapterInvalid
from lora_serve.request import AdapterUse, Pooling

OLD = "sentence_transformers.models."
EMBEDS = {"task_type": "FEATURE_EXTRACTION"}


def modules(*kinds: str) -> list[dict[str, Any]]:
    return [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": f"{OLD}{kind}"}
        for index, kind in enumerate(kinds)
    ]


PLAIN, NORMALIZED = modules("Transformer", "Pooling"), modules("Transformer", "Pooling", "Normalize")


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode_cls_token": True}, "first"),
        ({"pooling_mode": "lasttoken", "pooling_mode_mean_tokens": True}, "last"),
        ({"pooling_mode": ["cls"]}, "first"),
        ({"pooling_mode": "lasttoken", "include_prompt": False}, "last"),
        ({"word_embedding_dimension": 8}, "mean"),  # sentence-transformers' default
    ],
)
def test_both_spellings_of_the_mode(config: dict[str, Any], mode: Any) -> None:
    assert parse_pooling(PLAIN, config) == Pooling(mode, normalize=False)
    assert parse_pooling(NORMALIZED, config) == Pooling(mode, normalize=True)
    assert parse_pooling(None, config) == Pooling(mode, normalize=True)


@pytest.mark.parametrize(
    ("listed", "config", "complaint"),
    [
        (PLAIN, {"pooling_mode": "max"}, "mode max"),
        (PLAIN, {"pooling_mode": "weightedmean"}, "mode weightedmean"),
        (PLAIN, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, r"mode cls\+mean"),
        (PLAIN, {"pooling_mode": 3}, "mode 3"),
        (PLAIN, {"pooling_mode": {"a": 1}}, "mode {.a.: 1}"),
        (PLAIN, {"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
        (PLAIN, None, "1_Pooling/config.json is missing"),
        (PLAIN, ["mean"], "not a JSON object"),
        (modules("Transformer", "Pooling", "Dense", "Normalize"), {}, "a Dense module"),
        (modules("WordEmbeddings", "Pooling"), {}, "a WordEmbeddings module"),
        (modules("Transformer", "Normalize"), {}, "1_Pooling"),
        (modules("Transformer"), {}, "not a Transformer, then Pooling"),
        ([*PLAIN, PLAIN[1]], {}, "not a Transformer, then Pooling"),
        ([], {}, "not a Transformer, then Pooling"),
        ([PLAIN[0], PLAIN[1] | {"path": "../1_Pooling"}], {}, "elsewhere"),
        ({"a": 1}, {}, "not a list"),
        ([1], {}, "not a list"),
        ([{"type": 1}], {}, "not a list"),
    ],
)
def test_what_is_not_served_is_named(listed: Any, config: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_pooling(listed, config)


def lowered(folder: Path, listed: Any = None, config: Any = None, **fields: Any) -> Lowered:
    write(folder, **fields)
    if listed is not None:
        (folder / "modules.json").write_text(json.dumps(listed))
    if config is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return lower(read(folder, max_bytes=1 << 20), BASE)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, (False, None)),
        ({"task_type": "CAUSAL_LM"}, (False, None)),
        ({"listed": NORMALIZED}, (False, None)),
        (EMBEDS, (True, None)),
        ({"config": {"pooling_mode": "cls"}}, (True, Pooling("first", normalize=True))),
        ({"listed": PLAIN, "config": {"pooling_mode": "cls"}}, (True, Pooling("first", normalize=False))),
        ({**EMBEDS, "listed": NORMALIZED, "config": {"pooling_mode": "lasttoken"}}, (True, Pooling("last"))),
    ],
)
def test_an_adapter_for_feature_extraction_or_with_a_pooling_of_its_own_embeds(
    tmp_path: Path, files: dict[str, Any], wanted: tuple[bool, Pooling | None]
) -> None:
    found = lowered(tmp_path, **files)
    assert (found.embeds, found.pooling) == wanted


@pytest.mark.parametrize("files", [{"listed": PLAIN}, {"listed": PLAIN, "config": {"pooling_mode": "max"}}])
def test_an_adapter_whose_pooling_is_not_served_is_refused(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(AdapterInvalid, match=r"1_Pooling/config\.json"):
        lowered(tmp_path, **files, **EMBEDS)


def test_pooling_is_part_of_an_adapter_s_identity(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [{}, EMBEDS, {"r": 4}]
    for index, more in enumerate(cases):
        lowered(tmp_path / str(index), **more)
    write(tmp_path / "3")
    pooled = tmp_path / "3" / "1_Pooling"
    pooled.mkdir()
    (pooled / "config.json").write_text('{"pooling_mode": "mean"}')
    plain, embeds, again, own = (describe_folder(tmp_path / str(index)).digest for index in range(4))
    assert plain == again
    assert len({plain, embeds, own}) == 3


def test_keys_of_the_model_without_its_head_get_their_full_path(tmp_path: Path) -> None:
    body = replace(
        BASE,
        body="model",
        sites={f"model.{name}": replace(site, name=f"model.{name}") for name, site in BASE.sites.items()},
        modules={"lm_head": {"weight": (12, 8)}},
        others={"model.norm": "a RMSNorm"},
        groups=tuple(tuple(f"model.{name}" for name in group) for group in BASE.groups),
    )
    long = {key.replace(PREFIX, f"{PREFIX}model."): tensor for key, tensor in tensors().items()}
    for index, weights in enumerate((tensors(), long)):
        folder = write(tmp_path / str(index), weights)
        assert lower(read(folder, max_bytes=1 << 20), body).deltas.keys() == body.sites.keys()
    nowhere = {key.replace("layers", "blocks"): tensor for key, tensor in tensors().items()}
    with pytest.raises(AdapterInvalid, match=r"base_model\.model\.blocks"):
        lower(read(write(tmp_path / "nowhere", nowhere), max_bytes=1 << 20), body)


def test_the_pooling_is_a_trait_of_the_version(tmp_path: Path) -> None:
    lowered(tmp_path / "a", listed=NORMALIZED, config={"pooling_mode": "mean"})
    summary = run(
        LoweringJob(str(tmp_path / "a")), LoweringContext(BASE, "a base", torch.float32, 1 << 20, 1 << 20)
    ).summary
    assert summary.traits.pooling == Pooling("mean")
    assert summary.report["embeddings"] == "mean of all tokens, normalised"


def test_an_operator_s_folder_is_published_again_when_its_pooling_changes(tmp_path: Path) -> None:
    lowered(tmp_path / "given" / "a", config={"pooling_mode": "mean"})
    harness = RegistryHarness(tmp_path)
    harness.publish_folders(tmp_path / "given")
    assert harness.registry.acquire(AdapterUse("a")).traits.pooling == Pooling("mean")
    (tmp_path / "given" / "a" / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    harness.publish_folders(tmp_path / "given")
    assert harness.registry.acquire(AdapterUse("a")).traits.pooling == Pooling("last")
    harness.registry.close()
