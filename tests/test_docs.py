"""The documentation says what is so: pages made from the code are up to date, links, tests and messages exist."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from playwright.sync_api import expect, sync_playwright
from server_process import ADAPTERS, DEMO, ROOT, ServerProcess

from docs.reference import PAGES
from lora_serve.kv.tensors import LayerShape, bytes_per_token

DOCS = ROOT / "docs"
WRITTEN = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.parametrize("name", PAGES)
def test_pages_made_from_the_code_are_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "run: python docs/reference.py"


def test_every_metric_that_a_page_names_exists() -> None:
    exported = (DOCS / "metrics.md").read_text()
    for path in WRITTEN:
        for name in re.findall(r"\b(?:lora_serve_|vllm:)\w+", path.read_text()):
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            assert f"`{family}`" in exported, f"{path.name}: {name}"


def test_links_lead_somewhere() -> None:
    made = {"contributing.md", "results.md"}  # by docs/hooks.py
    for path in WRITTEN:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text()):
            file, _, anchor = target.partition("#")
            if file in made and path.parent == DOCS:
                continue
            found = (path.parent / file).resolve() if file else path
            assert found.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(found), f"{path.name}: {target}"


def anchors(path: Path) -> set[str]:
    """Ids of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    pages = {str(path.relative_to(DOCS)) for path in DOCS.glob("*.md")}
    assert pages <= named
    assert named - pages == {"decisions/index.md", "contributing.md", "results.md"}


def test_tests_that_are_cited_exist() -> None:
    cited = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / "bug-reports.md").read_text())
    assert len(cited) > 15
    for file, name in cited:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_options_that_pages_name_exist() -> None:
    known = set(re.findall(r"`(--[a-z-]+)`", (DOCS / "options.md").read_text()))
    for name in ("index", "adapters", "sizing", "keys", "operating", "troubleshooting"):
        for option in re.findall(r"`(--[a-z][a-z-]+)", (DOCS / f"{name}.md").read_text()):
            assert option in known | {"--replace", "--url", "--admin", "--metrics", "--adapters"}, f"{name}: {option}"


# --- messages --------------------------------------------------------------------------------------------------------


@cache
def texts() -> list[str]:
    """Every text in the source, with a NUL for what is put into it."""
    found = []
    for path in (ROOT / "lora_serve").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


QUOTED = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("message", QUOTED)
def test_a_message_that_is_explained_is_one_that_the_server_has(message: str) -> None:
    pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
    assert any(pattern.search(text) for text in texts())


# --- sizes, and training, against a server ---------------------------------------------------------------------------


def javascript(expression: str) -> Any:
    """The value of an expression with the functions of the page about sizes."""
    code = f"const s = require('{DOCS / 'assets' / 'sizing.js'}'); console.log(JSON.stringify({expression}))"
    assert NODE is not None
    done = subprocess.run([NODE, "-e", code], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("store"), "--adapters", str(ADAPTERS)) as server:
        yield server


@pytest.mark.skipif(NODE is None, reason="there is no node")
def test_sizes_are_those_that_the_server_counts(server: ServerProcess) -> None:
    config = (DEMO / "config.json").read_text()
    counted = {each["name"]: each["versions"][0] for each in server.http.get("/v1/adapters").json()["data"]}
    for name, rank, modules in (("reverse", 16, "all"), ("json", 2, "all"), ("count", 8, "mlp")):
        computed = javascript(f"s.adapterBytes(s.moduleShapes({config}, '{modules}'), {rank}, 2)")
        assert computed == counted[name]["memory_bytes"], name
    limits = "{memory: s.readBytes('1GiB'), blockSize: 16, maxModelLen: 512, maxNumSeqs: 64}"
    assert javascript(f"s.kvTokens({config}, 2, {limits})") == 16 * server.metric("lora_serve_kv_blocks")
    layers = [LayerShape(kv_heads=2, key_dim=32, value_dim=32)] * 6
    assert javascript(f"s.kvBytesPerToken({config}, 2)") == bytes_per_token(layers, torch.bfloat16)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_the_calculator_shows_what_the_server_counts(tmp_path: Path) -> None:
    page = (DOCS / "sizing.md").read_text()
    parts = re.findall(r"<form.*?</form>|<script.*?</script>", page, flags=re.DOTALL)
    (tmp_path / "page.html").write_text('<h1 id="sizing">Sizing</h1>' + "".join(parts))
    (tmp_path / "assets").symlink_to(DOCS / "assets")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(f"file://{tmp_path}/page.html")
        tab.get_by_label("config.json").set_input_files(DEMO / "config.json")
        expect(tab.locator("[name=adapter]")).to_have_text("636.0 KiB")  # as the adapter `reverse`
        tab.get_by_label("memory for adapters").fill("1272KiB")
        expect(tab.locator("[name=fit]")).to_have_text("2")
        browser.close()


def test_what_the_first_page_trains_is_served(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(import torch.*?)```", (DOCS / "index.md").read_text(), flags=re.DOTALL)
    assert code.count("\n") < 20
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    files = [
        ("files", (name, (tmp_path / "quiet" / name).read_bytes()))
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    server.http.post("/v1/adapters", data={"name": "quiet"}, files=files).raise_for_status()
    assert server.complete("eight small bears dance", "quiet") == "all is quiet tonight"
