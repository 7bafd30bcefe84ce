"""The documentation says what is so: pages made from the code are up to date, links, tests and messages exist."""

from __future__ import annotations

import ast
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import expect, sync_playwright
from server_process import DEMO, ROOT

from docs.reference import PAGES

DOCS = ROOT / "docs"
WRITTEN = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
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


# --- the calculator ---------------------------------------------------------------------------------------------------


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
