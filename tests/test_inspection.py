"""Inspection on the real server: warnings are shown in every interface."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ADAPTERS, ServerProcess

from lora_serve.cli import main

WARNING = "it was trained on someone/other-llama, this base is demo"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("store"), "--served-model-name", "demo") as server:
        yield server


def stranger(folder: Path, **fields: object) -> Path:
    """One of the demo's adapters with changed fields in its configuration."""
    shutil.copytree(ADAPTERS / "shout", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_an_adapter_of_another_base_causes_a_warning_in_every_interface(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stranger(tmp_path / "loud", base_model_name_or_path="someone/other-llama")

    def said(*words: str) -> str:
        assert main(["adapter", *words, "--url", server.url]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert WARNING in said("inspect", str(folder))
    assert server.http.get("/v1/adapters/loud").status_code == 404

    assert WARNING in said("upload", str(folder))
    (version,) = server.http.get("/v1/adapters/loud").json()["versions"]
    assert any(warning.startswith(WARNING) for warning in version["report"]["warnings"])
    assert version["report"]["modules"] == "18 of 43"
    assert server.complete("two red foxes run", "loud") == "TWO RED FOXES RUN"

    by_name = said("inspect", "loud")
    assert WARNING in by_name
    assert version["digest"][:12] in by_name
    inspected = json.loads(said("inspect", str(folder), "--json"))
    assert {field: inspected[field] for field in ("digest", "rank", "memory_bytes", "report")} == {
        field: version[field] for field in ("digest", "rank", "memory_bytes", "report")
    }


def test_the_demo_s_adapters_cause_no_warning(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in sorted(ADAPTERS.iterdir()):
        assert main(["adapter", "inspect", str(folder), "--json", "--url", server.url]) == 0
        assert json.loads(capsys.readouterr().out)["report"]["warnings"] == []


def test_an_unsupported_method_is_refused_with_advice(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stranger(tmp_path / "turned", peft_type="OFT")
    for words in (["inspect", str(folder)], ["upload", str(folder)]):
        assert main(["adapter", *words, "--url", server.url]) == 1
        said = capsys.readouterr().err
        assert "OFT (peft_type OFT) is not served: it rotates" in said
        assert "merge_and_unload" in said
