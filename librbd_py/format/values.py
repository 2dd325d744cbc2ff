"""`dataclass`, `field` and `replace` of the standard library: half of their features, a fraction of their
start-up time.

The standard one writes and compiles five functions for each class when the class is defined; that was half of the time
`rbdpy ls` took. This one compiles a function when it is first called. What it has: frozen, order, defaults, factories,
`repr` and `hash` of a field, inheritance, `__post_init__`, ClassVar, and everything of `dataclasses` that looks at
`__dataclass_fields__`. Type checkers see the standard one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass, field, replace

__all__ = ["dataclass", "field", "replace"]

_MISSING: Any = object()


class _Field(NamedTuple):
    default: Any = _MISSING
    default_factory: Any = _MISSING
    repr: bool = True
    hash: bool | None = None


def _field(
    *, default: Any = _MISSING, default_factory: Any = _MISSING, repr: bool = True, hash: bool | None = None
) -> Any:
    return _Field(default, default_factory, repr, hash)


def _replace(value: Any, /, **changes: Any) -> Any:
    """A copy with other values. TypeError: there is no field of that name."""
    return type(value)(**{name: getattr(value, name) for name in value.__values__} | changes)


def _dataclass(cls: Any = None, /, *, frozen: bool = False, order: bool = False) -> Any:
    if cls is None:
        return lambda cls: _made(cls, frozen, order)
    return _made(cls, frozen, order)


def _made(cls: Any, frozen: bool, order: bool) -> Any:
    fields: dict[str, _Field] = {}
    for base in reversed(cls.__mro__[1:]):
        fields |= base.__dict__.get("__values__", {})
    for name, kind in vars(cls).get("__annotations__", {}).items():
        if str(kind).removeprefix("typing.").startswith("ClassVar"):
            continue
        default = cls.__dict__.get(name, _MISSING)
        fields[name] = default if isinstance(default, _Field) else _Field(default)
        if isinstance(default, _Field):
            if default.default is _MISSING:
                delattr(cls, name)
            else:
                setattr(cls, name, default.default)
    own = cls.__dict__
    hashable = "__hash__" in own and not (own["__hash__"] is None and "__eq__" in own)
    cls.__values__ = fields
    setattr(cls, "__match_args__", tuple(fields))  # noqa: B010  mypy takes it for a constant
    cls.__dataclass_fields__ = _Standard(cls, "__dataclass_fields__", frozen, order)
    cls.__dataclass_params__ = _Standard(cls, "__dataclass_params__", frozen, order)
    _add(cls, "__init__", lambda: _init(cls, fields, frozen))
    _add(cls, "__eq__", lambda: _eq(cls, fields))
    if "__repr__" not in own:
        cls.__repr__ = _repr
    if not hashable:
        if frozen:
            if "__hash__" in own:
                del cls.__hash__  # the None that a class with __eq__ gets
            _add(cls, "__hash__", lambda: _hash(cls, fields))
        else:
            cls.__hash__ = None
    if frozen:
        _freeze(cls, fields)
    if order:
        _order(cls)
    return cls


def _add(cls: Any, name: str, compiled: Callable[[], Any]) -> None:
    """The method, compiled when it is first called."""
    if name in cls.__dict__:
        return

    def stub(self: Any, *args: Any, **named: Any) -> Any:
        function = compiled()
        function.__qualname__ = f"{cls.__qualname__}.{name}"
        setattr(cls, name, function)
        return function(self, *args, **named)

    setattr(cls, name, stub)


def _compile(source: str, name: str, known: dict[str, Any]) -> Any:
    found: dict[str, Any] = {}
    exec(source, known, found)
    return found[name]


def _init(cls: Any, fields: dict[str, _Field], frozen: bool) -> Any:
    known: dict[str, Any] = {"_set": object.__setattr__, "_missing": _MISSING}
    args, body = [], []
    for name, made in fields.items():
        value = name
        if made.default_factory is not _MISSING:
            known[f"_{name}_factory"] = made.default_factory
            args.append(f"{name}=_missing")
            value = f"_{name}_factory() if {name} is _missing else {name}"
        elif made.default is not _MISSING:
            known[f"_{name}_default"] = made.default
            args.append(f"{name}=_{name}_default")
        else:
            args.append(name)
        body.append(f"_set(_it, {name!r}, {value})" if frozen else f"_it.{name} = {value}")
    if hasattr(cls, "__post_init__"):
        body.append("_it.__post_init__()")
    lines = "\n ".join(body) or "pass"
    return _compile(f"def __init__({', '.join(['_it', *args])}):\n {lines}", "__init__", known)


def _values(fields: dict[str, _Field], of: str, hashed: bool = False) -> str:
    names = [name for name, made in fields.items() if not hashed or made.hash is not False]
    return "(" + "".join(f"{of}.{name}," for name in names) + ")"


def _eq(cls: Any, fields: dict[str, _Field]) -> Any:
    same = f"{_values(fields, 'self')} == {_values(fields, 'other')}"
    source = f"def __eq__(self, other):\n return {same} if other.__class__ is self.__class__ else NotImplemented"
    return _compile(source, "__eq__", {})


def _hash(cls: Any, fields: dict[str, _Field]) -> Any:
    return _compile(f"def __hash__(self):\n return hash({_values(fields, 'self', True)})", "__hash__", {})


def _repr(self: Any) -> str:
    shown = (f"{name}={getattr(self, name)!r}" for name, made in self.__values__.items() if made.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _freeze(cls: Any, fields: dict[str, _Field]) -> None:
    def refuse(self: Any, name: str, verb: str) -> None:
        if type(self) is cls or name in fields:
            from dataclasses import FrozenInstanceError

            raise FrozenInstanceError(f"cannot {verb} field {name!r}")

    def __setattr__(self: Any, name: str, value: Any) -> None:
        refuse(self, name, "assign to")
        super(cls, self).__setattr__(name, value)

    def __delattr__(self: Any, name: str) -> None:
        refuse(self, name, "delete")
        super(cls, self).__delattr__(name)

    cls.__setattr__, cls.__delattr__ = __setattr__, __delattr__


def _order(cls: Any) -> None:
    import operator

    for name in ("lt", "le", "gt", "ge"):
        compare = getattr(operator, name)

        def method(self: Any, other: Any, compare: Any = compare) -> Any:
            if other.__class__ is not self.__class__:
                return NotImplemented
            names = self.__values__
            return compare(tuple(getattr(self, n) for n in names), tuple(getattr(other, n) for n in names))

        setattr(cls, f"__{name}__", method)


class _Standard:
    """What `dataclasses` keeps in a class, made when somebody asks."""

    def __init__(self, cls: Any, name: str, frozen: bool, order: bool) -> None:
        self._cls, self._name, self._frozen, self._order = cls, name, frozen, order
        self._made: Any = None

    def __get__(self, value: Any, owner: Any) -> Any:
        if self._made is None:
            import dataclasses

            rows = []
            for name, made in self._cls.__values__.items():
                how: dict[str, Any] = {"repr": made.repr, "hash": made.hash}
                how |= {"default": made.default} if made.default is not _MISSING else {}
                how |= {"default_factory": made.default_factory} if made.default_factory is not _MISSING else {}
                rows.append((name, object, dataclasses.field(**how)))
            made_too = dataclasses.make_dataclass(self._cls.__name__, rows, frozen=self._frozen, order=self._order)
            self._made = getattr(made_too, self._name)
        return self._made


if not TYPE_CHECKING:
    dataclass, field, replace = _dataclass, _field, _replace
