"""Many hostile models, in a process that may die: `python tests/fuzz_campaign.py --help`.

    python tests/fuzz_campaign.py --seconds 600       # all targets, in turn
    python tests/fuzz_campaign.py --examples 1000 --target "GGUF file"
    python tests/fuzz_campaign.py --target "GGUF file" --example 12345   # one again, by its number

Prints the table of docs/reliability.md, and each failure with the number that makes it again. The
exit status is 1 if there was one.

The models are read in a child process, so that the death of it is seen and counted; what it does
to memory is bounded by a limit of its address space.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import resource
import select
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from fuzzing import SECONDS, TARGETS, HangError, OutsideError, UnclearError, attempt

OUTCOMES = ("accepted", "refused", "unclear", "traceback", "crash", "hang", "outside")
# Address space beyond what the imports take: torch alone takes some gigabytes of it.
ROOM_BYTES = 1 << 31
# A child that says nothing for so long hangs where no signal reaches it.
SILENCE = 3 * SECONDS


def one(target: str, number: int) -> tuple[str, str, str]:
    """Kind of mutation, outcome, and what is to be said of it."""
    rng = random.Random(f"{target} {number}")
    with TemporaryDirectory() as name:
        hostile = TARGETS[target](rng, Path(name).resolve())
        try:
            return hostile.kind, attempt(hostile, rng), ""
        except UnclearError as error:
            return hostile.kind, "unclear", str(error)
        except OutsideError as error:
            return hostile.kind, "outside", str(error)
        except HangError:
            return hostile.kind, "hang", traceback.format_exc(limit=-6)
        except BaseException:
            return hostile.kind, "traceback", traceback.format_exc(limit=-6)


def child(target: str, start: int) -> None:
    """Examples from `start` on, without end; each is announced before it is tried."""
    faulthandler.enable()
    warnings.simplefilter("error", RuntimeWarning)
    # All imports, and their threads, before the limit.
    for number in range(40):
        one(target, -1 - number)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, used + ROOM_BYTES))
    number = start
    while True:
        print("try", number, flush=True)
        kind, outcome, said = one(target, number)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        print("end", f"{kind}\t{outcome}\t{grown}\t{said!r}", flush=True)
        number += 1


def lines_of(process: subprocess.Popen[bytes]) -> Iterator[str | None]:
    """What the child says; None when it has been silent for too long."""
    assert process.stdout is not None
    left = b""
    while True:
        if not select.select([process.stdout], [], [], SILENCE)[0]:
            yield None
            return
        read = os.read(process.stdout.fileno(), 1 << 16)
        if not read:
            return
        *lines, left = (left + read).split(b"\n")
        for line in lines:
            yield line.decode()


class Campaign:
    """Counts by target and kind of mutation."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.failures: list[str] = []
        self.grown = 0  # KiB

    def _count(self, target: str, number: int, kind: str, outcome: str, said: str) -> None:
        self.counts[target, kind, outcome] += 1
        if outcome not in ("accepted", "refused"):
            self.failures.append(f"{outcome}: {target!r}, example {number} ({kind})\n{said}")
            print(self.failures[-1], file=sys.stderr, flush=True)

    def run(self, target: str, *, seconds: float, examples: int, start: int) -> None:
        """Examples of one target until either is reached."""
        end = time.monotonic() + seconds
        number, done = start, 0
        while done < examples and time.monotonic() < end:
            command = [sys.executable, __file__, "--child", "--target", target]
            with subprocess.Popen(
                [*command, "--start", str(number)], stdout=subprocess.PIPE
            ) as process:
                tried, silent = None, False
                for line in lines_of(process):
                    if line is None:
                        silent = True
                        break
                    word, _, rest = line.partition(" ")
                    if word == "try":
                        tried = number = int(rest)
                    elif word == "end":
                        kind, outcome, grown, said = rest.split("\t", 3)
                        said = said.encode().decode("unicode_escape")
                        self._count(target, number, kind, outcome, said)
                        self.grown = max(self.grown, int(grown))
                        tried, done, number = None, done + 1, number + 1
                        if done >= examples or time.monotonic() >= end:
                            break
                if silent or done >= examples or time.monotonic() >= end:
                    process.kill()
                status = process.wait()
            if not silent and (done >= examples or time.monotonic() >= end):
                return
            if tried is None and not silent:
                raise SystemExit(f"the child ended with status {status} between two examples")
            outcome, said = ("hang", "silence") if silent else ("crash", f"status {status}")
            self._count(target, number, _kind(target, number), outcome, said)
            number, done = number + 1, done + 1

    def table(self) -> str:
        """As Markdown."""
        heads = ("file", "change", "examples", *OUTCOMES)
        rows = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * (len(heads) - 2)]
        keys = list(dict.fromkeys((target, kind) for target, kind, _ in sorted(self.counts)))
        keys.sort(key=lambda key: list(TARGETS).index(key[0]))
        totals = [0] * (len(OUTCOMES) + 1)
        for target, kind in keys:
            found = [self.counts[target, kind, outcome] for outcome in OUTCOMES]
            numbers = [sum(found), *found]
            totals = [one + other for one, other in zip(totals, numbers, strict=True)]
            rows.append(f"| {target} | {kind} | " + " | ".join(f"{n:,}" for n in numbers) + " |")
        rows.append("| all | | " + " | ".join(f"{n:,}" for n in totals) + " |")
        return "\n".join(rows)


def _kind(target: str, number: int) -> str:
    with TemporaryDirectory() as name:
        return TARGETS[target](random.Random(f"{target} {number}"), Path(name).resolve()).kind


def main() -> int:
    """Run the targets one after the other."""
    parser = argparse.ArgumentParser(description="Many hostile models, in a process that may die.")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=600, help="in all; default: 600")
    parser.add_argument("--examples", type=int, default=sys.maxsize, help="of each target at most")
    parser.add_argument("--start", type=int, default=0, help="number of the first example")
    parser.add_argument("--example", type=int, help="try only this one, in this process")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    targets = given.target or list(TARGETS)
    if given.child:
        child(targets[0], given.start)
    if given.example is not None:
        warnings.simplefilter("error", RuntimeWarning)
        print(*one(targets[0], given.example), sep="\n")
        return 0
    campaign = Campaign()
    for target in targets:
        campaign.run(
            target,
            seconds=given.seconds / len(targets),
            examples=given.examples,
            start=given.start,
        )
    print(campaign.table())
    print(f"\nresident memory grew by {campaign.grown / 1024:.0f} MiB at most")
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
