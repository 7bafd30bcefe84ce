"""Loading and unloading of folders on the server, as vLLM's and SGLang's clients ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stub_admin import FILES, StubAdminApp, adapter_folder, refusal
from stub_completions import StubCompletionApp

from lora_serve.messages import UnloadAdapter


@pytest.fixture
def server(tmp_path: Path) -> StubAdminApp:
    return StubAdminApp(tmp_path / "store", adapter_roots=[tmp_path / "roots", tmp_path / "more"])


async def load(server: StubAdminApp, path: Path | str, name: str = "poet", **more: Any) -> Any:
    return await server.ask("POST", "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


async def test_a_folder_below_a_root_is_published_and_left_unchanged(server: StubAdminApp, tmp_path: Path) -> None:
    source = adapter_folder(tmp_path / "more" / "poet", **{"tokenizer_config.json": b"x", "training_args.bin": b"x"})
    answer = await load(server, source)
    assert answer.status_code == 200
    assert answer.text == "Success: LoRA adapter 'poet' added successfully."
    assert server.engine.published == [FILES]
    assert server.leftovers == []
    assert len(list(source.iterdir())) == 4
    assert refusal(await load(server, source))[0] == 409
    assert (await load(server, source, load_inplace=True)).status_code == 200


async def test_unloading_removes_what_was_loaded_and_keeps_its_folder(server: StubAdminApp, tmp_path: Path) -> None:
    source = adapter_folder(tmp_path / "more" / "poet")
    await load(server, source)
    answer = await server.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": "poet", "lora_int_id": 3})
    assert answer.text == "Success: LoRA adapter 'poet' removed successfully."
    assert server.engine.adapters == {}
    assert len(list(source.iterdir())) == 2
    assert refusal(await server.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": "poet"}))[0] == 404


@pytest.mark.parametrize("path", ["/v1/unload_lora_adapter", "/unload_lora_adapter"])
async def test_unloading_does_not_destroy_an_upload(server: StubAdminApp, path: str) -> None:
    await server.upload()
    assert (await server.ask("POST", path, json={"lora_name": "poet"})).status_code == 200
    assert server.engine.operations[-1 if path.startswith("/v1") else -2] == UnloadAdapter("poet")  # not a delete


@pytest.mark.parametrize("name", [None, "base"])
async def test_the_base_that_an_adapter_is_loaded_for_is_checked(tmp_path: Path, name: str | None) -> None:
    server = StubCompletionApp(tmp_path / "store", adapter_roots=[tmp_path])
    sent = {"lora_name": "poet", "lora_path": str(adapter_folder(tmp_path / "poet")), "is_3d_lora_weight": True}
    wrong = await server.post("/v1/load_lora_adapter", sent | {"base_model_name": "another"})
    assert refusal(wrong) == (400, "base_model_name", "the base of this server is base")
    assert server.engine.operations == []
    assert (await server.post("/v1/load_lora_adapter", sent | {"base_model_name": name})).status_code == 200


async def test_sglang_s_routes_load_and_unload(server: StubAdminApp, tmp_path: Path) -> None:
    await server.upload(name="clerk")
    sent = {"lora_name": "poet", "lora_path": str(adapter_folder(tmp_path / "more" / "poet")), "pinned": True}
    answer = (await server.ask("POST", "/load_lora_adapter", json=sent)).json()
    clerk = {"clerk": "clerk@digest0"}
    assert answer == {"success": True, "error_message": "", "loaded_adapters": clerk | {"poet": "poet@digest0"}}
    assert server.engine.adapters["poet"].pinned
    assert refusal(await server.ask("POST", "/load_lora_adapter", json=sent))[0] == 409
    answer = (await server.ask("POST", "/unload_lora_adapter", json={"lora_name": "poet"})).json()
    assert answer["loaded_adapters"] == clerk


async def test_an_adapter_that_cannot_be_pinned_is_not_loaded(server: StubAdminApp, tmp_path: Path) -> None:
    server.engine.may_pin = False
    sent = {"lora_name": "poet", "lora_path": str(adapter_folder(tmp_path / "more" / "poet")), "pinned": True}
    assert refusal(await server.ask("POST", "/load_lora_adapter", json=sent))[0] == 409
    assert server.engine.adapters == {}


@pytest.mark.parametrize("path", ["outside", "roots/../outside", "roots/link", "roots/none", "roots/file", "", "\0"])
async def test_only_folders_below_a_root_are_accepted(server: StubAdminApp, tmp_path: Path, path: str) -> None:
    adapter_folder(tmp_path / "outside")
    adapter_folder(tmp_path / "roots" / "poet")
    (tmp_path / "roots" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "roots" / "file").write_bytes(b"")
    answer = await load(server, f"{tmp_path}/{path}" if path else "")
    assert refusal(answer)[:2] == (400, "lora_path")
    assert str(tmp_path) not in answer.text
    assert server.engine.operations == []


async def test_without_roots_no_folder_is_accepted(tmp_path: Path) -> None:
    server = StubAdminApp(tmp_path / "store")
    assert refusal(await load(server, adapter_folder(tmp_path / "poet")))[:2] == (400, "lora_path")


async def test_links_are_followed_within_the_roots_only(server: StubAdminApp, tmp_path: Path) -> None:
    source = adapter_folder(tmp_path / "roots" / "poet")
    weights = source / "adapter_model.safetensors"
    blob = weights.rename(tmp_path / "roots" / "blob")
    weights.symlink_to(blob)
    assert (await load(server, source)).status_code == 200
    assert server.engine.published == [FILES]
    weights.unlink()
    weights.symlink_to(adapter_folder(tmp_path / "outside") / "adapter_model.safetensors")
    assert refusal(await load(server, source, "other"))[0] == 422
    assert len(server.engine.published) == 1
    assert server.leftovers == []


async def test_the_pooling_of_an_adapter_for_embeddings_is_read_from_its_folder(
    server: StubAdminApp, tmp_path: Path
) -> None:
    more = {"modules.json": b"[]", "1_Pooling/config.json": b"{}"}
    assert (await load(server, adapter_folder(tmp_path / "roots" / "poet", **more))).status_code == 200
    assert server.engine.published == [FILES | more]


async def test_a_folder_of_pickles_is_refused_with_advice(server: StubAdminApp, tmp_path: Path) -> None:
    source = adapter_folder(tmp_path / "roots" / "poet")
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
    status, _, message = refusal(await load(server, source))
    assert status == 422
    assert "save the adapter as adapter_model.safetensors" in message


async def test_a_folder_over_the_size_limit_is_413(tmp_path: Path) -> None:
    server = StubAdminApp(tmp_path / "store", adapter_roots=[tmp_path], max_adapter_size=1000)
    assert refusal(await load(server, adapter_folder(tmp_path / "poet")))[0] == 413


@pytest.mark.parametrize("more", [{"lora_path": 5}, {"path": "x"}, {"load_inplace": "yes"}, {"is_3d_lora_weight": 1}])
async def test_unknown_and_invalid_fields_are_refused(server: StubAdminApp, more: dict[str, Any]) -> None:
    answer = await server.ask("POST", "/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "x"} | more)
    assert refusal(answer)[:2] == (400, next(iter(more)))
