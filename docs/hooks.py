"""What MkDocs does besides: pages that are made of files elsewhere in the repository, and no requests to other hosts.

Files in `docs/` are read in the repository as well, so their links go to files there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"CONTRIBUTING.md": "contributing.md", "bench/RESULTS.md": "results.md"}
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\bsrc=[\"']?(https?:)?//|<link[^>]*\brel=[\"']?stylesheet[^>]*//"
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of other files, and the list of decisions."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "decisions/index.md", content=_decisions()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository as links between pages; code that is on no page is named only."""
    depth = "../" * page.file.src_uri.count("/")
    for source, target in ELSEWHERE.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}", f"]({depth}{target}", markdown)
    markdown = markdown.replace("](docs/decisions/)", f"]({depth}decisions/index.md)")
    markdown = markdown.replace("](decisions/)", f"]({depth}decisions/index.md)").replace("](docs/", f"]({depth}")
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)+(?:deploy|demo|bench|lora_serve|tests)/[^)]*\)", r"\1", markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would fetch something from another host."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from another host: {found[0]}")
    return output


def _decisions() -> str:
    lines = ["# Decisions", ""]
    for path in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"
