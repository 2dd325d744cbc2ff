"""Our dataclasses behave as the standard library's, method by method, in all forms that are used here."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from librbd_py.format import values
from librbd_py.format.values import field, replace


def family(dataclass: Callable[..., Any], field: Callable[..., Any]) -> dict[str, Any]:
    """The same classes by either decorator."""

    @dataclass(frozen=True)
    class Point:
        x: int
        y: int = 2
        kind: ClassVar[int] = 7

        def total(self) -> int:
            return self.x + self.y

    @dataclass(frozen=True)
    class Named(Point):
        name: str = field(default="n", repr=False)
        tags: list[int] = field(default_factory=list, hash=False)

    @dataclass(frozen=True, order=True)
    class Ordered:
        a: int
        b: str

    @dataclass
    class Plain:
        a: int
        rows: list[int] = field(default_factory=list)

        def __post_init__(self) -> None:
            self.twice = self.a * 2

    @dataclass(frozen=True)
    class Own:
        a: int

        def __repr__(self) -> str:
            return "mine"

        def __hash__(self) -> int:
            return 5

    @dataclass(frozen=True)
    class Empty:
        pass

    return {made.__name__: made for made in (Point, Named, Ordered, Plain, Own, Empty)}


OURS = family(values.dataclass, values.field)
THEIRS = family(dataclasses.dataclass, dataclasses.field)
P, N, O, L = "Point", "Named", "Ordered", "Plain"  # noqa: E741

QUESTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "values": lambda of: (of[P](1).x, of[P](1).y, of[P](x=3, y=4).total(), of[P].kind, of[P].y),
    "inherited": lambda of: vars(of[N](1, 3)),
    "repr": lambda of: repr([of[P](1), of[N](1, 2, "x"), of[L](3), of["Own"](1), of["Empty"]()]),
    "equal": lambda of: (of[P](1) == of[P](1), of[P](1) == of[P](2), of[P](1) == of[N](1), of[P](1) != 5),
    "post init": lambda of: (of[L](4).twice, of[L](4) == of[L](4)),
    "factories are called each time": lambda of: of[L](1).rows is of[L](1).rows,
    "hash": lambda of: (hash(of[P](1)) == hash(of[P](1, 2)), hash(of["Own"](1)), hash(of[N](1, tags=[1])) == 0),
    "dictionary": lambda of: {of[P](1): "a", of[P](2): "b"}[of[P](2)],
    "unhashable": lambda of: hash(of[L](1)),
    "order": lambda of: [vars(row) for row in sorted([of[O](2, "a"), of[O](1, "b"), of[O](1, "a")])],
    "compare": lambda of: (
        of[O](1, "a") <= of[O](1, "a"),
        of[O](1, "b") > of[O](1, "a"),
        of[O](1, "a") >= of[O](2, ""),
    ),
    "compare with others": lambda of: of[O](1, "a") < 5,
    "no order": lambda of: of[P](1) < of[P](2),
    "assign": lambda of: setattr(of[P](1), "x", 5),
    "delete": lambda of: delattr(of[P](1), "x"),
    "assign to a plain one": lambda of: setattr(of[L](1), "a", 5),
    "missing": lambda of: of[P](),
    "too many": lambda of: of[P](1, 2, 3),
    "unknown": lambda of: of[P](1, z=3),
    "match": lambda of: of[N].__match_args__,
    "fields": lambda of: [(f.name, f.repr, f.hash) for f in dataclasses.fields(of[N])],
    "asdict": lambda of: dataclasses.asdict(of[N](1, tags=[of[P](2)])),
    "is one": lambda of: (dataclasses.is_dataclass(of[P]), dataclasses.is_dataclass(of[P](1))),
    "standard replace": lambda of: dataclasses.replace(of[N](1), name="other").name,
    "copy": lambda of: vars(copy.deepcopy(of[N](1, tags=[3]))),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_as_the_standard_one(question: str) -> None:
    def answer(of: dict[str, Any]) -> Any:
        try:
            return QUESTIONS[question](of)
        except Exception as failure:
            return type(failure), str(failure).replace("family.<locals>.", "")

    assert answer(OURS) == answer(THEIRS)


def test_replace() -> None:
    changed = replace(OURS[N](1, 2, "x", [4]), x=9)
    assert vars(changed) == {"x": 9, "y": 2, "name": "x", "tags": [4]}
    with pytest.raises(TypeError):
        replace(changed, nothing=1)


def test_a_standard_dataclass_may_inherit_from_one_of_ours() -> None:
    base: Any = OURS[P]

    @dataclasses.dataclass(frozen=True)
    class Child(base):  # type: ignore[misc]
        z: int = 3

    assert repr(Child(1)).endswith("Child(x=1, y=2, z=3)") and Child(1) == Child(1, 2, 3)


def test_a_class_without_the_decorator_may_inherit() -> None:
    base: Any = OURS[P]

    class Child(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(4)
            self.more = 1

    assert Child().x == 4 and Child().more == 1


@values.dataclass(frozen=True)
class Kept:
    a: int


def test_pickled() -> None:
    assert pickle.loads(pickle.dumps(Kept(3))) == Kept(3)


def test_the_names_are_those_of_the_standard_one() -> None:
    assert field is not None and set(values.__all__) <= set(dataclasses.__all__)


def test_a_field_may_be_called_self() -> None:
    """As one of image/ownership.py is."""

    @values.dataclass(frozen=True)
    class Who:
        name: str
        self: bool = False

    who = Who("a", True)
    assert (who.name, who.self) == ("a", True)
    assert who == Who("a", self=True)
