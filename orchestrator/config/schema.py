"""Types of a sweep file: pydantic models made from the dataclasses of `config.spec`, and their JSON Schema."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, cast, get_type_hints

import pydantic
from pydantic import ConfigDict, Field, JsonValue, create_model

from orchestrator.config.checks import EVERY, SWEEP_NAME
from orchestrator.config.distributions import DISTRIBUTIONS, NAME
from orchestrator.config.document import HARMLESS, HARMLESS_IN_METRIC, SweepDocument
from orchestrator.config.spec import CheckpointOptions, Launch, Metric, Reduce, Retries, SweepSpec
from orchestrator.config.yaml12 import Path
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.core.text import describe, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["json_schema", "typed"]

_CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Positive = Annotated[int, Field(ge=1)]
_Count = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(gt=0)]
_Mapping = dict[str, JsonValue]


def _descriptions(shape: type) -> dict[str, str]:
    """What the docstring of a dataclass says about each field, in one line."""
    entries = re.findall(r"^        (\w+): (.*(?:\n            .*)*)", shape.__doc__ or "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _model(shape: type, **types: object) -> type[pydantic.BaseModel]:
    """A strict pydantic model of a dataclass: its fields and defaults, with other types where `types` names them."""
    hints, texts = get_type_hints(shape), _descriptions(shape)
    members: dict[str, object] = {}
    for f in fields(shape):
        default = ... if f.default is MISSING and f.default_factory is MISSING else f.default
        # What a section defaults to is put in afterwards, so that an empty `launch:` means the same as none.
        members[f.name] = (
            types.get(f.name, hints[f.name]),
            Field(None if default is MISSING else default, description=texts[f.name]),
        )
    return create_model(shape.__name__, __config__=_CONFIG, **members)  # type: ignore[call-overload,no-any-return]  # dynamic


_Retries = _model(Retries, **dict.fromkeys(("error", "signal", "memory", "timeout", "unknown"), _Count))
_Launch = _model(
    Launch,
    **dict.fromkeys(("trials_per_task", "max_workers", "throttle"), _Positive | None),
    **dict.fromkeys(
        ("nodes", "ranks_per_node", "cpus", "trials_per_node", "trials_per_gpu", "pack", "notice_s"), _Positive
    ),
    gpus=_Count,
    **dict.fromkeys(("lease_s", "import_timeout_s", "answer_s", "silent_s"), _Seconds),
    retries=_Retries | None,
)
_Reduce = _model(
    Reduce,
    **dict.fromkeys(("top", "trials_per_range", "ranks"), _Positive),
    visibility_s=Annotated[float, Field(ge=0)],
    fan_in=Annotated[int, Field(ge=2)],
    slurm=_Mapping | None,
)
_CheckpointOptions = _model(CheckpointOptions, mtbf_s=_Seconds)
_File = _model(
    SweepSpec,
    name=Annotated[str, Field()],
    parameters=_Mapping,
    metric=_model(Metric) | None,
    run_cap=_Positive | None,
    repeats=_Positive,
    seed=Annotated[int, Field(ge=0, lt=2**63)],
    env=_Mapping | None,
    zip=tuple[tuple[str, ...], ...] | None,
    slurm=_Mapping | None,
    launch=_Launch | None,
    reduce=_Reduce | None,
    checkpoint=_CheckpointOptions | None,
)
_SECTIONS: dict[Path, type] = {
    (): SweepSpec,
    ("metric",): Metric,
    ("launch",): Launch,
    ("launch", "retries"): Retries,
    ("reduce",): Reduce,
    ("checkpoint",): CheckpointOptions,
}


def json_schema() -> JsonObject:
    """The JSON Schema (draft 2020-12) of a sweep file: whatever reads well is valid, most of what doesn't is not."""
    schema: JsonObject = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_File.model_json_schema()}
    properties, definitions = _object(schema["properties"]), _object(schema["$defs"])
    properties["parameters"] = {"$ref": "#/$defs/parameters"}
    _object(properties["name"]).update(pattern=f"^{SWEEP_NAME}$", description=_descriptions(SweepSpec)["name"])
    _object(_object(definitions["Metric"])["properties"]).update(dict.fromkeys(HARMLESS_IN_METRIC, True))
    properties.update(dict.fromkeys(HARMLESS, True))
    for holder in (properties, _object(_object(definitions["Reduce"])["properties"])):
        _set_values(holder["slurm"], {"type": ["string", "number", "boolean", "null"]})
    _set_values(properties["env"], {"type": "string"})
    _object(_object(_object(definitions["CheckpointOptions"])["properties"])["every"])["pattern"] = f"^({EVERY})$"
    definitions.update(_parameter_schemas())
    schema.update(
        title="Sweep file",
        required=["method", "parameters"],
        anyOf=[{"required": ["program"]}, {"required": ["command"]}],
    )
    return schema


def _object(value: Json) -> JsonObject:
    assert isinstance(value, dict), value
    return value


def _set_values(nullable: Json, values: JsonObject) -> None:
    """Narrow what the mapping holds in the schema of an optional mapping."""
    for choice in cast("list[Json]", _object(nullable)["anyOf"]):
        if _object(choice).get("type") == "object":
            _object(choice)["additionalProperties"] = values


_KEY_SCHEMAS: dict[str, JsonObject] = {
    **{key: {"type": "number"} for key in ("min", "max", "mu")},
    **{key: {"type": "number", "exclusiveMinimum": 0} for key in ("q", "a", "b")},
    "sigma": {"type": "number", "minimum": 0},
    "value": {},
    "values": {"type": "array", "minItems": 1},
    "probabilities": {"type": "array", "minItems": 1, "items": {"type": "number", "minimum": 0}},
}
_INFERRED = ("constant", "categorical", "categorical_w_probabilities", "int_uniform", "uniform")


def _parameter_schemas() -> JsonObject:
    names = list(DISTRIBUTIONS)
    nested: JsonObject = {"parameters": {"$ref": "#/$defs/parameters"}}
    choices: list[Json] = [{"$ref": f"#/$defs/{name}"} for name in names]
    choices.append({"type": "object", "properties": nested, "required": ["parameters"], "additionalProperties": False})
    return {
        "parameters": {
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"pattern": f"^{NAME}$"},
            "additionalProperties": {"anyOf": choices},
        },
        **{name: _distribution_schema(name) for name in names},
    }


def _distribution_schema(name: str) -> JsonObject:
    kind = DISTRIBUTIONS[name]
    properties: JsonObject = {key: dict(_KEY_SCHEMAS[key]) for key in kind.keys}
    if name == "int_uniform":
        properties = {key: {"type": "integer"} for key in kind.keys}
    named = [] if name in _INFERRED else ["distribution"]
    return {
        "type": "object",
        "properties": {**properties, "distribution": {"const": name}},
        "required": [*kind.required, *named],
        "additionalProperties": False,
    }


# Errors of types, in our words


def typed(sheet: SweepDocument) -> pydantic.BaseModel | None:
    """The sheet's tree with every type checked; None when something is of a wrong type, which is then noted."""
    try:
        # As JSON, because strict pydantic takes lists for tuples only there.
        return _File.model_validate_json(json.dumps(sheet.tree))
    except pydantic.ValidationError as error:
        for each in error.errors(include_url=False):
            _blame_type(sheet, each)
        return None


_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
}


def _blame_type(sheet: SweepDocument, error: ErrorDetails) -> None:
    path, kind, found, context = error["loc"], error["type"], error["input"], error.get("ctx", {})
    section = _SECTIONS.get(path[:-1])
    if kind == "extra_forbidden" and section is not None:
        guess = did_you_mean(path[-1], [f.name for f in fields(section)])
        return sheet.blame(
            path, f"unknown key{guess or '; allowed: ' + ', '.join(f.name for f in fields(section))}", key=True
        )
    if kind == "missing":
        return sheet.blame(path, f"missing{_MISSING.get(path, '')}")
    if kind == "literal_error":
        return sheet.blame(path, _not_allowed(path, found, context["expected"]))
    if kind in _EXPECTED:
        return sheet.blame(
            path, f"found {describe(found)}, expected {_EXPECTED[kind]}{_type_remedy(kind, found, path)}"
        )
    limits = {
        "greater_than_equal": "at least {ge:g}",
        "greater_than": "more than {gt:g}",
        "less_than": "less than {lt}",
    }
    expected = limits[kind].format(**context) if kind in limits else error["msg"]
    return sheet.blame(path, f"found {describe(found)}, expected {expected}")


_MISSING: dict[Path, str] = {
    ("method",): ", allowed: grid, random",
    ("parameters",): ", expected at least one parameter",
}


def _not_allowed(path: Path, found: object, expected: str) -> str:
    allowed = re.findall(r"'([^']*)'", expected)
    if path == ("method",) and found in ("bayes", "custom"):
        return f"{found} is not available, allowed: {', '.join(allowed)}"
    return f"found {describe(found)}, allowed: {', '.join(allowed)}{did_you_mean(found, allowed)}"


def _type_remedy(kind: str, found: object, path: Path) -> str:
    if path == ("checkpoint", "every"):
        return " such as 30s, 5m, 500 steps, epoch or off"
    if kind == "string_type" and isinstance(found, bool | int | float):
        return f"; quote it: '{json.dumps(found)}'"
    if kind.startswith("int") and isinstance(found, float) and found.is_integer():
        return f"; write {int(found)}"
    if path[:1] == ("zip",) and kind == "tuple_type":
        return " of lists of parameter names, such as [[lr, epochs]]" if len(path) == 1 else " of parameter names"
    return ""
