"""The picture of the rooms is that of the code, and the names on its page are there."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from documents import ROOT


@pytest.fixture(scope="module")
def rooms() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "figures" / "rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_current(rooms: ModuleType) -> None:
    assert (ROOT / "docs/figures/rooms.svg").read_text() == rooms.draw(), "`make docs` draws it anew"


def test_every_room_of_the_picture_has_its_arrows(rooms: ModuleType) -> None:
    uses = rooms.reduced(rooms.imports())
    assert {room for room, others in uses.items() if not others} == {"core"}
    whole = rooms.imports()
    assert {room: rooms.reached(uses, room) for room in uses} == {room: rooms.reached(whole, room) for room in whole}


def test_a_module_that_is_gone_makes_no_picture(rooms: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rooms.WAYS, "a trial", ("config.nowhere",))
    with pytest.raises(LookupError, match=r"no module config\.nowhere"):
        rooms.draw()


def test_every_file_and_module_that_the_page_names_is_there() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`([a-z_]+/(?:[a-z_]+/)*(?:[a-z_]+\.py)?)`", text))
    assert len(named) > 10
    assert {
        name for name in named if not (ROOT / "orchestrator" / name).exists() and not (ROOT / name).exists()
    } == set()
    modules = set(re.findall(r"`([a-z]+(?:\.[a-z_]+)+)`", text)) - {"summary.json"}
    paths = {name: ROOT / "orchestrator" / name.replace(".", "/") for name in modules}
    assert {name for name, path in paths.items() if not path.with_suffix(".py").exists() and not path.is_dir()} == set()
