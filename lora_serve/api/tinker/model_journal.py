"""What a model was asked to do, on disk, so that it goes on after the server was killed.

journal             a msgpack record after another: calls as they came, results that clients had not fetched yet, and
                    which state they follow
state-<seq>         weights and optimizer after this call, as the engine saves them

A call is written before its request is answered, without waiting for the disk: the end of a process loses nothing, that
of the machine may lose the last calls. A record that was cut off ends the journal.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from lora_serve.api.tinker.ordered_calls import ModelCall

JOURNAL, STATE = "journal", "state-"
LENGTH = 4  # bytes before a record
MOST_RESULTS = 16 << 20  # bytes of results that are kept with a state


class CallRecord(msgspec.Struct, frozen=True, array_like=True, tag="call"):
    """A call that was accepted."""

    call: ModelCall


class ResultRecord(msgspec.Struct, frozen=True, array_like=True, tag="result"):
    """The result of a call that is not in the journal any more."""

    seq: int
    media_type: str
    body: bytes


class StateRecord(msgspec.Struct, frozen=True, array_like=True, tag="state"):
    """The calls up to this one are in the state."""

    seq: int


JournalRecord = CallRecord | ResultRecord | StateRecord
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(JournalRecord).decode


class JournalContent(msgspec.Struct):
    """What a journal says: calls by number, results by number, and the call that the saved state follows."""

    calls: dict[int, ModelCall] = {}
    results: dict[int, ResultRecord] = {}
    state: int | None = None


class ModelJournal:
    """The folder of one model. Methods block and may be called by several threads; all raise OSError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()

    def read(self) -> JournalContent:
        """What is there; nothing if there is no journal."""
        content = JournalContent()
        try:
            data = (self.folder / JOURNAL).read_bytes()
        except FileNotFoundError:
            return content
        place = 0
        while place + LENGTH <= len(data):
            end = place + LENGTH + int.from_bytes(data[place : place + LENGTH], "little")
            try:
                record = _decode(data[place + LENGTH : end]) if end <= len(data) else None
            except msgspec.MsgspecError:
                record = None
            match record:
                case CallRecord(call):
                    content.calls[call.seq] = call
                case ResultRecord(seq):
                    content.results[seq] = record
                case StateRecord(seq):
                    content.state = seq
                case None:
                    break
            place = end
        if place < len(data):
            os.truncate(self.folder / JOURNAL, place)
        return content

    def append(self, call: ModelCall) -> None:
        """Note a call that was accepted."""
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / JOURNAL).open("ab", buffering=0) as file:
                file.write(_framed(CallRecord(call)))

    def state(self, seq: int) -> Path:
        """The folder of the state after a call."""
        return self.folder / f"{STATE}{seq}"

    def clear(self, state: Path) -> None:
        """Make place for a state that is to be saved."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(state, ignore_errors=True)

    def follow_state(self, seq: int, made: ModelCall, results: Iterable[ResultRecord]) -> None:
        """Forget the calls up to this one, whose state is on the disk, except for the one that made the model."""
        with self._lock:
            content = self.read()
            kept = [call for number, call in sorted(content.calls.items()) if number > seq]
            fresh = self.folder / f"{JOURNAL}.new"
            left = MOST_RESULTS
            with fresh.open("wb") as file:
                records: list[JournalRecord] = [CallRecord(made), StateRecord(seq), *map(CallRecord, kept)]
                for record in records:
                    file.write(_framed(record))
                for result in results:
                    left -= len(result.body)
                    if left >= 0:
                        file.write(_framed(result))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.folder / JOURNAL)
            for state in self.folder.glob(f"{STATE}*"):
                if state != self.state(seq):
                    shutil.rmtree(state, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder."""
        with self._lock, suppress(FileNotFoundError):
            shutil.rmtree(self.folder)


def _framed(record: JournalRecord) -> bytes:
    data = _encode(record)
    return len(data).to_bytes(LENGTH, "little") + data
