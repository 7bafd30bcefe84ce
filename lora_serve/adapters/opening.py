"""Brings up the adapters at start: those of the store, then PEFT folders that the operator publishes.

One that cannot be served is listed as broken, with the reason; the rest is served.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from lora_serve.adapters.alias_operations import describe_problems, open_aliases
from lora_serve.adapters.folder_watch import describe_missing_adapter, folder_source
from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.operations import AdapterChanges
from lora_serve.adapters.publisher import Publisher
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.residency import Residency
from lora_serve.errors import AdapterBroken, ServeError
from lora_serve.messages import AdapterInfo, Publish
from lora_serve.names import CONFIG, check_adapter_name

Progress = Callable[[int, int], None]  # adapters that are ready, and of how many


def open_store(
    registry: Registry, residency: Residency, publisher: Publisher, base_name: str, progress: Progress
) -> list[str]:
    """Serve the adapters of the store; returns notes for the operator.

    A version that was lowered for another base, precision or release, or was not lowered, is lowered again first.
    """
    summaries: dict[str, Summary] = {}
    failures: dict[str, ServeError] = {}
    created: dict[str, float] = {}
    stale: list[str] = []
    names = publisher.names()
    open_aliases(residency, publisher, base_name)
    for digest in dict.fromkeys(digest for record in names.values() for digest in record.versions):
        try:
            created[digest] = publisher.created(digest)
        except AdapterBroken as error:
            failures[digest] = error
            continue
        try:
            summaries[digest] = publisher.summary(digest)
        except AdapterBroken:
            stale.append(digest)

    def lower(digest: str) -> None:
        def on_lowered(result: Summary | ServeError) -> None:
            if isinstance(result, ServeError):
                failures[digest] = result
            else:
                summaries[digest] = result
            progress(sum(digest in summaries or digest in failures for digest in stale), len(stale))

        publisher.lower_again(digest, on_lowered)

    for digest in stale:
        lower(digest)
    registry.wait(lambda: all(digest in summaries or digest in failures for digest in stale))
    notes = []
    for name, record in names.items():
        try:
            check_adapter_name(name, base_name)
        except ServeError as error:
            publisher.mark_broken(name, error.message)
            continue
        for digest in record.versions:
            try:
                residency.check_size(summaries[digest].nbytes if digest in summaries else 0)
            except ServeError as error:  # the memory for adapters is smaller than it was
                failures[digest] = error
                del summaries[digest]
        served = [digest for digest in record.versions if digest in summaries]
        if record.versions[0] not in summaries:
            publisher.mark_broken(name, failures[record.versions[0]].message)
            continue
        for digest in served:
            registry.add_version(summaries[digest], created[digest])
        try:
            if record.pinned:
                residency.check_pins(name, served[0], summaries[served[0]].nbytes)
        except ServeError as error:  # there are fewer slots, or there is less memory, than there was
            notes.append(f"adapter {name} is not pinned any more: {error.message}")
            record = msgspec.structs.replace(record, pinned=False)
        residency.apply(name, msgspec.structs.replace(record, versions=served))
        beyond = [residency.versions[digest] for digest in served if not residency.versions[digest].names]
        if beyond:  # more versions than are kept now
            publisher.save(name, residency.stored(name, residency.names[name]), lambda error: None)
        for version in beyond:
            registry.free_if_unused(version)
        notes += [
            f"an older version of adapter {name} is not served: {failures[digest].message}"
            for digest in record.versions
            if digest not in summaries
        ]
    notes += [f"adapter {name} is not served: {reason}" for name, reason in sorted(publisher.broken.items())]
    return notes + describe_problems(residency, publisher)


def publish_folders(
    registry: Registry,
    operations: AdapterChanges,
    residency: Residency,
    folder: Path,
    progress: Progress,
    *,
    trust_settings: bool = False,
) -> list[str]:
    """Publish every PEFT folder in `folder` under its own name, unless unchanged; returns notes for the operator."""
    results: dict[str, AdapterInfo | ServeError] = {}
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    wanted, changed, unreadable = [], [], dict[Path, str]()
    for path in folders:
        try:
            if not (path / CONFIG).exists():
                continue
            source = folder_source(path, trust_settings=trust_settings)
        except OSError as error:
            unreadable[path] = f"it cannot be read: {error.strerror}"
            continue
        wanted.append(path)
        record = residency.names.get(path.name)
        if record is None or record.source != source:
            changed.append((path, source))

    def publish(path: Path, source: str) -> None:
        def done(result: AdapterInfo | ServeError) -> None:
            results[path.name] = result
            progress(len(results), len(changed))

        operation = Publish(
            path.name, str(path), replace=True, source=source, local=True, trust_settings=trust_settings
        )
        try:
            operations.publish(operation, done)
        except ServeError as error:
            done(error)

    for path, source in changed:
        publish(path, source)
    registry.wait(lambda: len(results) == len(changed))
    failed = {name: result for name, result in results.items() if isinstance(result, ServeError)}
    notes = [f"adapter {name} is not served: {error.message}" for name, error in sorted(failed.items())]
    for path in folders:
        if path not in wanted:
            notes.append(
                f"{path.name} is not published: {unreadable[path]}"
                if path in unreadable
                else f"{path.name} is not served: {describe_missing_adapter(path)}"
            )
        elif path.name not in failed:
            report = residency.current(path.name).summary.report
            notes += [f"adapter {path.name}: {warning}" for warning in report.get("warnings", ())]
    return [note.encode(errors="replace").decode() for note in notes]  # names of folders need not be UTF-8
