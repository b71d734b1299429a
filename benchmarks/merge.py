"""Native merges against copying the same bytes, and against mergekit-yaml.

    python benchmarks/merge.py                   # some minutes
    python benchmarks/merge.py --quick           # small models, to see that it works

Makes a pair of random Llama-shaped bfloat16 checkpoints of 1.1B parameters in a scratch folder and
measures, in one run and each as a process of its own:

- copying the same bytes: reading both models and writing as many bytes as the child has, by the
  same number of threads, and flushing them to disk, as a native merge does;
- `modelkin merge --engine native`, linear and slerp, without statistics of earlier calls;
- `mergekit-yaml` on the same recipes, as it is and with asynchronous writing, whichever is faster.
  (It does not wait for the disk.)

Times are medians of rounds in which all take turns, mergekit last. The models are page-cached, and
all that was written before is on disk. Needs mergekit. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from kinship import make_models, weight_files, whole_command

from modelkin.gram.codegen import host

COPY = """
import os, sys, threading

threads, out, *files = sys.argv[1:]
CHUNK = 8 << 20
inputs = [os.open(file, os.O_RDONLY) for file in files]
size = os.fstat(inputs[0]).st_size
output = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
os.ftruncate(output, size)
places = iter(range(0, size, CHUNK))
lock = threading.Lock()

def work():
    room = [bytearray(CHUNK) for _ in inputs]
    while True:
        with lock:
            at = next(places, None)
        if at is None:
            return
        for descriptor, buffer in zip(inputs, room):
            read = os.preadv(descriptor, [buffer], at)
        os.pwrite(output, memoryview(room[0])[:read], at)

workers = [threading.Thread(target=work) for _ in range(int(threads))]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
os.fsync(output)
"""


def recipes(models: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The merges of the pair, in its own dtype."""
    one, two = ({"model": str(model)} for model in models)
    weights = [{**model, "parameters": {"weight": 0.5}} for model in (one, two)]
    return {
        "linear": {"merge_method": "linear", "models": weights, "dtype": "bfloat16"},
        "slerp": {
            "merge_method": "slerp",
            "base_model": one["model"],
            "models": [one, two],
            "parameters": {"t": 0.4},
            "dtype": "bfloat16",
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where to make the models, and keep them")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/merge.json"))
    chosen = parser.parse_args()
    size = "tiny" if chosen.quick else "1.1B"
    # Everybody decides for themselves how many threads to use.
    os.environ.pop("OMP_NUM_THREADS", None)
    scratch = chosen.folder or Path(tempfile.mkdtemp(prefix="modelkin-"))
    work = scratch / "work"
    work.mkdir(parents=True)
    # Machine code is kept from the first round on, statistics are not.
    os.environ["MODELKIN_CACHE"] = str(work / "cache")
    try:
        models = [scratch / f"{size}-base", scratch / f"{size}-m0"]
        if not models[0].exists():
            make_models(scratch, size, 1)
        copy = work / "copy.py"
        copy.write_text(COPY, encoding="utf-8")
        out = work / "child"
        script = Path(sys.executable).with_name
        files = [str(file) for file in weight_files(models)]
        threads = str(chosen.threads)
        copying = [sys.executable, "-I", str(copy), threads, str(out), *files]
        commands = {"copy": copying}
        others: dict[str, list[str]] = {}
        for method, recipe in recipes(models).items():
            file = work / f"{method}.yaml"
            file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            native = [str(script("modelkin")), "merge", str(file), str(out), "--engine", "native"]
            theirs = [str(script("mergekit-yaml")), str(file), str(out), "--no-copy-tokenizer"]
            commands[f"native {method}"] = [*native, "--threads", threads]
            others |= {
                f"mergekit {method}": [*theirs, "--num-threads", threads],
                f"mergekit {method}, async": [
                    *(*theirs, "--num-threads", threads),
                    *("--async-write", "--write-threads", threads),
                ],
            }
        # Copying stands beside what it is compared with.
        commands |= others
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for turn in range(chosen.rounds):
            # The first processes after mergekit wait for memory that it has just given back, and
            # the first of their kind for machine code.
            for name in ("copy", "native linear", "native slerp"):
                measured(commands[name], out, work)
            for name, command in commands.items():
                runs[name].append(measured(command, out, work))
            print(f"round {turn + 1} of {chosen.rounds}", flush=True)
        result = summary(runs) | {
            "bytes": {"read": sum(Path(file).stat().st_size for file in files)},
            "machine": {
                "processor": host().name,
                "threads": chosen.threads,
                "system": platform.platform(),
                "python": platform.python_version(),
                **{name: version(name) for name in ("mergekit", "torch", "llvmlite", "numpy")},
            },
        }
        chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {chosen.out}")
    finally:
        shutil.rmtree(work if chosen.folder else scratch)


def measured(command: Sequence[str], out: Path, work: Path) -> dict[str, Any]:
    """One run of a command, from a quiet disk on, and nothing left of it."""
    shutil.rmtree(work / "cache" / "statistics", ignore_errors=True)
    os.sync()
    found = whole_command(command, 1)
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()
    return found


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and what they are to each other; prints both."""
    found: dict[str, Any] = {}
    print(f"{'':26}{'seconds':>9}{'peak':>10}")
    for name, times in runs.items():
        seconds = [one["seconds"] for one in times]
        peak = max(one["peak_MB"] for one in times)
        found[name] = {"seconds": statistics.median(seconds), "peak_MB": peak, "runs": seconds}
        print(f"{name:26}{found[name]['seconds']:9.2f}{peak:7.0f} MB")
    copied = found["copy"]["seconds"]
    ratios: dict[str, Any] = {}
    for method in ("linear", "slerp"):
        ours = found[f"native {method}"]["seconds"]
        fastest = min(found[f"mergekit {method}{how}"]["seconds"] for how in ("", ", async"))
        ratios[method] = {"of_copying": ours / copied, "faster_than_mergekit": fastest / ours}
        print(
            f"{method}: {ours / copied:.2f} times as long as copying, "
            f"{fastest / ours:.1f} times faster than mergekit-yaml"
        )
    return {"commands": found, "ratios": ratios}


if __name__ == "__main__":
    main()
