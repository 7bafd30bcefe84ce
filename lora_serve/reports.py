"""Output of the `lora-serve adapter` and `lora-serve store` commands: JSON, tables and reports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

LONGEST_SETTING = 200  # characters that are shown

Answer = Mapping[str, Any]  # of a server of any version, so every field may be missing


def print_json(answer: Any) -> None:
    """Print a response as JSON."""
    _console().print_json(json.dumps(answer, ensure_ascii=True), ensure_ascii=True)


def count(number: int, what: str) -> str:
    """A number of things, named in the singular: `1 adapter`, `2 adapters`, `2 aliases`."""
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"


def count_both(adapters: int, aliases: int) -> str:
    """Numbers of adapters and of aliases, without those of which there are none."""
    found = [(adapters, "adapter"), (aliases, "alias")]
    return " and ".join(count(number, what) for number, what in found if number) or "0 adapters"


def print_table(adapters: Iterable[Answer]) -> None:
    """Print one line per adapter."""
    table = Table("name", "version", "rank", "size", "where", "leases", "pinned", box=None)
    for adapter in adapters:
        newest: Answer = next(iter(adapter.get("versions") or []), {})
        row = (
            adapter.get("name", adapter.get("id", "")),
            str(newest.get("digest", ""))[:12],
            newest.get("rank", ""),
            _size(newest, "memory_bytes") if newest else "",
            "broken" if adapter.get("broken") else ", ".join(newest.get("tiers", [])),
            newest.get("leases", ""),
            "yes" if adapter.get("pinned") else "",
        )
        table.add_row(*(_printable(str(cell)) for cell in row))
    _console().print(table)


def print_stored(rows: Iterable[Sequence[str]]) -> None:
    """Print one line per version in a store: its name, digest, size, when it was published, and its state."""
    table = Table("name", "version", "size", "published", "", box=None)
    for row in rows:
        table.add_row(*map(_printable, row))
    _console().print(table)


def print_published(adapter: Answer) -> None:
    """Print one line on a newly published adapter, and one per warning."""
    newest: Answer = next(iter(adapter.get("versions") or []), {})
    report: Answer = newest.get("report") or {}
    touched = f"{_modules_touched(report)}, {_size(newest, 'memory_bytes')}"
    version = str(newest.get("digest", ""))[:12]
    lines = [f"published {adapter.get('name', '')}@{version}: {report.get('method', 'adapter')}, {touched}"]
    lines += [f"sets {name}: {_shortened(value)}" for name, value in (newest.get("settings") or {}).items()]
    print_lines(lines + [f"warning: {warning}" for warning in report.get("warnings") or ()])


def print_report(answer: Answer, title: str) -> None:
    """Print the report on an inspected folder, or on the newest version of a published adapter."""
    versions = answer.get("versions")
    version: Answer = next(iter(versions), {}) if versions else answer
    report: Answer = version.get("report") or {}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, value in _report_rows(version, report):
        table.add_row(label, _printable(value))
    print_lines([f"{title}, version {str(version.get('digest', ''))[:12]}"])
    _console().print(table)


def _report_rows(version: Answer, report: Answer) -> Iterator[tuple[str, str]]:
    features = ", ".join(map(str, report.get("features") or ()))
    yield "method", str(report.get("method", "")) + (f" ({features})" if features else "")
    if ranks := report.get("ranks"):
        yield "ranks", ", ".join(map(str, ranks))
    yield "changes", _modules_touched(report)
    yield "size", f"{_size(version, 'file_bytes')} on disk, {_size(version, 'memory_bytes')} in memory"
    for number, sentence in enumerate(report.get("lowered") or ()):
        yield "" if number else "became", str(sentence)
    if "composable" in report:
        yield "composable", "yes" if report["composable"] else f"no: {report.get('not_composable', '')}"
    if embeddings := report.get("embeddings"):
        yield "embeddings", str(embeddings)
    if tokens := report.get("invocation_tokens"):
        yield "active from", f"tokens {tokens}"
    if name := report.get("base_model_name_or_path"):
        yield "trained on", str(name)
    for name, value in (version.get("settings") or {}).items():
        yield f"sets {name}", _shortened(value)
    for warning in report.get("warnings") or ():
        yield "warning", str(warning)


def _shortened(setting: Any) -> str:
    """A setting in one line; --json has it in full."""
    text = " ".join((setting if isinstance(setting, str) else json.dumps(setting, ensure_ascii=False)).split())
    return text if len(text) <= LONGEST_SETTING else f"{text[:LONGEST_SETTING]}… ({len(text):,} characters)"


def _modules_touched(report: Answer) -> str:
    kinds = report.get("touched")
    if not isinstance(kinds, dict):
        return f"{report.get('modules', 'no')} modules"
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no module of the base"


def _size(version: Answer, field: str) -> str:
    return format_bytes(version.get(field, 0))


def format_bytes(count: int) -> str:
    """A size for people, in MB or kB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _printable(text: str) -> str:
    """Replace unprintable characters: names are untrusted, and terminals obey control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, which a terminal may wrap but nothing else does."""
    for line in lines:
        _console().print(_printable(line), soft_wrap=True)


def _console() -> Console:
    return Console(highlight=False, markup=False)
