"""Config machinery: frozen dataclasses, checks with paths, component swaps, JSON that reads back equal.

Every config class is a frozen keyword-only dataclass that derives from `Config`, sits beside the code it configures and
documents each field with a string below it (shown by --help). `Config.check` raises `ConfigError` for an impossible value;
`validate` walks a whole tree, checks types, and completes the path of the field in the message.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import typeguard

from sparse_lm import components

C = TypeVar("C", bound="Config")


class ConfigError(ValueError):
    """An impossible configuration: names the field, the value and what is allowed."""

    def __init__(self, field: str, value: Any, allowed: str):
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field} = {value!r} is not possible; allowed: {allowed}")

    def within(self, prefix: str) -> "ConfigError":
        """Returns the same error with the field's path completed by the path of the config that holds it."""
        return ConfigError(f"{prefix}.{self.field}" if prefix else self.field, self.value, self.allowed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every config class."""

    def check(self) -> None:
        """Raises ConfigError if a value is impossible by itself or beside its siblings."""

    def require(self, condition: bool, field: str, allowed: str) -> None:
        """Raises ConfigError about `field` (its value read from self) unless the condition holds."""
        if not condition:
            raise ConfigError(field, getattr(self, field), allowed)


def component(kind: str, default: Any = dataclasses.MISSING, **keywords: Any) -> Any:
    """A dataclass field that holds a component of `kind` (or a tuple of them): swappable, tagged in JSON."""
    return dataclasses.field(default=default, metadata={"component": kind}, **keywords)


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def children(config: Config, prefix: str = "") -> Iterator[tuple[str, Config]]:
    """Yields (path, config) for the config itself and every config below it, tuples included."""
    yield prefix, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Config):
            yield from children(value, _join(prefix, field.name))
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, Config):
                    yield from children(item, _join(prefix, f"{field.name}.{i}"))


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of its hint; True and False are no numbers."""
    try:
        typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        return False
    items = value if isinstance(value, tuple) else (value,)
    return _mentions(hint, bool) or not any(isinstance(item, bool) for item in items)


def _mentions(hint: Any, wanted: type) -> bool:
    return hint is wanted or any(_mentions(inner, wanted) for inner in typing.get_args(hint))


def validate(config: C) -> C:
    """Checks types and values of a whole tree and returns it.

    Raises:
      ConfigError: with the dotted path of the first wrong field, its value and what is allowed.
    """
    nodes = list(children(config))
    for path, node in nodes:
        hints = _hints(type(node))
        for field in dataclasses.fields(node):
            value, hint = getattr(node, field.name), hints[field.name]
            if not _has_type(value, hint):
                allowed = hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
                raise ConfigError(_join(path, field.name), value, f"a value of type {allowed}")
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, float) and not math.isfinite(item):
                    raise ConfigError(_join(path, field.name), value, "finite numbers")
    # Children before their parents, whose checks may compute with the children's values.
    for path, node in reversed(nodes):
        try:
            node.check()
        except ConfigError as error:
            raise error.within(path) from None
    return config


def override(config: C, path: str, value: Any) -> C:
    """Returns a copy with the field at a dotted path replaced; tuples are indexed by number.

    Raises:
      ValueError: for a field that does not exist, with the nearest name.
    """
    head, _, rest = path.partition(".")
    names = [field.name for field in dataclasses.fields(config)]
    if head not in names:
        raise ValueError(
            f"{type(config).__name__} has no field {head!r}; fields: {', '.join(names)}.{components.did_you_mean(head, names)}"
        )
    if rest:
        child = getattr(config, head)
        if isinstance(child, tuple):
            index, _, inner = rest.partition(".")
            if not index.isdigit() or int(index) >= len(child):
                raise ValueError(f"{head} has {len(child)} entries; allowed: an index below that, not {index!r}")
            item = override(child[int(index)], inner, value) if inner else value
            value = child[: int(index)] + (item,) + child[int(index) + 1 :]
        elif isinstance(child, Config):
            value = override(child, rest, value)
        else:
            raise ValueError(f"{head} is a plain value and has no field {rest!r}")
    return dataclasses.replace(config, **{head: value})


def swap(config: C, assignment: str) -> C:
    """Applies one `--with` assignment: `kind=name` everywhere the kind occurs, or `dotted.path=name` at one place.

    The new component starts from its own defaults: numbers tuned for another component are not carried over.
    """
    target, separator, name = assignment.partition("=")
    if not separator or not name:
        raise ValueError(f"--with {assignment!r}; allowed: KIND=NAME or path.to.field=NAME")
    if target in components.TABLE:
        built = components.lookup(target, name)()
        swapped, count = _replace_kind(config, target, built)
        if not count:
            raise ValueError(f"--with {assignment!r}: this recipe has no {target} to replace")
        return swapped
    parent_path, _, field_name = target.rpartition(".")
    if field_name.isdigit():
        parent_path, _, field_name = parent_path.rpartition(".")
    parents = dict(children(config))
    if parent_path not in parents:
        known = [*components.TABLE, *filter(None, parents)]
        raise ValueError(
            f"--with {assignment!r}: no component kind or path {target!r}; kinds: "
            f"{', '.join(components.TABLE)}.{components.did_you_mean(target, known)}"
        )
    for field in dataclasses.fields(parents[parent_path]):
        if field.name == field_name and "component" in field.metadata:
            built = components.lookup(field.metadata["component"], name)()
            held = getattr(parents[parent_path], field_name)
            whole = isinstance(held, tuple) and not target.rpartition(".")[2].isdigit()
            return override(config, target, tuple(built for _ in held) if whole else built)
    known = [*components.TABLE] if not parent_path else []
    known += [_join(parent_path, f.name) for f in dataclasses.fields(parents[parent_path]) if "component" in f.metadata]
    raise ValueError(
        f"--with {assignment!r}: {target!r} is not a component field; allowed here: {', '.join(known) or 'none'}."
        f"{components.did_you_mean(target, known)}"
    )


def _replace_kind(config: Config, kind: str, built: Config) -> tuple[Any, int]:
    changes, count = {}, 0
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        items = value if isinstance(value, tuple) else (value,)
        replaced = []
        for item in items:
            if isinstance(item, Config) and field.metadata.get("component") == kind:
                item, found = built, 1
            elif isinstance(item, Config):
                item, found = _replace_kind(item, kind, built)
            else:
                found = 0
            count += found
            replaced.append(item)
        changes[field.name] = tuple(replaced) if isinstance(value, tuple) else replaced[0]
    return (dataclasses.replace(config, **changes) if count else config), count


def to_dict(config: Config, kind: str | None = None) -> dict[str, Any]:
    """Renders a config as JSON-ready dictionaries; component fields carry their table name under "component"."""
    out: dict[str, Any] = {"component": components.name_of(kind, type(config))} if kind else {}

    def render(value: Any, kind: str | None) -> Any:
        if isinstance(value, Config):
            return to_dict(value, kind)
        if isinstance(value, tuple):
            return [render(item, kind) for item in value]
        return value

    for field in dataclasses.fields(config):
        out[field.name] = render(getattr(config, field.name), field.metadata.get("component"))
    return out


def from_dict(cls: type[C], data: dict[str, Any], path: str = "") -> C:
    """Rebuilds a config from `to_dict`'s output; equal to the original.

    Raises:
      ConfigError: for an unknown key, with the nearest field name.
    """
    if not isinstance(data, dict):
        raise ConfigError(path or cls.__name__, data, f"a dictionary of the fields of {cls.__name__}")
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in data.items():
        if name == "component":
            continue
        if name not in fields:
            raise ConfigError(
                _join(path, name),
                value,
                f"a field of {cls.__name__}: {', '.join(fields)}.{components.did_you_mean(name, fields)}",
            )
        build = _builder(hints[name], fields[name].metadata.get("component"), _join(path, name))
        values[name] = build(value)
    return cls(**values)


def _builder(hint: Any, kind: str | None, path: str) -> Callable[[Any], Any]:
    """Returns the function that rebuilds one field's value from JSON, by its type hint."""
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return lambda value: tuple(_builder(inner[0], kind, f"{path}.{i}")(item) for i, item in enumerate(value))
        return lambda value: tuple(_builder(t, kind, f"{path}.{i}")(v) for i, (t, v) in enumerate(zip(inner, value)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return lambda value: None if value is None else _builder(options[0], kind, path)(value)
    if isinstance(hint, type) and issubclass(hint, Config):

        def build(value: dict[str, Any]) -> Config:
            if kind is None:
                return from_dict(hint, value, path)
            if not isinstance(value, dict) or "component" not in value:
                raise ConfigError(
                    path, value, f"a dictionary with the key component, one of {', '.join(components.TABLE[kind])}"
                )
            return from_dict(components.lookup(kind, value["component"]), value, path)

        return build
    if hint is float:
        return lambda value: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    return lambda value: value
