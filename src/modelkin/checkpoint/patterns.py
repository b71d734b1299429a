"""The patterns of an adapter's settings: regular expressions of modules, matched in bounded time.

PEFT hands them to `re`, which tries one way after the other: a short expression can keep it busy
for ever. Those with repeats or alternatives are matched here by following all ways at once. That
tells the same modules from the same expressions, without what cannot be matched so (lookaround,
references) and what nobody needs (flags). Knows nothing of settings and modules.
"""

import re
from collections.abc import Callable
from typing import Any

from modelkin.checkpoint.reading import shown
from modelkin.errors import CheckpointError

MOST_CHARACTERS = 1000
# Of one expression: parts, counted repeats written out; and groups within groups.
_MOST_PARTS = 5000
_DEEPEST = 20
# Of all expressions and modules of an adapter; some seconds.
_MOST_STEPS = 20_000_000

# What has neither repeats nor alternatives is left to `re`, but for sets, which it may warn of.
_MANY_WAYS = re.compile(r"[*+?{|[]")
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
# A set: what stands in it is left to `re`, which has but one way to match one character.
_SET = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")

# ("character", test), ("start",), ("end",), ("all", nodes), ("any", nodes) or
# ("repeat", node, least, most)
_Node = tuple[Any, ...]


class Steps:
    """What is left to do of the steps that all of an adapter's patterns together may take."""

    def __init__(self) -> None:
        self.left = _MOST_STEPS


class _RefusedError(Exception):
    """What an expression holds that is not supported."""


class ModulePattern:
    """Names of modules that are an expression, or that end with it behind a dot: PEFT's rule."""

    def __init__(self, text: str, what: str, steps: Steps) -> None:
        """Read an expression; `what` begins the message if it is none, or takes too long.

        Raises:
            CheckpointError: it is none that is supported.
        """
        self._what = what
        self._steps = steps
        self._ways: _Ways | None = None
        try:
            if len(text) > MOST_CHARACTERS:
                raise _RefusedError(f"more than {MOST_CHARACTERS} characters")
            if _MANY_WAYS.search(text):
                self._ways = _Ways(_Parser(text).parsed())
            self._compiled = re.compile(rf"(.*\.)?({text})$")
        except (_RefusedError, re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{what}: expected regular expressions of names, sets, groups, alternatives and "
                f"repeats, found {shown(text)}: {shown(str(error))[1:-1]}"
            ) from error

    def match(self, module: str) -> bool:
        """Whether a module is meant.

        Raises:
            CheckpointError: all patterns together have taken too long.
        """
        self._steps.left -= 1
        if self._ways is None:
            found = self._compiled.match(module) is not None
        else:
            found = self._ways.match(module, self._steps)
        if self._steps.left < 0:
            raise CheckpointError(
                f"{self._what}: expected expressions that are matched with {len(module)} "
                "characters in little time, found some that take too long"
            )
        return found


class _Parser:
    """An expression as a tree."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def parsed(self) -> _Node:
        found = self._alternatives(0)
        if self._at < len(self._text):
            raise _RefusedError("a ) without its (")
        return found

    def _next(self, *expected: str) -> bool:
        """Go on behind one of `expected`, if it comes next."""
        found = next((one for one in expected if self._text.startswith(one, self._at)), None)
        self._at += len(found or "")
        return found is not None

    def _alternatives(self, depth: int) -> _Node:
        if depth > _DEEPEST:
            raise _RefusedError(f"more than {_DEEPEST} groups within each other")
        found = [self._sequence(depth)]
        while self._next("|"):
            found.append(self._sequence(depth))
        return ("any", found)

    def _sequence(self, depth: int) -> _Node:
        found: list[_Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            found.append(self._repeated(self._one(depth)))
        return ("all", found)

    def _one(self, depth: int) -> _Node:
        if self._next("("):
            if not self._next("?:") and self._next("?"):
                raise _RefusedError("a group that begins with (? is not supported")
            inner = self._alternatives(depth + 1)
            if not self._next(")"):
                raise _RefusedError("a ( without its )")
            return inner
        if self._next("^"):
            return ("start",)
        if self._next("$"):
            return ("end",)
        if self._next("."):
            return ("character", lambda _: True)
        if self._next("\\"):
            return self._escaped()
        if self._text[self._at] == "[":
            return self._set()
        if self._text[self._at] in "*+?{":
            raise _RefusedError(f"{self._text[self._at]} with nothing before it to repeat")
        character = self._text[self._at]
        self._at += 1
        return ("character", character.__eq__)

    def _escaped(self) -> _Node:
        character = self._text[self._at : self._at + 1]
        self._at += 1
        if character in tuple("dDwWsS"):
            return ("character", re.compile(f"\\{character}").match)
        if not character or character.isalnum():
            raise _RefusedError(f"\\{character} is not supported")
        return ("character", character.__eq__)

    def _set(self) -> _Node:
        found = _SET.match(self._text, self._at)
        if found is None:
            raise _RefusedError("a [ without its ]")
        text = found.group()
        # Reserved for sets of sets, of which `re` warns.
        if "[" in text[1:] or any(2 * one in text for one in "-&~|"):
            raise _RefusedError("sets within sets are not supported")
        self._at = found.end()
        return ("character", re.compile(text).match)

    def _repeated(self, node: _Node) -> _Node:
        least, most = 1, 1
        if self._next("*"):
            least, most = 0, -1
        elif self._next("+"):
            least, most = 1, -1
        elif self._next("?"):
            least, most = 0, 1
        elif self._text.startswith("{", self._at):
            found = _COUNT.match(self._text, self._at)
            if found is None or found.group() == "{}":
                raise _RefusedError("a { that begins no count")
            self._at = found.end()
            first, comma, last = found.groups()
            least = int(first or 0)
            most = int(last) if last else (-1 if comma else least)
        else:
            return node
        if node[0] in ("start", "end"):
            raise _RefusedError("a repeated ^ or $ is not supported")
        # Whether as much as possible or as little is no matter: the whole name has to match.
        if not self._next("?") and self._next("+"):
            raise _RefusedError("repeats that do not give back are not supported")
        return ("repeat", node, least, most)


class _Ways:
    """An expression as a net of places; all places that a name's beginning leads to are known."""

    def __init__(self, tree: _Node) -> None:
        # A place has a test of the next character and where that leads, or ways on without one.
        self._tests: list[Callable[[str], object] | None] = []
        self._leads: list[int] = []
        self._free: list[list[int]] = []
        self._bounds: dict[int, str] = {}
        self._built = 0
        self._end = self._place()
        self._start = self._build(tree, self._end)

    def _place(self, *free: int) -> int:
        self._tests.append(None)
        self._leads.append(-1)
        self._free.append(list(free))
        return len(self._tests) - 1

    def _build(self, node: _Node, then: int) -> int:
        """The place from which `node` leads to `then`."""
        self._built += 1
        if self._built > _MOST_PARTS:
            raise _RefusedError(f"more than {_MOST_PARTS} parts, repeats written out")
        kind = node[0]
        if kind == "character":
            here = self._place()
            self._tests[here], self._leads[here] = node[1], then
            return here
        if kind == "all":
            for part in reversed(node[1]):
                then = self._build(part, then)
            return then
        if kind == "any":
            return self._place(*(self._build(part, then) for part in node[1]))
        if kind == "repeat":
            return self._build_repeat(node[1], node[2], node[3], then)
        here = self._place(then)
        self._bounds[here] = kind
        return here

    def _build_repeat(self, node: _Node, least: int, most: int, then: int) -> int:
        here = then
        if most < 0:
            here = self._place(then)
            self._free[here].append(self._build(node, here))
        for _ in range(most - least):
            here = self._place(then, self._build(node, here))
        for _ in range(least):
            here = self._build(node, here)
        return here

    def match(self, module: str, steps: Steps) -> bool:
        here: set[int] = set()
        for at in range(len(module) + 1):
            if at == 0 or module[at - 1] == ".":
                here.add(self._start)
            here = self._reached(here, at == 0, at == len(module))
            steps.left -= len(here) + 1
            if at == len(module) or steps.left < 0:
                break
            character = module[at]
            here = {
                self._leads[place]
                for place in here
                if (test := self._tests[place]) is not None and test(character) not in (False, None)
            }
        return self._end in here

    def _reached(self, places: set[int], first: bool, last: bool) -> set[int]:
        """These places, and those that they lead to without a character."""
        found = set(places)
        waiting = list(places)
        while waiting:
            place = waiting.pop()
            bound = self._bounds.get(place)
            if (bound == "start" and not first) or (bound == "end" and not last):
                continue
            for other in self._free[place]:
                if other not in found:
                    found.add(other)
                    waiting.append(other)
        return found
