"""Kinship against the speed of memory, and against loading everything.

    python benchmarks/kinship.py                 # the figures of docs/performance.md, some minutes
    python benchmarks/kinship.py --quick         # small models, to see that it works

Makes random Llama-shaped bfloat16 checkpoints in a scratch folder and measures, in one run:

- the streaming limit: the fastest plain pass over the same mapped files by the same number of
  threads, which maps them, adds up 64-bit words, and unmaps them;
- modelkin's pass over a pair, and over 4, 8 and 16 models;
- whole commands: `modelkin kinship` against a script that loads all models in float32 through
  transformers, concatenates the deltas and calls torch.corrcoef.

Times are medians; passes and limits take turns, so that both see the same machine. Everything but
the first pass is page-cached. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from modelkin.checkpoint import open_checkpoint
from modelkin.gram.codegen import I64, POINTER, Compiled, host, ir, new_function
from modelkin.measuring import measure

# Widths of real models of these sizes: SmolLM2-135M and TinyLlama-1.1B.
SHAPES = {
    "tiny": {"hidden": 64, "mlp": 192, "kv": 32, "layers": 4, "vocab": 2048, "tied": True},
    "135M": {"hidden": 576, "mlp": 1536, "kv": 192, "layers": 30, "vocab": 49152, "tied": True},
    "1.1B": {"hidden": 2048, "mlp": 5632, "kv": 256, "layers": 22, "vocab": 32000, "tied": False},
}
HEADS = {"tiny": (4, 2), "135M": (9, 3), "1.1B": (32, 4)}
WORDS = 1 << 20  # of 8 bytes: what a thread of the plain pass takes at a time, at least
BASELINE = """
import sys
import torch
from transformers import AutoModelForCausalLM

def load(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return torch.cat([weights.detach().reshape(-1) for weights in model.parameters()])

base, *models = (load(path) for path in sys.argv[1:])
deltas = torch.stack([model - base for model in models])
print(torch.corrcoef(deltas))
norms = deltas.norm(dim=1)
print(deltas @ deltas.T / torch.outer(norms, norms))
print(torch.cdist(deltas, deltas))
"""


def tensor_shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama of that size."""
    s = SHAPES[size]
    yield "model.embed_tokens.weight", (s["vocab"], s["hidden"])
    for layer in range(s["layers"]):
        here = f"model.layers.{layer}."
        yield here + "input_layernorm.weight", (s["hidden"],)
        yield here + "mlp.down_proj.weight", (s["hidden"], s["mlp"])
        yield here + "mlp.gate_proj.weight", (s["mlp"], s["hidden"])
        yield here + "mlp.up_proj.weight", (s["mlp"], s["hidden"])
        yield here + "post_attention_layernorm.weight", (s["hidden"],)
        yield here + "self_attn.k_proj.weight", (s["kv"], s["hidden"])
        yield here + "self_attn.o_proj.weight", (s["hidden"], s["hidden"])
        yield here + "self_attn.q_proj.weight", (s["hidden"], s["hidden"])
        yield here + "self_attn.v_proj.weight", (s["kv"], s["hidden"])
    yield "model.norm.weight", (s["hidden"],)
    if not s["tied"]:
        yield "lm_head.weight", (s["vocab"], s["hidden"])


def make_models(folder: Path, size: str, models: int) -> list[Path]:
    """A random base and that many perturbed copies of it, in bfloat16; the base first."""
    s = SHAPES[size]
    heads, kv_heads = HEADS[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": s["hidden"],
        "intermediate_size": s["mlp"],
        "num_hidden_layers": s["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": s["vocab"],
        "tie_word_embeddings": s["tied"],
        "dtype": "bfloat16",
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensor_shapes(size):
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    spelled = json.dumps(header).encode()
    spelled += b" " * (-len(spelled) % 8)
    folders = [folder / f"{size}-{name}" for name in ("base", *(f"m{n}" for n in range(models)))]
    for number, one in enumerate(folders):
        one.mkdir(parents=True)
        (one / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with (one / "model.safetensors").open("wb") as stream:
            stream.write(len(spelled).to_bytes(8, "little") + spelled)
            for position, (_, shape) in enumerate(tensor_shapes(size)):
                # The same base for all, and a change of each one's own.
                weights = _normal(position, shape) * np.float32(0.02) + (len(shape) == 1)
                if number:
                    weights += _normal(1000 * number + position, shape) * np.float32(0.001)
                stream.write((weights.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return folders


def _normal(seed: int, shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def word_sum() -> Callable[[int, int, int], None]:
    """Machine code that adds up 64-bit words on the widest vectors: (address, words, result)."""
    module = ir.Module()
    code = new_function(module, "words", [POINTER, I64, POINTER])
    words, count, result = code.function.args
    lanes = host().lanes // 2
    ways = 4  # one addition would wait for the one before it
    zero = ir.Constant(ir.VectorType(I64, lanes), [0] * lanes)

    def step(turn: Any, totals: list[Any]) -> list[Any]:
        at = code.mul(turn, I64(lanes * ways))
        return [
            code.add(total, code.read(words, I64, code.add(at, I64(n * lanes)), lanes=lanes))
            for n, total in enumerate(totals)
        ]

    totals = code.repeat(code.udiv(count, I64(lanes * ways)), [zero] * ways, step)
    for n, total in enumerate(totals):
        code.write(total, result, I64, I64(n * lanes))
    code.ret_void()
    pointer = ctypes.c_void_p
    return Compiled(module, host()).function("words", pointer, ctypes.c_int64, pointer)


def plain_pass(
    files: Sequence[Path], threads: int, window: int, add_up: Callable[[int, int, int], None]
) -> float:
    """Seconds to map the files, add up their words, `window` words at a time, and unmap them."""
    start = time.perf_counter()
    maps, parts = [], []
    for file in files:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        maps.append(mapped)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        words = len(mapped) // 8
        parts += [(address + 8 * at, min(window, words - at)) for at in range(0, words, window)]
    jobs = iter(parts)
    lock = threading.Lock()

    def work() -> None:
        result = np.zeros(64, np.int64)
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            add_up(*job, result.ctypes.data)

    others = [threading.Thread(target=work) for _ in range(threads - 1)]
    for other in others:
        other.start()
    work()
    for other in others:
        other.join()
    for mapped in maps:
        mapped.close()
    return time.perf_counter() - start


def weight_files(folders: Sequence[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def our_pass(folders: Sequence[Path], threads: int) -> float:
    """Seconds that it takes to open the models and measure them."""
    start = time.perf_counter()
    base, *models = (open_checkpoint(folder) for folder in folders)
    measure(base, models, threads=threads)
    del base, models  # and with them the mappings
    return time.perf_counter() - start


def compare_passes(folders: Sequence[Path], threads: int, rounds: int) -> dict[str, Any]:
    """Our pass and the plain one, in turns."""
    files = weight_files(folders)
    size = sum(file.stat().st_size for file in files)
    add_up = word_sum()
    our_pass(folders, threads)  # into the page cache, and machine code into its own
    windows = (WORDS, 8 * WORDS, 64 * WORDS)
    plain: dict[int, list[float]] = {window: [] for window in windows}
    ours: list[float] = []
    for _ in range(rounds):
        for window in windows:
            plain[window].append(plain_pass(files, threads, window, add_up))
        ours.append(our_pass(folders, threads))
    limit = min(statistics.median(times) for times in plain.values())
    median = statistics.median(ours)
    return {
        "models": len(folders) - 1,
        "bytes": size,
        "limit_s": limit,
        "ours_s": median,
        "limit_GBps": size / limit / 1e9,
        "ours_GBps": size / median / 1e9,
        "share_of_limit": limit / median,
        "times_limit": median / limit,
        "runs": {"ours": ours, "plain": {str(8 * key): times for key, times in plain.items()}},
    }


# A process's peak begins with that of the process that started it, so a small one starts it.
RUNNER = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(status, time.perf_counter() - start, usage.ru_maxrss / 1024)
"""


def whole_command(command: Sequence[str], rounds: int) -> dict[str, Any]:
    """Median seconds and peak resident memory of a command as a process of its own."""
    seconds, peaks = [], []
    for _ in range(rounds):
        said = subprocess.run(
            [sys.executable, "-I", "-S", "-c", RUNNER, *command],
            capture_output=True,
            text=True,
            check=True,
        )
        status, taken, peak = map(float, said.stdout.split())
        if status:
            raise SystemExit(f"failed: {' '.join(command)}")
        seconds.append(taken)
        peaks.append(peak)
    return {"seconds": statistics.median(seconds), "peak_MB": max(peaks), "runs": seconds}


def kinship_command(folders: Sequence[Path], threads: int) -> list[str]:
    base, *models = map(str, folders)
    modelkin = str(Path(sys.executable).with_name("modelkin"))
    return [modelkin, "kinship", "--no-cache", "--threads", str(threads), "--base", base, *models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where to make the models, and keep them")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/kinship.json"))
    chosen = parser.parse_args()
    small, large = ("tiny", "tiny") if chosen.quick else ("135M", "1.1B")
    scratch = chosen.folder or Path(tempfile.mkdtemp(prefix="modelkin-"))
    try:
        many = _made(scratch / "many", small, 16)
        pair = _made(scratch / "pair", large, 2)
        result: dict[str, Any] = {
            "machine": {
                "processor": host().name,
                "lanes": host().lanes,
                "threads": chosen.threads,
                "system": platform.platform(),
                "python": platform.python_version(),
                "llvmlite": version("llvmlite"),
                "numpy": version("numpy"),
            },
            "passes": [],
        }
        print(f"{'':24}{'limit':>12}{'ours':>12}{'of limit':>10}{'x limit':>9}{'peak':>9}")
        for label, folders in [
            (f"pair, {large}", pair),
            *((f"{n} models, {small}", many[: n + 1]) for n in (2, 4, 8, 16)),
        ]:
            found = compare_passes(folders, chosen.threads, chosen.rounds)
            process = whole_command(kinship_command(folders, chosen.threads), 3)
            found |= {"label": label, "command": process}
            result["passes"].append(found)
            print(
                f"{label:24}{found['limit_GBps']:7.1f} GB/s{found['ours_GBps']:7.1f} GB/s"
                f"{found['share_of_limit']:10.2f}{found['times_limit']:9.2f}"
                f"{process['peak_MB']:6.0f} MB",
                flush=True,
            )
        script = scratch / "baseline.py"
        script.write_text(BASELINE, encoding="utf-8")
        for label, folders in (("base + 2 models", many[:3]), ("base + 3 models", many[:4])):
            ours, theirs = [], []
            for _ in range(3):  # in turns
                theirs.append(whole_command([sys.executable, str(script), *map(str, folders)], 1))
                ours.append(whole_command(kinship_command(folders, chosen.threads), 3))
            one = {
                "label": label,
                "ours_s": statistics.median(r["seconds"] for r in ours),
                "load_everything_s": statistics.median(r["seconds"] for r in theirs),
                "ours_peak_MB": max(r["peak_MB"] for r in ours),
                "load_everything_peak_MB": max(r["peak_MB"] for r in theirs),
            }
            one["ratio"] = one["load_everything_s"] / one["ours_s"]
            result.setdefault("commands", []).append(one)
            print(
                f"{label}, whole commands: load everything {one['load_everything_s']:.2f} s "
                f"({one['load_everything_peak_MB']:.0f} MB), modelkin {one['ours_s']:.3f} s "
                f"({one['ours_peak_MB']:.0f} MB): {one['ratio']:.1f} times faster",
                flush=True,
            )
        chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {chosen.out}")
    finally:
        if not chosen.folder:
            shutil.rmtree(scratch)


def _made(folder: Path, size: str, models: int) -> list[Path]:
    if not folder.exists():
        return make_models(folder, size, models)
    return [folder / f"{size}-{name}" for name in ("base", *(f"m{n}" for n in range(models)))]


if __name__ == "__main__":
    main()
