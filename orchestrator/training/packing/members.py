"""One value a member: what a job holds where several trials run as one, and may pass on without knowing it.

    loss = trial.step(losses, batch)                PerMember: a tensor, shape (members,)
    trial.state.others["schedule"].step()           Each: whatever is done to it is done to each member's own
    trial.report(loss=loss)                         each member reports its own

What a single trial would do with one value and can't be done with several, such as an `if` on it, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

import torch

__all__ = ["REMEDY", "Each", "PerMember", "Stacked", "Unlike", "Unpackable", "gathered", "of_member"]

REMEDY: Final = "to train its trials one by one, set launch.pack: 1"


class Unpackable(TypeError):
    """A job does what trials can't do together; the text says what, and how to train them one by one."""

    def __init__(self, text: str) -> None:
        super().__init__(f"{text}; {REMEDY}")
        self.reason = text


class Unlike(Unpackable):
    """Trials have built what can't be stacked, and can train apart.

    Args:
        text: where they differ.
        groups: those that are alike, by their places; the groups in the order of their first.
    """

    def __init__(self, text: str, groups: list[list[int]]) -> None:
        super().__init__(text)
        self.groups = groups


class PerMember(torch.Tensor):
    """A number for each member, shape (members,). Arithmetic gives numbers for each member again."""

    @staticmethod
    def of(values: Sequence[float] | torch.Tensor) -> PerMember:
        """These values, by member; of a sequence as float64."""
        found = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.float64, device="cpu")
        return found.as_subclass(PerMember)

    def _refused(self, *_: object) -> NoReturn:
        raise Unpackable(
            "the job uses a value as one number, or decides by it, and trials in a pack have one each: report it, "
            "or compute with it as a tensor"
        )

    __bool__ = __float__ = __int__ = __index__ = item = _refused

    def __repr__(self) -> str:  # type: ignore[override]  # torch gives it an argument for itself
        return f"PerMember({self.tolist()})"


class Stacked:
    """A batch in which each member has its own samples.

    Args:
        parts: shape (members, batch, ...) each.
    """

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[torch.Tensor, ...]) -> None:
        self.parts = parts

    def _refused(self, *_: object) -> NoReturn:
        raise Unpackable(
            "the job looks into a batch, and in a pack that is one batch a member: do in `losses` what is to be done "
            "with it"
        )

    __iter__ = __getitem__ = __len__ = _refused


class Each:
    """An object of each member, such as its scheduler.

    Attributes, items and calls are those of all, and so is what comes of them: `PerMember` where it is numbers. Of
    arguments that are one value a member, each is given its own.

    Args:
        parts: by member.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[object]) -> None:
        self._parts = tuple(parts)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return gathered([getattr(part, name) for part in self._parts])

    def __call__(self, *arguments: object, **named: object) -> object:
        """What each member's gives."""
        found = []
        for at, part in enumerate(self._parts):
            own = [of_member(one, at) for one in arguments]
            own_named = {key: of_member(one, at) for key, one in named.items()}
            found.append(part(*own, **own_named))  # type: ignore[operator]  # what can't be called says so
        return gathered(found)

    def __getitem__(self, key: object) -> object:
        return gathered([part[key] for part in self._parts])  # type: ignore[index]  # what has no items says so

    def __setitem__(self, key: object, value: object) -> None:
        for at, part in enumerate(self._parts):
            part[key] = of_member(value, at)  # type: ignore[index]  # what has no items says so

    def _refused(self, *_: object) -> NoReturn:
        kind = type(self._parts[0]).__name__
        raise Unpackable(f"the job uses a {kind} in a way that is not possible with one for each trial of a pack")

    __iter__ = __len__ = __bool__ = __float__ = __int__ = _refused

    def state_dict(self) -> dict[str, object]:
        """Every member's state.

        Raises:
            TypeError: a member's has none.
        """
        return {"members": [_state_of(part) for part in self._parts]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Put back what `state_dict` gave."""
        saved = state["members"]
        assert isinstance(saved, list)
        for part, own in zip(self._parts, saved, strict=True):
            _put_back(part, own)


def _state_of(part: object) -> object:
    if isinstance(part, torch.Generator):
        return part.get_state()
    return _method(part, "state_dict")()


def _put_back(part: object, state: object) -> None:
    if isinstance(part, torch.Generator):
        assert isinstance(state, torch.Tensor)
        part.set_state(state)
    else:
        _method(part, "load_state_dict")(state)


def _method(part: object, name: str) -> Callable[..., object]:
    found: object = getattr(part, name, None)
    if not callable(found):
        raise TypeError(
            f"a {type(part).__qualname__} has no {name}(), so a checkpoint can't hold it: give it state_dict() and "
            "load_state_dict(), or keep it out of orc.State and make it anew from the parameters"
        )
    return found


def gathered(values: Sequence[object]) -> object:
    """What the members gave, as one: nothing, a text that is the same for all, numbers, or an `Each`."""
    first = values[0]
    if first is None or isinstance(first, str):
        if all(value == first for value in values):
            return first
    elif all(isinstance(value, (int, float)) for value in values):
        return PerMember.of([float(value) for value in values])  # type: ignore[arg-type]  # looked at above
    return Each(values)


def of_member(value: object, at: int) -> object:
    """One member's part of a value; one that isn't by member is everybody's.

    Raises:
        Unpackable: it was one value a member, and no longer is.
    """
    if isinstance(value, Each):
        return value._parts[at]
    if not isinstance(value, PerMember):
        return value
    if not value.dim():
        raise Unpackable("the job has put the values of several trials together in one")
    found = value.detach().as_subclass(torch.Tensor)[at]
    return found if found.dim() else float(found)
