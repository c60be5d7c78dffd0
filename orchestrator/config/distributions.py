"""The search space: W&B's distributions, and the point of trial i without the points before it.

    random_points(parameters, seed)(i)      parameters of configuration i, each drawn from a stream of its own
    Grid.of(parameters, zipped).point(i)    configuration i of the Cartesian product; `.size` of them
    trial_seed(seed, i)                     the 63-bit seed of trial i
    faults(config)                          everything that is wrong with one parameter of a sweep file

Streams: the value of a parameter is a function of (sweep seed, configuration index, dotted path of the parameter): a
128-bit word from BLAKE2b over the three, put through the distribution's inverse CDF. So no parameter's values move when
another one is added, removed or changed. A beta variate has no closed inverse; the word seeds a generator of its own.
The trial's seed comes from (sweep seed, trial index) under another personalisation of the same hash.

What each distribution means is W&B's `sweeps/params.py`: `log_uniform` takes exponents of e, `log_uniform_values` takes
the limits themselves, `q_` rounds to multiples of `q` (integers when `q` is one; by default 1), and a grid goes through
`q_uniform` from `min` in steps of `q`, without `max`, as NumPy's arange does.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import NamedTuple, TypeAlias, cast

from orchestrator.core.atomic import Json, JsonObject, canonical
from orchestrator.core.text import describe, did_you_mean

__all__ = ["DISTRIBUTIONS", "ENUMERABLE", "NAME", "Kind", "faults", "infer", "leaves", "random_points", "trial_seed"]

Path: TypeAlias = tuple[str, ...]
Draw: TypeAlias = Callable[[int], Json]


class Fault(NamedTuple):
    """What is wrong within a parameter: where in it, what, and whether it is the key there rather than its value."""

    path: tuple[str | int, ...]
    text: str
    key: bool = False


NAME = r"[A-Za-z_][A-Za-z0-9_.-]*"
"""What a parameter may be called (W&B's pattern)."""

ENUMERABLE = ("constant", "categorical", "int_uniform", "q_uniform")
"""The distributions that a grid can go through."""

_WORD_BITS = 128
_LOWEST, _HIGHEST = 0, 2**_WORD_BITS - 1


def _unit(word: int) -> float:
    """The word as a number in (0, 1), both ends excluded: 52 bits and a half, so that rounding never reaches 1."""
    return ((word >> (_WORD_BITS - 52)) + 0.5) * 2.0**-52


def number(config: JsonObject, key: str) -> float:
    return cast("float", config[key])


def _uniform(config: JsonObject) -> Callable[[int], float]:
    low, high = float(number(config, "min")), float(number(config, "max"))
    if math.isinf(high - low):
        raise OverflowError
    return lambda word: min(low + (high - low) * _unit(word), high)


def _log_uniform(config: JsonObject) -> Callable[[int], float]:
    exponent = _uniform(config)
    return lambda word: math.exp(exponent(word))


def _log_uniform_values(config: JsonObject) -> Callable[[int], float]:
    low, high = number(config, "min"), number(config, "max")
    exponent = _uniform({"min": math.log(low), "max": math.log(high)})
    # exp(log(x)) may miss x by a bit; no value leaves the limits that the user wrote.
    return lambda word: min(max(math.exp(exponent(word)), float(low)), float(high))


def _inv_log_uniform(config: JsonObject) -> Callable[[int], float]:
    low, high = number(config, "min"), number(config, "max")
    return lambda word: math.exp(-(low + (1 - _unit(word)) * (high - low)))


def _normal(config: JsonObject) -> Callable[[int], float]:
    from statistics import NormalDist  # 10 ms, and few sweeps want it

    mu, sigma, standard = number(config, "mu"), number(config, "sigma"), NormalDist()
    return lambda word: mu + sigma * standard.inv_cdf(_unit(word))


def _log_normal(config: JsonObject) -> Callable[[int], float]:
    exponent = _normal(config)
    return lambda word: math.exp(exponent(word))


_MOST_SHAPE = 1e300


def _beta(config: JsonObject) -> Callable[[int], float]:
    from random import Random

    a, b = number(config, "a"), number(config, "b")
    if max(a, b) > _MOST_SHAPE:
        raise OverflowError("random.betavariate would try for ever: half of its numbers overflow")
    return lambda word: Random(word).betavariate(a, b)


def _multiple(step: float) -> Callable[[int], int | float]:
    """Map n to n * step: integer if `step` is one, else the float nearest to the exact product (3 * 0.1 is 0.3)."""
    from decimal import Decimal

    exact = Decimal(repr(step))
    return lambda n: n * step if isinstance(step, int) else float(exact * n)


def _quantised(base: Callable[[JsonObject], Callable[[int], float]]) -> Callable[[JsonObject], Draw]:
    def build(config: JsonObject) -> Draw:
        step, draw = number(config, "q"), base(config)
        multiple = _multiple(step)
        return lambda word: multiple(round(draw(word) / step))

    return build


def _constant(config: JsonObject) -> Draw:
    value = config["value"]
    return lambda _: value


def _categorical(config: JsonObject) -> Draw:
    values = cast("list[Json]", config["values"])
    return lambda word: values[word * len(values) >> _WORD_BITS]


def _weighted(config: JsonObject) -> Draw:
    weights = cast("list[float]", config["probabilities"])
    values = [v for v, w in zip(cast("list[Json]", config["values"]), weights, strict=True) if w > 0]
    # The last edge is left out: what rounding keeps the sum from reaching 1 belongs to the last value.
    edges = list(accumulate(w for w in weights if w > 0))[:-1]
    return lambda word: values[bisect_right(edges, _unit(word))]


def _int_uniform(config: JsonObject) -> Draw:
    low, high = cast("int", config["min"]), cast("int", config["max"])
    return lambda word: low + (word * (high - low + 1) >> _WORD_BITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One distribution.

    Args:
        build: draw of a complete and faultless configuration: 128-bit word -> value.
        required: keys that it must have.
        defaults: keys that it may have.
    """

    build: Callable[[JsonObject], Draw]
    required: tuple[str, ...] = ()
    defaults: dict[str, int | float]

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that it takes, but for `distribution`."""
        return (*self.required, *self.defaults)


def _kinds() -> Iterator[tuple[str, Kind]]:
    limits, moments, shape, none = ("min", "max"), {"mu": 0, "sigma": 1}, {"a": 1, "b": 1}, dict[str, int | float]()
    yield "constant", Kind(build=_constant, required=("value",), defaults=none)
    yield "categorical", Kind(build=_categorical, required=("values",), defaults=none)
    yield "categorical_w_probabilities", Kind(build=_weighted, required=("values", "probabilities"), defaults=none)
    yield "int_uniform", Kind(build=_int_uniform, required=limits, defaults=none)
    yield "inv_log_uniform", Kind(build=_inv_log_uniform, required=limits, defaults=none)
    yield "inv_log_uniform_values", Kind(build=_log_uniform_values, required=limits, defaults=none)
    families: list[
        tuple[str, Callable[[JsonObject], Callable[[int], float]], tuple[str, ...], dict[str, int | float]]
    ] = [
        ("uniform", _uniform, limits, none),
        ("log_uniform", _log_uniform, limits, none),
        ("log_uniform_values", _log_uniform_values, limits, none),
        ("normal", _normal, (), {**moments}),
        ("log_normal", _log_normal, (), {**moments}),
        ("beta", _beta, (), {**shape}),
    ]
    for name, base, required, defaults in families:
        yield name, Kind(build=base, required=required, defaults=defaults)
        yield f"q_{name}", Kind(build=_quantised(base), required=required, defaults={**defaults, "q": 1})


DISTRIBUTIONS: dict[str, Kind] = dict(_kinds())
"""Every distribution by its name in a sweep file."""


def infer(config: JsonObject) -> str | None:
    """The distribution of a parameter: its own word, or what its keys say, as W&B reads them; None when they don't."""
    if "distribution" in config:
        named = config["distribution"]
        return named if isinstance(named, str) and named in DISTRIBUTIONS else None
    if "value" in config:
        return "constant"
    if "values" in config:
        return "categorical_w_probabilities" if "probabilities" in config else "categorical"
    if "min" not in config or "max" not in config:
        return None
    return "int_uniform" if all(type(config[key]) is int for key in ("min", "max")) else "uniform"


def leaves(parameters: JsonObject, above: Path = ()) -> Iterator[tuple[Path, JsonObject]]:
    """Every parameter that has a value of its own, with its path; nested `parameters` are gone through."""
    for name, config in parameters.items():
        assert isinstance(config, dict)
        inner = config.get("parameters")
        if isinstance(inner, dict):
            yield from leaves(inner, (*above, name))
        else:
            yield (*above, name), config


def _filled(config: JsonObject) -> tuple[Kind, JsonObject]:
    name = infer(config)
    assert name is not None, config
    return DISTRIBUTIONS[name], {**DISTRIBUTIONS[name].defaults, **config}


def nest(point: JsonObject, path: Path, value: Json) -> None:
    for name in path[:-1]:
        point = cast("JsonObject", point.setdefault(name, {}))
    point[path[-1]] = value


# Streams


def _hash(seed: int, index: int, purpose: bytes) -> int:
    digest = blake2b(b"%d\0" % seed, digest_size=8, person=purpose)
    digest.update(index.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def trial_seed(seed: int, index: int) -> int:
    """The seed of trial `index` in the sweep of `seed`: 63 bits, so that it fits every signed 64-bit integer."""
    return _hash(seed, index, b"orc trial seed") >> 1


def _stream(seed: int, path: Path) -> Callable[[int], int]:
    start = blake2b(b"%d\0%b\0" % (seed, ".".join(path).encode()), digest_size=16, person=b"orc parameter")

    def word(index: int) -> int:
        digest = start.copy()
        digest.update(index.to_bytes(8, "little"))
        return int.from_bytes(digest.digest(), "little")

    return word


def random_points(parameters: JsonObject, seed: int) -> Callable[[int], JsonObject]:
    """Configuration index -> parameters, drawn at random; `parameters` must be without `faults`."""
    streams = []
    for path, config in leaves(parameters):
        kind, filled = _filled(config)
        streams.append((path, kind.build(filled), _stream(seed, path)))

    def point(index: int) -> JsonObject:
        values: JsonObject = {}
        for path, draw, word in streams:
            nest(values, path, draw(word(index)))
        return values

    return point


# Grids


# What can be wrong with a parameter


def faults(config: JsonObject) -> list[Fault]:
    """Everything wrong with one parameter that has no nested ones: where in it, and what was found and is allowed."""
    name = infer(config)
    if name is None:
        return [_no_distribution(config)]
    found = [*_key_faults(config, name), *_type_faults(config, name)]
    return found or _value_faults(*_filled(config), name)


_TELLING = ("value", "values", "min", "max", "distribution", "parameters")


def _no_distribution(config: JsonObject) -> Fault:
    if "distribution" in config:
        named = config["distribution"]
        allowed = ", ".join(sorted(DISTRIBUTIONS))
        return Fault(
            ("distribution",), f"found {describe(named)}, allowed: {allowed}{did_you_mean(named, DISTRIBUTIONS)}"
        )
    if not config:
        return Fault((), "found an empty mapping, expected value, values, min and max, or distribution")
    for key in config:
        guess = did_you_mean(key, _TELLING)
        if guess and key not in _TELLING:
            return Fault((key,), f"unknown key{guess}", key=True)
    shown = ", ".join(config)
    return Fault((), f"{shown} can't be read as a distribution: add value, values, both min and max, or distribution")


def _key_faults(config: JsonObject, name: str) -> Iterator[Fault]:
    kind = DISTRIBUTIONS[name]
    for key in kind.required:
        if key not in config:
            yield Fault((), f"{key} is missing; {name} needs {' and '.join(kind.required)}", key=True)
    for key in config:
        if key not in kind.keys and key != "distribution":
            yield Fault((key,), f"not a key of {name}, allowed: {', '.join(kind.keys)}{_remedy(key, kind)}", key=True)


def _remedy(key: str, kind: Kind) -> str:
    if key == "q":
        return "; to round to multiples of q, name a distribution that begins with q_"
    if key in ("mu", "sigma", "a", "b"):
        return "; name its distribution"
    return did_you_mean(key, kind.keys)


def _type_faults(config: JsonObject, name: str) -> Iterator[Fault]:
    for key in DISTRIBUTIONS[name].keys:
        if key not in config or key == "value":
            continue
        value = config[key]
        if key in ("values", "probabilities"):
            yield from _list_faults(key, value)
        elif name == "int_uniform" and type(value) is not int:
            yield Fault((key,), f"found {describe(value)}, expected an integer")
        elif not _is_number(value):
            yield Fault((key,), f"found {describe(value)}, expected a number")


def _list_faults(key: str, value: Json) -> Iterator[Fault]:
    if not isinstance(value, list) or not value:
        yield Fault((key,), f"found {describe(value)}, expected a list of at least one")
    elif key == "probabilities":
        for i, item in enumerate(value):
            if not _is_number(item) or cast("float", item) < 0:
                yield Fault((key, i), f"found {describe(item)}, expected a number that is not negative")


def _is_number(value: Json) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _value_faults(kind: Kind, config: JsonObject, name: str) -> list[Fault]:
    """Faults between keys that are each of the right type."""
    found = list(_limit_faults(config, name))
    for key in kind.keys:
        if key in ("q", "a", "b") and number(config, key) <= 0:
            found += [Fault((key,), f"found {describe(config[key])}, expected a number above 0")]
    if "sigma" in config and number(config, "sigma") < 0:
        found += [Fault(("sigma",), f"found {describe(config['sigma'])}, expected a number that is not negative")]
    if name == "categorical_w_probabilities":
        found += _probability_faults(config)
    return found or _range_faults(kind, config, name)


def _limit_faults(config: JsonObject, name: str) -> Iterator[Fault]:
    if "min" not in config:
        return
    low, high = number(config, "min"), number(config, "max")
    if name.endswith("log_uniform_values") and low <= 0:
        reason = f"{name} is uniform in the logarithm"
        yield Fault(("min",), f"found {describe(config['min'])}, expected a number above 0: {reason}")
    if low > high:
        yield Fault(("min",), f"found {describe(config['min'])}, expected at most max, which is {config['max']}")


def _probability_faults(config: JsonObject) -> Iterator[Fault]:
    values, weights = cast("list[Json]", config["values"]), cast("list[float]", config["probabilities"])
    if len(values) != len(weights):
        yield Fault(("probabilities",), f"found {len(weights)} numbers for {len(values)} values, expected one for each")
    elif abs(math.fsum(weights) - 1) > 1e-6:
        yield Fault(("probabilities",), f"found a sum of {math.fsum(weights):.6g}, expected 1")


def _range_faults(kind: Kind, config: JsonObject, name: str) -> list[Fault]:
    """Values that no JSON number or no 64-bit integer could hold, seen at both ends of the distribution."""
    if "min" not in config and not kind.defaults:
        return []
    try:
        draw = kind.build(config)
        ends = [cast("float", draw(word)) for word in (_LOWEST, _HIGHEST)]
    except (OverflowError, ValueError):
        ends = [math.inf]
    if all(math.isfinite(end) and (type(end) is float or -(2**63) <= end < 2**63) for end in ends):
        return []
    hint = f"; did you mean '{name}_values'?" if name.endswith("log_uniform") else ""
    exponents = ": min and max are exponents of e here" if hint else ""
    return [Fault((), f"{name} reaches values that are too large for a number{exponents}{hint}")]


def same(a: Json, b: Json) -> bool:
    """Whether two values are one and the same on a grid: 1 and 1.0 are, 1 and true are not."""
    return canonical(_plain(a)) == canonical(_plain(b))


def _plain(value: Json) -> Json:
    return int(value) if type(value) is float and value.is_integer() else value
