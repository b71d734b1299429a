"""Statistics that are remembered from call to call."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import family, spy, write

import modelkin as mk
from modelkin.checkpoint import MappedTensor, open_checkpoint
from modelkin.errors import CheckpointError
from modelkin.measuring import measure, stored


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled as soon as they are written."""
    monkeypatch.setattr(stored, "SETTLED", -1.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that weights are read from, one for each slice."""
    found: list[Path] = []
    read = MappedTensor.read

    def spied(tensor: MappedTensor, start: int, stop: int) -> Any:
        found.append(tensor.file)
        return read(tensor, start, stop)

    monkeypatch.setattr(MappedTensor, "read", spied)
    return found


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A base and six models."""
    return write(tmp_path / "models", family(0, 6, {"a": 50, "b.c": 7}))


def _kinship(folders: Sequence[Path], **how: Any) -> dict[str, Any]:
    return mk.kinship(folders[0], folders[1:], **how).as_dict("tensor")


def _close(found: Any, expected: Any) -> bool:
    """Whether two results are the same but for rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            _close(found[key], expected[key]) for key in expected
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(
            _close(one, other) for one, other in zip(found, expected, strict=True)
        )
    return bool(found == (pytest.approx(expected) if isinstance(expected, float) else expected))


def _entries() -> Iterator[Path]:
    """The files of the cache of statistics."""
    return (Path(os.environ["MODELKIN_CACHE"]) / "statistics").rglob("*.*")


@pytest.mark.usefixtures("settled")
def test_the_second_call_reads_no_weights(folders: list[Path], reads: list[Path]) -> None:
    """What was measured once is answered from memory: the same numbers, to the bit."""
    first = _kinship(folders[:4])
    assert {file.parent for file in reads} == set(folders[:4])
    reads.clear()
    assert _kinship(folders[:4]) == first
    assert reads == []
    assert len(list(_entries())) == 2


@pytest.mark.usefixtures("settled")
def test_without_the_cache_nothing_is_remembered(folders: list[Path], reads: list[Path]) -> None:
    """A call that is told so neither asks the cache nor leaves anything there."""
    _kinship(folders[:3], cache=False)
    assert list(_entries()) == []
    _kinship(folders[:3])
    reads.clear()
    _kinship(folders[:3], cache=False)
    assert reads


@pytest.mark.usefixtures("settled")
def test_models_in_another_order_are_known(folders: list[Path], reads: list[Path]) -> None:
    """The order of the models makes no difference to what is known, nor does asking for fewer."""
    base, a, b, c, d, *_ = folders
    expected = [_kinship(some, cache=False) for some in ([base, c, a, d, b], [base, d, b])]
    _kinship([base, a, b, c, d])
    reads.clear()
    assert _close(_kinship([base, c, a, d, b]), expected[0])
    assert _close(_kinship([base, d, b]), expected[1])
    assert reads == []
    assert len(list(_entries())) == 2


@pytest.mark.usefixtures("settled")
def test_what_is_known_is_extended(folders: list[Path], reads: list[Path]) -> None:
    """Of more models than are known the pairs of known ones are not computed again."""
    expected = _kinship(folders, cache=False)
    _kinship(folders[:3])
    _kinship([folders[0], folders[5], folders[2], folders[3]])
    assert _close(_kinship(folders), expected)
    reads.clear()
    assert _close(_kinship(folders), expected)
    assert reads == []


@pytest.mark.usefixtures("settled")
def test_other_patterns_are_other_statistics(folders: list[Path], reads: list[Path]) -> None:
    """What is known of some tensors is not taken for what is asked of others."""
    patterns: list[dict[str, Any]] = [{}, {"exclude": ["a"]}, {"include": ["a"]}]
    expected = [_kinship(folders[:4], cache=False, **some) for some in patterns]
    assert len({repr(one) for one in expected}) == 3
    for some, one in zip(patterns, expected, strict=True):
        reads.clear()
        assert _kinship(folders[:4], **some) == one
        assert reads
    reads.clear()
    for some, one in zip(patterns, expected, strict=True):
        assert _kinship(folders[:4], **some) == one
    # Another pattern for the same tensors.
    assert _kinship(folders[:4], exclude=["b"]) == expected[2]
    assert reads == []


@pytest.mark.usefixtures("settled")
def test_the_base_is_part_of_what_is_known(folders: list[Path], reads: list[Path]) -> None:
    """The same models against another base are other statistics."""
    _kinship(folders[:4])
    expected = _kinship([folders[4], *folders[1:4]], cache=False)
    reads.clear()
    assert _kinship([folders[4], *folders[1:4]]) == expected
    assert reads


@pytest.mark.usefixtures("settled")
def test_a_folder_that_is_given_twice_is_known(folders: list[Path], reads: list[Path]) -> None:
    """One model under two names is two models, and both are known the next time."""
    base, a, b, *_ = folders
    expected = _kinship([base, a, b, a], cache=False)
    assert expected["ed"][0][2] == 0
    for some in ([base, a, b, a], [base, a, b]):
        assert _kinship(some)
    reads.clear()
    assert _close(_kinship([base, a, b, a]), expected)
    assert _close(_kinship([base, a, a]), _kinship([base, a, a], cache=False))
    assert set(reads) == {folder / "model.safetensors" for folder in (base, a)}


@pytest.mark.usefixtures("settled")
def test_one_model_that_is_known_is_known_twice(folders: list[Path], reads: list[Path]) -> None:
    """What is known of a model answers for it under any number of names."""
    base, a, b, *_ = folders
    expected = _kinship([base, a, b, a, b], cache=False)
    _kinship([base, a, b])
    reads.clear()
    assert _close(_kinship([base, a, b, a, b]), expected)
    assert reads == []


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_changed_file_is_never_trusted(which: int, how: str, folders: list[Path]) -> None:
    """Other weights in a file of the same size and time are other weights."""
    before = _kinship(folders[:4])
    file = folders[which] / "model.safetensors"
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[-100:] = np.arange(25, dtype="<f4").tobytes()
    if how == "replaced":
        new = file.with_name("new")
        new.write_bytes(content)
        os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
        new.replace(file)
    else:
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    after = _kinship(folders[:4])
    assert after == _kinship(folders[:4], cache=False)
    assert not _close(after["pcc"], before["pcc"])


def test_young_files_are_not_remembered(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was changed just now may change again within a tick: it is not remembered."""
    monkeypatch.setattr(stored, "SETTLED", 3600.0)
    assert _kinship(folders[:3])
    assert list(_entries()) == []


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_changes_meanwhile_is_not_remembered(
    which: int, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that changed while they were measured nobody knows what was measured."""

    def touch(_: int) -> None:
        os.utime(folders[which] / "model.safetensors", (0, 0))

    spy(monkeypatch, touch)
    assert _kinship(folders[:3])
    assert list(_entries()) == []


@pytest.mark.usefixtures("settled")
def test_a_file_that_goes_away_is_not_remembered(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is deleted while it is measured, or before, is no error of the cache."""

    def delete(_: int) -> None:
        (folders[1] / "model.safetensors").unlink(missing_ok=True)

    base, *models = (open_checkpoint(folder) for folder in folders[:3])
    with monkeypatch.context() as patch:
        spy(patch, delete)
        # It is mapped before it goes away.
        assert measure(base, models, cache=True).models == ("m1", "m2")
    assert list(_entries()) == []
    base, *models = (open_checkpoint(folder) for folder in folders[2:5])
    (folders[3] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        measure(base, models, cache=True)


_DAMAGES: Mapping[str, tuple[str, Callable[[bytes], bytes]]] = {
    "empty list": (".json", lambda _: b""),
    "no JSON": (".json", lambda _: b"\xff\x00 {"),
    "other JSON": (".json", lambda _: b"[1, 2]"),
    "no list": (".json", lambda _: b'{"models": 5}'),
    "no names": (".json", lambda _: b'{"models": [1, null]}'),
    "one more": (".json", lambda raw: raw.replace(b"[", b'["x", ')),
    "one less": (
        ".json",
        lambda raw: json.dumps({"models": json.loads(raw)["models"][1:]}).encode(),
    ),
    "no arrays": (".npz", lambda _: b""),
    "half of them": (".npz", lambda raw: raw[: len(raw) // 2]),
    "another bit": (".npz", lambda raw: raw.replace(raw[200:208], b"\x7f" * 8)),
    "something else": (".npz", lambda _: b"PK\x03\x04 no archive"),
}


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_statistics_are_replaced(
    damage: str, folders: list[Path], reads: list[Path]
) -> None:
    """What cannot be read in the cache is measured again, and whole the next time."""
    expected = _kinship(folders[:4])
    kind, change = _DAMAGES[damage]
    (file,) = (file for file in _entries() if file.suffix == kind)
    file.write_bytes(change(file.read_bytes()))
    reads.clear()
    assert _kinship(folders[:4]) == expected
    assert reads
    reads.clear()
    assert _kinship(folders[:4]) == expected
    assert reads == []


@pytest.mark.usefixtures("settled")
def test_arrays_of_another_shape_or_kind_are_not_used(folders: list[Path]) -> None:
    """Arrays are looked at before they are believed; pickled ones are never loaded."""
    expected = _kinship(folders[:4])
    (file,) = (file for file in _entries() if file.suffix == ".npz")
    with np.load(file) as loaded:
        arrays = dict(loaded)
    for changed in (
        {**arrays, "gram_TNN": arrays["gram_TNN"][:, :2, :2]},
        {**arrays, "sum_TN": arrays["sum_TN"].astype(np.float32)},
        {**arrays, "base_T": np.array([object(), None])},
        {name: array for name, array in arrays.items() if name != "cross_TN"},
    ):
        np.savez(file, **changed)
        assert _kinship(folders[:4]) == expected


@pytest.mark.usefixtures("settled")
def test_a_worse_entry_answers_for_a_damaged_one(folders: list[Path], reads: list[Path]) -> None:
    """Where the entry that knows most cannot be read, the next one is asked."""
    expected = _kinship(folders[:3])
    _kinship(folders)
    for file in _entries():
        if file.suffix == ".npz" and file.stat().st_size > 2500:
            file.write_bytes(b"")
    assert sum(file.stat().st_size == 0 for file in _entries()) == 1
    reads.clear()
    assert _kinship(folders[:3]) == expected
    assert reads == []


@pytest.mark.usefixtures("settled")
def test_a_cache_that_cannot_be_written_answers(
    folders: list[Path], reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that may only be read is as good for what it knows, and silent about the rest."""
    expected = _kinship(folders[:4])
    before = {file: file.read_bytes() for file in _entries()}

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, "read-only")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    reads.clear()
    assert _kinship(folders[:4]) == expected
    assert reads == []
    assert _kinship(folders)
    assert {file: file.read_bytes() for file in _entries()} == before


@pytest.mark.usefixtures("settled")
def test_a_file_in_place_of_the_cache_is_no_error(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache cannot be, everything is measured."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("MODELKIN_CACHE", str(tmp_path / "file"))
    assert _kinship(folders[:4]) == _kinship(folders[:4])


@pytest.mark.usefixtures("settled")
def test_an_entry_that_another_process_deletes_is_not_half_there(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that goes away while it is read leaves no list without statistics behind."""
    expected = _kinship(folders[:4])
    load = np.load

    def deleting(*arguments: Any, **more: Any) -> Any:
        found = load(*arguments, **more)
        for file in list(_entries()):
            file.unlink()
        return found

    monkeypatch.setattr(np, "load", deleting)
    assert _kinship(folders[:4]) == expected
    assert list(_entries()) == []


@pytest.mark.usefixtures("settled")
def test_what_was_used_longest_ago_makes_room(
    folders: list[Path], reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the cache is full, the entry that was asked longest ago goes, and no other."""
    base, *models = folders
    pairs = [[base, models[n], models[n + 1]] for n in range(4)]
    for pair in pairs[:3]:
        _kinship(pair)
    lists = [file for file in _entries() if file.suffix == ".json"]
    for file in lists:
        os.utime(file, (1, 1))
    _kinship(pairs[0])
    _kinship(pairs[2])
    size = max(file.stat().st_size for file in _entries() if file.suffix == ".npz")
    monkeypatch.setattr(stored, "ROOM", 3 * size)
    # Left behind by a process that was killed: no list, and older than all.
    orphan = lists[0].with_name("orphan.npz")
    orphan.write_bytes(b"x" * size)
    os.utime(orphan, (0, 0))
    _kinship(pairs[3])
    assert not orphan.exists()
    assert len(list(_entries())) == 6
    for number, known in enumerate([True, False, True, True]):
        reads.clear()
        mk.kinship(pairs[number][0], pairs[number][1:])
        assert (reads == []) == known
        if not known:
            # Measured again and remembered, it takes the room of another.
            break


@pytest.mark.usefixtures("settled")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_names_that_are_no_text_are_no_obstacle(
    folders: list[Path], reads: list[Path], tmp_path: Path
) -> None:
    """Files whose names are no text are remembered like others."""
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    models = [{"w": np.arange(5.0) * n} for n in range(3)]
    written = write(strange, models)
    expected = mk.kinship(written[0], written[1:]).ed_NN
    reads.clear()
    np.testing.assert_array_equal(mk.kinship(written[0], written[1:]).ed_NN, expected)
    assert reads == []
