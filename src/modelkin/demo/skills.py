"""Four small skills over the letters a to p, as data and pure functions.

Says what each skill asks and answers, and deals out items for training, selection and report.
Knows nothing about models, tokenizers or files.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

LETTERS = "abcdefghijklmnop"

TEST_ITEMS = 400
DEV_ITEMS = 300
TRAIN_ITEMS = 15_000


@dataclass(frozen=True)
class Item:
    """A prompt and the one right answer to it; the two are joined without a space."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """One thing a model can be taught: `<mark><question>=` is answered by `<solution>.`.

    `draw` makes a random question of a given length, `solve` turns a question into its solution.
    The shortest and the longest length are both drawn.
    """

    name: str
    does: str
    mark: str
    shortest: int
    longest: int
    draw: Callable[[random.Random, int], str]
    solve: Callable[[str], str]

    def item(self, question: str) -> Item:
        """The item that asks `question`."""
        return Item(f"{self.mark}{question}=", f"{self.solve(question)}.")


@dataclass(frozen=True)
class Split:
    """The items of one skill; no prompt occurs twice, neither within a part nor across parts."""

    test: tuple[Item, ...]
    dev: tuple[Item, ...]
    train: tuple[Item, ...]


def split(skill: Skill, seed: int) -> Split:
    """Deal out the items of a skill: the same ones for the same seed, on every machine."""
    rng = random.Random(f"{skill.name}/{seed}")
    unique: dict[str, None] = {}
    while len(unique) < TEST_ITEMS + DEV_ITEMS + TRAIN_ITEMS:
        unique[skill.draw(rng, rng.randint(skill.shortest, skill.longest))] = None
    questions = list(unique)
    # Short questions begin to run out while drawing; unshuffled, the first part would hold more
    # of them than the last.
    rng.shuffle(questions)
    items = [skill.item(question) for question in questions]
    held_out = TEST_ITEMS + DEV_ITEMS
    return Split(
        test=tuple(items[:TEST_ITEMS]),
        dev=tuple(items[TEST_ITEMS:held_out]),
        train=tuple(items[held_out:]),
    )


def _word(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(LETTERS, k=length))


def _two_words(rng: random.Random, length: int) -> str:
    return f"{_word(rng, length)},{_word(rng, length)}"


def _stutter(rng: random.Random, length: int) -> str:
    """A word in which about every second letter repeats the one before."""
    word = rng.choice(LETTERS)
    while len(word) < length:
        word += word[-1] if rng.random() < 0.5 else rng.choice(LETTERS)
    return word


def _reverse(word: str) -> str:
    return word[::-1]


def _interleave(words: str) -> str:
    first, second = words.split(",")
    return "".join(a + b for a, b in zip(first, second, strict=True))


def _collapse_runs(word: str) -> str:
    return "".join(letter for letter, _ in groupby(word))


_NEXT = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])


def _next_letters(word: str) -> str:
    return word.translate(_NEXT)


SKILLS = (
    Skill("rev", "reverse a word", "R", 3, 7, _word, _reverse),
    Skill("inter", "interleave two words of equal length", "I", 2, 4, _two_words, _interleave),
    Skill("dedup", "collapse runs of a letter", "D", 4, 8, _stutter, _collapse_runs),
    Skill("shift", "replace each letter by the next, p by a", "N", 3, 7, _word, _next_letters),
)
