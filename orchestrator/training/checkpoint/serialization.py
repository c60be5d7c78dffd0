"""State as JSON and tensors, and both as safetensors bytes: never a pickle.

    packed = pack({"net": net.state_dict(), "step": 3})     a structure (JSON text) and tensors by name
    pieces = encode(packed, {"schema": "1"})                safetensors bytes, piece by piece, without a copy
    packed, metadata = decode(b"".join(pieces))
    unpack(packed)                                          the state again, equal in type and in every bit

A state is any nesting of dict, OrderedDict, Counter, list, tuple, deque; of None, bool, int, float, str, bytes; of
tensors and of NumPy's numbers and arrays. Tensors that are one memory are stored once, and are one tensor afterwards.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors

from orchestrator.core.atomic import Json, JsonObject

__all__ = ["Packed", "Tree", "decode", "encode", "memory", "pack", "unpack"]

Tree: TypeAlias = object
"""What `pack` takes; see the module."""

_DEEPEST = 100
_HEADER_LIMIT = 100_000_000
"""Bytes of a safetensors header; readers of that format refuse more."""
_ALIGNMENT = 8

_STRUCTURE = "state"
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Kinds of numbers that every release of safetensors knows; tensors of others are stored as their bytes."""
_RAW = {
    str(kind).removeprefix("torch."): kind
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype) and (kind.is_complex or kind.is_floating_point) and kind not in _CODES
}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
_NUMPY_KINDS = "biufc"
_NUMPY_DTYPE = re.compile(f"[<>|=][{_NUMPY_KINDS}][0-9]{{1,2}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A state in two parts.

    Args:
        structure: JSON text in which tensors stand as names.
        tensors: by name; dense, of any device and strides, sharing their memory with the state.
    """

    structure: str
    tensors: Mapping[str, torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """What the tensors hold, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


# Packing


def pack(state: Tree) -> Packed:
    """The parts of `state`; its tensors are not copied, everything else is.

    Raises:
        TypeError: something in it is of none of the module's types; names where, and what to do.
    """
    packer = _Packer()
    structure = json.dumps(packer.node(state), separators=(",", ":"), allow_nan=False)
    return Packed(structure=structure, tensors=packer.tensors)


class _Packer:
    """One walk through a state. Nodes are JSON values; those that JSON lacks are objects whose "is" names them."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[object, ...], str] = {}
        self._path: list[object] = []

    def node(self, value: Tree) -> Json:
        kind = type(value)
        if isinstance(value, (bool, str, type(None))) and kind in (bool, str, type(None)):
            return value
        if isinstance(value, (int, float)) and kind in (int, float):
            return _number(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict) and kind in _MAPPINGS:
            return self._mapping(value, _MAPPINGS[kind])
        if isinstance(value, (list, tuple, deque)) and kind in (list, tuple, deque):
            return self._sequence(value)
        return self._rest(value)

    def _inner(self, key: object, value: Tree) -> Json:
        self._path.append(key)
        if len(self._path) > _DEEPEST:
            raise TypeError(f"{self._where()[:80]}... is nested deeper than {_DEEPEST} levels: does it hold itself?")
        found = self.node(value)
        self._path.pop()
        return found

    def _mapping(self, value: dict[object, object], kind: str) -> Json:
        keys = [self._key(key) for key in value]
        return {"is": kind, "keys": keys, "of": [self._inner(key, item) for key, item in value.items()]}

    def _key(self, key: object) -> Json:
        if not isinstance(key, (str, int, float, bytes, tuple, np.generic, type(None))):
            raise TypeError(f"{self._where()} has a key of type {_name(key)}: use a number, a string or a tuple")
        return self.node(key)

    def _sequence(self, value: list[object] | tuple[object, ...] | deque[object]) -> Json:
        of = [self._inner(position, item) for position, item in enumerate(value)]
        if isinstance(value, list):
            return of
        if isinstance(value, tuple):
            return {"is": "tuple", "of": of}
        return {"is": "deque", "of": of, "maxlen": value.maxlen}

    def _rest(self, value: object) -> Json:
        if type(value) is bytes:
            return {"is": "bytes", "name": self._store(_bytes_as_tensor(value))}
        if isinstance(value, np.generic) and value.dtype.kind in _NUMPY_KINDS:
            return {"is": "scalar", **self._array(value)}
        if type(value) is np.ndarray and value.dtype.kind in _NUMPY_KINDS:
            return {"is": "array", **self._array(value)}
        raise TypeError(
            f"{self._where()} is of type {_name(value)}, which a checkpoint can't hold: it holds numbers, strings, "
            "bytes, tensors, NumPy arrays of numbers, and dict, list, tuple, OrderedDict, Counter and deque of them; "
            "give the object a state_dict() and load_state_dict() that speak in those"
        )

    def _array(self, value: np.ndarray | np.generic) -> JsonObject:
        name = self._named((id(value),), lambda: _bytes_as_tensor(value.tobytes()))
        return {"name": name, "dtype": value.dtype.str, "shape": list(value.shape)}

    def _tensor(self, value: torch.Tensor) -> Json:
        self._check(value)
        value = value.detach()
        if value.dtype in _CODES:
            return {"is": "tensor", "name": self._shared(value, value), **_strides(value)}
        plain = value.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        kind: JsonObject = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        return {"is": "raw", "name": self._shared(value, plain), **kind, **_strides(value)}

    def _check(self, value: torch.Tensor) -> None:
        known = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        if known and value.device.type != "meta" and (value.dtype in _CODES or value.dtype in _RAW.values()):
            return
        raise TypeError(
            f"{self._where()} is a {type(value).__name__} of dtype {value.dtype}, layout {value.layout}, on "
            f"{value.device}; a checkpoint holds plain dense tensors of numbers: give it as such"
        )

    def _shared(self, value: torch.Tensor, stored: torch.Tensor) -> str:
        if not value.numel():
            return self._store(stored)
        # The state keeps `value` alive while we walk, so no other tensor can get its address.
        key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device, value.is_conj())
        return self._named(key, lambda: stored)

    def _named(self, key: tuple[object, ...], make: Callable[[], torch.Tensor]) -> str:
        if key not in self._names:
            self._names[key] = self._store(make())
        return self._names[key]

    def _store(self, value: torch.Tensor) -> str:
        name = str(len(self.tensors))
        self.tensors[name] = value
        return name

    def _where(self) -> str:
        return "state" + "".join(f"[{key!r}]" for key in self._path)


def _name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _number(value: int | float) -> Json:
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else {"is": "int", "hex": hex(value)}
    if value - value == 0:
        return value
    return {"is": "float", "hex": struct.pack(">d", value).hex()}


def _bytes_as_tensor(value: bytes) -> torch.Tensor:
    if not value:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(value), dtype=torch.uint8)


def _strides(value: torch.Tensor) -> JsonObject:
    """The strides where they are not the usual ones: kernels that reduce or multiply may choose their order by them."""
    usual, size = [], 1
    for length in reversed(value.shape):
        usual.append(size)
        size *= max(length, 1)
    if value.stride() == tuple(reversed(usual)) or not value.numel():
        return {}
    # A tensor with holes or overlaps is restored without them.
    return {"stride": list(torch.empty_like(value, device="meta").stride())}


# Unpacking


def unpack(packed: Packed) -> Tree:
    """The state of which `packed` holds the parts; its tensors are new ones, on the CPU.

    Raises:
        ValueError: the parts don't fit each other, or are none that `pack` makes.
    """
    try:
        return _Unpacker(packed.tensors).tree(json.loads(packed.structure))
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, struct.error) as error:
        raise ValueError(f"its structure is none of ours: {type(error).__name__}: {error}") from error


class _Unpacker:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[str, torch.Tensor] = {}

    def tree(self, node: Json) -> Tree:
        if isinstance(node, list):
            return [self.tree(item) for item in node]
        return self._object(node) if isinstance(node, dict) else node

    def _object(self, node: JsonObject) -> Tree:
        kind = node["is"]
        if kind in ("tensor", "raw"):
            return self._tensor(node)
        if kind in ("array", "scalar"):
            return self._array(node)
        if kind == "bytes":
            return self._stored(node).numpy().tobytes()
        if kind == "int":
            return int(_text(node["hex"]), 16)
        if kind == "float":
            return float(struct.unpack(">d", bytes.fromhex(_text(node["hex"])))[0])
        return self._container(_text(kind), node)

    def _container(self, kind: str, node: JsonObject) -> Tree:
        of = [self.tree(item) for item in _list(node["of"])]
        if kind == "tuple":
            return tuple(of)
        if kind == "deque":
            return deque(of, _optional_int(node["maxlen"]))
        pairs = zip(map(self.tree, _list(node["keys"])), of, strict=True)
        if kind == "counter":
            return _counter(pairs)
        return {"dict": dict, "ordered": OrderedDict}[kind](pairs)

    def _stored(self, node: JsonObject) -> torch.Tensor:
        return self._tensors[_text(node["name"])]

    def _tensor(self, node: JsonObject) -> torch.Tensor:
        name = _text(node["name"])
        if name not in self._made:
            self._made[name] = self._new(node)
        return self._made[name]

    def _new(self, node: JsonObject) -> torch.Tensor:
        value = self._stored(node).clone()
        if node["is"] == "raw":
            value = value.view(_RAW[_text(node["dtype"])]).reshape(_ints(node["shape"]))
        if "stride" not in node:
            return value
        stride = _ints(node["stride"])
        if not _is_dense(value.shape, stride):
            raise ValueError(f"strides {stride} don't fit shape {tuple(value.shape)}")
        return torch.empty_strided(value.shape, stride, dtype=value.dtype, device="cpu").copy_(value)

    def _array(self, node: JsonObject) -> object:
        if not _NUMPY_DTYPE.fullmatch(_text(node["dtype"])):
            raise ValueError(f"an array of {node['dtype']!r}")
        kind = np.dtype(_text(node["dtype"]))
        found = np.frombuffer(self._stored(node).numpy().tobytes(), dtype=kind).reshape(_ints(node["shape"]))
        return found[()] if node["is"] == "scalar" else found.copy()


def _counter(pairs: Iterable[tuple[object, object]]) -> Counter[object]:
    found: Counter[object] = Counter()
    for key, count in pairs:
        found[key] = count  # type: ignore[assignment]  # a Counter takes any value, and so gives it back
    return found


def _text(node: Json) -> str:
    if not isinstance(node, str):
        raise TypeError(f"{node!r} is no string")
    return node


def _list(node: Json) -> list[Json]:
    if not isinstance(node, list):
        raise TypeError(f"{node!r} is no list")
    return node


def _ints(node: Json) -> tuple[int, ...]:
    found = tuple(item for item in _list(node) if isinstance(item, int) and item >= 0)
    if len(found) != len(_list(node)):
        raise ValueError(f"{node!r} is no list of sizes")
    return found


def _optional_int(node: Json) -> int | None:
    if node is not None and not isinstance(node, int):
        raise TypeError(f"{node!r} is no number")
    return node


def _is_dense(shape: Iterable[int], stride: Iterable[int]) -> bool:
    """Whether elements of these strides fill their memory without holes, so that it is as large as they are."""
    expected = 1
    for step, length in sorted(zip(stride, shape, strict=True)):
        if length != 1:
            if step != expected:
                return False
            expected *= length
    return True


# Bytes


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in the order of its elements; its own memory when it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def encode(packed: Packed, metadata: Mapping[str, str]) -> list[memoryview]:
    """Safetensors bytes in pieces, of which all but the first are the tensors' own memory where that is possible.

    Args:
        packed: the state.
        metadata: further texts for the header; "state" is taken.

    Raises:
        TypeError: what is no tensor in the state is more than a header may hold.
    """
    # Wide numbers first keeps every tensor aligned.
    tensors = sorted(packed.tensors.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, object] = {"__metadata__": {**metadata, _STRUCTURE: packed.structure}}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > _HEADER_LIMIT:
        raise TypeError(
            f"what is no tensor in the state takes {len(text)} bytes, and a checkpoint holds {_HEADER_LIMIT} of that: "
            "put long lists of numbers into tensors"
        )
    text += b" " * (-len(text) % _ALIGNMENT)
    return [memoryview(len(text).to_bytes(8, "little") + text), *(memory(tensor) for _, tensor in tensors)]


def decode(body: bytes) -> tuple[Packed, dict[str, str]]:
    """What `encode` was given, from its bytes.

    Raises:
        ValueError: they are no safetensors bytes, or not of ours.
    """
    try:
        tensors = from_safetensors(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        metadata = dict(header["__metadata__"])
        return Packed(structure=metadata.pop(_STRUCTURE), tensors=tensors), metadata
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"its body is no state of ours: {type(error).__name__}: {error}") from error
