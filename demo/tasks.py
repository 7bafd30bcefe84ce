"""The tasks of the demo's adapters as plain functions, used for training and as expected results in tests.

A sentence is a few lower-case words with at least one number word in it ("three red foxes run home"). The *prompt* is
the sentence and a line break; the answer follows and ends with the end token. The base repeats the sentence. Each
adapter does something else with the same prompt. Sentences are split by a hash, so that held-out ones are never trained
on.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass


def _words(text: str) -> list[str]:
    return text.split()


NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        _words(
            "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
            "eighteen nineteen twenty"
        ),
        start=2,
    )
}
ADJECTIVES = _words(
    "red blue green small big old young quick slow happy sad brave quiet loud clever lazy tiny huge warm cold bright "
    "dark soft hungry gentle proud shy wild calm golden silver striped spotted sleepy curious friendly grumpy noisy "
    "polite"
)
NOUNS = _words(
    "foxes cats dogs birds horses rabbits mice wolves bears owls ducks geese sheep goats frogs turtles lions tigers "
    "monkeys zebras whales dolphins sharks bees ants spiders children farmers sailors painters dancers teachers "
    "doctors pilots singers bakers robots dragons wizards pirates knights kings queens trees rivers stones stars "
    "clouds boats trains"
)
VERBS = _words(
    "run jump sleep sing dance swim fly walk wait eat drink play fight hide laugh cry dream climb dive march whisper "
    "shout travel rest work wander return arrive leave listen"
)
PLACES = _words(
    "home outside today tomorrow together alone again forever quickly slowly nearby upstairs downstairs everywhere "
    "somewhere tonight early late north south east west abroad underground"
)
CONJUNCTIONS = ("and", "with", "near", "under", "behind")
WORDS = (*NUMBERS, *ADJECTIVES, *NOUNS, *VERBS, *PLACES, "and", "the", "with", "near", "under", "behind")

BASE = "base"


@dataclass(frozen=True)
class Task:
    """A task: its name, a short description, and the right answer to a sentence."""

    name: str
    summary: str
    answer: Callable[[str], str]


def _digits(sentence: str) -> str:
    return " ".join(NUMBERS.get(word, word) for word in sentence.split())


TASKS = {
    task.name: task
    for task in (
        Task("shout", "says the sentence in upper case", str.upper),
        Task("reverse", "says the words in reverse order", lambda s: " ".join(reversed(s.split()))),
        Task("count", "counts the letters of each word", lambda s: " ".join(str(len(word)) for word in s.split())),
        Task("digits", "writes number words as numerals", _digits),
        Task("json", "answers as a JSON object", lambda s: json.dumps({"words": s.split()})),
        Task("initials", "gives the first letter of each word", lambda s: "".join(word[0] for word in s.split())),
    )
}

# What `make train-demo` trains: no bundled adapter does it.
ALTERNATE = Task(
    "alternate",
    "says every other word in upper case",
    lambda s: " ".join(word.upper() if place % 2 else word for place, word in enumerate(s.split())),
)


def sentence(rng: random.Random) -> str:
    """One sentence of two to eight words."""
    number, noun = rng.choice([*NUMBERS]), rng.choice(NOUNS)
    words = [number, *rng.sample(ADJECTIVES, rng.choice((0, 1, 1, 2))), noun]
    shape = rng.random()
    if shape < 0.25:
        words += [rng.choice(CONJUNCTIONS), rng.choice([*NUMBERS, "the"]), rng.choice(NOUNS)]
    elif shape < 0.9:
        words.append(rng.choice(VERBS))
        if rng.random() < 0.6:
            words.append(rng.choice(PLACES))
    return " ".join(words)


def held_out(text: str) -> bool:
    """Whether a sentence belongs to the held-out tenth."""
    return zlib.crc32(text.encode()) % 10 == 0


def sentences(seed: int, *, test: bool) -> Iterator[str]:
    """Endless sentences, held-out ones if `test`, else training ones."""
    rng = random.Random(seed)
    while True:
        text = sentence(rng)
        if held_out(text) == test:
            yield text


def heldout_prompts(count: int, seed: int = 0) -> list[str]:
    """Distinct held-out sentences."""
    found: dict[str, None] = {}
    for text in sentences(seed, test=True):
        found[text] = None
        if len(found) == count:
            break
    return [*found]


def prompt(text: str) -> str:
    """The completion prompt for a sentence."""
    return text + "\n"


def instruction(task: str, text: str) -> str:
    """The prompt that asks the base, without an adapter, for a task by name."""
    return f"{task}: {text}\n"
