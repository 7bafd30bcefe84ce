"""Alias routes, entity tags and conditions: what is called, what is answered, and what a key may do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from stub_admin import FILES, StubAdminApp, refusal
from stub_completions import StubCompletionApp

from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key
from lora_serve.messages import (
    AdapterInfo,
    AdapterVersion,
    AliasInfo,
    AliasTarget,
    DeleteAdapter,
    DeleteAlias,
    Publish,
    PutAlias,
)
from lora_serve.precondition import Precondition
from lora_serve.request import Routing

TARGETS = [{"adapter": "poet@3fa4", "weight": 95}, {"adapter": "coder", "weight": 5}]
BOTH = [AliasTarget("poet@3fa4", 95), AliasTarget("coder", 5)]
KEYS = {
    "sk-boss": Caller("boss", admin=True),
    "sk-user": Caller("user", adapters=("prod",)),
    "sk-head": Caller("head", admin=True, adapters=("poet*", "prod*")),
}


@pytest.fixture
def server(tmp_path: Path) -> StubAdminApp:
    server = StubAdminApp(tmp_path / "store")
    _publish(server)
    return server


@pytest.fixture
def keyed(tmp_path: Path) -> StubAdminApp:
    server = StubAdminApp(tmp_path / "store", Keys({hash_key(key): caller for key, caller in KEYS.items()}))
    _publish(server)
    return server


def _publish(server: StubAdminApp) -> None:
    for name in ("poet", "coder"):
        server.engine.adapters[name] = AdapterInfo(
            name, False, [AdapterVersion("d" * 64, 5.5, 8, 2, 1, 1, ["disk"], 0)]
        )


async def test_an_alias_is_put_shown_listed_and_deleted(server: StubAdminApp) -> None:
    answer = await server.ask("PUT", "/v1/aliases/prod", json={"targets": TARGETS, "sticky": "user"})
    assert answer.status_code == 200
    assert server.engine.operations == [PutAlias("prod", BOTH, "user")]
    assert answer.json() == {
        "name": "prod", "targets": TARGETS, "sticky": "user", "etag": "tag1", "created": 3.0, "broken": None,
    }  # fmt: skip
    shown = await server.ask("GET", "/v1/aliases/prod")
    assert shown.json() == answer.json()
    assert shown.headers["ETag"] == answer.headers["ETag"] == '"tag1"'
    assert (await server.ask("GET", "/v1/aliases")).json() == {"object": "list", "data": [answer.json()]}
    assert (await server.ask("DELETE", "/v1/aliases/prod")).json() == {"name": "prod", "deleted": True}
    assert refusal(await server.ask("GET", "/v1/aliases/prod")) == (404, "name", "alias prod does not exist")
    assert refusal(await server.ask("DELETE", "/v1/aliases/prod"))[0] == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "targets"),
        ({"targets": []}, "targets"),
        ({"targets": [{"adapter": "poet"}] * 2}, "targets"),
        ({"targets": [{"adapter": "poet", "weight": 0}]}, "targets"),
        ({"targets": [{"adapter": f"a{n}"} for n in range(17)]}, "targets"),
        ({"targets": [{"adapter": "poet", "weight": -1}]}, "targets.0.weight"),
        ({"targets": [{"adapter": "poet", "share": 1}]}, "targets.0.share"),
        ({"targets": [{"weight": 1}]}, "targets.0.adapter"),
        ({"targets": TARGETS, "sticky": "session"}, "sticky"),
        ({"targets": TARGETS, "sticky": "header:a b"}, "sticky"),
        ({"targets": TARGETS, "stick": "user"}, "stick"),
    ],
)
async def test_a_mistake_in_an_alias_is_named(server: StubAdminApp, body: dict[str, Any], field: str) -> None:
    assert refusal(await server.ask("PUT", "/v1/aliases/prod", json=body))[:2] == (400, field)
    assert refusal(await server.ask("PUT", "/v1/aliases/.prod", json={"targets": TARGETS}))[:2] == (400, "name")
    assert server.engine.operations == []


async def test_changes_of_aliases_are_audited_with_their_targets(
    server: StubAdminApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await server.ask("PUT", "/v1/aliases/prod", json={"targets": TARGETS})
    await server.ask("DELETE", "/v1/aliases/prod")
    await server.ask("DELETE", "/v1/aliases/prod")
    found = [
        (each.getMessage(), each.fields["status"], each.fields.get("digest"), each.fields.get("targets"))  # type: ignore[attr-defined]
        for each in caplog.records
        if each.name == "lora_serve.audit"
    ]
    assert found == [
        ("alias prod", 200, "tag1", "poet@3fa4:95, coder:5"),
        ("unalias prod", 200, None, None),
        ("unalias prod", 404, None, None),
    ]


# --- keys ------------------------------------------------------------------------------------------------------------


async def test_changing_aliases_needs_an_admin_key(keyed: StubAdminApp) -> None:
    for method in ("PUT", "DELETE"):
        assert refusal(await keyed.ask(method, "/v1/aliases/prod", "sk-user", json={"targets": TARGETS}))[0] == 403
    assert keyed.engine.operations == []


async def test_an_alias_is_seen_by_who_may_use_its_name(keyed: StubAdminApp) -> None:
    for name in ("prod", "test"):
        await keyed.ask("PUT", f"/v1/aliases/{name}", "sk-boss", json={"targets": TARGETS})
    assert [each["name"] for each in (await keyed.ask("GET", "/v1/aliases", "sk-user")).json()["data"]] == ["prod"]
    hidden = refusal(await keyed.ask("GET", "/v1/aliases/test", "sk-user"))
    absent = refusal(await keyed.ask("GET", "/v1/aliases/none", "sk-user"))
    assert hidden == (absent[0], absent[1], absent[2].replace("none", "test"))


async def test_of_an_alias_s_targets_a_key_sees_those_that_it_may_use(keyed: StubAdminApp) -> None:
    await keyed.ask("PUT", "/v1/aliases/prod", "sk-boss", json={"targets": TARGETS})
    keyed.engine.aliases["prod"] = msgspec.structs.replace(keyed.engine.aliases["prod"], broken="no adapter coder")
    for key, targets in (("sk-boss", TARGETS), ("sk-head", TARGETS[:1]), ("sk-user", [])):
        shown = (await keyed.ask("GET", "/v1/aliases/prod", key)).json()
        assert shown["targets"] == targets
        assert ("coder" in shown["broken"]) == (key == "sk-boss")
        assert (await keyed.ask("GET", "/v1/aliases", key)).json()["data"] == [shown]


async def test_an_alias_s_entity_tag_tells_nothing_of_targets_that_a_key_does_not_see(keyed: StubAdminApp) -> None:
    async def tags(key: str, known: str = "") -> tuple[int, str]:
        shown = await keyed.ask("GET", "/v1/aliases/prod", key, headers={"If-None-Match": known})
        assert shown.status_code == 304 or shown.headers["ETag"].strip('"') == shown.json()["etag"]
        return shown.status_code, shown.headers["ETag"]

    seen: dict[str, set[str]] = {"sk-boss": set(), "sk-head": set(), "sk-user": set()}
    for hidden in ("coder", "coder@3fa4"):
        targets = [TARGETS[0], {"adapter": hidden, "weight": 5}]
        answer = await keyed.ask("PUT", "/v1/aliases/prod", "sk-boss", json={"targets": targets})
        assert answer.status_code == 200
        for key, found in seen.items():
            status, tag = await tags(key)
            assert (status, await tags(key, tag)) == (200, (304, tag))
            found.add(tag)
    assert {key: len(found) for key, found in seen.items()} == {"sk-boss": 2, "sk-head": 1, "sk-user": 1}
    assert len(seen["sk-head"] | seen["sk-user"] | seen["sk-boss"]) == 4
    await keyed.ask("PUT", "/v1/aliases/prod", "sk-boss", json={"targets": [{**TARGETS[0], "weight": 1}, TARGETS[1]]})
    assert (await tags("sk-head"))[1] not in seen["sk-head"]


async def test_all_aliases_are_listed_though_the_engine_lists_a_few_at_once(keyed: StubAdminApp) -> None:
    names = [f"prod{number}" for number in range(7)]
    for name in reversed(names):
        await keyed.ask("PUT", f"/v1/aliases/{name}", "sk-boss", json={"targets": TARGETS})
    assert [each["name"] for each in (await keyed.ask("GET", "/v1/aliases", "sk-head")).json()["data"]] == names
    assert (await keyed.ask("GET", "/v1/aliases", "sk-user")).json()["data"] == []


async def test_an_admin_key_of_some_adapters_is_bound_by_the_alias_and_its_targets(keyed: StubAdminApp) -> None:
    async def put(name: str, adapter: str, **more: Any) -> Any:
        body = {"targets": [{"adapter": "poet-2"}, {"adapter": adapter}]}
        return await keyed.ask("PUT", f"/v1/aliases/{name}", "sk-head", json=body, **more)

    assert refusal(await put("other", "poet"))[:2] == (403, "name")
    assert refusal(await put("prod", "coder@3f")) == (404, "targets.1.adapter", "adapter coder does not exist")
    assert keyed.engine.aliases == {}
    assert (await put("prod", "poet")).status_code == 200
    assert keyed.engine.operations[-1].precondition == Precondition(none_match=("*",))  # type: ignore[union-attr]
    assert (await put("prod", "poet@1")).status_code == 200
    assert (await put("prod", "poet", headers={"If-Match": '"other"'})).status_code == 412
    await keyed.ask("PUT", "/v1/aliases/prod", "sk-boss", json={"targets": TARGETS})
    for refused in (await put("prod", "poet"), await keyed.ask("DELETE", "/v1/aliases/prod", "sk-head")):
        assert refusal(refused)[:2] == (403, "name")
    assert refusal(await keyed.ask("DELETE", "/v1/aliases/other", "sk-head"))[0] == 404


# --- conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "condition"),
    [
        ({}, Precondition()),
        ({"If-Match": '"a", "b"'}, Precondition(match=("a", "b"))),
        ({"If-Match": "*", "If-None-Match": "*"}, Precondition(("*",), ("*",))),
        ({"If-Match": 'W/"a"'}, Precondition(match=())),  # a weak tag never equals one here
        ({"If-None-Match": 'W/"a",b'}, Precondition(none_match=("a", "b"))),
        ({"If-Match": ""}, Precondition(match=())),
    ],
)
async def test_conditions_reach_the_engine_with_the_change(
    server: StubAdminApp, sent: dict[str, str], condition: Precondition
) -> None:
    await server.ask("PUT", "/v1/adapters/poet", headers=sent, files=[("files", item) for item in FILES.items()])
    await server.ask("DELETE", "/v1/adapters/poet", headers=sent)
    await server.ask("PUT", "/v1/aliases/prod", headers=sent, json={"targets": TARGETS})
    await server.ask("DELETE", "/v1/aliases/prod", headers=sent)
    changes = (Publish, DeleteAdapter, PutAlias, DeleteAlias)
    found = [each for each in server.engine.operations if isinstance(each, changes)]
    assert [(type(each), each.precondition) for each in found] == [(change, condition) for change in changes]


async def test_a_condition_that_does_not_hold_is_412_and_names_the_header(server: StubAdminApp) -> None:
    files = [("files", item) for item in FILES.items()]
    for header, tag in (("If-Match", '"old"'), ("If-None-Match", "*")):
        answer = await server.ask("PUT", "/v1/adapters/poet", headers={header: tag}, files=files)
        assert refusal(answer)[:2] == (412, header)
        assert answer.json()["error"]["code"] == "precondition_failed"
    assert refusal(await server.ask("DELETE", "/v1/adapters/poet", headers={"If-Match": '"old"'}))[0] == 412
    assert refusal(await server.ask("DELETE", "/v1/adapters/none", headers={"If-Match": '"old"'}))[0] == 404
    answer = await server.ask("PUT", "/v1/adapters/poet", headers={"If-Match": f'"{"d" * 64}"'}, files=files)
    assert (answer.status_code, answer.headers["ETag"]) == (201, '"digest1"')


async def test_a_reader_that_has_it_already_is_told_so(server: StubAdminApp) -> None:
    await server.ask("PUT", "/v1/aliases/prod", json={"targets": TARGETS})
    for path in ("/v1/adapters/poet", "/v1/aliases/prod"):
        answer = await server.ask("GET", path)
        etag = answer.headers["ETag"]
        for known in (etag, f'"x", W/{etag}', "*"):
            again = await server.ask("GET", path, headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag)
        assert (await server.ask("GET", path, headers={"If-None-Match": '"x"'})).content == answer.content
    assert (await server.upload(name="new")).headers["ETag"] == '"digest0"'


async def test_a_broken_adapter_has_no_tag(server: StubAdminApp) -> None:
    server.engine.adapters["poet"] = AdapterInfo("poet", False, [], "it is damaged")
    answer = await server.ask("GET", "/v1/adapters/poet", headers={"If-None-Match": "*"})
    assert (answer.status_code, "ETag" in answer.headers) == (200, False)


# --- generating ------------------------------------------------------------------------------------------------------


@pytest.fixture
def generating(tmp_path: Path) -> StubCompletionApp:
    server = StubCompletionApp(tmp_path, Keys({hash_key(key): caller for key, caller in KEYS.items()}))
    server.engine.aliases["prod"] = AliasInfo("prod", BOTH, None, "tag", 3.0)
    server.engine.resolves["prod"] = "poet"
    server.engine.adapters["poet"] = AdapterInfo("poet", False, [AdapterVersion("3fa4", 5.5, 8, 2, 1, 1, [], 0)])
    return server


@pytest.mark.parametrize("field", ["adapter", "model"])
async def test_what_answered_is_the_target_though_only_the_alias_may_be_named(
    generating: StubCompletionApp, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answer = await generating.complete("sk-user", **{field: "prod"})
    assert answer.json()["model"] == "poet"
    assert answer.json()["adapter"] == f"poet@{'d' * 12}"
    assert (await generating.complete("sk-user", adapter="poet")).status_code == 404
    usage = await generating.client.get("/v1/usage", headers={"Authorization": "Bearer sk-user"})
    assert [row["adapter"] for row in usage.json()["data"]] == ["poet"]
    assert 'adapter="poet"' in generating.app.state.services.metrics.render().decode()


async def test_the_root_of_an_alias_is_a_target_only_for_who_may_use_it(generating: StubCompletionApp) -> None:
    for key, root in (("sk-boss", "poet@3fa4"), ("sk-head", "poet@3fa4"), ("sk-user", "prod")):
        headers = {"Authorization": f"Bearer {key}"}
        listed = (await generating.client.get("/v1/models", headers=headers)).json()["data"]
        assert [card["root"] for card in listed if card["id"] == "prod"] == [root]
        assert (await generating.client.get("/v1/models/prod", headers=headers)).json()["root"] == root


async def test_a_call_is_routed_by_its_user_and_the_headers_that_aliases_go_by(generating: StubCompletionApp) -> None:
    engine = generating.engine
    engine.stats.sticky_headers = ["x-session", "x-other"]
    headers = {"Authorization": "Bearer sk-boss", "X-Session": "s1", "X-More": "no"}
    body = {"prompt": ["hi", "ho"], "n": 2, "adapter": "prod", "user": "u1"}
    assert (await generating.client.post("/v1/completions", json=body, headers=headers)).status_code == 200
    assert len(engine.requests) == 4
    (routing,) = {id(each.routing): each.routing for each in engine.requests}.values()
    assert routing == Routing(engine.requests[0].id, "u1", {"x-session": "s1"})
    body = {"input": ["hi", "ho"], "adapter": "prod", "user": "u1"}
    await generating.client.post("/v1/embeddings", json=body, headers=headers)
    first, second = engine.requests[4:]
    assert first.routing == second.routing == Routing(first.routing.call, "u1", {"x-session": "s1"})
    assert first.id.startswith(first.routing.call)


async def test_anthropic_s_user_id_is_the_user(generating: StubCompletionApp) -> None:
    message = {"model": "prod", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
    await generating.post("/v1/messages", message | {"metadata": {"user_id": "u7"}}, "sk-user")
    assert generating.engine.requests[0].routing.user == "u7"


async def test_choices_that_got_different_versions_are_refused(generating: StubCompletionApp) -> None:
    generating.engine.digests = ["d" * 64, "e" * 64]
    answer = await generating.complete("sk-boss", adapter="prod", n=2)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert len(generating.engine.closed) == 2


async def test_models_lists_aliases_after_adapters(generating: StubCompletionApp) -> None:
    boss = {"Authorization": "Bearer sk-boss"}
    found = (await generating.client.get("/v1/models", headers=boss)).json()["data"]
    assert [(each["id"], each["root"], each["parent"]) for each in found] == [
        ("base", "root", None), ("poet", "poet@3fa4", "base"), ("prod", "poet@3fa4", "base"),
    ]  # fmt: skip
    for name in ("prod", "base:prod"):
        assert (await generating.client.get(f"/v1/models/{name}", headers=boss)).json() == found[2]
    user = {"Authorization": "Bearer sk-user"}
    found = (await generating.client.get("/v1/models", headers=user)).json()["data"]
    assert [each["id"] for each in found] == ["base", "prod"]


async def test_a_name_that_resembles_an_alias_is_told_it(generating: StubCompletionApp) -> None:
    answer = await generating.complete("sk-boss", model="prud")
    assert refusal(answer) == (404, "model", "model prud does not exist; did you mean prod?")


async def test_tokenizing_knows_aliases(generating: StubCompletionApp) -> None:
    generating.engine.adapters["coder"] = AdapterInfo("coder", False, generating.engine.adapters["poet"].versions)
    for name, status in (("prod", 200), ("prod@3fa4", 404), ("none", 404)):
        assert (await generating.post("/tokenize", {"prompt": "hi", "adapter": name}, "sk-boss")).status_code == status
