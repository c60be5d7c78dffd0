"""State as JSON and tensors: what goes in comes out, equal in type and in every bit."""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from orchestrator.training.checkpoint.serialization import Packed, decode, encode, pack, unpack

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.complex32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
]
SHAPES = [(), (0,), (1,), (3,), (2, 3), (2, 0, 3), (2, 1, 3, 2)]


def tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits at all, NaNs of every kind among them."""
    num = math.prod(shape) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def round_trip(state: object) -> Any:
    packed, _ = decode(b"".join(encode(pack(state), {"a": "b"})))
    return unpack(packed)


def bits(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape, a.stride(), bits(a)) == (b.dtype, b.shape, b.stride(), bits(b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, np.ndarray | np.generic):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b)) and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
    return bool(a == b)


TENSORS = st.builds(tensor, st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 99))
ARRAYS = st.builds(
    lambda of, kind: np.array(of).astype(kind),
    st.lists(st.integers(0, 100), max_size=4),
    st.sampled_from(["<f8", ">f4", "<i2", "u1", "bool", "<c16"]),
)
KEYS = st.text(max_size=4) | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text(max_size=2))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([63, 64, 20_000]).map(lambda power: -(2**power) - 1)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["\ud800", "\x00", "é"])
    | st.binary(max_size=20)
    | TENSORS
    | ARRAYS
    | ARRAYS.filter(len).map(lambda array: array[0])
)


def containers(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    lists = st.lists(inner, max_size=3)
    dicts = st.dictionaries(KEYS, inner, max_size=3)
    counters = st.dictionaries(KEYS, st.integers(-3, 3), max_size=3).map(Counter)
    deques = st.builds(deque, lists, st.none() | st.integers(3, 5))
    return lists | lists.map(tuple) | deques | dicts | dicts.map(OrderedDict) | counters


@settings(max_examples=150)
@given(st.recursive(LEAVES, containers, max_leaves=10))
def test_a_state_comes_back_equal_in_type_and_bits(state: object) -> None:
    assert same(round_trip(state), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_of_every_kind_and_shape_come_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = [tensor(dtype, shape), tensor(dtype, shape, 1).requires_grad_(dtype in (torch.float32, torch.complex64))]
    found = round_trip(state)
    assert same(found[0], state[0])
    assert bits(found[1]) == bits(state[1].detach())
    assert not found[1].requires_grad


def test_a_tensor_that_is_there_twice_is_stored_once_and_is_one_again() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    state = {"a": weight, "b": weight.detach(), "part": weight.detach()[1:], "turned": weight.detach().T}
    packed = pack(state)
    assert len(packed.tensors) == 3
    found: Any = round_trip(state)
    assert found["a"] is found["b"]
    assert found["part"] is not found["a"]
    assert torch.equal(found["turned"], weight.T)


def test_tensors_that_are_gone_are_not_taken_for_those_that_come_after() -> None:
    state = [torch.full((3,), float(i)) for i in range(100)]
    assert same(round_trip({"arrays": [part.numpy() for part in state], "tensors": state})["tensors"], state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(3, 4).T,
        lambda: torch.randn(3, 4, dtype=torch.complex128).T.conj(),
        lambda: torch.randn(2, 3, dtype=torch.complex64).imag,
        lambda: torch.randn(6)[::2],
        lambda: torch.randn(3, 1).expand(3, 4),
    ],
)
def test_layouts_survive_and_holes_are_closed(make: Any) -> None:
    value = make()
    found = round_trip(value)
    assert torch.equal(found, value)
    assert found.dtype == value.dtype
    assert found.stride() == torch.empty_like(value).stride()


def test_what_was_packed_does_not_change_with_the_state() -> None:
    state = {"losses": [1.0], "count": Counter(a=1)}
    packed = pack(state)
    state["losses"].append(2.0)  # type: ignore[union-attr]
    state["count"]["a"] = 9
    assert unpack(packed) == {"losses": [1.0], "count": Counter(a=1)}


def test_what_is_unpacked_shares_no_memory_with_what_was_packed() -> None:
    state = torch.zeros(3)
    found: Any = unpack(pack(state))
    found.fill_(1)
    assert not state.any()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        ({1, 2}, "set"),
        (lambda: None, "function"),
        (defaultdict(list), "collections.defaultdict"),
        (np.array([object()]), "numpy.ndarray"),
        (torch.float32, "torch.dtype"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.empty(2, device="meta"), "on meta"),
    ],
)
def test_what_cannot_be_held_is_refused_by_its_place(value: object, kind: str) -> None:
    with pytest.raises(TypeError, match=r"state\['opt'\]\[0\]\[3\]") as error:
        pack({"opt": [{3: value}]})
    assert kind in str(error.value)


def test_a_state_that_holds_itself_is_refused() -> None:
    state: list[object] = []
    state.append(state)
    with pytest.raises(TypeError, match="does it hold itself"):
        pack(state)


def test_a_key_that_cannot_be_held_is_refused() -> None:
    with pytest.raises(TypeError, match=r"state\['a'\] has a key of type frozenset"):
        pack({"a": {frozenset(): 1}})


def test_the_bytes_are_what_safetensors_reads() -> None:
    state = {"a": torch.randn(3), "b": torch.randn(2).double(), "c": torch.tensor(True)}
    found = load(b"".join(encode(pack(state), {})))
    assert {(value.dtype, bits(value)) for value in found.values()} == {
        (value.dtype, bits(value)) for value in state.values()
    }


@pytest.mark.parametrize(
    "structure",
    [
        "",
        "{}",
        '{"is":"pickle","name":"0"}',
        '{"is":"tensor","name":"9"}',
        '{"is":"tensor","name":["0"]}',
        '{"is":"tensor","name":"0","stride":[4000000000000]}',
        '{"is":"tensor","name":"0","stride":[-1]}',
        '{"is":"raw","name":"0","dtype":"float32","shape":[2]}',
        '{"is":"raw","name":"0","dtype":"complex64","shape":[9000000000]}',
        '{"is":"array","name":"0","dtype":"O","shape":[2]}',
        '{"is":"array","name":"0","dtype":"<f8","shape":[99]}',
        '{"is":"dict","keys":[[]],"of":[1]}',
        '{"is":"dict","keys":["a"],"of":[]}',
        '{"is":"int","hex":"zz"}',
        '{"is":"float","hex":"00"}',
        '{"is":"deque","of":[1],"maxlen":-1}',
        "[" * 100_000,
        "9" * 5000,
    ],
)
def test_parts_that_no_packing_makes_are_refused(structure: str) -> None:
    with pytest.raises(ValueError, match="its structure is none of ours"):
        unpack(Packed(structure=structure, tensors={"0": torch.zeros(4)}))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_state_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="its body is no state of ours"):
        decode(data)
