"""Entry point of a replica's server: `lora-serve serve` that belongs to the process which started it.

Its first line of standard input is a key that may do everything, for that process alone; when standard input ends, that
process is gone and the server ends too, at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from lora_serve import cli
from lora_serve.api.caller import Caller
from lora_serve.api.key_file import Keys, hash_key, load_keys

STDIN = 0
OWNER = Caller("replica", admin=True, metrics=True)  # in the audit log


class OwnedKeys(Keys):
    """The keys of a key file, and the one of the process that started the server."""

    def __init__(self, keys: Keys, own: str) -> None:
        super().__init__({hash_key(own): OWNER})
        self._others = keys

    def find(self, key: str) -> Caller | None:
        return super().find(key) or self._others.find(key)


def main(config: Path) -> int:
    """Serve with the options of a YAML file. Returns the exit status."""
    own = ""
    while (letter := os.read(STDIN, 1)) not in (b"", b"\n"):  # unbuffered: the thread below reads the same descriptor
        own += letter.decode()
    threading.Thread(target=_end_with_owner, daemon=True).start()

    def keys_of(path: Path | None) -> Keys | None:
        keys = load_keys(path)
        return None if keys is None else OwnedKeys(keys, own)

    return cli.main(["serve", "--config", str(config)], keys_of)


def _end_with_owner() -> None:
    while os.read(STDIN, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)  # a second one does not wait for running requests: nobody reads them


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
