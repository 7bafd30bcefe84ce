"""Trains a further task for the demo base on a running server, which answers meanwhile; `make train-demo`.

python demo/train_on_server.py --port 8000          # serves until Ctrl-C
python demo/train_on_server.py --port 8000 --once   # ends when the new adapter has answered
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from tasks import ALTERNATE, heldout_prompts

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "lora_serve"]
SERVE = ["serve", "demo/model", "--served-model-name", "demo", "--adapters", "adapters", "--training-memory", "256MiB"]
TRAIN = ["train", "demo/alternate.jsonl", "--name", ALTERNATE.name, "--epochs", "4", "--batch-size", "16"]
TRAIN += ["--rank", "8", "--alpha", "16", "--learning-rate", "3e-3", "--warmup-ratio", "0.08", "--schedule", "cosine"]
TRAIN += ["--seed", "3"]
TESTED = 50  # sentences that were not trained on


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", default="8000")
    parser.add_argument("--store", help="folder of the server's adapters (default: in the user's data folder)")
    parser.add_argument("--once", action="store_true", help="end when the new adapter has answered")
    options = parser.parse_args()
    url = f"http://127.0.0.1:{options.port}"
    more = ["--log-level", "warning"] + (["--store", options.store] if options.store else [])
    with subprocess.Popen([*COMMAND, *SERVE, "--port", options.port, *more], cwd=ROOT) as server:
        try:
            with httpx.Client(base_url=url, timeout=60) as http:
                await_ready(http, server)
                with answering(http) as waits:
                    subprocess.run([*COMMAND, *TRAIN, "--url", url], cwd=ROOT, check=True)
                show(http, url, waits)
            if not options.once:
                print("the server goes on until Ctrl-C", flush=True)
                server.wait()
        except KeyboardInterrupt:
            pass
        finally:
            server.terminate()
    return 0


def await_ready(http: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    while True:
        with suppress(httpx.TransportError):
            if http.get("/ready").is_success:
                return
        if server.poll() is not None:
            raise SystemExit("the server did not start")
        time.sleep(0.2)


@contextmanager
def answering(http: httpx.Client) -> Iterator[list[float]]:
    """Ask another adapter all the while; yields the seconds that its answers took."""
    waits: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(0.5):
            began = time.monotonic()
            answer(http, heldout_prompts(1)[0], "shout")
            waits.append(time.monotonic() - began)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield waits
    finally:
        ended.set()
        asking.join()


def answer(http: httpx.Client, text: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 48}
    found = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    return str(found["choices"][0]["message"]["content"])


def show(http: httpx.Client, url: str, waits: list[float]) -> None:
    """How well the new adapter does, and the command that asks it."""
    texts = heldout_prompts(TESTED, seed=9)
    right = sum(answer(http, text, ALTERNATE.name) == ALTERNATE.answer(text) for text in texts)
    print(f"\nmeanwhile {len(waits)} requests to the adapter shout took {sum(waits) / len(waits):.2f} s each")
    print(f"{ALTERNATE.name} {ALTERNATE.summary}: right on {right} of {TESTED} sentences that it has never seen\n")
    body = {"model": ALTERNATE.name, "messages": [{"role": "user", "content": texts[0]}], "temperature": 0}
    print(f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}\n")
    print(f"# … {answer(http, texts[0], ALTERNATE.name)}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
