"""Pickled weights: read where that is allowed, by torch's loader for weights alone."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    EMBEDDING,
    HEAD,
    MINIMAL_CONFIG,
    llama_config,
    llama_like,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from modelkin.checkpoint import as_float64, fingerprint, open_checkpoint
from modelkin.errors import CheckpointError, MissingExtraError

torch = pytest.importorskip("torch")

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
KINDS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def write_pickled(
    folder: Path, tensors: Any, *, config: Any = MINIMAL_CONFIG, shards: int = 1
) -> Path:
    """A folder as transformers wrote them before safetensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards == 1:
        torch.save(tensors, folder / SINGLE)
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        names = list(tensors)[number::shards]
        torch.save({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def refusal(folder: Path, *parts: object) -> str:
    """The one line with which `folder` is refused though pickles are allowed."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, allow_pickle=True)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for part in parts:
        assert str(part) in message
    return message


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_element_is_found(kind: str, shards: int, tmp_path: Path) -> None:
    """Names, shapes and elements are those that were pickled, in one file or several."""
    tensors = {
        name: torch.from_numpy(values).to(KINDS[kind])
        for name, values in llama_like(np.random.default_rng(0), layers=1).items()
    }
    folder = write_pickled(tmp_path / "m", tensors, shards=shards)
    found = open_checkpoint(folder, allow_pickle=True)
    assert list(found.tensors) == sorted(tensors)
    for name, tensor in found.tensors.items():
        expected = tensors[name]
        assert (tensor.format, tensor.dtype, tensor.shape) == (kind, kind, tuple(expected.shape))
        assert tensor.bytes == expected.numel() * expected.element_size()
        for start, stop in ((0, tensor.count), (3, 7), (5, 10**6)):
            values = as_float64(tensor.read(start, stop), tensor.format)
            np.testing.assert_array_equal(values, expected.double().numpy().ravel()[start:stop])
    beside = {"config.json"} | ({INDEX} if shards > 1 else set())
    weights = {path.name for path in folder.glob("*.bin")}
    assert {file.name for file in found.files} == beside | weights
    found.release()


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_a_slice_of_a_tensor_that_is_not_contiguous(one: int, other: int) -> None:
    """A transposed or strided tensor is read in the order of its own shape."""
    whole = torch.arange(60.0).reshape(5, 12)
    kept = {"turned": whole.T, "strided": whole[:, ::3], "same": torch.ones(1).expand(4, 5)}
    start, stop = sorted((one, other))
    with tempfile.TemporaryDirectory() as name:
        folder = write_pickled(Path(name) / "m", kept)
        for key, tensor in open_checkpoint(folder, allow_pickle=True).tensors.items():
            found = tensor.read(start, stop)
            assert found.flags.c_contiguous
            np.testing.assert_array_equal(found, kept[key].reshape(-1)[start:stop])


def test_they_are_not_read_unless_allowed(tmp_path: Path) -> None:
    """Without the flag nothing is loaded; the message names the way out."""
    folder = write_pickled(tmp_path / "m", {"a": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"pickled weights.*--allow-pickle"):
        open_checkpoint(folder)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    """Where both are there, the pickle is not touched."""
    folder = write_checkpoint(tmp_path / "m", {"a": np.ones(3)})
    (folder / SINGLE).write_bytes(b"nonsense")
    assert open_checkpoint(folder, allow_pickle=True).tensors["a"].read(0, 3).sum() == 3


@pytest.mark.parametrize("says_so", [True, False])
def test_a_tied_head_is_listed_once(says_so: bool, tmp_path: Path) -> None:
    """A head that shares the embedding's storage is no tensor of its own, as in safetensors."""
    plain = llama_like(np.random.default_rng(1), layers=1, tied=True)
    tensors = {name: torch.from_numpy(values) for name, values in plain.items()}
    config = llama_config(plain)
    if not says_so:
        del config["tie_word_embeddings"]
    folder = write_pickled(tmp_path / "m", {HEAD: tensors[EMBEDDING], **tensors}, config=config)
    assert list(open_checkpoint(folder, allow_pickle=True).tensors) == sorted(plain)


def test_a_part_of_a_tensor_is_not_its_duplicate(tmp_path: Path) -> None:
    """Tensors that share storage, but not all of it, are different tensors."""
    whole = torch.arange(6.0)
    folder = write_pickled(tmp_path / "m", {"a": whole, "b": whole[:3], "c": whole.view(2, 3)})
    assert list(open_checkpoint(folder, allow_pickle=True).tensors) == ["a", "b", "c"]


def test_a_fingerprint_depends_on_the_weights(tmp_path: Path) -> None:
    """Other pickled weights are another fingerprint; it does not depend on where they are."""
    marks = [
        fingerprint(
            open_checkpoint(
                write_pickled(tmp_path / name, {"a": torch.full((3,), value)}), allow_pickle=True
            )
        )
        for name, value in (("one", 1.0), ("same", 1.0), ("other", 2.0))
    ]
    assert marks[0] == marks[1] != marks[2]


# What is refused


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._file),)


@pytest.mark.parametrize("how", ["torch", "pickle", "nested"])
def test_code_in_a_pickle_does_not_run(how: str, tmp_path: Path) -> None:
    """A pickle that holds more than weights is refused by torch, in one line, and runs nothing."""
    trap = tmp_path / "sprung"
    content: Any = Trap(trap)
    if how == "nested":
        content = {"a": torch.ones(2), "b": {"c": [content]}}
    folder = write_pickled(tmp_path / "m", content)
    if how == "pickle":
        (folder / SINGLE).write_bytes(pickle.dumps(content))
    why = "torch.save" if how == "pickle" else "torch refuses to load it: it holds more than"
    refusal(folder, folder / SINGLE, why)
    assert not trap.exists()


def test_the_reason_names_what_is_not_allowed(tmp_path: Path) -> None:
    """The line says which function the pickle would have called."""
    refusal(write_pickled(tmp_path / "m", Trap(tmp_path / "sprung")), "mkdir")


def test_an_older_file_is_named(tmp_path: Path) -> None:
    """A bare pickle of tensors, which torch cannot map, is refused with what is expected."""
    folder = write_pickled(tmp_path / "m", {})
    torch.save({"a": torch.ones(2)}, folder / SINGLE, _use_new_zipfile_serialization=False)
    refusal(folder, folder / SINGLE, "since PyTorch 1.6")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ([torch.ones(2)], ["expected tensors by their names, found list"]),
        (torch.ones(2), ["found Tensor"]),
        ({"a": [1, 2]}, ["'a'", "expected a dense tensor, found list"]),
        ({"state_dict": {"a": torch.ones(2)}}, ["'state_dict'", "found dict"]),
        ({"a": torch.ones(2, dtype=torch.int64)}, ["'a'", "BF16", "found torch.int64"]),
        ({"a": torch.ones(2, dtype=torch.bool)}, ["'a'", "found torch.bool"]),
        ({"a": torch.eye(2).to_sparse()}, ["'a'", "expected a dense tensor"]),
    ],
    ids=str,
)
def test_what_is_no_weight_is_named(content: Any, parts: list[str], tmp_path: Path) -> None:
    """Something else than floating-point tensors by name is refused with what it is."""
    folder = write_pickled(tmp_path / "m", content)
    refusal(folder, folder / SINGLE, *parts)


@given(st.binary(max_size=64) | st.integers(0, 600))
@settings(max_examples=40, deadline=None)
def test_broken_files_are_refused(content: bytes | int) -> None:
    """Random bytes, and a file that ends early, are one line whatever torch raises."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_pickled(Path(name) / "m", {"a": torch.ones(3)})
        file = folder / SINGLE
        file.write_bytes(file.read_bytes()[:content] if isinstance(content, int) else content)
        refusal(folder, file)


def test_an_index_is_checked(tmp_path: Path) -> None:
    """An index that looks for a tensor in the wrong shard is refused with tensor and shard."""
    folder = write_pickled(tmp_path / "m", {"a": torch.ones(1), "b": torch.ones(1)}, shards=2)
    first = "pytorch_model-00001-of-00002.bin"
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": first, "b": first}}))
    refusal(folder, folder / INDEX, "'b'", first)


def test_other_pickles_are_no_model(tmp_path: Path) -> None:
    """Allowed or not, a pickle of another name is no model."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "consolidated.pt").write_bytes(b"")
    refusal(tmp_path, "expected model.safetensors", SINGLE, "consolidated.pt")


def test_torch_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch, the message says what to install."""
    folder = write_pickled(tmp_path / "m", {"a": torch.ones(1)})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"torch.*modelkin\[evolve\]"):
        open_checkpoint(folder, allow_pickle=True)


def test_a_pickled_adapter_needs_the_flag(tmp_path: Path) -> None:
    """`adapter_model.bin` is read where pickles are allowed, as what PEFT wrote once."""
    base = open_checkpoint(write_checkpoint(tmp_path / "base", {"w.weight": np.eye(3)}))
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2})
    )
    b, a = torch.ones(3, 1), torch.arange(3.0)[None]
    pair = {"base_model.model.w.lora_A.weight": a, "base_model.model.w.lora_B.weight": b}
    torch.save(pair, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_checkpoint(folder, base=base)
    found = open_checkpoint(folder, base=base, allow_pickle=True)
    expected = np.eye(3) + 2 * (b @ a).numpy()
    np.testing.assert_array_equal(found.tensors["w.weight"].read(0, 9), expected.ravel())
    assert folder / "adapter_model.bin" in found.files
