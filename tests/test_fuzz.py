"""Hostile models: whatever the files hold, they are read, or refused in one line.

`fuzz_campaign.py` tries many more; docs/reliability.md holds its table.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from checkpoints import MINIMAL_CONFIG, llama_like, with_header, write_checkpoint, write_safetensors
from fuzz_campaign import Campaign
from fuzzing import SECONDS, TARGETS, Hostile, OutsideError, attempt, damaged, hostile_json
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modelkin.checkpoint import as_float64, fingerprint, open_checkpoint
from modelkin.checkpoint.patterns import ModulePattern, Steps
from modelkin.errors import CheckpointError

pytestmark = pytest.mark.skipif(
    not hasattr(os, "mkfifo"), reason="pipes, signals and limits as on Unix"
)
NEEDED = {"GGUF file": "gguf", "pytorch_model.bin": "torch", "the folder": "torch"}
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("target", TARGETS)
@given(st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_hostile_model_is_read_or_refused(target: str, rng: random.Random) -> None:
    """It opens no file elsewhere, ends soon, and is refused in one line that names a file."""
    for package in {"gguf", NEEDED.get(target, "gguf")} if target in NEEDED else ():
        pytest.importorskip(package)
    with TemporaryDirectory() as name:
        assert attempt(TARGETS[target](rng, Path(name).resolve()), rng) in ("accepted", "refused")


# The fuzzers themselves


def test_the_changes_change_something() -> None:
    """Most damaged bytes and documents differ from what they were, and each number makes one."""
    rng = random.Random(0)
    tree = {"a": [1, {"b": "c"}], "d": None}
    whole = json.dumps(tree).encode()
    assert sum(damaged(rng, whole) != whole for _ in range(100)) > 80
    assert sum(hostile_json(rng, tree) != whole for _ in range(100)) > 80
    assert damaged(random.Random(1), whole) == damaged(random.Random(1), whole)


@pytest.mark.parametrize("how", ["file", "listing"])
def test_what_is_opened_elsewhere_is_seen(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that opens a file outside of the model's folder would not pass."""
    hostile = TARGETS["config.json"](random.Random(0), tmp_path.resolve())

    def strays(*_: Any, **__: Any) -> None:
        if how == "file":
            (tmp_path / "outside" / "config.json").read_bytes()
        else:
            list((tmp_path / "outside").iterdir())

    monkeypatch.setattr("fuzzing._opened", strays)
    monkeypatch.setattr("fuzzing._measured", strays)
    monkeypatch.setattr("fuzzing._printed", strays)
    with pytest.raises(OutsideError, match="outside"):
        attempt(hostile, _Always())


class _Always(random.Random):
    """Draws the way that opens and reads, and leaves out the fingerprint."""

    def random(self) -> float:
        return 0.5


def test_a_crash_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that dies is counted with the example that it died of, and the next is tried."""
    code = (
        "import os, sys\n"
        "start = int(sys.argv[sys.argv.index('--start') + 1])\n"
        "for number in range(start, start + 3):\n"
        "    print('try', number, flush=True)\n"
        "    if number == 1: os.abort()\n"
        "    print('end', 'bytes\\tok\\t0\\t\\'\\'', flush=True)\n"
    ).replace("\\tok\\t", "\\trefused\\t")
    with TemporaryDirectory() as name:
        script = Path(name, "child.py")
        script.write_text(code)
        monkeypatch.setattr("fuzz_campaign.__file__", str(script))
        campaign = Campaign()
        campaign.run("config.json", seconds=SECONDS, examples=4, start=0)
    assert sum(campaign.counts.values()) == 4
    assert sum(n for (_, _, outcome), n in campaign.counts.items() if outcome == "crash") == 1
    assert "example 1 " in campaign.failures[0]
    assert "| all | | 4 | 0 | 3 | 0 | 0 | 1 | 0 | 0 |" in campaign.table()


# What they found, each once


def refusal(source: Path, *parts: object, **options: Any) -> str:
    """The one line with which `source` is refused; holds all of `parts`."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    for part in parts:
        assert str(part) in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model."""
    tensors = llama_like(np.random.default_rng(0), layers=1)
    return write_checkpoint(tmp_path.resolve() / "m", tensors)


def with_entry(folder: Path, **entry: Any) -> Path:
    """The only tensor of a model's file, with an entry of any form; returns the file."""
    whole = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}
    file = folder / "model.safetensors"
    file.write_bytes(with_header(json.dumps({"w": whole}).encode(), bytes(8)))
    return file


@pytest.fixture
def _little() -> Iterator[None]:
    """The test takes little memory and time."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        assert time.monotonic() - began < SECONDS
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("_little")
@pytest.mark.parametrize(
    "shape",
    [[10**18], [10**9, 10**9], [10**4000, 10**4000], [2] * 500_000, [9] * 65, [2**64], [0, 2**64]],
    ids=lambda shape: f"{len(shape)} of {len(str(shape[0]))} digits",
)
@pytest.mark.parametrize("fitting", [False, True])
def test_a_shape_beyond_all_measure(shape: list[int], fitting: bool, folder: Path) -> None:
    """Sizes that no file can hold are refused before anything of that size is made."""
    end = 4 * shape[0] if fitting and len(shape) < 3 else 4
    refusal(folder, with_entry(folder, shape=shape, data_offsets=[0, end]), "'w'").encode()


@pytest.mark.parametrize("name", ["a\nb", "a\u2028b", "\ud800", "\x1b[2J", "x" * 501])
def test_a_name_that_cannot_be_printed(name: str, folder: Path) -> None:
    """Names of tensors that would break a message or a table are refused, in the index too."""
    write_safetensors(folder / "model.safetensors", {name: np.ones(2)})
    refusal(folder, folder / "model.safetensors", "printable", repr(name)[:50])
    index = {"weight_map": {name: "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal(folder, "index.json", "printable", repr(name)[:50])


@pytest.mark.parametrize("shard", ["a\nb", "\udcff", "a\u2028b"])
def test_a_shard_whose_name_cannot_be_printed(shard: str, folder: Path) -> None:
    """A shard that is there, but breaks messages about it, is refused."""
    (folder / shard).write_bytes(b"")
    index = {"weight_map": {"w": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal(folder, "index.json", "'w'", repr(shard))


@pytest.mark.parametrize("found", [["a\nb"], [[["a"] * 3] * 3], "a\u2028b", [{"a": "\n"}]])
def test_an_architecture_of_one_line(found: Any, folder: Path) -> None:
    """What a config calls its architecture is quoted in messages."""
    (folder / "config.json").write_text(json.dumps({"architectures": found, "model_type": found}))
    assert len(open_checkpoint(folder).architecture.splitlines()) == 1


def test_an_architecture_too_deep_to_be_told(folder: Path) -> None:
    """Lists within lists that can be read, but hardly be written down again."""
    deep = "[" * 900 + "]" * 900
    (folder / "config.json").write_text(f'{{"architectures": [{deep}]}}')
    try:
        assert len(open_checkpoint(folder).architecture) < 200
    except CheckpointError as error:
        assert "config.json" in str(error)  # noqa: PT017


def test_files_with_odd_names_are_listed_in_one_line(tmp_path: Path) -> None:
    """What a folder holds instead of a model is told in one line, whatever its name."""
    (tmp_path / "a\nb\udcff").mkdir()
    refusal(tmp_path, r"a\nb")
    (tmp_path / "a\nb.gguf").write_bytes(b"GGUF")
    refusal(tmp_path, "a\\nb.gguf", "line break")
    (tmp_path / "c\n.gguf").write_bytes(b"GGUF")
    refusal(tmp_path, "a\\nb.gguf", "found 2")


@pytest.mark.parametrize("source", ["~\0", "~\ud800", "no\nsuch", "no/such\n", "x" * 5000])
def test_a_source_that_is_no_path(source: str) -> None:
    """No name of a model raises anything else, or more than a line."""
    refusal(Path(source), "no such folder" if len(source) < 99 else "xxx")
    with pytest.raises(CheckpointError):
        open_checkpoint(source)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "dangling", "device"])
def test_what_is_no_file_is_refused(kind: str, name: str, folder: Path) -> None:
    """Nothing is read that may never end, or is not there."""
    file = folder / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to({"loop": name, "dangling": "gone", "device": "/dev/zero"}[kind])
    if name == "model.safetensors.index.json":
        # The single file beside it is whole.
        assert open_checkpoint(folder).tensors
    else:
        refusal(folder, folder, name)


@pytest.mark.parametrize("name", ["m.gguf", "a.json", "tokenizer.model", "code.py"])
def test_a_pipe_beside_the_model(name: str, folder: Path) -> None:
    """A pipe is opened neither as a GGUF file nor for the fingerprint: it would hang."""
    os.mkfifo(folder / name)
    model = open_checkpoint(folder)
    if name == "m.gguf":
        fingerprint(model)
        (folder / "model.safetensors").unlink()
        pytest.importorskip("gguf")
        refusal(folder, folder / name, "expected a file, found a pipe")
    else:
        with pytest.raises(CheckpointError, match="expected a file, found a pipe"):
            fingerprint(model)


def test_a_fingerprint_of_odd_names(folder: Path) -> None:
    """A file whose name is no UTF-8 counts like any other."""
    before = fingerprint(open_checkpoint(folder))
    (folder / "\udcff.json").write_bytes(b"{}")
    assert fingerprint(open_checkpoint(folder)) != before


def test_links_out_of_the_folder_are_followed(folder: Path) -> None:
    """The Hub's cache is made of links to files elsewhere."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / f"of-{file.name}")
        file.symlink_to(Path("..", "blobs", f"of-{file.name}"))
    assert open_checkpoint(folder).tensors


@pytest.mark.usefixtures("_little")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_document_of_any_length_is_no_trap(name: str, folder: Path) -> None:
    """A file that says it is a terabyte is not read into memory."""
    (folder / name).write_bytes(b"{")
    os.truncate(folder / name, 1 << 40)
    refusal(folder, folder / name, 1 << 40)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("format", "bits"),
    [("F32", 0x7F800001), ("F16", 0x7C01), ("BF16", 0x7F81), ("F8_E5M2", 0x7D)],
)
def test_a_signalling_nan_is_no_warning(format: str, bits: int) -> None:
    """Any bits of a NaN are a NaN, without a warning on the terminal."""
    kinds = {"F32": ("<u4", "<f4"), "F16": ("<u2", "<f2"), "BF16": ("<u2", "<u2")}
    stored, read = kinds.get(format, ("u1", "u1"))
    assert np.isnan(as_float64(np.array([bits], stored).view(read), format)).all()


# Patterns of an adapter


def with_patterns(tmp_path: Path, patterns: Any, module: str = QUERY) -> tuple[Path, Path]:
    """An adapter whose settings hold them, and its base."""
    base = write_checkpoint(tmp_path / "base", {f"{module}.weight": np.eye(8)}, config={})
    folder = tmp_path / "a"
    folder.mkdir()
    content = {"peft_type": "LORA", "r": 2, "rank_pattern": patterns}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    pair = {f"{module}.lora_A.weight": np.ones((2, 8)), f"{module}.lora_B.weight": np.ones((8, 2))}
    write_safetensors(folder / "adapter_model.safetensors", pair)
    return folder, base


@pytest.mark.usefixtures("_little")
@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(.*)*x", "(.|.)*x", ".*.*.*.*.*.*.*.*x", r"(\w+\.?)*x", "((.+)+)+x"),
        *(".?" * 60 + "x" * 60, "(?:.|_|[a-z])" * 40 + "!", "(([a-z_.]*)*)*!", "(.{0,30}){0,30}!"),
    ],
)
def test_a_pattern_that_keeps_re_busy_is_matched(pattern: str, tmp_path: Path) -> None:
    """A pattern with a million ways to match one name is matched, or refused, in little time."""
    folder, base = with_patterns(tmp_path, {pattern: 3, "q_proj": 2}, f"{QUERY}.{'a' * 100}.q_proj")
    opened = open_checkpoint(base)
    try:
        open_checkpoint(folder, base=opened)
    except CheckpointError as error:
        assert "adapter" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(?=a)a", "begins with (?"),
        ("(?i)a", "begins with (?"),
        ("(?P<a>a)", "begins with (?"),
        ("(.)\\1*", "\\1 is not supported"),
        ("\\bq_proj*", "\\b is not supported"),
        ("a*+", "do not give back"),
        ("a{", "begins no count"),
        ("^*", "repeated ^"),
        ("*", "nothing before it"),
        ("a**", "nothing before it"),
        ("(a|b", "without its )"),
        ("a|b)", "without its ("),
        ("[a|", "without its ]"),
        ("[[a]|b]", "sets within sets"),
        ("(" * 30 + "a*" + ")" * 30, "within each other"),
        ("((a{100}){100}){100}", "5000 parts"),
        ("(((){1000}){1000}){1000}", "5000 parts"),
        ("a" * 1001, "1000 characters"),
        ("(\n", "without its )|missing"),
    ],
)
def test_a_pattern_that_is_not_supported_is_named(pattern: str, why: str, tmp_path: Path) -> None:
    """What could not be matched as PEFT does, or not in time, is refused and named."""
    folder, base = with_patterns(tmp_path, {pattern: 3})
    message = refusal(folder, "rank_pattern", base=open_checkpoint(base))
    assert any(one in message for one in why.split("|"))


def test_a_rank_of_thousands_of_digits(tmp_path: Path) -> None:
    """A number that no tensor can have does not fill the screen."""
    folder, base = with_patterns(tmp_path, {"q_proj": 10**4000})
    refusal(folder, "lora_A", "rank 1000", base=open_checkpoint(base))


def test_patterns_that_take_too_long_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a limit for all patterns and modules of an adapter."""
    monkeypatch.setattr("modelkin.checkpoint.patterns._MOST_STEPS", 100)
    folder, base = with_patterns(tmp_path, {f"a{n}|b*": 3 for n in range(50)})
    refusal(folder, "rank_pattern", "take too long", base=open_checkpoint(base))


_NAMES = st.text("ab.", max_size=8)
_PATTERNS = st.recursive(
    st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", "^", "$", "ab", ""]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(
            inner,
            st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{1,}"]),
        ).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


@given(_PATTERNS, st.lists(_NAMES, min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
@example("a|b", ["a", "xa", "x.a", "x.b", "ab", ""])
@example(r"layers\.([0-9]|1[0-9])\..*(q|k)_proj", ["model.layers.12.self_attn.q_proj"])
@example("^a.*", ["a.b", "b.a"])
@example("a.*$", ["a.b", "b.a"])
@example("^(a|b)$|b$", ["a", "b.b", "b.a"])
def test_a_pattern_means_what_it_means_to_peft(pattern: str, names: list[str]) -> None:
    """The same modules are found as by PEFT's own expression."""
    rule = re.compile(rf"(.*\.)?({pattern})$")
    found = ModulePattern(pattern, "test", Steps())
    assert [found.match(name) for name in names] == [rule.match(name) is not None for name in names]


# Archives of torch's


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A record that grows a thousandfold is not unpacked; torch writes none."""
    pytest.importorskip("torch")
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL_CONFIG))
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert file.stat().st_size < 10**5
    refusal(tmp_path, file, "compressed", allow_pickle=True)


def test_no_warning_of_torch_is_shown(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """What torch says of odd bytes before it refuses them is not printed: one line is enough."""
    pytest.importorskip("torch")
    warnings.simplefilter("always")
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL_CONFIG))
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x7dN.")
        archive.writestr("archive/version", b"3\n")
    refusal(tmp_path, file, allow_pickle=True)
    assert not recwarn.list


@pytest.mark.parametrize(
    "case", ["repeated", "negative", "conjugate", "name", "nul", "number", "same"]
)
def test_tensors_that_are_more_than_their_file(case: str, tmp_path: Path) -> None:
    """A few bytes that say they are 10^12 elements, and views that cannot be handed out as such."""
    torch = pytest.importorskip("torch")
    cases: dict[str, dict[Any, Any]] = {
        "repeated": {"w": torch.ones(1).expand(10**6, 10**6)},
        "negative": {"w": torch.ones(2, dtype=torch.cfloat).conj().imag},
        "conjugate": {"w": torch.ones(2, dtype=torch.cfloat).conj()},
        "name": {"a\nb": torch.ones(2)},
        "nul": {"a\0b": torch.ones(2)},
        "number": {3: torch.ones(2)},
        "same": {"3": torch.ones(2), 3: torch.zeros(2)},
    }
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL_CONFIG))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(cases[case], tmp_path / "pytorch_model.bin")
    refusal(tmp_path, tmp_path / "pytorch_model.bin", "expected", allow_pickle=True)


# GGUF files


def _gguf(tmp_path: Path, *, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> Path:
    file = tmp_path / "m.gguf"
    counts = tensors.to_bytes(8, "little") + keys.to_bytes(8, "little")
    file.write_bytes(b"GGUF\3\0\0\0" + counts + rest)
    return file


@pytest.mark.usefixtures("_little")
@pytest.mark.parametrize("what", ["tensors", "keys", "text", "list", "layers"])
def test_a_gguf_file_of_any_length_is_no_trap(what: str, tmp_path: Path) -> None:
    """Counts that a sparse file of a terabyte could hold take neither memory nor time."""
    pytest.importorskip("gguf")
    key = b"\1\0\0\0\0\0\0\0k"
    if what == "layers":
        pairs = {"block_count": 10**6, "attention.head_count": 1, "embedding_length": 1}
        rest = _entry(b"general.architecture", 8, (5).to_bytes(8, "little") + b"llama")
        for name, value in pairs.items():
            rest += _entry(f"llama.{name}".encode(), 4, value.to_bytes(4, "little"))
        file = _gguf(tmp_path, keys=4, rest=rest)
        refusal(file, file, "block_count")
        return
    number = (2**36).to_bytes(8, "little")
    file = {
        "tensors": lambda: _gguf(tmp_path, tensors=2**36),
        "keys": lambda: _gguf(tmp_path, keys=2**36),
        "text": lambda: _gguf(tmp_path, keys=1, rest=number),
        "list": lambda: _gguf(tmp_path, keys=1, rest=key + b"\x09\0\0\0\x08\0\0\0" + number),
    }[what]()
    os.truncate(file, 1 << 40)
    refusal(file, file, "expected")


def _entry(key: bytes, kind: int, value: bytes) -> bytes:
    return len(key).to_bytes(8, "little") + key + kind.to_bytes(4, "little") + value


# Files that go away


@pytest.mark.parametrize("count", range(4))
def test_a_file_that_goes_away(count: int, tmp_path: Path) -> None:
    """A file that is removed between two looks at it is refused by name."""
    home = tmp_path.resolve()
    source = write_checkpoint(home / "m", {"w": np.ones(3)})
    hostile = Hostile("vanishing", home, source, vanishing=count)
    # The config, the header and the weights.
    expected = "refused" if count < 3 else "accepted"
    assert attempt(hostile, _Always()) == expected
