"""Request bodies as dataclasses: one table of fields says what is parsed, refused and described.

A field is a dataclass field with an annotation (its JSON type) and a help text; `parse` checks a JSON object against
it. A description of the API can be generated from the same fields. No framework: errors name the field, what is
expected, and what came.
"""

import dataclasses
import functools
import re
import types
from dataclasses import MISSING
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from multidict import MultiMapping

from qjax.server.errors import bad_request, shorten

MAX_INT = 2**63


@dataclasses.dataclass(frozen=True)
class Refused:
    """A known field that is not supported: only its neutral values (and null), which ask for nothing, are accepted."""

    reason: str
    neutral: tuple[Any, ...] = ()


def body_field(
    help: str,
    default: Any = None,
    *,
    minimum: float | None = None,
    max_items: int | None = None,
    schema: dict[str, Any] | None = None,
) -> Any:
    """A field of a request's body.

    Args:
      default: the value where the field is absent or null; `MISSING` makes it required.
      minimum: for numbers.
      max_items: for lists.
      schema: more of its JSON schema, where the limits are checked by whoever owns them.
    """
    metadata = {"help": help, "minimum": minimum, "max_items": max_items, "schema": schema or {}}
    if default is MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse[T](cls: type[T], body: Any, where: str = "") -> T:
    """A request object from a JSON object. null means absent.

    `cls` may have the tables `REFUSED` (name → Refused) and `NO_EFFECT` (name → why it changes nothing).

    Raises:
      ApiError: 400, naming the first field that is unknown, refused, missing or of the wrong type.
    """
    if not isinstance(body, dict):
        raise bad_request(f"{where or 'The body'} must be a JSON object, got {shorten(body)}.", where or None)
    hints = _hints(cls)  # type: ignore[arg-type]
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    refused: dict[str, Refused] = getattr(cls, "REFUSED", {})
    no_effect: dict[str, str] = getattr(cls, "NO_EFFECT", {})
    prefix = f"{where}." if where else ""
    values = {}
    for name, value in sorted(body.items(), key=lambda item: item[0] != "type"):  # which says what else there is
        path = prefix + name
        if name in fields:
            if value is not None:
                values[name] = _checked(fields[name], _convert(hints[name], value, path), path)
        elif name in refused:
            if value is not None and not any(_same(value, v) for v in refused[name].neutral):
                raise bad_request(f"{path} is not supported: {refused[name].reason}", path, value)
        elif name not in no_effect:
            raise bad_request(f"Unrecognized request argument supplied: {path}", path)
    for name, f in fields.items():
        if name not in values and f.default is MISSING:
            raise bad_request(f"{prefix}{name} is required: {describe(hints[name])}.", prefix + name)
    return cls(**values)


def parse_query[T](cls: type[T], query: MultiMapping[str]) -> T:
    """`parse` for what stands behind the ? of a URL: digits are a number, true and false what they say, and a list is
    its name several times."""
    hints = _hints(cls)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name in query:
        texts = query.getall(name)
        is_list = any(get_origin(part) is list for part in (hints.get(name), *get_args(hints.get(name))))
        if hints.get(name) is bool:
            values[name] = {"true": True, "false": False}.get(texts[-1].lower(), texts[-1])
            continue
        values[name] = texts if is_list else int(texts[-1]) if re.fullmatch("-?[0-9]{1,18}", texts[-1]) else texts[-1]
    return parse(cls, values)


def describe(annotation: Any) -> str:
    """A type in words, for errors."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args if a is not types.NoneType)
    if origin is Literal:
        return " or ".join(map(shorten, args))
    if origin is list:
        return "a list of " + _PLURALS.get(args[0], "lists of integers" if get_origin(args[0]) is list else "objects")
    return "an object"


_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Any: "any value"}
_PLURALS = {int: "integers", str: "strings", float: "numbers"}


class _Mismatch(Exception):
    pass


def _convert(annotation: Any, value: Any, path: str) -> Any:
    try:
        return _as_type(annotation, value, path)
    except _Mismatch:
        raise bad_request(f"{path} must be {describe(annotation)}, got {shorten(value)}.", path) from None


def _as_type(annotation: Any, value: Any, path: str) -> Any:
    """The value as the annotated type, or _Mismatch. Strict: no text for numbers, no numbers for booleans."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        for arg in args:
            try:
                return _as_type(arg, value, path)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is Literal:
        if not any(_same(value, arg) for arg in args):
            raise _Mismatch
        return value
    if origin is list:
        if not isinstance(value, list):
            raise _Mismatch
        if args[0] is int and all(type(v) is int for v in value):  # long lists of token ids
            return value
        return [_as_type(args[0], v, f"{path}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _Mismatch
        return {_key(args[0], k): _as_type(args[1], v, path) for k, v in value.items()}
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, dict):
            raise _Mismatch
        return parse(annotation, value, path)  # type: ignore[arg-type]
    if annotation is float and type(value) in (int, float) and abs(value) < MAX_INT:
        return float(value)
    if annotation is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not annotation or (annotation is int and not -MAX_INT <= value < MAX_INT):
        raise _Mismatch
    return value


def _key(annotation: Any, key: str) -> Any:
    if annotation is not int:
        return key
    if not re.fullmatch(r"-?[0-9]{1,19}", key):  # `int` also takes blanks, underscores and digits of other scripts
        raise _Mismatch
    return int(key)


def _checked(f: dataclasses.Field, value: Any, path: str) -> Any:
    minimum, max_items = f.metadata.get("minimum"), f.metadata.get("max_items")
    if minimum is not None and isinstance(value, int | float) and value < minimum:
        raise bad_request(f"{path} must be at least {minimum}, got {value}.", path, value)
    if max_items is not None and isinstance(value, list) and len(value) > max_items:
        raise bad_request(f"{path} can have at most {max_items} items, got {len(value)}.", path)
    return value


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: `true` is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)
