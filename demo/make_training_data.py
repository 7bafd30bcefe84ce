"""Writes `demo/alternate.jsonl`, the training data of `make train-demo`: chats that no adapter has been trained on."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from tasks import ALTERNATE, sentences

EXAMPLES = 500


def main() -> None:
    with (Path(__file__).parent / "alternate.jsonl").open("w") as file:
        for text in islice(sentences(3, test=False), EXAMPLES):
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": ALTERNATE.answer(text)}]
            file.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    main()
