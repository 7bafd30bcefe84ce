"""Encoded training data on disk: tokens of all sequences, and which of them the loss is on; read through mmap.

tokens      uint32 [tokens]
learnt      uint8 [tokens], 1 where the loss is on the token
ends        uint64 [sequences], where each sequence ends
reference   float32 [tokens], log-probabilities by the base; only for preferences, written when a run begins

The second sequence of a preference follows the first. Everything can be made again from the file that was uploaded.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from lora_serve.adapters.store.disk import Disk
from lora_serve.api.fine_tuning.example_encoder import EncodedSequence, PreferencePair
from lora_serve.training_messages import TrainingExample

TOKENS, LEARNT, ENDS, REFERENCE = "tokens", "learnt", "ends", "reference"
NEW = ".new"  # of a folder or file that is not complete


class DataWriter:
    """Writes encoded examples into a folder, which is there as a whole once it is finished."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder, self._disk = folder, disk
        self._new = folder.with_name(folder.name + NEW)
        disk.remove(self._new)
        disk.make_folder(self._new)
        self._files: dict[str, IO[bytes]] = {name: (self._new / name).open("xb") for name in (TOKENS, LEARNT, ENDS)}
        self._written = 0

    def add(self, encoded: Iterable[EncodedSequence | PreferencePair]) -> None:
        """Write examples. Raises OSError."""
        for each in encoded:
            for sequence in (each,) if isinstance(each, EncodedSequence) else each:
                array("I", sequence.tokens).tofile(self._files[TOKENS])
                self._files[LEARNT].write(bytes(weight > 0 for weight in sequence.weights))
                self._written += len(sequence.tokens)
                array("Q", [self._written]).tofile(self._files[ENDS])

    def finish(self) -> None:
        """Let the folder appear. Raises OSError."""
        self.close()
        for name in self._files:
            self._disk.sync(self._new / name)
        self._disk.remove(self._folder)
        self._disk.move(self._new, self._folder)
        self._disk.sync(self._folder.parent)

    def close(self) -> None:
        """Close the files; what is not finished is removed when it is begun again."""
        for file in self._files.values():
            file.close()


class EncodedData:
    """Encoded examples of a finished folder.

    Attributes:
        sequences: in all; twice as many as preferences.
        tokens, learnt_tokens: of all sequences, and those that the loss is on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens = _mapped(folder / TOKENS, "I")
        self._learnt = _mapped(folder / LEARNT, "B")
        self._ends = _mapped(folder / ENDS, "Q")
        self._reference: Any | None = None  # until it is needed
        self.sequences = len(self._ends)
        self.tokens = len(self._tokens)
        self.learnt_tokens = self._learnt.tobytes().count(1)

    @property
    def has_reference(self) -> bool:
        """Whether the base's log-probabilities are there."""
        return (self._folder / REFERENCE).exists()

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        start, end = self._place(sequence)
        return end - start

    def learnt(self, sequence: int) -> int:
        """How many of its tokens the loss is on."""
        start, end = self._place(sequence)
        return int(self._learnt[start:end].tobytes().count(1))

    def example(self, sequence: int, weight: float = 1.0, *, reference: bool = False) -> TrainingExample:
        """A sequence as the engine learns from it, each target with this weight.

        Args:
            reference: with the base's log-probabilities.
        """
        start, end = self._place(sequence)
        tokens = self._tokens[start:end].tolist()
        inputs: dict[str, list[float]] = {
            "weights": [weight if learnt else 0.0 for learnt in self._learnt[start + 1 : end]]
        }
        if reference:
            if self._reference is None:
                self._reference = _mapped(self._folder / REFERENCE, "f")
            inputs["logprobs"] = self._reference[start + 1 : end].tolist()
        return TrainingExample(tokens[:-1], tokens[1:], inputs)

    def reference_writer(self, disk: Disk) -> ReferenceWriter:
        """Writes the base's log-probabilities."""
        return ReferenceWriter(self._folder / REFERENCE, disk)

    def _place(self, sequence: int) -> tuple[int, int]:
        return (self._ends[sequence - 1] if sequence else 0), self._ends[sequence]


class ReferenceWriter:
    """Log-probabilities by the base, sequence by sequence in order."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self._path, self._disk = path, disk
        self._new = path.with_name(path.name + NEW)
        disk.remove(self._new)
        self._file = self._new.open("xb")

    def add(self, logprobs: list[float]) -> None:
        """Those of a sequence's targets. Raises OSError."""
        array("f", [0.0, *logprobs]).tofile(self._file)

    def finish(self) -> None:
        """Let the file appear. Raises OSError."""
        self.close()
        self._disk.sync(self._new)
        self._disk.move(self._new, self._path)
        self._disk.sync(self._path.parent)

    def close(self) -> None:
        self._file.close()


def _mapped(path: Path, kind: str) -> Any:
    """A file's numbers as a memoryview; `kind` as in `struct`."""
    with path.open("rb") as file:
        size = path.stat().st_size
        content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    view: Any = memoryview(content)
    return view.cast("B").cast(kind)
