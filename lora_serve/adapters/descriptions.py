"""What clients are told of adapters."""

from __future__ import annotations

from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.residency import Residency, Version
from lora_serve.adapters.store.records import NameRecord
from lora_serve.errors import AdapterBroken
from lora_serve.messages import AdapterInfo, AdapterVersion, Inspection


def describe_adapter(name: str, record: NameRecord, residency: Residency) -> AdapterInfo:
    """The state of an adapter, with the reason if the last load of its newest version failed for its files."""
    versions = [residency.versions[digest] for digest in record.versions]
    failure = versions[0].failure
    broken = failure.message if isinstance(failure, AdapterBroken) else None
    return AdapterInfo(name, record.pinned, [describe_version(version) for version in versions], broken)


def describe_version(version: Version) -> AdapterVersion:
    """The state of one version."""
    summary = version.summary
    return AdapterVersion(
        digest=version.digest,
        created=version.created,
        rank=summary.rank,
        modules=summary.modules,
        file_bytes=summary.file_bytes,
        memory_bytes=version.bytes,
        tiers=["disk", *version.tiers],
        leases=len(version.leases),
        last_used=version.last_used,
        report=summary.report,
        vocab_size=summary.traits.vocabulary or None,
        settings=summary.settings,
    )


def describe_upload(summary: Summary) -> Inspection:
    """What an adapter would be if it were published."""
    return Inspection(
        summary.digest,
        summary.rank,
        summary.modules,
        summary.file_bytes,
        summary.nbytes,
        summary.report,
        summary.settings,
    )
