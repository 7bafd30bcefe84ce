"""Exit status 0 if the server in this container answers /health, wherever it listens.

The port may come from an option, a file or the environment, so the sockets are asked: the server is the process with
the lowest number that listens.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

import psutil

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> int:
    sockets = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN and each.pid]
    if not sockets:
        print("nothing listens")
        return 1
    address = min(sockets, key=lambda each: each.pid).laddr
    host = ANY.get(address.ip, address.ip)
    url = f"http://{f'[{host}]' if ':' in host else host}:{address.port}/health"
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=4) as answer:
            print(url, answer.status)
    except (urllib.error.URLError, OSError) as error:
        print(url, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
