"""An adapter's `serve.yaml`: part of its version if an administrator vouches for it, and otherwise nowhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft_folders import write
from registry_harness import RegistryHarness

from lora_serve.adapters.store.folder import StoreFolder
from lora_serve.adapters.store.records import KEPT
from lora_serve.adapters.store.store import Store
from lora_serve.adapters.store.transfer import find_sources, import_adapter
from lora_serve.errors import AdapterInvalid, AdapterNotFound
from lora_serve.messages import AdapterInfo, AliasTarget, Inspect, LocateFiles, Publish, PutAlias
from lora_serve.request import AdapterUse, Routing
from lora_serve.serve_settings import ServeSettings

SETTINGS = b"temperature: 0.5\nsystem: Speak in verse.\n"
READ = ServeSettings(temperature=0.5, system="Speak in verse.")


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[RegistryHarness]:
    harness = RegistryHarness(tmp_path, keep_versions=2)
    yield harness
    harness.registry.close()


def publish(harness: RegistryHarness, name: str, settings: bytes | None, *, trust: bool = True) -> AdapterInfo:
    folder = harness.upload(0)
    if settings is not None:
        (folder / "serve.yaml").write_bytes(settings)
    operation = Publish(name, str(folder), True, trust_settings=trust)
    info: AdapterInfo = harness.run(lambda done: harness.operations.publish(operation, done))
    return info


def files(harness: RegistryHarness, name: str) -> set[str]:
    return {*harness.operations.locate(LocateFiles(name)).files}


def test_settings_that_nobody_vouches_for_are_not_kept(harness: RegistryHarness) -> None:
    without = publish(harness, "without", None).versions[0]
    ignored = publish(harness, "ignored", SETTINGS, trust=False).versions[0]
    assert ignored.digest == without.digest
    assert (ignored.settings, files(harness, "ignored")) == (None, {"adapter_config.json", "adapter_model.safetensors"})
    assert any("serve.yaml is ignored" in warning for warning in ignored.report["warnings"])
    broken = publish(harness, "broken", b"\xff" * 1000, trust=False).versions[0]  # nor are they read
    assert broken.digest == without.digest
    assert not any(path.name == "serve.yaml" for path in harness.folder.rglob("*"))


def test_settings_are_part_of_the_version(harness: RegistryHarness) -> None:
    first = publish(harness, "poet", None)
    second = publish(harness, "poet", SETTINGS)
    third = publish(harness, "poet", SETTINGS.replace(b"0.5", b"0.6"))
    assert len({info.versions[0].digest for info in (first, second, third)}) == 3
    assert [version.settings for version in third.versions] == [
        ServeSettings(temperature=0.6, system=READ.system), READ,
    ]  # fmt: skip
    assert "serve.yaml" in files(harness, "poet")
    again = publish(harness, "second", SETTINGS)
    assert again.versions[0].digest == second.versions[0].digest


def test_settings_outlast_the_server_and_another_release(harness: RegistryHarness) -> None:
    digest = publish(harness, "poet", SETTINGS).versions[0].digest
    state = harness.registry.settings_state
    harness.registry.close()
    for lowered_again in (False, True):
        if lowered_again:
            shutil.rmtree(harness.folder / "store" / "versions" / digest / "lowered")
        restarted = RegistryHarness(harness.folder, keep_versions=2)
        version = restarted.operations.describe("poet").versions[0]
        assert (version.digest, version.settings) == (digest, READ)
        assert restarted.registry.settings_state not in (0, state)
        restarted.registry.close()


def test_inspecting_shows_what_publishing_would_do(harness: RegistryHarness) -> None:
    for trust in (False, True):
        folder = harness.upload(0)
        (folder / "serve.yaml").write_bytes(SETTINGS)
        operation = Inspect(str(folder), trust)
        found = harness.run(lambda done, operation=operation: harness.operations.inspect(operation, done))
        assert found.settings == (READ if trust else None)
        published = publish(harness, "poet", SETTINGS, trust=trust)
        assert found.digest == published.versions[0].digest


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (b"temprature: 1", "serve.yaml: there is no setting temprature; did you mean temperature?"),
        (b"chat_template: '{% if %}'", "serve.yaml: chat_template: it cannot write a short conversation"),
        (b"chat_template: \"{{ raise_exception('no') }}\"", "short conversation: no"),
        (b"chat_template: '{{ 1 // 0 }}'", "short conversation"),
        (b"chat_template: '{{ messages.__class__.__mro__ }}'", "unsafe"),
        (b"chat_template: '{{ cycler().next() }}'", "short conversation: at least one item"),
        (b"chat_template: '{% if false %}{% endif %}'", "it writes nothing"),
        (b"chat_template: '{% include \"x\" %}'", "short conversation"),
        (b"chat_template: '{% for i in range(99999) %}xxxxxxxxxx{% endfor %}'", "characters of a few words"),
    ],
)
def test_settings_that_cannot_be_read_are_refused_with_the_adapter(
    harness: RegistryHarness, settings: bytes, what: str
) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        publish(harness, "poet", settings)
    assert what in refused.value.message
    with pytest.raises(AdapterNotFound):
        harness.operations.describe("poet")


def test_templates_of_trainers_are_accepted(harness: RegistryHarness) -> None:
    template = (
        "{{ bos_token + '' }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}{{ eos_token }}"
    )
    settings = publish(harness, "poet", f"chat_template: |\n  {template}\n".encode()).versions[0].settings
    assert settings is not None
    assert settings.chat_template == template + "\n"


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_lease_says_whether_the_request_was_made_by_the_settings(harness: RegistryHarness) -> None:
    publish(harness, "plain", None)
    digest = publish(harness, "poet", SETTINGS).versions[0].digest
    acquired = [
        harness.registry.acquire(use)
        for use in (
            AdapterUse("plain"), AdapterUse("poet"), AdapterUse("poet", digest),
            AdapterUse("poet", digest, settings_applied=True),
        )
    ]  # fmt: skip
    assert [lease.settings_missing for lease in acquired] == [False, True, True, False]


def test_what_an_alias_stands_for_is_resolved_with_its_settings(harness: RegistryHarness) -> None:
    publish(harness, "poet", None)
    publish(harness, "poet", SETTINGS)
    put = PutAlias("prod", [AliasTarget("poet")])
    harness.run(lambda done: harness.operations.aliases.put(put, done))
    found = harness.registry.resolve(AdapterUse("prod"), Routing("call"))
    current = harness.operations.describe("poet").versions
    assert (found.name, found.digest, found.settings) == ("poet", current[0].digest, READ)
    assert harness.registry.resolve(AdapterUse("poet", current[1].digest[:9])).settings is None


def test_the_state_of_settings_changes_with_every_name_once_there_are_any(harness: RegistryHarness) -> None:
    publish(harness, "plain", None)
    assert harness.registry.settings_state == 0
    publish(harness, "poet", SETTINGS)
    seen = {harness.registry.settings_state}
    publish(harness, "plain", b"top_k: 1")
    seen.add(harness.registry.settings_state)
    harness.run(lambda done: harness.operations.delete("plain", done))
    seen.add(harness.registry.settings_state)
    assert len(seen - {0}) == 3


# --- folders and other stores ----------------------------------------------------------------------------------------


def test_settings_in_the_operator_s_folder_count_only_if_it_says_so(harness: RegistryHarness) -> None:
    given = write(harness.folder / "given" / "poet")
    (given / "serve.yaml").write_bytes(SETTINGS)

    def start(*, trust: bool) -> tuple[list[str], Any]:
        notes = harness.publish_folders(given.parent, trust_settings=trust)
        return notes, harness.operations.describe("poet").versions[0].settings

    notes, settings = start(trust=False)
    assert settings is None
    assert any("serve.yaml is ignored" in note for note in notes)
    assert start(trust=True) == ([], READ)
    (given / "serve.yaml").write_bytes(b"top_k: 7\n")
    assert start(trust=True) == ([], ServeSettings(top_k=7))
    assert start(trust=False)[1] is None


def test_a_store_brings_settings_and_a_folder_does_not(harness: RegistryHarness, tmp_path: Path) -> None:
    publish(harness, "poet", SETTINGS)
    harness.registry.close()
    loose = write(tmp_path / "loose")
    (loose / "serve.yaml").write_bytes(SETTINGS)
    other = Store(tmp_path / "other", "a fingerprint")
    for path in (harness.folder / "store", loose):
        (source,) = find_sources(path, "a fingerprint", [])
        assert import_adapter(other, source, replace=False)
    folder = StoreFolder(tmp_path / "other")
    kept = {name: {*other.version(other.names()[name].versions[0]).files} for name in ("poet", "loose")}
    assert "serve.yaml" in kept["poet"]
    assert "serve.yaml" not in kept["loose"]
    assert (folder.version(other.names()["poet"].versions[0]) / "serve.yaml").read_bytes() == SETTINGS
    assert {*KEPT} > kept["poet"]
    other.close()
