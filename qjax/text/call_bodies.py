"""What stands between `<tool_call>` and `</tool_call>`, read as it comes: Hermes' JSON, or Qwen3-Coder's XML.

A body gives the call's name and the JSON text of its arguments; `tool_calls` decides what to do with them.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from qjax.text.json_scanner import JsonScanner

_SPACE = " \t\n\r"
_TAG = re.compile(r"\s*(<(?:function|parameter)=([^<>\s]+)>|</function>)")
MAX_TAG = 1000  # characters
END_CALL = "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"


class CallBody(Protocol):
    """The inside of one call.

    Attributes:
      name: once it is known.
      is_done: the call is complete.
      is_broken: the next character cannot be part of a call.
    """

    name: str | None
    is_done: bool
    is_broken: bool

    def read(self, text: str) -> int:
        """Takes text; returns how much of it. It must be given the rest again, with more behind it."""

    def take(self) -> str:
        """The text of the arguments that was read since the last time."""


class JsonBody:
    """`{"name": …, "arguments": {…}}`, keys in any order, others dropped; the arguments' text is a slice.

    Arguments may be missing or null (then `{}`), or a JSON string that holds the object, which is unpacked. A missing
    last brace is forgiven.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_done = False
        self.is_broken = False
        self._state = "open"
        self._key = ""
        self._kept = ""  # the text of a value that is read as a whole
        self._scanner = JsonScanner()
        self._arguments: list[str] = []
        self._has_arguments = False

    def read(self, text: str) -> int:
        i = 0
        while i < len(text) and not (self.is_done or self.is_broken):
            if self._state in ("key", "value"):
                i = self._scan(text, i)
            elif text[i] in _SPACE:
                i += 1
            else:
                i = self._between(text, i)
        return i

    def take(self) -> str:
        if self.is_done and not self._has_arguments:
            self._has_arguments = True
            self._arguments.append("{}")
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _between(self, text: str, i: int) -> int:
        """The outer object's own braces, colons and commas."""
        char, state = text[i], self._state
        if state == "open" and char == "{":
            self._state = "first key"
        elif state in ("first key", "next key") and char == '"':
            self._begin("key")
            return i
        elif state == "colon" and char == ":":
            self._state = "before value"
        elif state == "before value":
            if self._key == "arguments" and char not in '{"n':
                self.is_broken = True
            self._begin("value")
            return i
        elif state == "after" and char == ",":
            self._state = "next key"
        elif state == "after" and char in "}<" and self.name is not None:
            self.is_done = True
            return i + (char == "}")
        else:
            self.is_broken = True
            return i
        return i + 1

    def _begin(self, state: str) -> None:
        self._state, self._scanner, self._kept = state, JsonScanner(), ""

    def _scan(self, text: str, i: int) -> int:
        streams = self._state == "value" and self._key == "arguments" and (self._kept or text[i]) == "{"
        end = self._scanner.scan(text, i)
        if streams:
            self._kept = "{"
            self._arguments.append(self._scanner.take())
        else:
            self._kept += self._scanner.take()
        if self._scanner.is_done:
            self._ended(streams)
        self.is_broken = self.is_broken or self._scanner.is_broken
        return end

    def _ended(self, was_streamed: bool) -> None:
        if self._state == "key":
            self._key, self._state = json.loads(self._kept), "colon"
            self.is_broken = (self._key == "name" and self.name is not None) or (
                self._key == "arguments" and self._has_arguments
            )
            return
        self._state = "after"
        if was_streamed:
            self._has_arguments = True
        elif self._key == "name":
            name = json.loads(self._kept) if self._kept.startswith('"') else None
            self.is_broken = not name or not _is_unicode(name)
            self.name = name or None
        elif self._key == "arguments":
            self._unpack(self._kept)

    def _unpack(self, text: str) -> None:
        """Arguments that are a string or null."""
        inner = (json.loads(text) or "").strip() or "{}"
        scanner = JsonScanner()
        end = scanner.scan(inner)
        if inner[0] != "{" or not scanner.is_done or end < len(inner) or not _is_unicode(inner):
            self.is_broken = True
            return
        self._arguments.append(scanner.take())
        self._has_arguments = True


class XmlBody:
    """`<function=name><parameter=key>value</parameter>…</function>`; the arguments' text is made of it.

    A value is text unless the tool's schema says otherwise; its own first and last newline are dropped. It ends where
    `</parameter>` is followed by the next parameter or the function's end, so that it may contain the tag.

    Args:
      schemas: the tools' names and the properties of their parameters.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]):
        self.name: str | None = None
        self.is_done = False
        self.is_broken = False
        self._schemas = schemas
        self._state = "open"
        self._types: frozenset[str] = frozenset()
        self._value: list[str] = []  # of a value that is not text
        self._is_first = True  # no character of the value was read
        self._num_parameters = 0
        self._arguments: list[str] = []

    def read(self, text: str) -> int:
        i = 0
        while not (self.is_done or self.is_broken):
            end = self._read_value(text, i) if self._state == "value" else self._read_tag(text, i)
            if end == i:
                break
            i = end
        return i

    def take(self) -> str:
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _read_tag(self, text: str, i: int) -> int:
        match = _TAG.match(text, i)
        if match is None:
            rest = text[i:].lstrip()
            tags = (FUNCTION,) if self._state == "open" else (PARAMETER, END_FUNCTION)
            is_begun = any(tag.startswith(rest) or (tag[-1] == "=" and rest.startswith(tag)) for tag in tags)
            self.is_broken = not is_begun or len(rest) > MAX_TAG or bool(re.search(r"[<>\s]", rest[1:]))
            return i
        tag, name = match[1], match[2]
        if self._state == "open" and tag.startswith(FUNCTION):
            self.name, self._state = name, "parameters"
        elif self._state == "parameters" and tag.startswith(PARAMETER):
            self._arguments.append(
                (", " if self._num_parameters else "{") + json.dumps(name, ensure_ascii=False) + ": "
            )
            self._types = _types(self._schemas.get(self.name or "", {}).get(name))
            self._num_parameters += 1
            self._state, self._is_first = "value", True
            if self._is_text:
                self._arguments.append('"')
        elif self._state == "parameters" and tag == END_FUNCTION:
            self._arguments.append("}" if self._num_parameters else "{}")
            self.is_done = True
        else:
            self.is_broken = True
            return i
        return match.end()

    @property
    def _is_text(self) -> bool:
        return self._types <= {"string"}

    def _read_value(self, text: str, i: int) -> int:
        if self._is_first:
            if i == len(text):
                return i
            self._is_first = False
            if text[i] == "\n":
                return i + 1
        end, is_end = _value_end(text, i)
        part = text[i : end - 1] if end > i and text[end - 1] == "\n" else text[i:end]
        if self._is_text:
            self._arguments.append(_escaped(part))
        else:
            self._value.append(part)
        if not is_end:
            return i + len(part)
        if self._is_text:
            self._arguments.append('"')
        else:
            self._arguments.append(_as_json("".join(self._value), self._types))
            self._value.clear()
        self._state = "parameters"
        return end + len(END_PARAMETER) * text.startswith(END_PARAMETER, end)


def _value_end(text: str, start: int) -> tuple[int, bool]:
    """Where a parameter's value ends, and true; or up to where it certainly goes on, and false."""
    i = text.find("<", start)
    while i >= 0:
        for tag, followers in ((END_PARAMETER, (PARAMETER, END_FUNCTION)), (END_FUNCTION, (END_CALL,))):
            if tag.startswith(text[i : i + len(tag)]):
                rest = text[i + len(tag) :].lstrip()
                if rest.startswith(followers):
                    return i, True
                if any(follower.startswith(rest) for follower in followers):
                    return i, False
        i = text.find("<", i + 1)
    return len(text), False


def _types(schema: Any, depth: int = 8) -> frozenset[str]:
    """The JSON types that a schema allows; none where it does not say, or too far down."""
    if not isinstance(schema, Mapping) or not depth:
        return frozenset()
    types = schema.get("type")
    found = {types} if isinstance(types, str) else set()
    if isinstance(types, list):
        found |= {t for t in types if isinstance(t, str)}
    for name in ("anyOf", "oneOf"):
        options = schema.get(name)
        for option in options if isinstance(options, list) else []:
            found |= _types(option, depth - 1)
    return frozenset(found)


def _as_json(text: str, types: frozenset[str]) -> str:
    """A value's JSON text: as it is where it is JSON of a type that the schema allows, else as a string."""
    text = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return f'"{_escaped(text)}"'
    kinds = {_KINDS.get(type(value), "null")} | ({"number"} if type(value) is int else set())
    return text.strip() if "string" not in types or kinds & types - {"string"} else f'"{_escaped(text)}"'


_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _is_unicode(text: str) -> bool:
    """False where an escape made half a surrogate pair, which cannot be sent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
