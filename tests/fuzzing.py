"""Hostile models: how they are made, and what may come of opening and reading them.

    hostile = TARGETS["index"](random.Random(0), folder)
    attempt(hostile, random.Random(0))  # "accepted" or "refused"; else raises

`test_fuzz.py` runs a few of each in every test run, `fuzz_campaign.py` as many as one likes.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import signal
import socket
import struct
import sys
import sysconfig
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from checkpoints import ALL_DTYPES, llama_config, llama_like, with_header, write_checkpoint
from click.testing import CliRunner

import modelkin
from modelkin.checkpoint import Checkpoint, as_float64, fingerprint, open_checkpoint
from modelkin.checkpoint import gguf_header as gguf_header_module
from modelkin.checkpoint.tensors import WeightFile
from modelkin.cli import app
from modelkin.errors import ModelkinError
from modelkin.files import cache_folder

SECONDS = 20  # for one model; all but a few need milliseconds
# What a file of some kilobytes may become in memory.
MOST_BYTES = 64_000_000
_QUERY = "model.layers.0.self_attn.q_proj"


class UnclearError(AssertionError):
    """A refusal that is not one line, or names no file."""


class OutsideError(AssertionError):
    """A file was opened that does not belong to the model."""


class HangError(BaseException):
    """It took too long; no `except Exception` may swallow it."""


@dataclass(frozen=True)
class Hostile:
    """A hostile model in a folder of its own.

    Attributes:
        kind: how it was made.
        home: the folder; holds `base` and `good`, which are what they should be, and `outside`,
            which nothing may open.
        source: the model.
        adapter: whether it needs the base.
        base: what its kinship is measured from.
        good: a sound model of that base.
        linked: places outside of its folder that links in it lead to on purpose.
        vanishing: the file that is opened at this count, from 0, is removed just before.
    """

    kind: str
    home: Path
    source: Path
    adapter: bool = False
    base: str = "base"
    good: str = "good"
    linked: tuple[Path, ...] = ()
    vanishing: int | None = None


Maker = Callable[[random.Random, Path], Hostile]


# Damaged bytes


_NUMBERS = (0, 1, 2, 7, 8, 31, 32, 255, 2**16, 2**31 - 1, 2**32 - 1, 10**18, 2**63, 2**64 - 1)
_TEXTS = (b'"', b"{", b"[", b"\n", b"\\u0000", b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"../", b"e9")


def damaged(rng: random.Random, content: bytes, *, until: int | None = None) -> bytes:
    """The same bytes with one to four changes, all before byte `until`."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        end = min(len(found), until if until is not None else len(found))
        at = rng.randint(0, max(end - 1, 0))
        length = rng.randint(1, 8)
        change = rng.randrange(8)
        if change == 0 and found:
            found[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            found[at : at + length] = rng.randbytes(length)
        elif change == 2:
            found[at:at] = rng.randbytes(length)
        elif change == 3:
            del found[at : at + length]
        elif change == 4:
            found[at:at] = found[at : at + 8 * length]
        elif change == 5:
            layout = rng.choice(["<I", "<Q"])
            number = rng.choice(_NUMBERS) % (1 << 8 * struct.calcsize(layout))
            found[at : at + struct.calcsize(layout)] = struct.pack(layout, number)
        elif change == 6:
            found[at : at + rng.choice([0, length])] = rng.choice(_TEXTS)
        else:
            del found[at if until is None else rng.randint(0, len(found)) :]
    return bytes(found)


# Hostile JSON

_VALUES = (
    *("0", "-1", "1", "8", "1.5", "1e400", "-0.0", "NaN", "Infinity", "-Infinity", "true", "null"),
    *('""', "[]", "{}", "[1, 2]", '{"a": 1, "a": 2}', '"F32"', '"I8"', '"LORA"', '["LORA"]'),
    *(str(2**31), str(2**63), str(2**64), str(10**18), "-" + "9" * 400, "9" * 4299, "9" * 5000),
    f"[{', '.join(['9' * 4200] * 2)}]",
    f"[{', '.join(['2'] * 2000)}]",
    "[" * 3000 + "]" * 3000,
    "[" * 900 + "]" * 900,
    '{"a": ' * 850 + "1" + "}" * 850,
    *('"\\ud800"', '"\\udcff"', '"a\\nb"', '"a\\u2028b"', '"\\u0000"', f'"{"x" * 3000}"'),
    *('"../outside/model.safetensors"', '"/etc/passwd"', '"é\\u202e"', '["a\\nb"]', '"."'),
)
_KEYS = (
    *("", "a\nb", "\ud800", "\udcff", "\0", "x" * 3000, "__metadata__", "..", "é\u2028"),
    *("lm_head.weight", "weight_map", "tie_word_embeddings", "rank_pattern"),
)


class _Json:
    """A document that is changed as a tree, and may then hold what no tree of Python's can."""

    def __init__(self, rng: random.Random, tree: Any) -> None:
        self._rng = rng
        self._tree = json.loads(json.dumps(tree))
        self._raw: dict[str, str] = {}

    def _nodes(self, tree: Any) -> Iterator[tuple[Any, Any]]:
        """Every place in the tree, as the container and the key in it."""
        keys = tree if isinstance(tree, dict) else range(len(tree))
        for key in list(keys):
            yield tree, key
            if isinstance(tree[key], (dict, list)):
                yield from self._nodes(tree[key])

    def place(self, text: str) -> str:
        """What stands for JSON of any form until it is written."""
        name = f"@{len(self._raw)}@"
        self._raw[json.dumps(name)] = text
        return name

    def change(self) -> None:
        nodes = list(self._nodes(self._tree))
        if not nodes:
            return
        container, key = self._rng.choice(nodes)
        how = self._rng.randrange(6)
        if how < 3 or not isinstance(container, dict):
            container[key] = self.place(self._rng.choice(_VALUES))
        elif how == 3:
            del container[key]
        else:
            names = [*_KEYS, *container] if how == 4 else list(container)
            # A name that is there already makes a key that stands twice.
            container[self.place(json.dumps(self._rng.choice(names)))] = container[key]
            if how == 4:
                del container[key]

    def text(self) -> str:
        text = json.dumps(self._tree)
        for name, raw in self._raw.items():
            text = text.replace(name, raw)
        return text


def hostile_json(rng: random.Random, tree: Any) -> bytes:
    """A document that says something else than `tree`, or is none."""
    document = _Json(rng, tree)
    for _ in range(rng.randint(1, 3)):
        document.change()
    text = document.text()
    if rng.random() < 0.1:
        text = rng.choice(_VALUES)
    encoding = rng.choice(["utf-8"] * 9 + ["utf-8-sig", "utf-16", "utf-32"])
    content = text.encode(encoding, "surrogatepass")
    return b"" if rng.random() < 0.02 else content


# Sound models to begin with


@cache
def _sound() -> Mapping[str, Mapping[str, bytes]]:
    """Folder -> file -> content."""
    rng = np.random.default_rng(0)
    base = llama_like(rng, layers=1, hidden=8, intermediate=8, vocab=8)
    with TemporaryDirectory() as name:
        for folder in ("base", "good", "model"):
            noise = 0.01 * (folder != "base")
            tensors = {
                name: values + noise * rng.standard_normal(values.shape)
                for name, values in base.items()
            }
            write_checkpoint(Path(name, folder), tensors, config=llama_config(base))
        write_checkpoint(Path(name, "sharded"), base, shards=2)
        return {
            folder.name: {file.name: file.read_bytes() for file in folder.iterdir()}
            for folder in Path(name).iterdir()
        }


def _write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _home(folder: Path) -> Path:
    for name in ("base", "good"):
        _write(folder / name, _sound()[name])
    _write(folder / "outside", _sound()["model"])
    return folder


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _hostile_safetensors(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    header, data = _split(content)
    length = 8 + int.from_bytes(content[:8], "little")
    kind = rng.choice(["bytes", "header bytes", "header", "header", "sizes", "random weights"])
    if kind == "bytes":
        return kind, damaged(rng, content)
    if kind == "header bytes":
        # The length is made to fit: only the text is wrong.
        return kind, with_header(damaged(rng, content[8:length]), data)
    if kind == "header":
        return kind, with_header(hostile_json(rng, header), data)
    names = [name for name in header if name != "__metadata__"]
    if kind == "sizes":
        for name in rng.sample(names, 2):
            sizes = [rng.choice([*_NUMBERS, 10**400, 10**4000]) for _ in range(rng.randint(0, 4))]
            entry = header[name]
            entry["shape"] = sizes * rng.choice([1, 1, 1, 500])
            if rng.random() < 0.5:
                begin = rng.choice([entry["data_offsets"][0], *_NUMBERS])
                length = 4 * math.prod(sizes[:3]) % 10**4200
                entry["data_offsets"] = [begin, begin + length]
        return kind, with_header(json.dumps(header).encode(), data)
    # Any bits, in any format, at odd places.
    at = rng.randrange(8)
    data = rng.randbytes(at)
    for name in names:
        dtype = rng.choice(ALL_DTYPES)
        bytes_ = int(np.prod(header[name]["shape"])) * _width(dtype)
        header[name] |= {"dtype": dtype, "data_offsets": [at, at + bytes_]}
        data += rng.randbytes(bytes_) if rng.random() < 0.5 else bytes(bytes_)
        at += bytes_
    return kind, with_header(json.dumps(header).encode(), data)


def _width(dtype: str) -> int:
    return {"F32": 4, "F64": 8, "BF16": 2, "F16": 2}.get(dtype, 1)


def safetensors(rng: random.Random, folder: Path) -> Hostile:
    """A `model.safetensors`."""
    files = dict(_sound()["model"])
    kind, files["model.safetensors"] = _hostile_safetensors(rng, files["model.safetensors"])
    return Hostile(kind, _home(folder), _write(folder / "model", files))


_SHARDS = (
    *("../outside/model.safetensors", "../model/../outside/model.safetensors", "/etc/passwd"),
    *("..", ".", "", "\0", "model\0.safetensors", "x" * 255, "x" * 256, "x" * 100_000, "a/b"),
    *("\ud800", "\udcff", "é" * 200, "\u202e", "a\nb", "a\u2028b", "config.json", "~", "~root"),
    *("file:///etc/passwd", "\\\\host\\share", "C:\\x", "model.safetensors/", "./config.json"),
)


def index(rng: random.Random, folder: Path) -> Hostile:
    """A `model.safetensors.index.json`."""
    files = dict(_sound()["sharded"])
    name = "model.safetensors.index.json"
    tree = json.loads(files[name])
    kind = rng.choice(["bytes", "structure", "shard names"])
    home = _home(folder)
    if kind == "bytes":
        files[name] = damaged(rng, files[name])
    elif kind == "structure":
        files[name] = hostile_json(rng, tree)
    else:
        chosen = rng.sample(list(tree["weight_map"]), rng.randint(1, 3))
        shard = rng.choice([*_SHARDS, str(home / "outside" / "model.safetensors")])
        tree["weight_map"] |= dict.fromkeys(chosen, shard)
        files[name] = json.dumps(tree).encode()
        if shard in ("a\nb", "\udcff", "a\u2028b") and rng.random() < 0.5:
            files[shard] = files["model-00001-of-00002.safetensors"]
    return Hostile(kind, home, _write(folder / "model", files))


def config(rng: random.Random, folder: Path) -> Hostile:
    """A `config.json`."""
    files = dict(_sound()["model"])
    kind = rng.choice(["bytes", "structure"])
    if kind == "bytes":
        files["config.json"] = damaged(rng, files["config.json"])
    else:
        files["config.json"] = hostile_json(rng, json.loads(files["config.json"]))
    return Hostile(kind, _home(folder), _write(folder / "model", files))


# Adapters


def _adapter_files(**settings: Any) -> dict[str, bytes]:
    rng = np.random.default_rng(1)
    header: dict[str, Any] = {}
    data = b""
    for name, shape in (
        (f"{_QUERY}.lora_A.weight", (2, 8)),
        (f"{_QUERY}.lora_B.weight", (8, 2)),
        ("model.embed_tokens.lora_embedding_A", (2, 8)),
        ("model.embed_tokens.lora_embedding_B", (8, 2)),
        ("model.norm.weight", (8,)),
    ):
        part = rng.standard_normal(shape).astype("<f4").tobytes()
        offsets = [len(data), len(data) + len(part)]
        header[f"base_model.model.{name}"] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": offsets,
        }
        data += part
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    return {
        "adapter_config.json": json.dumps(content).encode(),
        "adapter_model.safetensors": with_header(json.dumps(header).encode(), data),
    }


_EVIL = (
    *("(a+)+$", "(.*)*x", "(.|.)*x", "(.|.){30}x", "(a|aa)+$", ".*.*.*.*.*.*.*.*x", "(.*.*)*x"),
    *(".?" * 40 + "x" * 40, "(?:.+)+x", "((.+)+)+x", "(\\w+\\.?)*x", "([a-z_.]+)*X", "(.)\\1*x"),
    *("(?=(.+)+x).*", "(?<=a)b", "(?i)q_PROJ", "(?P<a>.*)*x", "(?#x)", "[", "(", "a{", "*", "a**"),
    *("a{1000}{1000}{1000}", "a{4294967296}", "(" * 200 + ")" * 200, "(" * 50 + ".*" + ")*" * 50),
    *("[[]a]", "\\1", "(?(1)a|b)", "a\n", "\ud800", "x" * 5000, "(?>a*)x", "a*+x", "\\Z", "\\b"),
    *("(?i:[\0-\U0010ffff])" * 40, "[^.]*" * 30 + "x", "(|a)*" * 20 + "x", "|" * 500, "(?s:.)*x"),
)
_PIECES = (
    *("a", "q_proj", r"\.", ".", ".*", ".+", r"\d+", "(", ")", "|", "*", "+", "?", "{2}", "{1,30}"),
    *("[a-z]", "[^.]", "^", "$", r"\w", "(?:", "layers", "self_attn", "??", "]", "}", "{,3}"),
)


def adapter_config(rng: random.Random, folder: Path) -> Hostile:
    """An `adapter_config.json`."""
    pattern = {"q_proj": 2, "embed_tokens": 2}
    files = _adapter_files(rank_pattern=pattern, alpha_pattern={"q_proj": 3.5}, bias="none")
    name = "adapter_config.json"
    kind = rng.choice(["bytes", "structure", "patterns"])
    if kind == "bytes":
        files[name] = damaged(rng, files[name])
    elif kind == "structure":
        files[name] = hostile_json(rng, json.loads(files[name]))
    else:
        made = "".join(rng.choice(_PIECES) for _ in range(rng.randint(1, 30)))
        patterns = {rng.choice([made, made, *_EVIL]): 2 for _ in range(rng.randint(1, 3))}
        key = rng.choice(["rank_pattern", "alpha_pattern"])
        files[name] = json.dumps({"peft_type": "LORA", "r": 2, key: patterns}).encode()
    return Hostile(kind, _home(folder), _write(folder / "model", files), adapter=True)


def adapter(rng: random.Random, folder: Path) -> Hostile:
    """An `adapter_model.safetensors`."""
    files = _adapter_files()
    kind, files["adapter_model.safetensors"] = _hostile_safetensors(
        rng, files["adapter_model.safetensors"]
    )
    return Hostile(kind, _home(folder), _write(folder / "model", files), adapter=True)


# GGUF


@cache
def _sound_gguf() -> tuple[Mapping[str, bytes], tuple[tuple[int, int], ...], int]:
    """Format -> a file; the places and widths of all numbers in its header; where that ends."""
    import gguf

    hidden = 32
    rng = np.random.default_rng(2)
    shapes: dict[str, tuple[int, ...]] = {
        **{f"blk.0.attn_{part}.weight": (hidden, hidden) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}.weight": (hidden, hidden) for part in ("gate", "up", "down")},
        **{f"blk.0.{part}_norm.weight": (hidden,) for part in ("attn", "ffn")},
        "token_embd.weight": (8, hidden),
        "output_norm.weight": (hidden,),
    }
    found: dict[str, bytes] = {}
    with TemporaryDirectory() as name:
        file = Path(name, "m.gguf")
        for kind in ("F32", "Q8_0", "Q4_0", "F16"):
            writer = gguf.GGUFWriter(file, "llama")
            writer.add_block_count(1)
            writer.add_embedding_length(hidden)
            writer.add_head_count(4)
            writer.add_head_count_kv(2)
            writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(20)])
            for tensor, shape in shapes.items():
                stored = gguf.GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
                values = rng.standard_normal(shape).astype("f4")
                writer.add_tensor(tensor, gguf.quantize(values, stored), raw_dtype=stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            found[kind] = file.read_bytes()
        places: list[tuple[int, int]] = []

        class Watched(gguf_header_module._Bytes):
            def scalar(self, layout: str) -> Any:
                places.append((self.at, struct.calcsize(layout)))
                return super().scalar(layout)

        original, gguf_header_module._Bytes = gguf_header_module._Bytes, Watched  # type: ignore[misc]
        try:
            gguf_header_module.read_gguf_header(WeightFile(file, file.stat().st_size))
        finally:
            gguf_header_module._Bytes = original  # type: ignore[misc]
    return found, tuple(places), max(at for at, _ in places) + 8


def gguf_file(rng: random.Random, folder: Path) -> Hostile:
    """A GGUF file."""
    files, places, end = _sound_gguf()
    home = folder
    _write(home / "outside", {})
    for name in ("base", "good"):
        _write(home / name, {"m.gguf": files["F32" if name == "base" else "Q8_0"]})
    content = files[rng.choice(list(files))]
    kind = rng.choice(["bytes", "header bytes", "numbers", "numbers", "random weights"])
    if kind == "bytes":
        content = damaged(rng, content)
    elif kind == "header bytes":
        content = damaged(rng, content, until=end)
    elif kind == "numbers":
        changed = bytearray(content)
        for at, width in rng.sample(places, rng.randint(1, 3)):
            number = rng.choice([*range(41), *_NUMBERS, 10_000, 10**6]) % (1 << 8 * width)
            changed[at : at + width] = number.to_bytes(width, "little")
        content = bytes(changed)
    else:
        content = content[:end] + rng.randbytes(len(content) - end)
    return Hostile(kind, home, _write(folder / "model", {"m.gguf": content}))


# Pickles


class _Storage:
    def __init__(self, kind: Any, key: Any, count: Any) -> None:
        self.place = ("storage", kind, key, "cpu", count)


class _Rebuilt:
    """Becomes a call of one of torch's own functions."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.place if isinstance(obj, _Storage) else None


def _archive(pickled: bytes, *, records: Mapping[str, bytes], compressed: bool = False) -> bytes:
    stream = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", how) as found:
        warnings.simplefilter("ignore")
        for name, content in {"data.pkl": pickled, "version": b"3\n", **records}.items():
            found.writestr(f"archive/{name}", content)
    return stream.getvalue()


@cache
def _sound_pickle() -> tuple[bytes, bytes, Mapping[str, bytes]]:
    """A file as torch writes it, its pickle, and its other records."""
    import torch

    header, data = _split(_sound()["model"]["model.safetensors"])
    header.pop("__metadata__")
    tensors = {
        name: torch.frombuffer(bytearray(data), dtype=torch.float32)[
            entry["data_offsets"][0] // 4 : entry["data_offsets"][1] // 4
        ].reshape(entry["shape"])
        for name, entry in header.items()
    }
    stream = io.BytesIO()
    torch.save({name: values.clone() for name, values in tensors.items()}, stream)
    with zipfile.ZipFile(stream) as found:
        records = {name.partition("/")[2]: found.read(name) for name in found.namelist()}
    pickled = records.pop("data.pkl")
    return stream.getvalue(), pickled, records


def _crafted(rng: random.Random) -> bytes:
    """A pickle of tensors whose sizes, steps and storage do not belong together."""
    import torch
    from torch import _utils

    some: list[int] = [*range(-2, 9), 64, 2**31, 2**40, 10**18, 2**61, 2**62, -(2**62), 2**63]

    def number() -> int:
        return rng.choice(some)

    def numbers() -> tuple[int, ...]:
        return tuple(number() for _ in range(rng.randint(0, 3)))

    def tensor() -> Any:
        kinds = ["FloatStorage", "DoubleStorage", "HalfStorage", "BFloat16Storage", "LongStorage"]
        count = rng.choice([64, 64, 64, number()])
        storage = _Storage(getattr(torch, rng.choice(kinds)), rng.choice(["0", "0", "7"]), count)
        sizes = rng.choice([(8, 8), (64,), numbers()])
        strides = rng.choice([(8, 1), (1, 8), (0, 0), (0,), (1,), numbers()])
        rest: tuple[Any, ...] = (rng.random() < 0.2, OrderedDict())
        if rng.random() < 0.3:
            rest += ({rng.choice(["neg", "conj", "x"]): True},)
        offset = rng.choice([0, 0, number()])
        made = _Rebuilt(_utils._rebuild_tensor_v2, storage, offset, sizes, strides, *rest)
        if rng.random() < 0.2:
            return _Rebuilt(_utils._rebuild_parameter, made, True, OrderedDict())
        if rng.random() < 0.1:
            return _Rebuilt(
                _utils._rebuild_meta_tensor_no_storage, torch.float32, sizes, strides, False
            )
        return made

    names: list[Any] = ["a\nb", "\ud800", 3, (1, 2), "x" * 3000, "", _QUERY, "model.norm.weight"]
    content: Any = {rng.choice(names): tensor() for _ in range(rng.randint(1, 3))}
    if rng.random() < 0.1:
        content = rng.choice([tensor(), [tensor()], {"a": content}, None, 3, "x" * 3000])
    stream = io.BytesIO()
    _Pickler(stream, 2).dump(content)
    return stream.getvalue()


def pickled(rng: random.Random, folder: Path) -> Hostile:
    """A `pytorch_model.bin`."""
    whole, inner, records = _sound_pickle()
    kind = rng.choice(["bytes", "pickle", "tensors", "tensors", "archive"])
    if kind == "bytes":
        content = damaged(rng, whole)
    elif kind == "pickle":
        content = _archive(damaged(rng, inner), records=records)
    elif kind == "tensors":
        data = {f"data/{key}": rng.randbytes(rng.choice([256, 512, 0])) for key in ("0", "1")}
        content = _archive(_crafted(rng), records={"byteorder": b"little", **data})
    else:
        changed = dict(records)
        for name in rng.sample(sorted(changed), 2):
            value = rng.choice([None, b"", b"big", b"9" * 5000, rng.randbytes(40), bytes(10**6)])
            changed.pop(name) if value is None else changed.update({name: value})
        content = _archive(inner, records=changed, compressed=rng.random() < 0.5)
    files = {"config.json": _sound()["model"]["config.json"], "pytorch_model.bin": content}
    return Hostile(kind, _home(folder), _write(folder / "model", files))


# Files that are none


_FORMS: Mapping[str, tuple[str, ...]] = {
    # form -> the files that decide a model
    "model": ("config.json", "model.safetensors"),
    "sharded": ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "gguf": ("m.gguf",),
    "pickled": ("config.json", "pytorch_model.bin"),
}


def _form(form: str) -> dict[str, bytes]:
    if form == "adapter":
        return _adapter_files()
    if form == "gguf":
        return {"m.gguf": _sound_gguf()[0]["Q8_0"]}
    if form == "pickled":
        return {
            "config.json": _sound()["model"]["config.json"],
            "pytorch_model.bin": _sound_pickle()[0],
        }
    return dict(_sound()[form])


def files(rng: random.Random, folder: Path) -> Hostile:
    """Folders, pipes, links and devices where files should be, and files that go away."""
    form = rng.choice(list(_FORMS))
    content = _form(form)
    home = _home(folder)
    source = _write(folder / "model", content)
    # Beside the model's own: what only the fingerprint reads.
    name = rng.choice([*_FORMS[form], *_FORMS[form], "tokenizer.json", "code.py", "m.gguf"])
    file = source / name
    kind = rng.choice(
        [
            *("folder", "pipe", "socket", "device", "dangling link", "loop", "link outside"),
            *("empty", "huge", "vanishing", "odd name"),
        ]
    )
    linked: tuple[Path, ...] = ()
    if kind in ("vanishing", "odd name"):
        if kind == "odd name":
            odd = rng.choice(["a\nb", "é\u2028", "x" * 200, "\udcff"])
            (source / odd).write_bytes(b"")
            (source / f"{odd}.gguf").write_bytes(content.get("m.gguf", b"GGUF"))
            (source / f"{odd}.json").write_bytes(b"{}")
            file.unlink(missing_ok=True)
        vanishing = rng.randrange(6) if kind == "vanishing" else None
        return Hostile(kind, home, source, form == "adapter", vanishing=vanishing)
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        # The name is longer than sockets may have where the folder's is: bound from within.
        with socket.socket(socket.AF_UNIX) as bound:
            descriptor = os.open(source, os.O_RDONLY)
            try:
                bound.bind(f"/proc/self/fd/{descriptor}/{name}")
            except OSError:
                file.mkdir()
            finally:
                os.close(descriptor)
    elif kind == "device":
        file.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/random", "/dev/tty"]))
    elif kind == "dangling link":
        file.symlink_to("gone")
    elif kind == "loop":
        file.symlink_to(name)
    elif kind == "link outside":
        # As in the Hub's cache, whose files are links to others.
        blob = home / "outside" / "blob"
        blob.write_bytes(content.get(name, b"{}"))
        file.symlink_to(blob)
        linked = (blob,)
    elif kind == "empty":
        file.touch()
    else:
        # Takes no room on the disk.
        file.write_bytes(content.get(name, b"{}"))
        os.truncate(file, 1 << rng.choice([31, 36, 40]))
    return Hostile(kind, home, source, form == "adapter", linked=linked)


TARGETS: Mapping[str, Maker] = {
    "model.safetensors": safetensors,
    "model.safetensors.index.json": index,
    "config.json": config,
    "adapter_config.json": adapter_config,
    "adapter_model.safetensors": adapter,
    "GGUF file": gguf_file,
    "pytorch_model.bin": pickled,
    "the folder": files,
}


# What may come of it


class _Watch:
    """What is opened while it is on; hooks cannot be taken away again, so there is one."""

    def __init__(self) -> None:
        self.on = False
        self.opened: list[str] = []
        self.vanishing: int | None = None
        self.within = ""
        self._installed = False

    def install(self) -> None:
        if not self._installed:
            sys.addaudithook(self._heard)
            self._installed = True

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event not in ("open", "os.listdir", "os.scandir"):
            return
        if not isinstance(arguments[0], (str, bytes)):
            return
        # Where it leads, while it is there.
        path = os.path.realpath(os.fsdecode(arguments[0]))
        self.opened.append(path)
        if self.vanishing is None or event != "open" or not path.startswith(self.within):
            return
        if self.vanishing == 0:
            self.vanishing = None
            Path(path).unlink(missing_ok=True)
        else:
            self.vanishing -= 1


_watch = _Watch()


def _own_places() -> tuple[str, ...]:
    """Where Python, its packages and modelkin's cache lie."""
    places = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix}
    places |= {str(Path(modelkin.__file__).parent), "/proc", "/sys", "/usr/share/zoneinfo"}
    places.add(str(cache_folder("any").parent))
    return tuple({os.path.realpath(place) for place in places})


@contextmanager
def _limits(hostile: Hostile) -> Iterator[None]:
    """Time, and what is opened."""
    _watch.install()
    _watch.opened = []
    _watch.vanishing, _watch.within = hostile.vanishing, os.path.realpath(hostile.source)

    def late(number: int, frame: Any) -> None:
        raise HangError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    _watch.on = True
    try:
        yield
    finally:
        _watch.on = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    allowed = [hostile.source, hostile.home / hostile.base, hostile.home / hostile.good]
    places = [os.path.realpath(one) for one in (*allowed, *hostile.linked)]
    places += _own_places()
    for path in _watch.opened:
        if not any(path == one or path.startswith(one + os.sep) for one in places):
            raise OutsideError(f"opened {path}")


def attempt(hostile: Hostile, rng: random.Random) -> str:
    """Open and read it, in one of the ways in which it is used.

    Returns:
        "accepted" or "refused".

    Raises:
        UnclearError, OutsideError, HangError: it should not have come to this.
    """
    way = rng.choices([_opened, _measured, _printed], [12, 2, 1])[0]
    with _limits(hostile):
        try:
            way(hostile, rng)
        except ModelkinError as error:
            message = str(error)
        else:
            return "accepted"
    if len(message.splitlines()) != 1 or len(message) > 2000:
        raise UnclearError(f"not one line: {message[:500]!r}")
    if str(hostile.home) not in message:
        raise UnclearError(f"names no file: {message[:500]!r}")
    return "refused"


def _opened(hostile: Hostile, rng: random.Random) -> None:
    base = open_checkpoint(hostile.home / hostile.base) if hostile.adapter else None
    model = open_checkpoint(hostile.source, base=base, allow_pickle=True)
    _read(model, rng)
    # Hashing takes as long as files are long, and some only say that they are.
    beside = {*model.files, *(hostile.source.iterdir() if hostile.source.is_dir() else ())}
    if rng.random() < 0.3 and not any(
        file.is_file() and file.stat().st_size > 1 << 30 for file in beside
    ):
        model.release()
        fingerprint(model)


def _read(model: Checkpoint, rng: random.Random) -> None:
    for tensor in model.tensors.values():
        if tensor.count > 1 << 22:
            # Only what a file of that size holds.
            assert tensor.bytes <= tensor.file.stat().st_size
            continue
        whole = tensor.read(0, tensor.count)
        assert whole.size == tensor.count
        assert whole.nbytes < MOST_BYTES
        as_float64(whole, tensor.format)
        start, stop = (rng.randint(-1, tensor.count + 1) for _ in "ab")
        part = tensor.read(start, stop)
        assert part.size == max(min(stop, tensor.count) - max(start, 0), 0)
        as_float64(part, tensor.format)


def _measured(hostile: Hostile, rng: random.Random) -> None:
    home = hostile.home
    modelkin.kinship(
        home / hostile.base,
        [hostile.source, home / hostile.good],
        threads=1,
        cache=False,
        allow_pickle=True,
    )


def _printed(hostile: Hostile, rng: random.Random) -> None:
    home, source = hostile.home, str(hostile.source)
    base, good = str(home / hostile.base), str(home / hostile.good)
    if not hostile.adapter and rng.random() < 0.3:
        base, source = source, base
    if rng.random() < 0.5:
        command = ["inspect", source, good, "--base", base, "--allow-pickle"]
    else:
        command = ["kinship", source, good, "--base", base, "--allow-pickle", "--no-cache"]
        command += ["--threads", "1", "--per", rng.choice(["model", "layer", "tensor"])]
    result = CliRunner().invoke(app, command)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 2)
    if result.exit_code == 2:
        assert result.stderr.startswith("error: ")
        # Told as any other refusal.
        raise ModelkinError(result.stderr.removeprefix("error: ").removesuffix("\n"))
