"""Saved runs of a fine-tuning job, and its checkpoints.

saves/<step>/save.json   where training was, and the checkpoint's record if it is one
saves/<step>/run/        weights and optimizer, as the engine saved them
saves/<step>/adapter/    of a checkpoint: its PEFT files

A save appears by one rename. Kept are the newest one, to go on from, and the last three checkpoints, with the best one.
"""

from __future__ import annotations

import logging
import re
import threading
import uuid
from collections.abc import Container
from pathlib import Path

import msgspec

from lora_serve.adapters.store.disk import Disk
from lora_serve.api.fine_tuning.job_records import SaveRecord

RECORD, RUN, ADAPTER = "save.json", "run", "adapter"
KEPT_CHECKPOINTS = 3
_STEP = re.compile(r"[0-9]{9}")

log = logging.getLogger(__name__)


class JobSaves:
    """The saves of one job. Methods wait for the disk and raise OSError."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self._root, self._disk = root, disk
        self._lock = threading.RLock()
        self._found: dict[int, SaveRecord] | None = None

    def folder(self, step: int) -> Path:
        """The folder of a save."""
        return self._root / f"{step:09d}"

    def new_folder(self) -> Path:
        """A new folder for a save that is being made."""
        with self._lock:
            self._saves()  # which removes what was interrupted
            folder = self._root / f"new-{uuid.uuid4().hex}"
            self._disk.make_folder(folder)
            return folder

    def keep(self, folder: Path, record: SaveRecord, best_step: int = 0) -> None:
        """Let a save appear that is complete and on the disk but for its record, and remove those it replaces.

        Args:
            best_step: of the checkpoint that is kept besides the last ones.
        """
        with self._lock:
            found = self._saves()
            self._disk.write(folder / RECORD, msgspec.json.encode(record))
            self._disk.sync(folder)
            target = self.folder(record.position.step)
            self._disk.remove(target)
            self._disk.move(folder, target)
            self._disk.sync(self._root)
            found[record.position.step] = record
            steps = [step for step, each in sorted(found.items()) if each.checkpoint is not None]
            self._remove_but({*steps[-KEPT_CHECKPOINTS:], best_step, record.position.step})

    def newest(self) -> tuple[Path, SaveRecord] | None:
        """The save to go on from."""
        with self._lock:
            found = {step: each for step, each in self._saves().items() if (self.folder(step) / RUN).exists()}
            return (self.folder(max(found)), found[max(found)]) if found else None

    def newest_step(self) -> int:
        """The step to go on from; 0 if there is no save."""
        newest = self.newest()
        return 0 if newest is None else newest[1].position.step

    def checkpoints(self) -> list[tuple[int, SaveRecord]]:
        """Steps and records of the checkpoints, the oldest first."""
        with self._lock:
            return [(step, each) for step, each in sorted(self._saves().items()) if each.checkpoint is not None]

    def adapter(self, step: int) -> Path | None:
        """The PEFT files of a checkpoint; None if there is none of that step."""
        with self._lock:
            return self.folder(step) / ADAPTER if step in dict(self.checkpoints()) else None

    def discard(self, folder: Path) -> None:
        """Remove a save that could not be completed, as far as that is possible."""
        try:
            self._disk.remove(folder)
        except OSError as error:
            log.error("a save that is not complete cannot be removed: %s", error)

    def keep_adapters_only(self) -> None:
        """Remove what is needed to go on; the checkpoints' adapters stay."""
        with self._lock:
            self._remove_but(dict(self.checkpoints()))
            for step, _ in self.checkpoints():
                self._disk.remove(self.folder(step) / RUN)

    def _saves(self) -> dict[int, SaveRecord]:
        """What is there, by step; what was interrupted is removed."""
        if self._found is None:
            found: dict[int, SaveRecord] = {}
            for path in sorted(self._root.iterdir()):
                if not _STEP.fullmatch(path.name):
                    self._disk.remove(path)
                    continue
                try:
                    found[int(path.name)] = msgspec.json.decode((path / RECORD).read_bytes(), type=SaveRecord)
                except FileNotFoundError:  # its removal was interrupted
                    self._disk.remove(path)
                except (OSError, ValueError) as error:
                    log.error("%s cannot be read and is left alone: %s", path, error)
            self._found = found
        return self._found

    def _remove_but(self, kept: Container[int]) -> None:
        found = self._saves()
        for step in [step for step in found if step not in kept]:
            self._disk.remove(self.folder(step) / RECORD)
            del found[step]
            self._disk.remove(self.folder(step))
