"""Checkpoints: everything that can be wrong on disk is a CheckpointError that names it."""

from __future__ import annotations

import errno
import json
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    ALL_DTYPES,
    EMBEDDING,
    FLOAT8,
    HEAD,
    Dtype,
    llama_config,
    llama_like,
    stored,
    with_header,
    write_checkpoint,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import modelkin.checkpoint
from modelkin.checkpoint import (
    INDEX_FILE,
    MAX_HEADER_BYTES,
    RECIPE_FILE,
    SINGLE_FILE,
    as_float64,
    fingerprint,
    open_checkpoint,
    whole_folder,
)
from modelkin.errors import CheckpointError, ConfigError, DiskFullError, IncomparableError
from modelkin.measuring import compare

TENSORS: Mapping[str, Any] = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(4.0)}


def _refusal(source: Path | str, *parts: object) -> str:
    """The one line with which `source` is refused; holds all of `parts`."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def _with_weights(folder: Path, content: bytes) -> Path:
    """A model folder whose only weight file holds `content`; returns that file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / SINGLE_FILE).write_bytes(content)
    return folder / SINGLE_FILE


def _header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


# What can be read


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_element_is_found(dtype: Dtype, shards: int, tmp_path: Path) -> None:
    """Names, shapes, dtypes and elements are those that were written, in one file or several."""
    tensors = llama_like(np.random.default_rng(0))
    found = open_checkpoint(write_checkpoint(tmp_path / "m", tensors, dtype=dtype, shards=shards))
    assert list(found.tensors) == sorted(tensors)
    for name, ref in found.tensors.items():
        assert (ref.dtype, ref.format, ref.shape) == (dtype, dtype, tensors[name].shape)
        values = as_float64(ref.read(0, ref.count), ref.format).reshape(ref.shape)
        np.testing.assert_array_equal(values, stored(tensors[name], dtype))
    assert found.parameters == sum(values.size for values in tensors.values())
    beside = {"config.json", INDEX_FILE} if shards > 1 else {"config.json"}
    assert beside < {file.name for file in found.files}
    assert len(found.files) == shards + len(beside)


def test_the_safetensors_package_reads_what_the_tests_write(tmp_path: Path) -> None:
    """The bytes that the tests write by hand are a safetensors file to its own library."""
    safetensors = pytest.importorskip("safetensors.numpy")

    folder = write_checkpoint(tmp_path / "m", TENSORS, dtype={"a": "F16", "b": "F64"})
    read = safetensors.load_file(folder / SINGLE_FILE)
    assert set(read) == set(TENSORS)
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(read[name], values)


@given(st.integers(0, 0xFFFF))
@settings(deadline=None)
@example(0x0001)
@example(0x7F80)
@example(0xFFC0)
def test_bfloat16_bits_are_widened_exactly(bits: int) -> None:
    """A bfloat16 is the float32 whose upper half it is, subnormal and special ones included."""
    found = as_float64(np.array([bits], "<u2"), "BF16")
    expected = np.frombuffer(bytes(2) + bits.to_bytes(2, "little"), "<f4")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_byte_of_an_8_bit_float_is_widened_exactly(dtype: str) -> None:
    """E4M3 has no infinities and two NaN; E5M2 is as IEEE 754 would have it."""
    found = as_float64(np.arange(256, dtype="u1"), dtype)
    np.testing.assert_array_equal(found, FLOAT8[dtype])
    np.testing.assert_array_equal(np.signbit(found[128:-1]), True)
    special = [np.isnan(found).sum(), np.isinf(found).sum(), found[np.isfinite(found)].max()]
    assert special == ([2, 0, 448] if dtype == "F8_E4M3" else [6, 2, 57344])


@pytest.mark.parametrize("dtype", FLOAT8)
def test_torch_means_the_same_by_an_8_bit_float(dtype: str) -> None:
    """Each byte is the number that torch takes it for."""
    torch = pytest.importorskip("torch")

    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    expected = torch.arange(256, dtype=torch.uint8).view(kind).double().numpy()
    np.testing.assert_array_equal(as_float64(np.arange(256, dtype="u1"), dtype), expected)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@given(st.integers(-3, 30), st.integers(-3, 30))
@settings(max_examples=30, deadline=None)
def test_a_slice_is_a_part_of_the_whole(dtype: Dtype, start: int, stop: int) -> None:
    """Slices are views of the file, at any byte, and never leave their tensor."""
    with tempfile.TemporaryDirectory() as name:
        # One byte before: what follows is not aligned.
        tensors = {"a": np.zeros(1), "b": np.arange(24.0).reshape(4, 6)}
        kinds: dict[str, Dtype] = {"a": "F8_E5M2", "b": dtype}
        folder = write_checkpoint(Path(name) / "m", tensors, dtype=kinds)
        tensor = open_checkpoint(folder).tensors["b"]
        found = tensor.read(start, stop)
        assert found.dtype == modelkin.checkpoint.DTYPES[tensor.format]
        assert not found.flags.writeable or found.size == 0
        expected = stored(tensors["b"], dtype).ravel()[max(start, 0) : max(stop, 0)]
        np.testing.assert_array_equal(as_float64(found, dtype), expected)


def test_a_file_is_mapped_once_by_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors of a file share one mapping, made at the first read."""
    maps: list[int] = []
    original = mmap.mmap

    def counted(descriptor: int, length: int, access: int) -> mmap.mmap:
        maps.append(length)
        return original(descriptor, length, access=access)

    tensors = llama_like(np.random.default_rng(3))
    model = open_checkpoint(write_checkpoint(tmp_path / "m", tensors))
    monkeypatch.setattr(mmap, "mmap", counted)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda tensor: tensor.read(0, tensor.count), model.tensors.values()))
    assert len(maps) == 1
    for values, name in zip(read, model.tensors, strict=True):
        np.testing.assert_array_equal(values, tensors[name].astype("f4").ravel())


def test_what_was_read_stays_valid_after_a_release(tmp_path: Path) -> None:
    """Released pages are read again, by old views and by new ones."""
    model = open_checkpoint(write_checkpoint(tmp_path / "m", TENSORS))
    model.release()  # nothing is mapped yet
    view = model.tensors["a"].read(1, 5)
    model.release()
    np.testing.assert_array_equal(view, [1, 2, 3, 4])
    np.testing.assert_array_equal(model.tensors["a"].read(0, 6), np.arange(6))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_a_release_frees_memory(tmp_path: Path) -> None:
    """After a release, no page of the file is resident."""
    folder = write_checkpoint(tmp_path / "m", {"a": np.ones(1 << 20)})
    model = open_checkpoint(folder)

    def resident() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        for line in lines:
            if line.endswith(str(folder / SINGLE_FILE)):
                return next(int(one.split()[1]) for one in lines if one.startswith("Rss"))
        return 0

    assert model.tensors["a"].read(0, 1 << 20).sum() == 1 << 20
    assert resident() >= 4096
    model.release()
    assert resident() == 0


def test_a_file_that_shrank_is_named(tmp_path: Path) -> None:
    """A file that became smaller after it was opened is no crash, if it was not mapped yet."""
    model = open_checkpoint(write_checkpoint(tmp_path / "m", TENSORS))
    os.truncate(model.folder / SINGLE_FILE, 40)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has shrunk .* found 40"):
        model.tensors["a"].read(0, 1)


def test_a_file_that_went_is_named(tmp_path: Path) -> None:
    """A file that cannot be opened any more is named, with the reason."""
    model = open_checkpoint(write_checkpoint(tmp_path / "m", TENSORS))
    (model.folder / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        model.tensors["a"].read(0, 1)


def test_opening_needs_no_heavy_package() -> None:
    """Neither torch nor gguf nor the Hub's client is imported with the module."""
    heavy = (
        "{'torch', 'gguf', 'huggingface_hub', 'pydantic', 'transformers', 'peft', 'safetensors'}"
    )
    code = f"import sys, modelkin.checkpoint; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_checkpoint_is_named_after_its_folder(tmp_path: Path) -> None:
    """The name is the folder's, unless one is given; a trailing slash does not change it."""
    folder = write_checkpoint(tmp_path / "some-model", TENSORS)
    assert open_checkpoint(folder).name == "some-model"
    assert open_checkpoint(f"{folder}/").name == "some-model"
    assert open_checkpoint(folder, name="other").name == "other"
    assert open_checkpoint(folder).revision is None


def test_the_folder_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder is found from the working directory and remembered as an absolute one."""
    folder = write_checkpoint(tmp_path / "here" / "m", TENSORS)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("here/m").folder == folder.resolve()


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ({"architectures": ["A", "B"]}, "A"),
        ({"architectures": None, "model_type": "llama"}, "llama"),
        ({"architectures": []}, "unknown"),
        ({}, "unknown"),
        ({"model_type": None}, "unknown"),
        ({"architectures": {"A": 1}, "model_type": "llama"}, "llama"),
    ],
)
def test_the_architecture_is_read_from_the_config(
    config: Mapping[str, Any], architecture: str, tmp_path: Path
) -> None:
    """The architecture is the first of `architectures`, or else the model type."""
    folder = write_checkpoint(tmp_path / "m", TENSORS, config=config)
    assert open_checkpoint(folder).architecture == architecture


def test_a_tied_head_is_listed_once(tmp_path: Path) -> None:
    """A stored `lm_head.weight` is left out where the config ties it to the embedding."""
    tensors = llama_like(np.random.default_rng(1), tied=True)
    config = llama_config(tensors)
    twice = {**tensors, HEAD: tensors[EMBEDDING]}
    folder = write_checkpoint(tmp_path / "tied", twice, config=config)
    assert HEAD not in open_checkpoint(folder).tensors
    untied = {**config, "tie_word_embeddings": False}
    folder = write_checkpoint(tmp_path / "untied", twice, config=untied)
    assert HEAD in open_checkpoint(folder).tensors


def test_only_tensors_of_the_index_are_taken(tmp_path: Path) -> None:
    """What a shard holds beside what the index names is no part of the model."""
    folder = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["weight_map"]["b"]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert list(open_checkpoint(folder).tensors) == ["a"]


# What is no model


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    """A path that is nothing is named, and the message says what was looked for."""
    _refusal(tmp_path / "nothing", tmp_path / "nothing", "no such folder")


@pytest.mark.parametrize(
    "source",
    [
        "",
        "a b",
        "one/two/three",
        "./here",
        "~/nowhere-at-all",
        "org/",
        "x" * 5000,
        "a\0b",
        "~nobody/x",
    ],
)
def test_a_name_that_is_no_hub_id_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is neither a folder nor of the form org/name is refused, and nothing is asked."""
    monkeypatch.chdir(tmp_path)
    _refusal(source)


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    """A weight file in place of the folder it is in is refused."""
    folder = write_checkpoint(tmp_path / "m", TENSORS)
    _refusal(folder / SINGLE_FILE, folder / SINGLE_FILE, "found another file")


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    """A folder without `config.json` is no model, and the message says what it holds."""
    folder = write_checkpoint(tmp_path / "m", TENSORS)
    (folder / "config.json").unlink()
    _refusal(folder, folder, "config.json", f"found {SINGLE_FILE}")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    """An empty folder is said to be empty."""
    _refusal(tmp_path, tmp_path, "an empty folder")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    """A folder with a config and no weights is no model."""
    (tmp_path / "config.json").write_text("{}")
    _refusal(tmp_path, tmp_path, SINGLE_FILE, INDEX_FILE, "found config.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": }', b"\xff\xfe\x00", b"nonsense", b"[" * 100_000]
)
@pytest.mark.parametrize("file", ["config.json", INDEX_FILE])
def test_corrupt_json_is_named(content: bytes, file: str, tmp_path: Path) -> None:
    """JSON that cannot be parsed is refused with the file's name, whatever is in it."""
    folder = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
    (folder / file).write_bytes(content)
    _refusal(folder, folder / file, "not valid JSON")


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"'])
@pytest.mark.parametrize("file", ["config.json", INDEX_FILE])
def test_json_that_is_no_object_is_named(content: str, file: str, tmp_path: Path) -> None:
    """JSON of another kind than an object is refused with the file's name."""
    folder = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
    (folder / file).write_text(content)
    _refusal(folder, folder / file, "expected a JSON object")


@pytest.mark.parametrize("suffix", ["bin", "pt"])
def test_pickled_weights_are_refused_with_a_hint(suffix: str, tmp_path: Path) -> None:
    """Pickled weights can run code: they are refused, not loaded, with a way out."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / f"pytorch_model.{suffix}").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    _refusal(tmp_path, tmp_path, "pickled", "save_pretrained", "--allow-pickle")
    assert not (tmp_path / "sprung").exists()


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._file,)


# Safetensors files that are not what they should be


@pytest.mark.parametrize("shards", [1, 2])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_truncated_file_is_named(shards: int, data: st.DataObject) -> None:
    """A weight file that ends early, wherever, is refused with its name."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name).resolve() / "m", TENSORS, shards=shards)
        file = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
        whole = file.read_bytes()
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        _refusal(folder, file)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, -1])
def test_a_file_truncated_at_an_edge_is_named(kept: int, tmp_path: Path) -> None:
    """Nothing, half a length, a length alone and all but the last byte are truncated files."""
    whole = (write_checkpoint(tmp_path / "whole", TENSORS) / SINGLE_FILE).read_bytes()
    file = _with_weights(tmp_path / "m", whole[:kept])
    _refusal(file.parent, file, "truncated")


# Anything that JSON can say, to stand where the header, a tensor, or a part of it should.
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
_SIZE = st.integers(-2, 40) | st.integers() | _JSON
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ALL_DTYPES, "I8"]) | _JSON,
        "shape": st.lists(_SIZE, max_size=3) | _JSON,
        "data_offsets": st.lists(_SIZE, min_size=2, max_size=2) | _JSON,
    }
)


def _opens_or_refuses(content: bytes) -> None:
    """Whatever the bytes: either a checkpoint whose tensors lie in the file, or CheckpointError."""
    with tempfile.TemporaryDirectory() as name:
        file = _with_weights(Path(name).resolve(), content)
        found, message = None, ""
        try:
            found = open_checkpoint(name)
        except CheckpointError as error:
            message = str(error)
        if found is None:
            assert str(file) in message
            assert "\n" not in message
            return
        for ref in found.tensors.values():
            assert ref.read(0, ref.count).nbytes == ref.bytes <= len(content)


@given(st.binary(max_size=64))
@settings(max_examples=60, deadline=None)
def test_random_bytes_are_refused(content: bytes) -> None:
    """No bytes in place of a weight file raise anything but CheckpointError."""
    _opens_or_refuses(content)


@given(st.binary(max_size=64), st.binary(max_size=16))
@settings(max_examples=60, deadline=None)
def test_a_random_header_is_refused(header: bytes, data: bytes) -> None:
    """No bytes in place of a header of the right length raise anything but CheckpointError."""
    _opens_or_refuses(len(header).to_bytes(8, "little") + header + data)


@given(_JSON | st.dictionaries(st.text(max_size=5), _ENTRY | _JSON, max_size=3))
@settings(max_examples=100, deadline=None)
@example({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}})
@example({"a": {"dtype": {}, "shape": [], "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32", "shape": [2**64, 0], "data_offsets": [0, 0]}})
@example({"a": {"dtype": "F32", "shape": [0], "data_offsets": [2**64, 2**64]}})
@example({"a\nb": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}})
@example({"a": {"dtype": "F32\n", "shape": [3], "data_offsets": [0, 4]}})
@example({"__metadata__": 3})
def test_a_nonsensical_header_is_refused(header: Any) -> None:
    """No JSON in place of a header raises anything but CheckpointError, in one line."""
    _opens_or_refuses(with_header(json.dumps(header).encode(), bytes(40)))


@pytest.mark.parametrize("length", [10**6, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_named(length: int, tmp_path: Path) -> None:
    """A header that says it is longer than the file is refused before it is read."""
    file = _with_weights(tmp_path / "m", length.to_bytes(8, "little") + b"{}")
    _refusal(file.parent, file, length)


def test_a_header_beyond_the_formats_limit_is_refused(tmp_path: Path) -> None:
    """A header longer than the format allows is refused even where the file is as long."""
    file = _with_weights(tmp_path / "m", (MAX_HEADER_BYTES + 8).to_bytes(8, "little"))
    os.truncate(file, MAX_HEADER_BYTES + 16)  # a sparse file: takes no room
    _refusal(file.parent, file, MAX_HEADER_BYTES + 8)


def test_offsets_outside_the_file_are_named(tmp_path: Path) -> None:
    """A tensor that ends behind the end of the file is named."""
    file = _with_weights(
        tmp_path / "m",
        with_header(_header(w={"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}), bytes(20)),
    )
    _refusal(file.parent, file, "'w'", "truncated")


@pytest.mark.parametrize("offsets", [[-4, 0], [4, 0], [0, 4, 8], [0], [0.0, 4.0], ["0", "4"], None])
def test_senseless_offsets_are_named(offsets: Any, tmp_path: Path) -> None:
    """Offsets that are no pair of increasing integers are refused with the tensor's name."""
    header = _header(w={"dtype": "F32", "shape": [1], "data_offsets": offsets})
    file = _with_weights(tmp_path / "m", with_header(header, bytes(16)))
    _refusal(file.parent, file, "'w'")


@pytest.mark.parametrize("shape", [[3], [2, 3], [], [1, 0], [5]])
def test_a_shape_that_does_not_fit_is_named(shape: list[int], tmp_path: Path) -> None:
    """A shape that needs more or fewer bytes than the tensor has is refused."""
    header = _header(w={"dtype": "F32", "shape": shape, "data_offsets": [0, 16]})
    file = _with_weights(tmp_path / "m", with_header(header, bytes(16)))
    _refusal(file.parent, file, "'w'", shape, f"needs {4 * int(np.prod(shape))} bytes", "16")


@pytest.mark.parametrize("dtype", ["I8", "F8_E8M0", "F4", "U8", "BOOL", "bf16", ""])
def test_an_unknown_dtype_is_named(dtype: str, tmp_path: Path) -> None:
    """A dtype that is none of the floats that are read is refused with those that are."""
    header = _header(w={"dtype": dtype, "shape": [4], "data_offsets": [0, 4]})
    file = _with_weights(tmp_path / "m", with_header(header, bytes(4)))
    _refusal(file.parent, file, "'w'", "BF16, F16, F32, F64, F8_E4M3, F8_E5M2", f"found {dtype!r}")


def test_a_tensor_without_its_entries_is_named(tmp_path: Path) -> None:
    """A header entry that lacks its shape is refused, and shown."""
    header = _header(w={"dtype": "F32", "data_offsets": [0, 4]})
    file = _with_weights(tmp_path / "m", with_header(header, bytes(4)))
    _refusal(file.parent, file, "'w'", "shape", "{'dtype': 'F32', 'data_offsets': [0, 4]}")


def _one(begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize("ranges", [[(0, 8), (4, 12)], [(4, 12), (0, 8)], [(0, 12), (4, 8)]])
def test_tensors_that_overlap_are_named(ranges: list[tuple[int, int]], tmp_path: Path) -> None:
    """Two tensors that share bytes are refused with both names."""
    header = _header(first=_one(*ranges[0]), second=_one(*ranges[1]))
    file = _with_weights(tmp_path / "m", with_header(header, bytes(12)))
    _refusal(file.parent, file, "'first'", "'second'", "share no bytes")


def test_holes_and_empty_tensors_are_accepted(tmp_path: Path) -> None:
    """Bytes that are no tensor's, and tensors of no bytes amid others, are no overlap."""
    header = _header(a=_one(0, 8), b=_one(12, 16), empty=_one(4, 4), also=_one(4, 4))
    file = _with_weights(tmp_path / "m", with_header(header, bytes(16)))
    found = open_checkpoint(file.parent)
    assert {name: tensor.count for name, tensor in found.tensors.items()} == {
        "a": 2,
        "b": 1,
        "empty": 0,
        "also": 0,
    }


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    """A header or an index with two entries of one name is refused: readers would differ."""
    entry = json.dumps(_one(0, 4))
    file = _with_weights(tmp_path / "m", with_header(f'{{"w": {entry}, "w": {entry}}}'.encode()))
    _refusal(file.parent, file, "header", "'w' twice")
    index = _with_index(tmp_path / "sharded", {})
    index.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "x"}}')
    _refusal(index.parent, index, "'a' twice")


@pytest.mark.parametrize("name", ["config.json", SINGLE_FILE])
def test_a_file_that_cannot_be_read_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the system refuses to open is refused with its name and the reason."""
    folder = write_checkpoint(tmp_path / "m", TENSORS)
    original = Path.open

    def refused(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return original(self, *arguments, **options)

    # Not by its mode: the tests may run as a user who can read everything.
    monkeypatch.setattr(Path, "open", refused)
    _refusal(folder, folder / name, "cannot be read: Permission denied")


def test_a_corrupt_header_is_named(tmp_path: Path) -> None:
    """A header that is not JSON is refused with the file's name."""
    file = _with_weights(tmp_path / "m", with_header(b'{"w": '))
    _refusal(file.parent, file, "header")


# Indexes that are not what they should be


def _with_index(folder: Path, weight_map: Any) -> Path:
    """A sharded model whose index is replaced; returns the index."""
    write_checkpoint(folder, TENSORS, shards=2)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return folder / INDEX_FILE


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """An index that names a file that is not there is refused with both names."""
    index = _with_index(tmp_path / "m", {"a": "model-00001-of-00002.safetensors", "b": "gone"})
    _refusal(index.parent, index, "gone", "missing")


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "sub/x.safetensors", "", ".", "..", 3, None, "x" * 300, "a\0"]
)
def test_a_shard_elsewhere_is_refused(shard: Any, tmp_path: Path) -> None:
    """A shard outside the model's folder is refused, though there is one."""
    index = _with_index(tmp_path / "m", {"a": shard})
    whole = write_checkpoint(tmp_path / "whole", TENSORS) / SINGLE_FILE
    (tmp_path / "x.safetensors").write_bytes(whole.read_bytes())
    _refusal(index.parent, index, "'a'", repr(shard)[:200])


def test_a_shard_at_an_absolute_path_is_refused(tmp_path: Path) -> None:
    """An index cannot point at any file on the disk."""
    whole = write_checkpoint(tmp_path / "whole", TENSORS) / SINGLE_FILE
    index = _with_index(tmp_path / "m", {"a": str(whole)})
    _refusal(index.parent, index, "'a'", whole)


def test_a_tensor_that_the_shard_lacks_is_named(tmp_path: Path) -> None:
    """An index that looks for a tensor in the wrong shard is refused with tensor and shard."""
    first = "model-00001-of-00002.safetensors"
    index = _with_index(tmp_path / "m", {"a": first, "b": first})
    _refusal(index.parent, index, "'b'", first)


@pytest.mark.parametrize("weight_map", [{}, None, [], "text"])
def test_an_index_without_a_map_is_named(weight_map: Any, tmp_path: Path) -> None:
    """An index that maps nothing is refused with the key that it lacks."""
    index = _with_index(tmp_path / "m", weight_map)
    _refusal(index.parent, index, "'weight_map'")


def test_a_corrupt_shard_is_named(tmp_path: Path) -> None:
    """Of several shards, the one that is broken is named."""
    folder = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(b"nonsense")
    _refusal(folder, second)


# Comparing


def test_another_architecture_is_incomparable(tmp_path: Path) -> None:
    """Models of another architecture than the base are incomparable, by their headers alone."""
    one, other = (
        open_checkpoint(
            write_checkpoint(tmp_path / name, TENSORS, config={"architectures": [name]})
        )
        for name in ("GPT2LMHeadModel", "LlamaForCausalLM")
    )
    with pytest.raises(IncomparableError, match=r"expected .*GPT2LMHeadModel, found LlamaForCau"):
        compare(one, [other])


# Fingerprints


def _copy(folder: Path, **how: Any) -> Path:
    """A model with tokenizer and notes, always the same but for `how`."""
    tensors = how.pop("tensors", TENSORS)
    write_checkpoint(folder, tensors, **how)
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "README.md"):
        (folder / name).write_text(f'"{name}"')
    (folder / RECIPE_FILE).write_text("{}")
    (folder / "modeling_own.py").write_text("x = 1")
    return folder


def test_equal_models_have_equal_fingerprints(tmp_path: Path) -> None:
    """A fingerprint depends on what the files hold, and not on where they are."""
    one, other = (open_checkpoint(_copy(tmp_path / name)) for name in ("one", "other"))
    assert fingerprint(one) == fingerprint(other)
    assert len(fingerprint(one)) == 32


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer.model", "generation_config.json", "modeling_own.py"]
)
def test_a_fingerprint_depends_on_what_decides_the_answers(file: str, tmp_path: Path) -> None:
    """A change of tokenizer, generation settings or code changes the fingerprint."""
    folder = _copy(tmp_path / "m")
    before = fingerprint(open_checkpoint(folder))
    (folder / file).write_text("changed")
    assert fingerprint(open_checkpoint(folder)) != before
    (folder / file).unlink()
    assert fingerprint(open_checkpoint(folder)) != before


def test_a_fingerprint_depends_on_the_weights(tmp_path: Path) -> None:
    """One bit of one weight changes the fingerprint, in one file and in a shard."""
    changed = {**TENSORS, "b": np.nextafter(np.float32(TENSORS["b"]), np.float32(9))}
    for shards in (1, 2):
        one = _copy(tmp_path / f"one-{shards}", shards=shards)
        other = _copy(tmp_path / f"other-{shards}", shards=shards, tensors=changed)
        assert fingerprint(open_checkpoint(one)) != fingerprint(open_checkpoint(other))


def test_a_fingerprint_depends_on_the_config(tmp_path: Path) -> None:
    """Another setting in `config.json` changes the fingerprint."""
    one = _copy(tmp_path / "one", config={"rms_norm_eps": 1e-5})
    other = _copy(tmp_path / "other", config={"rms_norm_eps": 1e-6})
    assert fingerprint(open_checkpoint(one)) != fingerprint(open_checkpoint(other))


@pytest.mark.parametrize("file", ["README.md", RECIPE_FILE, "trainer_state.json", "notes.txt"])
def test_a_fingerprint_does_not_depend_on_notes(file: str, tmp_path: Path) -> None:
    """Notes, recipes and a trainer's state can change without the model being another one."""
    folder = _copy(tmp_path / "m")
    before = fingerprint(open_checkpoint(folder))
    (folder / file).write_text("changed")
    assert fingerprint(open_checkpoint(folder)) == before


# Folders that appear whole


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    """Until the block ends there is no such folder; then it holds everything and its record."""
    folder = tmp_path / "models" / "child"
    with whole_folder(folder, record={"recipe": "ä"}) as partial:
        assert partial.name == "child"
        (partial / "weights").write_text("w")
        (partial / "sub").mkdir()
        (partial / "sub" / "deep").write_text("d")
        assert not folder.exists()
    assert sorted(path.name for path in folder.rglob("*")) == [
        "deep",
        RECIPE_FILE,
        "sub",
        "weights",
    ]
    assert json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8")) == {"recipe": "ä"}
    assert list(folder.parent.iterdir()) == [folder]


def _fill(folder: Path, error: BaseException) -> None:
    """Begin to fill a folder, and fail."""
    with whole_folder(folder, record={}) as partial:
        (partial / "weights").write_text("w")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_error(error: type[BaseException], tmp_path: Path) -> None:
    """An exception of any kind leaves no folder, whole or partial, and goes on."""
    with pytest.raises(error) as caught:
        _fill(tmp_path / "child", error("stop"))
    assert caught.value.args == ("stop",)
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_is_no_json_leaves_nothing(tmp_path: Path) -> None:
    """A record that cannot be written fails the folder."""
    with pytest.raises(TypeError), whole_folder(tmp_path / "child", record={"x": object()}):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_folder_is_refused(kind: str, tmp_path: Path) -> None:
    """What exists is never written over, and the block does not begin."""
    child = tmp_path / "child"
    if kind == "folder":
        child.mkdir()
        (child / "precious").write_text("p")
    else:
        child.write_text("precious")
    with pytest.raises(ConfigError, match="does not exist yet") as caught:
        whole_folder(child, record={}).__enter__()
    assert str(child) in str(caught.value)
    assert list(tmp_path.iterdir()) == [child]


def test_remains_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """Partial folders of the same name go when the folder is made anew; others stay."""
    killed = whole_folder(tmp_path / "child", record={})
    (killed.__enter__() / "weights").write_text("half")
    other = whole_folder(tmp_path / "child-2", record={})
    other.__enter__()
    others = [path for path in tmp_path.iterdir() if path.name.startswith(".child-2.")]
    assert len(others) == 1
    with whole_folder(tmp_path / "child", record={}):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "child", *others])
    assert [path.name for path in (tmp_path / "child").iterdir()] == [RECIPE_FILE]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk or quota that fills up in the block is a DiskFullError that names the folder."""

    def write_text(self: Path, *_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "write_text", write_text)
    with (
        pytest.raises(DiskFullError) as caught,
        whole_folder(tmp_path / "child", record={}) as partial,
    ):
        (partial / "weights").write_bytes(b"w")
    assert str(tmp_path / "child") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "mkdir"])
def test_a_disk_that_fills_up_around_the_block_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up when the folder is begun or flushed is a DiskFullError too."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(DiskFullError), whole_folder(tmp_path / "child", record={}) as partial:
        (partial / "weights").write_bytes(b"w")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_behind_another_error_is_a_full_disk(tmp_path: Path) -> None:
    """A writer's own error that came from a full disk is a DiskFullError."""
    error = RuntimeError("cannot serialise")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(DiskFullError):
        _fill(tmp_path / "child", error)
    assert list(tmp_path.iterdir()) == []
