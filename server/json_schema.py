"""JSON schemas of the dataclasses that `schema.parse` reads: what it takes is described from the fields it checks."""

import dataclasses
import types
from dataclasses import MISSING
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qjax.server.schema import Refused

Schema = dict[str, Any]
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
_NULL: Schema = {"type": "null"}


class Definitions:
    """Collects the schemas of classes, each once under its name.

    Args:
      prefix: where they will lie, as in "#/components/schemas/".
    """

    def __init__(self, prefix: str):
        self.schemas: dict[str, Schema] = {}
        self._prefix = prefix
        self._classes: dict[str, type] = {}

    def reference(self, cls: type) -> Schema:
        """`{"$ref": …}` to the class, whose schema and those it uses are added."""
        name = cls.__name__
        if self._classes.setdefault(name, cls) is not cls:
            raise RuntimeError(f"two request types are called {name}")
        if name not in self.schemas:
            self.schemas[name] = {}  # a class may hold itself
            self.schemas[name] = self._object(cls)
        return {"$ref": self._prefix + name}

    def of_field(self, annotation: Any, f: dataclasses.Field) -> Schema:
        """null means that the field is absent, so all but required ones take it."""
        schema = self.of(annotation)
        limits = {"minimum": f.metadata.get("minimum"), "maxItems": f.metadata.get("max_items")}
        for name, limit in limits.items():
            if limit is not None:
                _limit(schema, name, limit)
        schema |= f.metadata.get("schema", {})
        is_required = f.default is MISSING
        if is_required:
            schema = _without_null(schema)
        elif schema and not _takes_null(schema):
            schema = _with_null(schema)
        described = {"description": f.metadata["help"]} | schema
        return described if is_required or f.default is None else described | {"default": f.default}

    def of(self, annotation: Any) -> Schema:
        origin, args = get_origin(annotation), get_args(annotation)
        if annotation is Any:
            return {}
        if annotation is types.NoneType:
            return dict(_NULL)
        if annotation in _TYPES:
            return {"type": _TYPES[annotation]}
        if origin in (Union, types.UnionType):
            return _any_of([self.of(arg) for arg in args])
        if origin is Literal:
            return {"enum": list(args)}
        if origin is list:
            return {"type": "array", "items": self.of(args[0])}
        if origin is dict:
            names = {"propertyNames": {"pattern": "^-?[0-9]{1,19}$"}} if args[0] is int else {}
            return {"type": "object", "additionalProperties": self.of(args[1]), **names}
        if dataclasses.is_dataclass(annotation):
            return self.reference(annotation)  # type: ignore[arg-type]
        raise RuntimeError(f"no JSON schema for {annotation}")

    def _object(self, cls: type) -> Schema:
        hints, fields = get_type_hints(cls), dataclasses.fields(cls)
        refused: dict[str, Refused] = getattr(cls, "REFUSED", {})
        no_effect: dict[str, str] = getattr(cls, "NO_EFFECT", {})
        properties = {f.name: self.of_field(hints[f.name], f) for f in fields}
        for name, why in refused.items():
            properties[name] = {"description": f"Not supported: {why.reason}", "enum": [None, *why.neutral]}
        for name, reason in no_effect.items():
            properties[name] = {"description": f"Changes nothing: {reason}"}
        schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
        required = [f.name for f in fields if f.default is MISSING]
        description = _own_docstring(cls)
        return (
            ({"description": description} if description else {})
            | schema
            | ({"required": required} if required else {})
        )


def _any_of(options: list[Schema]) -> Schema:
    """Alternatives; those of simple types as one list of types."""
    rest = [option for option in options if option != _NULL]
    if len(rest) == 1 and len(options) == 2:
        return _with_null(rest[0])
    if all(set(option) == {"type"} for option in options):
        return {"type": [option["type"] for option in options]}
    return {"anyOf": [part for option in options for part in option.get("anyOf", [option])]}


def _with_null(schema: Schema) -> Schema:
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [*schema.get("anyOf", [schema]), dict(_NULL)]}


def _limit(schema: Schema, name: str, limit: float) -> None:
    """Sets a limit where it counts: on the numbers or the lists among the alternatives."""
    kinds = {"minimum": {"integer", "number"}, "maxItems": {"array"}}[name]
    for part in schema.get("anyOf", [schema]):
        types_of = part.get("type", [])
        if kinds & set([types_of] if isinstance(types_of, str) else types_of):
            part[name] = limit


def _takes_null(schema: Schema) -> bool:
    kinds = schema.get("type", [])
    return "null" in kinds or _NULL in schema.get("anyOf", []) or None in schema.get("enum", [])


def _without_null(schema: Schema) -> Schema:
    return {"allOf": [schema, {"not": _NULL}]} if not schema or _takes_null(schema) else schema


def _own_docstring(cls: type) -> str:
    """Not the one that `dataclass` writes where there is none."""
    text = cls.__doc__ or ""
    return "" if text.startswith(f"{cls.__name__}(") else " ".join(text.split())
