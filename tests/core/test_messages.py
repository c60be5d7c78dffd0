"""Messages: what is sent is what arrives, and what is no message is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson
import pytest

from orchestrator.core import messages
from orchestrator.core.channel import decode, encode
from orchestrator.core.messages import Cause, MalformedMessage, Message, Status

EXAMPLES: dict[str, Any] = {
    "bool": True, "int": 3, "str": "é", "None": None, "float": 0.1, "JsonObject": {"a": [1, None]}, "list[Json]": [{}],
    "list[int]": [1, 2], "Status": Status.DIVERGED, "Cause": Cause.MEMORY, "Message": messages.RankStarted(pid=7),
}  # fmt: skip


def kinds(base: type[Message] = Message) -> list[type[Message]]:
    below = {kind.__name__: getattr(messages, kind.__name__) for kind in base.__subclasses__()}
    return [kind for cls in below.values() for kind in (cls, *kinds(cls))]


def example(kind: type[Message], alternative: int) -> Message:
    def value(declared: str) -> Any:
        names = declared.split(" | ")
        return EXAMPLES[names[alternative % len(names)]]

    return kind(**{each.name: value(str(each.type)) for each in dataclasses.fields(kind)})


@pytest.mark.parametrize("alternative", [0, 1])
@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_what_is_sent_arrives(kind: type[Message], alternative: int) -> None:
    message = example(kind, alternative)
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode(line.rstrip()) == message
    assert type(decode(line.rstrip())) is kind


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_a_field_that_is_missing_strange_or_of_another_type_is_named(kind: type[Message]) -> None:
    whole = orjson.loads(encode(example(kind, 0)))
    with pytest.raises(MalformedMessage, match="no field 'extra'"):
        decode(orjson.dumps({**whole, "extra": 1}))
    for each in dataclasses.fields(kind):
        with pytest.raises(MalformedMessage, match=each.name):
            decode(orjson.dumps({**whole, each.name: "no bool" if "bool" in str(each.type) else True}))
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            with pytest.raises(MalformedMessage, match=f"{each.name} is missing"):
                decode(orjson.dumps({name: value for name, value in whole.items() if name != each.name}))


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"3", b"{}", b'{"kind":3}', b'{"kind":"Message"}', b'{"kind":"x"}'])
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(line)
