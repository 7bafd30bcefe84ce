"""The first part of a fine-tuning job: its files are validated and encoded, a little at a time beside requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from lora_serve.api.fine_tuning.encoded_data import DataWriter
from lora_serve.api.fine_tuning.example_encoder import EncodedSequence, EncodingCounts, ExampleEncoder, PreferencePair
from lora_serve.api.fine_tuning.example_lines import InvalidExamples, read_examples
from lora_serve.api.fine_tuning.hyperparameters import choose_numbers, steps_in_all
from lora_serve.api.fine_tuning.job_records import DataFile, JobEvent, JobRecord
from lora_serve.api.fine_tuning.job_store import ENCODED, TRAINING, VALIDATION, JobStore, disk_errors
from lora_serve.errors import ServeError
from lora_serve.messages import EngineInfo

FEWEST_EXAMPLES = 10  # to learn from, as with OpenAI
KINDS = {"supervised": ("chat", "completion"), "dpo": ("preference",)}
WORK, REST = 0.02, 0.02  # seconds of encoding, and between two pieces of it

Encoded = tuple[int, EncodedSequence | PreferencePair]


class InvalidData(ServeError):
    """A file is not what the job needs; `kind_of_file` is the error's code."""

    kind = "invalid_training_file"


class InvalidValidationData(InvalidData):
    """The same of the file that a job is measured with."""

    kind = "invalid_validation_file"


class Prepared(NamedTuple):
    """How many examples there are after encoding, and what encoding did."""

    examples: int
    counts: EncodingCounts


async def prepare(store: JobStore, id_: str, tokenizer: Any, info: EngineInfo, check: Callable[[], None]) -> None:
    """Encode a job's files, and choose its numbers. Raises `InvalidData`, `StorageFull`, and what `check` raises.

    Args:
        check: called now and then.
    """
    job = store.find(id_)
    store.tell(id_, JobEvent(int(store.clock()), "info", f"Validating training file: {job.training.id}"))
    training = await _encode(store, job, TRAINING, job.training, tokenizer, info, check)
    if job.validation is not None:
        store.tell(id_, JobEvent(int(store.clock()), "info", f"Validating validation file: {job.validation.id}"))
        await _encode(store, job, VALIDATION, job.validation, tokenizer, info, check)
    numbers = choose_numbers(job, training.examples)
    steps = steps_in_all(training.examples, numbers.batch_size, numbers.n_epochs)

    def validated(job: JobRecord) -> JobRecord:
        status = "queued" if job.status == "validating_files" else job.status
        return msgspec.structs.replace(job, status=status, numbers=numbers, steps=steps)

    await asyncio.to_thread(store.update, id_, validated)
    store.tell(id_, JobEvent(int(store.clock()), "info", "Files validated, moving job to queued state"))


def is_prepared(store: JobStore, job: JobRecord) -> bool:
    """Whether a job's data are encoded."""
    needed = [TRAINING] if job.validation is None else [TRAINING, VALIDATION]
    return job.numbers is not None and all((store.folder(job) / ENCODED[name]).is_dir() for name in needed)


async def _encode(
    store: JobStore,
    job: JobRecord,
    name: str,
    file: DataFile,
    tokenizer: Any,
    info: EngineInfo,
    check: Callable[[], None],
) -> Prepared:
    invalid = InvalidData if name == TRAINING else InvalidValidationData
    param = f"{name}_file"
    if file.kind not in KINDS[job.method]:
        needed = " or ".join(KINDS[job.method])
        raise invalid(f"{file.id} has {file.kind} examples; method {job.method} learns from {needed} ones", param=param)
    if name == TRAINING and file.examples < FEWEST_EXAMPLES:
        raise invalid(f"{file.id} has {file.examples} examples; at least {FEWEST_EXAMPLES} are needed", param=param)
    longest = info.max_model_len - job.settings.num_virtual_tokens
    most_tokens = min(job.max_length or longest, longest)
    encoder = ExampleEncoder(tokenizer, end_tokens=info.eos_token_ids, most_tokens=most_tokens)
    folder = store.folder(job)
    encoded = encoder.encode_all(read_examples(folder / name))
    with disk_errors():
        writer = await asyncio.to_thread(DataWriter, folder / ENCODED[name], store.disk)
        try:
            while await asyncio.to_thread(_write_some, writer, encoded):
                check()
                await asyncio.sleep(REST)
            counts = encoder.counts
            if counts.examples == counts.dropped:
                raise invalid(f"{file.id} has nothing to learn within {most_tokens} tokens", param=param)
            await asyncio.to_thread(writer.finish)
        except InvalidExamples as error:
            raise invalid(f"{file.id}: {error.message}", param=param) from None
        finally:
            writer.close()
    _report(store, job.id, file, counts)
    return Prepared(counts.examples - counts.dropped, counts)


def _write_some(writer: DataWriter, encoded: Iterator[Encoded]) -> bool:
    """Encode and write for a while; whether there is more."""
    until = time.monotonic() + WORK
    while time.monotonic() < until:
        each = next(encoded, None)
        if each is None:
            return False
        writer.add([each[1]])
    return True


def _report(store: JobStore, id_: str, file: DataFile, counts: EncodingCounts) -> None:
    message = (
        f"{file.id}: {counts.examples - counts.dropped:,} examples, {counts.tokens:,} tokens, of which "
        f"{counts.trained_tokens:,} are learnt"
    )
    store.tell(id_, JobEvent(int(store.clock()), "info", message))
    if counts.truncated or counts.dropped:
        cut = (
            f"{file.id}: {counts.truncated:,} examples were cut at their end, and {counts.dropped:,} left out of which "
            "nothing to learn remained, as they are longer than the longest sequence"
        )
        store.tell(id_, JobEvent(int(store.clock()), "warn", cut))


def data_folder(store: JobStore, job: JobRecord, name: str) -> Path:
    """Where a job's encoded data are."""
    return store.folder(job) / ENCODED[name]
