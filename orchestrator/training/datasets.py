"""Data sets from files that the user has: MNIST's IDX files, CIFAR-10 and CIFAR-100, npz, safetensors.

    (x, y), (val_x, val_y) = read_mnist("data/mnist")           uint8 (n, 28, 28), int64 (n,)
    (x, y), (val_x, val_y) = read_cifar10("data/cifar")         uint8 (n, 3, 32, 32), int64 (n,)
    tensors = read_npz("data/train.npz", sha256="9f86d0...")    a tensor by name

Nothing is downloaded: where a file is missing, the error says which, and where to put it. No file can run code: the
pickles of CIFAR's Python form are read by a reader that knows nothing but what they hold, and whatever else is asked
for in one is refused before it is looked up. Every error is an `errors.DataError` that names the file.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import math
import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal, TypeAlias, cast

import numpy as np
import torch

from orchestrator.errors import DataError

__all__ = ["Parts", "read_cifar10", "read_cifar100", "read_idx", "read_mnist", "read_npz", "read_safetensors"]

Part: TypeAlias = tuple[torch.Tensor, torch.Tensor]
Parts: TypeAlias = tuple[Part, Part]
"""Training and test samples, each as inputs and labels."""
Digests: TypeAlias = "Mapping[str, str]"
"""SHA-256 by file name, in hexadecimal digits; files that are not named are not checked."""

_PIECE: Final = 1 << 20

# http://yann.lecun.com/exdb/mnist, "The IDX file format": the third byte says the type, the fourth how many dimensions.
_IDX_TYPES: Final = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

_SIDE: Final = 32
_PIXELS: Final = 3 * _SIDE * _SIDE


@contextlib.contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """Whatever a damaged file makes a reader raise, told as what it is."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: it can't be read as {what}: {error.strerror or error}") from error
    except Exception as error:
        raise DataError(f"{path}: expected {what}, found a damaged file, or another one: {error}") from error


def _opened(path: Path, sha256: str | None, what: str) -> BinaryIO:
    """The file, its checksum checked.

    Raises:
        DataError: there is none that can be read, or it has another checksum.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise DataError(f"{path}: expected a SHA-256 of 64 hexadecimal digits to check it by, found {sha256!r}")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; put {what} there: nothing is downloaded") from None
    except OSError as error:
        raise DataError(f"{path}: expected {what}, which can't be opened: {error.strerror}") from None
    if sha256 is not None:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256.lower():
            file.close()
            raise DataError(
                f"{path}: expected {what} of SHA-256 {sha256.lower()}, found {found}: another file, or damaged"
            )
        file.seek(0)
    return file


# IDX


def read_idx(path: Path | str, *, sha256: str | None = None) -> torch.Tensor:
    """The array of an IDX file, of its own type and shape; also where it is compressed by gzip, whatever its name.

    Args:
        path: the file.
        sha256: of the file as it lies there, in hexadecimal digits; None not to check it.

    Raises:
        DataError: it is missing, no IDX file, or of another length than it says; or has another checksum.
    """
    path = Path(path)
    with _opened(path, sha256, "an IDX file") as file, _told(path, "an IDX file"):
        is_packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not is_packed:
            return _idx(path, file)
        with gzip.GzipFile(fileobj=file) as unpacked:
            return _idx(path, cast(BinaryIO, unpacked))


def _idx(path: Path, file: BinaryIO) -> torch.Tensor:
    begin = file.read(4)
    kind = _IDX_TYPES.get(begin[2]) if len(begin) == 4 and begin[:2] == b"\0\0" else None
    if kind is None:
        raise DataError(
            f"{path}: expected an IDX file, whose first bytes are 0, 0, one of "
            f"{', '.join(f'0x{code:02x}' for code in _IDX_TYPES)}, and the number of dimensions; found "
            f"{begin.hex(' ') or 'nothing'}"
        )
    sizes = file.read(4 * begin[3])
    if len(sizes) < 4 * begin[3]:
        raise DataError(f"{path}: expected {begin[3]} sizes after the first 4 bytes, found the end of the file")
    shape = struct.unpack(f">{begin[3]}I", sizes)
    dtype = np.dtype(kind)
    num_bytes = math.prod(shape) * dtype.itemsize
    values = _at_most(file, num_bytes + 1)
    if len(values) != num_bytes:
        found = "more" if len(values) > num_bytes else f"only {len(values)}"
        raise DataError(f"{path}: expected {num_bytes} bytes of values, for the shape {shape}; found {found}")
    return _tensor(np.frombuffer(values, dtype).reshape(shape))


def _at_most(file: BinaryIO, num: int) -> bytearray:
    """The next bytes, `num` of them or all that are left; a size that is damage takes no memory."""
    found = bytearray()
    while len(found) < num and (piece := file.read(min(_PIECE, num - len(found)))):
        found += piece
    return found


def _tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
    """The array as a tensor, in this machine's order of bytes."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


def read_mnist(folder: Path | str, *, sha256: Digests | None = None) -> Parts:
    """MNIST, or a data set in its form, such as Fashion-MNIST, of any number of samples.

    Args:
        folder: has train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, each as it is or as .gz.
        sha256: of the files as they lie there, by their names; None not to check them.

    Returns:
        Training and test samples: x uint8 of shape (n, 28, 28), y int64 of shape (n,).

    Raises:
        DataError: a file is missing, or not what its name says.
    """
    return _mnist_part(Path(folder), "train", sha256 or {}), _mnist_part(Path(folder), "t10k", sha256 or {})


def _mnist_part(folder: Path, name: str, sha256: Digests) -> Part:
    x_path = _idx_path(folder, f"{name}-images-idx3-ubyte")
    y_path = _idx_path(folder, f"{name}-labels-idx1-ubyte")
    x, y = (read_idx(path, sha256=sha256.get(path.name)) for path in (x_path, y_path))
    if x.dtype != torch.uint8 or x.shape[1:] != (28, 28):
        raise DataError(f"{x_path}: expected images of bytes, of shape (n, 28, 28); found {_described(x)}")
    if y.dtype != torch.uint8 or y.shape != x.shape[:1]:
        raise DataError(f"{y_path}: expected a label of a byte for each of {len(x)} images; found {_described(y)}")
    return x, y.long()


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _idx_path(folder: Path, name: str) -> Path:
    for found in (folder / name, folder / f"{name}.gz"):
        if found.exists():
            return found
    raise DataError(
        f"{folder / name}: no such file, nor {name}.gz; put MNIST's four IDX files into {folder}: nothing is downloaded"
    )


# CIFAR


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cifar:
    """One of the two data sets, as https://www.cs.toronto.edu/~kriz/cifar.html describes its files.

    Args:
        name: CIFAR-10 or CIFAR-100.
        archives: names of its folders in the archives, of the binary form and of Python's.
        train: names of the training files in Python's form.
        test: that of the test file.
        labels: of a sample, in the order of the binary form: the key in Python's form, and how many classes.
    """

    name: str
    archives: tuple[str, str]
    train: tuple[str, ...]
    test: str
    labels: tuple[tuple[str, int], ...]

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


_CIFAR10: Final = _Cifar(
    name="CIFAR-10",
    archives=("cifar-10-batches-bin", "cifar-10-batches-py"),
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    labels=(("labels", 10),),
)
_CIFAR100: Final = _Cifar(
    name="CIFAR-100",
    archives=("cifar-100-binary", "cifar-100-python"),
    train=("train",),
    test="test",
    labels=(("coarse_labels", 20), ("fine_labels", 100)),
)


def read_cifar10(folder: Path | str, *, sha256: Digests | None = None) -> Parts:
    """CIFAR-10 from its binary files or those of its Python form, of any number of samples.

    Args:
        folder: has the files of either form, or the folder of that name that its archive unpacks to: data_batch_1.bin
            to data_batch_5.bin and test_batch.bin, or the same without .bin. The binary form goes first.
        sha256: of the files, by their names; None not to check them.

    Returns:
        Training and test samples: x uint8 of shape (n, 3, 32, 32), y int64 of shape (n,).

    Raises:
        DataError: a file is missing, or not what its name says.
    """
    return _cifar(_CIFAR10, Path(folder), "labels", sha256 or {})


def read_cifar100(
    folder: Path | str, *, labels: Literal["fine", "coarse"] = "fine", sha256: Digests | None = None
) -> Parts:
    """CIFAR-100 from its binary files or those of its Python form, of any number of samples.

    Args:
        folder: as for `read_cifar10`: train.bin and test.bin, or the same without .bin.
        labels: those of the 100 classes, or of the 20 above them.
        sha256: of the files, by their names; None not to check them.

    Returns:
        As `read_cifar10`.

    Raises:
        DataError: a file is missing, or not what its name says.
    """
    return _cifar(_CIFAR100, Path(folder), f"{labels}_labels", sha256 or {})


def _cifar(kind: _Cifar, folder: Path, key: str, sha256: Digests) -> Parts:
    suffix, found = _cifar_folder(kind, folder)
    read = _cifar_binary if suffix else _cifar_pickle

    def part(names: tuple[str, ...]) -> Part:
        paths = [found / f"{name}{suffix}" for name in names]
        x, y = zip(*(read(kind, path, key, sha256.get(path.name)) for path in paths), strict=True)
        return torch.cat(x), torch.cat(y)

    return part(kind.train), part((kind.test,))


def _cifar_folder(kind: _Cifar, folder: Path) -> tuple[str, Path]:
    """What the names of the files end with, and where they are: the first place that has one of them."""
    for suffix, archive in zip((".bin", ""), kind.archives, strict=True):
        for found in (folder, folder / archive):
            if any((found / f"{name}{suffix}").is_file() for name in kind.files):
                return suffix, found
    packed = next((path for path in sorted(folder.glob("cifar*.tar.gz"))), None)
    unpack = "" if packed is None else f"; {packed.name} is there, and wants unpacking: tar -xzf {packed.name}"
    raise DataError(
        f"{folder}: found no file of {kind.name}: expected {kind.train[0]}.bin and the others of its binary form, or "
        f"{kind.train[0]} and the others of its Python form; put them there: nothing is downloaded{unpack}"
    )


def _cifar_binary(kind: _Cifar, path: Path, key: str, sha256: str | None) -> Part:
    what = f"a file of {kind.name}'s binary form"
    with _opened(path, sha256, what) as file, _told(path, what):
        values = bytearray(file.read())
    num_labels = len(kind.labels)
    size = num_labels + _PIXELS
    if not values or len(values) % size:
        raise DataError(f"{path}: expected {what}, of {size} bytes a sample; found {len(values)} bytes")
    rows = torch.frombuffer(values, dtype=torch.uint8).view(-1, size)
    at = [name for name, _ in kind.labels].index(key)
    x = rows[:, num_labels:].reshape(-1, 3, _SIDE, _SIDE)
    return x, _in_range(path, rows[:, at].long(), kind.labels[at][1])


def _in_range(path: Path, y: torch.Tensor, num_classes: int) -> torch.Tensor:
    wrong = ((y < 0) | (y >= num_classes)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise DataError(f"{path}: expected labels from 0 to {num_classes - 1}, found {int(y[at])} at sample {at}")
    return y


def _cifar_pickle(kind: _Cifar, path: Path, key: str, sha256: str | None) -> Part:
    what = f"a file of {kind.name}'s Python form"
    with _opened(path, sha256, what) as file, _told(path, what):
        found = _Unpickler(path, what, io.BytesIO(file.read())).load()
    named = {_text(name): value for name, value in found.items()} if isinstance(found, dict) else {}
    data, labels = named.get("data"), named.get(key)
    if not isinstance(data, _Array) or data.values is None:
        raise DataError(f"{path}: expected {what}, with an array of bytes named 'data'; found {_outline(found)}")
    if len(data.shape) != 2 or data.shape[1] != _PIXELS or not data.shape[0]:
        raise DataError(f"{path}: expected an array of shape (n, {_PIXELS}) named 'data', found the shape {data.shape}")
    x = torch.frombuffer(bytearray(data.values), dtype=torch.uint8)
    x = x.view(data.shape[::-1]).T if data.is_fortran else x.view(data.shape)
    if not isinstance(labels, list) or len(labels) != len(x) or not all(type(label) is int for label in labels):
        raise DataError(f"{path}: expected a list of {len(x)} whole numbers named {key!r}; found {_outline(labels)}")
    num_classes = dict(kind.labels)[key]
    # Before it becomes a tensor: a number of a damaged file may have any size.
    wrong = next((label for label in labels if not 0 <= label < num_classes), None)
    if wrong is not None:
        raise DataError(f"{path}: expected labels from 0 to {num_classes - 1}, found one of {wrong}")
    return x.reshape(-1, 3, _SIDE, _SIDE).contiguous(), torch.tensor(labels, dtype=torch.int64)


def _text(name: object) -> object:
    return name.decode("latin-1") if isinstance(name, bytes) else name


def _outline(found: object) -> str:
    if isinstance(found, dict):
        return f"a dict with the keys {', '.join(sorted(str(_text(name)) for name in found)) or '(none)'}"
    return f"a list of {len(found)}" if isinstance(found, list) else f"a value of type {type(found).__name__}"


# The pickles of CIFAR's Python form


class _Array:
    """What stands for a NumPy array while a pickle is read: NumPy itself never sees its parts.

    Made and given its state as the pickle says; has `values` only where that is a plain array of bytes.
    """

    __slots__ = ("is_fortran", "shape", "values")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.is_fortran = False
        self.values: bytes | None = None

    def __setstate__(self, state: object) -> None:
        """As `numpy.ndarray.__reduce__` gives it: version, shape, type, order, values."""
        _, shape, dtype, is_fortran, values = cast("tuple[object, ...]", state)
        if not isinstance(dtype, _Dtype) or not isinstance(values, bytes) or not isinstance(shape, tuple):
            raise pickle.UnpicklingError("an array that is not one of bytes")
        if not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) != len(values):
            raise pickle.UnpicklingError(f"an array of shape {shape} with {len(values)} bytes")
        self.shape, self.is_fortran, self.values = shape, bool(is_fortran), values


class _Dtype:
    """What stands for the type of an array: that of bytes, the only one there is."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which bytes have not."""


class _Known:
    """What a pickle may call, each as itself: no function or class is ever in its reach."""

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, "_what"):
            raise pickle.UnpicklingError(f"a new {name!r} for {self._what}")
        object.__setattr__(self, name, value)

    def __call__(self, *args: object) -> object:
        if self._what == "array":
            return _Array()
        if self._what == "type" and _text(args[0]) in ("u1", "uint8"):
            return _Dtype()
        if (
            self._what == "encoding"
            and len(args) == 2
            and args[1] in ("latin1", b"latin1")
            and isinstance(args[0], str)
        ):
            return args[0].encode("latin-1")  # how Python 3 writes bytes for Python 2
        raise pickle.UnpicklingError(f"a call of {self._what} with {args!r:.80}")


_KNOWN: Final = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy", "ndarray"): "class of arrays",
    ("numpy", "dtype"): "type",
    ("_codecs", "encode"): "encoding",
}


# The one written in Python: that in C takes 16 bytes of memory for each number that a damaged opcode names.
class _Unpickler(pickle._Unpickler):
    """Reads numbers, texts, bytes, lists, tuples, dicts and arrays of bytes."""

    def __init__(self, path: Path, what: str, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")  # the files were written by Python 2
        self._path = path
        self._what = what

    def find_class(self, module: str, name: str, /) -> _Known:
        """Something of `_KNOWN`; nothing is imported or looked up.

        Raises:
            DataError: the pickle asks for something else.
        """
        known = _KNOWN.get((module, name))
        if known is None:
            raise DataError(
                f"{self._path}: expected {self._what}, which holds arrays, lists and texts alone; found a pickle that "
                f"asks for {module}.{name}: it was not run; don't use this file"
            )
        return _Known(known)


# Tensors by name


def read_npz(path: Path | str, *, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """The arrays of an .npz file, by name; nothing in it is unpickled.

    Args:
        path: the file.
        sha256: of it, in hexadecimal digits; None not to check it.

    Raises:
        DataError: it is missing, no such file, or has an array that is no tensor; or has another checksum.
    """
    path = Path(path)
    with _opened(path, sha256, "an .npz file") as file, _told(path, "an .npz file"):
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: expected an .npz file, found a single array, as numpy.save writes it")
        return {name: _named_tensor(path, name, found[name]) for name in found.files}


def _named_tensor(path: Path, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
    try:
        return _tensor(array)
    except TypeError:
        raise DataError(f"{path}: {name}: expected an array of numbers, found one of {array.dtype}") from None


def read_safetensors(path: Path | str, *, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, by name.

    Args:
        path: the file.
        sha256: of it, in hexadecimal digits; None not to check it.

    Raises:
        DataError: it is missing, or no such file; or has another checksum.
    """
    from safetensors.torch import load_file

    path = Path(path)
    _opened(path, sha256, "a .safetensors file").close()
    with _told(path, "a .safetensors file"):
        return load_file(path)
