"""Data sets from files: what is read, and what is said of files that are damaged, foreign or hostile."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import orchestrator as orc

GENERATOR = np.random.default_rng(3)
TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def idx(values: Any, code: int = 0x08) -> bytes:
    array = np.asarray(values).astype(TYPES[code])
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.tobytes()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refused(read: Callable[..., object], path: Path, *texts: str, **options: Any) -> None:
    """The file is refused, by its name, in these words."""
    with pytest.raises(orc.DataError) as found:
        read(path, **options)
    for text in (str(path), *texts):
        assert text in str(found.value)
    assert found.value.exit_code == 2


# IDX


@pytest.mark.parametrize("code", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (2, 0, 4)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_every_idx_array_is_read(
    tmp_path: Path, code: int, shape: tuple[int, ...], pack: Callable[[bytes], bytes]
) -> None:
    wanted = GENERATOR.integers(0, 100, shape).astype(TYPES[code])
    (tmp_path / "it").write_bytes(pack(idx(wanted, code)))
    found = orc.read_idx(tmp_path / "it", sha256=sha256(tmp_path / "it").upper())
    assert (found.dtype, found.shape) == (torch.from_numpy(wanted.astype(TYPES[code].lstrip(">"))).dtype, shape)
    assert np.array_equal(found.numpy(), wanted)
    found.zero_()  # it is nobody else's


GOOD = idx([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "found nothing"),
        (b"\0\0\x08", "found 00 00 08"),
        (b"\0\0\x0a\1" + GOOD[4:], "found 00 00 0a 01"),
        (b"\1" + GOOD[1:], "found 01 00 08 02"),
        (GOOD[:9], "expected 2 sizes"),
        (GOOD[:-1], "expected 6 bytes of values, for the shape (2, 3); found only 5"),
        (GOOD + b"7", "expected 6 bytes of values, for the shape (2, 3); found more"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "found only 0"),
        (gzip.compress(GOOD)[:-9], "an IDX file"),
        (gzip.compress(GOOD)[:-8] + b"12345678", "an IDX file"),
        (gzip.compress(GOOD[:-1]), "found only 5"),
    ],
    ids=range(11),  # the bytes differ: gzip notes the time
)
def test_a_damaged_idx_file_is_told(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "it").write_bytes(content)
    refused(orc.read_idx, tmp_path / "it", text)


@pytest.mark.parametrize("read", [orc.read_idx, orc.read_npz, orc.read_safetensors])
def test_a_file_that_is_missing_or_another_one_is_told(tmp_path: Path, read: Callable[..., object]) -> None:
    refused(read, tmp_path / "none", "no such file; put", "nothing is downloaded")
    refused(read, tmp_path, "Is a directory")
    (tmp_path / "it").write_bytes(b"not at all")
    refused(read, tmp_path / "it", "expected a")
    wanted = "0" * 64
    refused(read, tmp_path / "it", f"of SHA-256 {wanted}, found {sha256(tmp_path / 'it')}", sha256=wanted)
    refused(
        read, tmp_path / "it", "expected a SHA-256 of 64 hexadecimal digits to check it by, found '12'", sha256="12"
    )


def mnist(folder: Path, num: int = 7, pack: Callable[[bytes], bytes] = bytes, end: str = "") -> list[Any]:
    made = []
    for name in ("train", "t10k"):
        x, y = GENERATOR.integers(0, 256, (num, 28, 28)), GENERATOR.integers(0, 10, num)
        (folder / f"{name}-images-idx3-ubyte{end}").write_bytes(pack(idx(x)))
        (folder / f"{name}-labels-idx1-ubyte{end}").write_bytes(pack(idx(y)))
        made += [x, y]
    return made


@pytest.mark.parametrize(("pack", "end"), [(bytes, ""), (gzip.compress, ".gz")])
def test_mnist_is_read(tmp_path: Path, pack: Callable[[bytes], bytes], end: str) -> None:
    made = mnist(tmp_path, pack=pack, end=end)
    digests = {path.name: sha256(path) for path in tmp_path.iterdir()}
    (x, y), (val_x, val_y) = orc.read_mnist(tmp_path, sha256=digests)
    for found, wanted in zip((x, y, val_x, val_y), made, strict=True):
        assert np.array_equal(found.numpy(), wanted)
    assert (x.dtype, x.shape, y.dtype) == (torch.uint8, (7, 28, 28), torch.int64)


def test_what_is_not_mnist_is_told(tmp_path: Path) -> None:
    refused(
        orc.read_mnist, tmp_path, "train-images-idx3-ubyte: no such file, nor train-images-idx3-ubyte.gz; put MNIST's"
    )
    mnist(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx([1, 2]))
    with pytest.raises(
        orc.DataError, match=r"t10k-labels.*a label of a byte for each of 7 images; found uint8 of shape \(2,\)"
    ):
        orc.read_mnist(tmp_path)
    with pytest.raises(orc.DataError, match=r"t10k-labels-idx1-ubyte: .*found [0-9a-f]{64}"):
        orc.read_mnist(tmp_path, sha256={labels.name: "0" * 64})
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((7, 28))))
    with pytest.raises(orc.DataError, match=r"train-images.*of shape \(n, 28, 28\); found uint8 of shape \(7, 28\)"):
        orc.read_mnist(tmp_path)


# CIFAR


def string(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text


def number(value: int) -> bytes:
    return b"K" + bytes([value])


def python2(data: np.ndarray[Any, Any], keys: dict[str, list[int]]) -> bytes:
    """The pickle of protocol 2 that Python 2 and its NumPy write, opcode by opcode, as in the published archives."""
    lists = [string(key.encode()) + b"](" + b"".join(map(number, values)) + b"e" for key, values in keys.items()]
    dtype = (
        b"cnumpy\ndtype\n"
        + string(b"u1")
        + b"K\0K\1\x87R(K\3"
        + string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + string(b"b") + b"\x87R"
        b"(K\1(" + b"".join(b"M" + struct.pack("<H", size) for size in data.shape) + b"t" + dtype + b"\x89"
        + string(data.tobytes()) + b"tb"
    )  # fmt: skip
    return (
        b"\x80\2}(" + b"".join(lists) + string(b"data") + array + string(b"batch_label") + string(b"one of 5") + b"u."
    )


def python3(protocol: int, fortran: bool = False) -> Callable[..., bytes]:
    def dumped(data: np.ndarray[Any, Any], keys: dict[str, list[int]]) -> bytes:
        array = np.asfortranarray(data) if fortran else data
        return pickle.dumps({"data": array, "filenames": ["a.png"], **keys}, protocol)

    return dumped


def binary(data: np.ndarray[Any, Any], keys: dict[str, list[int]]) -> bytes:
    labels = np.array(list(keys.values()), np.uint8).T
    return np.concatenate((labels, data), 1).tobytes()


TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
FORMS = {
    "binary": (binary, ".bin"),
    "python2": (python2, ""),
    **{f"python3-{protocol}": (python3(protocol), "") for protocol in range(5)},
    "fortran": (python3(4, fortran=True), ""),
}


def cifar(folder: Path, form: str, names: list[str], keys: dict[str, int], num: int = 3) -> dict[str, Any]:
    """The files of one form; pixels and labels, by file."""
    folder.mkdir(exist_ok=True)
    dump, end = FORMS[form]
    made = {}
    for name in names:
        data = GENERATOR.integers(0, 256, (num, 3072), np.uint8)
        labels = {key: GENERATOR.integers(0, most, num).tolist() for key, most in keys.items()}
        (folder / f"{name}{end}").write_bytes(dump(data, labels))
        made[name] = data, labels
    return made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inner", [False, True])
def test_cifar10_is_read_in_either_form(tmp_path: Path, form: str, inner: bool) -> None:
    archive = "cifar-10-batches-bin" if form == "binary" else "cifar-10-batches-py"
    made = cifar(tmp_path / archive if inner else tmp_path, form, [*TRAIN, "test_batch"], {"labels": 10})
    digests = {path.name: sha256(path) for path in tmp_path.rglob("*_batch*") if path.is_file()}
    (x, y), (val_x, val_y) = orc.read_cifar10(tmp_path, sha256=digests)
    assert np.array_equal(x.numpy(), np.concatenate([made[name][0] for name in TRAIN]).reshape(15, 3, 32, 32))
    assert y.tolist() == [label for name in TRAIN for label in made[name][1]["labels"]]
    assert np.array_equal(val_x.numpy().reshape(3, -1), made["test_batch"][0])
    assert val_y.tolist() == made["test_batch"][1]["labels"]
    assert (x.dtype, y.dtype, x.is_contiguous()) == (torch.uint8, torch.int64, True)


@pytest.mark.parametrize("form", ["binary", "python2", "python3-4"])
@pytest.mark.parametrize("labels", ["fine", "coarse"])
def test_cifar100_is_read_in_either_form(tmp_path: Path, form: str, labels: Any) -> None:
    made = cifar(tmp_path, form, ["train", "test"], {"coarse_labels": 20, "fine_labels": 100})
    for (x, y), name in zip(orc.read_cifar100(tmp_path, labels=labels), ("train", "test"), strict=True):
        assert np.array_equal(x.numpy().reshape(3, -1), made[name][0])
        assert y.tolist() == made[name][1][f"{labels}_labels"]


def test_the_binary_form_goes_first_and_a_missing_file_is_told(tmp_path: Path) -> None:
    refused(orc.read_cifar10, tmp_path, "found no file of CIFAR-10: expected data_batch_1.bin", "nothing is downloaded")
    (tmp_path / "cifar-10-python.tar.gz").touch()
    refused(orc.read_cifar10, tmp_path, "wants unpacking: tar -xzf cifar-10-python.tar.gz")
    cifar(tmp_path, "python2", [*TRAIN, "test_batch"], {"labels": 10})
    cifar(tmp_path, "binary", TRAIN[:4], {"labels": 10})
    with pytest.raises(
        orc.DataError, match=r"data_batch_5.bin: no such file; put a file of CIFAR-10's binary form there"
    ):
        orc.read_cifar10(tmp_path)


class Call:
    """A pickle of this calls a function."""

    def __init__(self, function: Any, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    "payload",
    [
        lambda path: Call(os.mkdir, path),
        lambda path: Call(eval, f"__import__('os').mkdir({path!r})"),
        lambda path: Call(np.save, path, 1),
        lambda path: {"data": PIXELS, "labels": [0, Call(os.mkdir, path)]},
        lambda path: np.array([Call(os.mkdir, path)], object),
        lambda path: Call(getattr, path, "upper"),
        lambda path: np.dtype([("a", "u1")]),
        lambda path: torch.zeros(2),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_asks_for_anything_else_is_refused_and_not_run(
    tmp_path: Path, payload: Callable[[str], object], protocol: int
) -> None:
    cifar(tmp_path, "python2", [*TRAIN, "test_batch"], {"labels": 10})
    made = tmp_path / "made"
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(payload(str(made)), protocol))
    with pytest.raises(orc.DataError, match=r"data_batch_3: expected a file of CIFAR-10's Python form"):
        orc.read_cifar10(tmp_path)
    assert not made.exists()


HOSTILE = {
    "asks for posix.system: it was not run": b"cposix\nsystem\n(S'true'\ntR.",
    "asks for builtins.exec": b"c__builtin__\nexec\n.",
    "a new": b"cnumpy\ndtype\nN}(X\4\0\0\0_whaK\1u\x86b.",
    "a call of class of arrays": b"cnumpy\nndarray\n)R.",
    "a call of encoding": b"c_codecs\nencode\n(X\1\0\0\0aX\6\0\0\0rot_13tR.",
    "asks for numpy.testing": b"\x80\4\x8c\rnumpy.testing\x8c\7measure\x93.",
    "damaged": b"\x80\2}q\0(",
    "a value of type NoneType": b"N\x72\xff\xff\xff\x7f.",
    "persistent": b"Pname\n.",
    "found a value of type list": b"].",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_crafted_opcodes_come_to_nothing(tmp_path: Path, text: str) -> None:
    cifar(tmp_path, "python2", [*TRAIN, "test_batch"], {"labels": 10})
    (tmp_path / "data_batch_1").write_bytes(HOSTILE[text])
    with pytest.raises(orc.DataError) as found:
        orc.read_cifar10(tmp_path)
    assert "data_batch_1: " in str(found.value)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_pickle_with_damaged_bytes_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(python2(PIXELS[:1], {"labels": [1]}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from([*range(150), *range(len(whole) - 60, len(whole))]))
        whole[at] = data.draw(st.integers(0, 255))
    if not (tmp_path / "test_batch").exists():
        cifar(tmp_path, "python2", [*TRAIN, "test_batch"], {"labels": 10}, num=1)
    (tmp_path / "data_batch_1").write_bytes(whole)
    with contextlib.suppress(orc.DataError):
        (x, y), _ = orc.read_cifar10(tmp_path)
        assert (x.shape[1:], y.shape) == ((3, 32, 32), (len(x),))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"labels": [0, 1]}, "named 'data'; found a dict with the keys labels"),
        ({"data": PIXELS[:, :9], "labels": [0, 1]}, r"expected an array of shape \(n, 3072\)"),
        ({"data": PIXELS, "labels": [0]}, "a list of 2 whole numbers named 'labels'; found a list of 1"),
        ({"data": PIXELS, "labels": [0, True]}, "a list of 2 whole numbers"),
        ({"data": PIXELS, "labels": [0, 10]}, "labels from 0 to 9, found one of 10"),
        ({"data": PIXELS, "labels": [0, 1 << 99]}, "labels from 0 to 9"),
        ({"data": PIXELS.astype(np.float32), "labels": [0, 1]}, "damaged"),
    ],
)
def test_a_pickle_of_another_form_is_told(tmp_path: Path, content: object, text: str) -> None:
    cifar(tmp_path, "python2", [*TRAIN, "test_batch"], {"labels": 10})
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(orc.DataError, match=rf"data_batch_2: .*{text}"):
        orc.read_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "of 3073 bytes a sample; found 0 bytes"),
        (b"\0" * 3072, "of 3073 bytes a sample; found 3072 bytes"),
        (b"\x0a" * 3073, "labels from 0 to 9, found 10 at sample 0"),
    ],
)
def test_a_damaged_binary_file_is_told(tmp_path: Path, content: bytes, text: str) -> None:
    cifar(tmp_path, "binary", [*TRAIN, "test_batch"], {"labels": 10})
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(orc.DataError, match=f"test_batch.bin: .*{text}"):
        orc.read_cifar10(tmp_path)


# Tensors by name


def test_npz_is_read_without_pickles(tmp_path: Path) -> None:
    path = tmp_path / "it.npz"
    wanted = {
        "x": np.arange(6.0).reshape(2, 3).T,
        "y": np.array([1, 2], ">i8"),
        "z": np.float32(3),
        "b": np.array([True]),
    }
    np.savez_compressed(path, **wanted)  # type: ignore[arg-type]
    found = orc.read_npz(path, sha256=sha256(path))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name].numpy(), wanted[name]) for name in wanted)
    assert found["x"].dtype == torch.float64
    assert found["y"].dtype == torch.int64


@pytest.mark.parametrize("value", [np.array([{}], object), np.array(["text"]), np.zeros(2, "M8[s]")])
def test_an_array_that_is_no_tensor_is_refused(tmp_path: Path, value: Any) -> None:
    np.savez(tmp_path / "it.npz", x=value)
    refused(orc.read_npz, tmp_path / "it.npz", "expected an")


def test_a_single_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "it.npy", np.zeros(2))
    refused(orc.read_npz, tmp_path / "it.npy", "found a single array, as numpy.save writes it")


@pytest.mark.parametrize("cut", [10, 60, 150])
def test_a_cut_npz_is_told(tmp_path: Path, cut: int) -> None:
    np.savez(tmp_path / "it.npz", x=np.zeros(50))
    (tmp_path / "it.npz").write_bytes((tmp_path / "it.npz").read_bytes()[:-cut])
    refused(orc.read_npz, tmp_path / "it.npz", "expected an .npz file")


def test_safetensors_are_read(tmp_path: Path) -> None:
    wanted = {"x": torch.randn(3, 2), "y": torch.arange(3)}
    save_file(wanted, tmp_path / "it")
    found = orc.read_safetensors(str(tmp_path / "it"), sha256=sha256(tmp_path / "it"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (tmp_path / "it").write_bytes((tmp_path / "it").read_bytes()[:-1])
    refused(orc.read_safetensors, tmp_path / "it", "expected a .safetensors file")
