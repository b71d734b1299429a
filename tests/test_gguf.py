"""GGUF files as models: they are what transformers makes of them."""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from modelkin.checkpoint import Checkpoint, as_float64, fingerprint, open_checkpoint
from modelkin.checkpoint import gguf as gguf_module
from modelkin.errors import CheckpointError, MissingExtraError

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, KV_HEADS, LAYERS, VOCAB, INTERMEDIATE = 256, 8, 4, 1, 24, 512
# Formats that the package can write; the others it can only read.
WRITABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


def head_size(architecture: str) -> int:
    """Features of a head; transformers takes Qwen3's to be 128 whatever a GGUF file says."""
    return 128 if architecture == "qwen3" else HIDDEN // HEADS


def tensors_of(architecture: str, *, tied: bool = False) -> dict[str, Any]:
    """Random weights by GGUF's names, in NumPy's order of axes."""
    rng = np.random.default_rng(0)
    head = head_size(architecture)
    queries, kv = head * HEADS, head * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (queries, HIDDEN),
            f"blk.{layer}.attn_k.weight": (kv, HIDDEN),
            f"blk.{layer}.attn_v.weight": (kv, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, queries),
            f"blk.{layer}.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INTERMEDIATE),
        }
        if architecture == "qwen2":
            shapes |= {
                f"blk.{layer}.attn_q.bias": (queries,),
                f"blk.{layer}.attn_k.bias": (kv,),
                f"blk.{layer}.attn_v.bias": (kv,),
            }
        if architecture == "qwen3":
            shapes |= {
                f"blk.{layer}.attn_q_norm.weight": (head,),
                f"blk.{layer}.attn_k_norm.weight": (head,),
            }
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def write_gguf(
    file: Path,
    architecture: str = "llama",
    kind: str = "F32",
    *,
    tensors: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """A GGUF file by the package's own writer; matrices are of `kind`, vectors of float32."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(head_size(architecture))
    writer.add_key_length(head_size(architecture))
    writer.add_value_length(head_size(architecture))
    writer.add_vocab_size(VOCAB)
    # Longer than the lists that are kept, so that it has to be skipped.
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(5000)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 5000)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    for key, value in (metadata or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    for name, values in (tensors or tensors_of(architecture)).items():
        found = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        stored = gguf.quantize(values, found)
        writer.add_tensor(name, stored, raw_dtype=found)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def refusal(source: Path, *parts: object) -> str:
    """The one line with which `source` is refused; holds all of `parts`."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def read(model: Checkpoint) -> dict[str, Any]:
    """All tensors, in float64."""
    return {
        name: as_float64(tensor.read(0, tensor.count), tensor.format).reshape(tensor.shape)
        for name, tensor in model.tensors.items()
    }


# Against transformers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "kind", "tied"),
    [
        ("llama", "F32", False),
        ("llama", "Q4_1", True),
        ("llama", "F16", False),
        ("qwen2", "Q8_0", False),
        ("qwen3", "Q5_0", True),
    ],
)
def test_a_file_is_what_transformers_reads(
    architecture: str, kind: str, tied: bool, tmp_path: Path
) -> None:
    """Names, shapes and every number are those of transformers' own reading."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")

    tensors = tensors_of(architecture, tied=tied)
    file = write_gguf(tmp_path / "m.gguf", architecture, kind, tensors=tensors)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    model = open_checkpoint(file)
    weights = {name: values.numpy() for name, values in expected.state_dict().items()}
    if tied:
        del weights["lm_head.weight"]
    assert list(model.tensors) == sorted(weights)
    for name, values in read(model).items():
        np.testing.assert_array_equal(values, weights[name], err_msg=name)
    assert model.architecture == type(expected).__name__
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert model.config[key] == getattr(expected.config, key)
    assert model.config["num_key_value_heads"] == expected.config.num_key_value_heads
    assert model.config["tie_word_embeddings"] == tied


# By the package's own dequantisation


@pytest.mark.parametrize("kind", WRITABLE)
def test_every_format_is_widened(kind: str, tmp_path: Path) -> None:
    """A tensor is what the package makes of it as a whole; llama's queries are put in order."""
    tensors = tensors_of("llama")
    model = open_checkpoint(write_gguf(tmp_path / "m.gguf", kind=kind, tensors=tensors))
    number = gguf.GGMLQuantizationType[kind]
    found = read(model)
    for name, stored in (("mlp.up_proj", "ffn_up"), ("self_attn.q_proj", "attn_q")):
        quantised = gguf.quantize(tensors[f"blk.0.{stored}.weight"], number)
        expected = gguf.dequantize(quantised, number)
        if stored == "attn_q":
            # llama.cpp: (heads, 2, half) became (heads, half, 2)
            halves = expected.reshape(HEADS, -1, 2, HIDDEN)
            expected = halves.swapaxes(1, 2).reshape(HIDDEN, HIDDEN)
        np.testing.assert_array_equal(found[f"model.layers.0.{name}.weight"], expected)
    tensor = model.tensors["model.layers.0.mlp.up_proj.weight"]
    assert tensor.dtype == kind
    assert tensor.format == (kind if kind in ("F32", "F16", "BF16") else "F32")
    block, size = gguf.GGML_QUANT_SIZES[number]
    assert tensor.bytes == tensor.count // block * size


@pytest.mark.parametrize("kind", [kind for kind in gguf.GGMLQuantizationType if "Q" in kind.name])
def test_every_format_that_the_package_reads_is_read(kind: Any, tmp_path: Path) -> None:
    """Random blocks of each quantised format come out as the package's; others are refused."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (3, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key in ("block_count", "embedding_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_tensor("output.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(raw, kind).ravel()
    except NotImplementedError:
        refusal(tmp_path / "m.gguf", "output.weight", kind.name)
        return
    tensor = open_checkpoint(tmp_path / "m.gguf").tensors["lm_head.weight"]
    assert tensor.shape == (3, 512)
    np.testing.assert_array_equal(tensor.read(0, 1536), expected)
    np.testing.assert_array_equal(tensor.read(5, 777), expected[5:777])


@cache
def _opened(kind: str) -> Checkpoint:
    """A model that is mapped, so that its file can go."""
    with tempfile.TemporaryDirectory() as folder:
        return open_checkpoint(write_gguf(Path(folder) / "m.gguf", kind=kind))


@given(
    st.sampled_from(["F16", "BF16", "Q4_0", "Q8_0", "TQ2_0"]),
    st.sampled_from(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    st.integers(0, HIDDEN * HIDDEN),
    st.integers(0, 3000),
    st.sampled_from([64, 1000, 1 << 18]),
)
@settings(max_examples=80, deadline=None)
def test_any_slice_is_a_part_of_the_whole(
    kind: str, module: str, start: int, length: int, tile: int
) -> None:
    """Slices start and stop within rows and blocks, and are handled in pieces of any size."""
    tensor = _opened(kind).tensors[f"model.layers.0.{module}.weight"]
    whole = tensor.read(0, tensor.count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_module, "_TILE", tile)
        found = tensor.read(start, start + length)
    np.testing.assert_array_equal(found, whole[start : start + length])
    assert found.flags.c_contiguous


# Where it is


def test_a_folder_with_one_file_is_a_model(tmp_path: Path) -> None:
    """A folder that holds one GGUF file and no safetensors stands for it."""
    file = write_gguf(tmp_path / "some.Q8_0.gguf", kind="Q8_0")
    by_file, by_folder = open_checkpoint(file), open_checkpoint(tmp_path)
    assert (by_file.name, by_folder.name) == ("some.Q8_0", "some.Q8_0")
    assert (by_file.folder, by_folder.folder) == (file, tmp_path)
    assert by_file.files == by_folder.files == (file,)
    assert open_checkpoint(file, name="other").name == "other"
    by_file.release()


def test_of_several_files_one_must_be_named(tmp_path: Path) -> None:
    """Several files in a folder are several models."""
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name)
    refusal(tmp_path, "expected one .gguf file, found 2", "a.gguf")
    assert open_checkpoint(tmp_path / "b.gguf").name == "b"


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    """Where both are there, the folder is the safetensors model."""
    folder = write_checkpoint(tmp_path / "m", {"a": np.ones(3)})
    write_gguf(folder / "m.gguf")
    assert list(open_checkpoint(folder).tensors) == ["a"]


def test_the_fingerprint_is_the_files(tmp_path: Path) -> None:
    """It depends on the file's content, and not on what lies beside it."""
    marks = []
    for name, kind in (("one", "F32"), ("same", "F32"), ("other", "F16")):
        (tmp_path / name).mkdir()
        file = write_gguf(tmp_path / name / "m.gguf", kind=kind)
        marks.append(fingerprint(open_checkpoint(file)))
        (tmp_path / name / "notes.json").write_text("{}")
        assert fingerprint(open_checkpoint(file)) == marks[-1]
    assert marks[0] == marks[1] != marks[2]


def test_the_package_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, the message says what to install."""
    file = write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"gguf.*modelkin\[gguf\]"):
        open_checkpoint(file)


# What is refused


def test_another_architecture_is_named(tmp_path: Path) -> None:
    """An architecture that was not checked is refused with those that were."""
    file = write_gguf(tmp_path / "m.gguf", "gemma2", tensors=tensors_of("llama"))
    refusal(file, file, "llama, qwen2, qwen3", "found 'gemma2'")


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"split.count": 3}, ["3 parts", "--merge"]),
        ({"llama.expert_count": 8}, ["mixture of experts"]),
        ({"general.alignment": 24}, ["general.alignment", "24"]),
        ({"llama.attention.head_count": 0}, ["head_count", "found 0"]),
        ({"llama.attention.head_count": [8]}, ["head_count", "found [8]"]),
        ({"llama.attention.head_count": 7}, ["attn_q", "7 heads"]),
        ({"llama.block_count": 10**6}, ["block_count", "1000000"]),
        ({"llama.block_count": 0}, ["block_count", "found 0"]),
    ],
    ids=str,
)
def test_metadata_that_cannot_be_is_named(
    metadata: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    """What the metadata says is checked before it is used."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    usual = {f"llama.{key}": 1 for key in ("block_count", "embedding_length")}
    for key, value in {**usual, "llama.attention.head_count": HEADS, **metadata}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_tensor("blk.0.attn_q.weight", tensors_of("llama")["blk.0.attn_q.weight"])
    writer.data_alignment = 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refusal(tmp_path / "m.gguf", tmp_path / "m.gguf", *parts)


def test_a_tensor_that_is_not_known_is_named(tmp_path: Path) -> None:
    """A tensor that the architecture does not have is refused; rotary factors are no weights."""
    tensors = tensors_of("llama")
    vector = np.ones(8, "f4")
    file = write_gguf(tmp_path / "m.gguf", tensors={**tensors, "rope_freqs.weight": vector})
    assert len(open_checkpoint(file).tensors) == len(tensors)
    file = write_gguf(tmp_path / "n.gguf", tensors={**tensors, "blk.0.ssm_a.weight": vector})
    refusal(file, "blk.0.ssm_a.weight", "llama")


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    """A file for machines of the other byte order is refused by its version."""
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refusal(file, "version 2 or 3, little-endian")


@cache
def _whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(Path(folder) / "m.gguf", kind="Q8_0").read_bytes()


def _opens_or_refuses(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder).resolve() / "m.gguf"
        file.write_bytes(content)
        try:
            found = open_checkpoint(file)
        except CheckpointError as error:
            message = str(error)
        else:
            for tensor in found.tensors.values():
                assert tensor.read(0, tensor.count).size == tensor.count
            return
    assert str(file) in message
    assert "\n" not in message


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_truncated_file_is_refused(data: st.DataObject) -> None:
    """A file that ends early, wherever, is refused with its name."""
    whole = _whole()
    _opens_or_refuses(whole[: data.draw(st.integers(0, 3000) | st.integers(0, len(whole) - 1))])


@given(st.binary(max_size=64))
@settings(max_examples=40, deadline=None)
def test_random_bytes_are_refused(content: bytes) -> None:
    """No bytes raise anything but CheckpointError, with or without a GGUF file's beginning."""
    _opens_or_refuses(content)
    _opens_or_refuses(b"GGUF\3\0\0\0" + content)


@given(st.integers(0, 700), st.binary(min_size=1, max_size=8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_changed_header_is_refused_or_read(at: int, patch: bytes, late: bool) -> None:
    """Bytes of the header that are changed give another model or one line, in little time."""
    content = bytearray(_whole())
    # The beginning holds the metadata, the part before the weights the tensors' places.
    start = at if not late else content.rindex(b"output_norm.weight") - 700 + at
    content[start : start + len(patch)] = patch
    _opens_or_refuses(bytes(content))


def test_a_list_of_any_length_is_no_trap(tmp_path: Path) -> None:
    """A count that the file cannot hold ends with the file, and takes no memory."""
    for kind in (0, 8, 9, 99):
        key = b"\1\0\0\0\0\0\0\0k" + (9).to_bytes(4, "little")
        counts = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
        content = b"GGUF\3\0\0\0" + counts + key + kind.to_bytes(4, "little")
        (tmp_path / "m.gguf").write_bytes(content + (2**60).to_bytes(8, "little") + bytes(100))
        refusal(tmp_path / "m.gguf", tmp_path / "m.gguf")
