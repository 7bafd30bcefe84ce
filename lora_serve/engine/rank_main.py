"""Entry point of the process of a rank other than the engine; see `engine/follower.py`.

Started as `python -m lora_serve.engine.rank_main DESCRIPTOR PARENT`, with one end of a socket pair.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from lora_serve import log_format
from lora_serve.config import ServeConfig
from lora_serve.engine.process_main import die_with_parent, end, watch_parent
from lora_serve.errors import ServeError

GRACE = 5.0  # seconds for the engine to report the same refusal, before this process's end ends it

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> NoReturn:
    """Run the process: `arguments` are the descriptor of its socket and the engine's process id."""
    descriptor, parent = map(int, arguments)
    die_with_parent()
    watch_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the whole group; the engine decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    # Imported here, when it is sure that this process ends with its parent: importing torch takes seconds.
    from lora_serve.engine.follower import follow
    from lora_serve.engine.rank_commands import RankConnection

    connection = RankConnection(socket.socket(fileno=descriptor))
    try:
        join, _ = connection.receive()
    except EOFError:
        end(0)
    config = ServeConfig.model_validate_json(join.config)
    log_format.configure(config.log_level, config.log_format, f"rank {join.rank}[{os.getpid()}]")
    try:
        follow(connection, join)
    except EOFError:
        end(0)  # the engine is gone
    except ServeError as error:
        log.error("%s", error.message)
        time.sleep(GRACE)
        end(3)
    except Exception:
        log.exception("this rank failed")
        end(1)
    end(0)


if __name__ == "__main__":
    main(sys.argv[1:])
