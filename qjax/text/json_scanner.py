"""`JsonScanner`: follows one JSON value through text that comes in pieces, and finds its end or its first mistake.

The value is not built: its text is what is wanted. No recursion, so that deep nesting costs memory only.
"""

import json
import re

_WHITESPACE = " \t\n\r"
_STRING_STOP = re.compile(r'["\\\x00-\x1f]')
_LITERAL_RUN = re.compile(r"[-+.0-9A-Za-z]*")
_LITERAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_CLOSING = {"{": "}", "[": "]"}
_HEX = frozenset("0123456789abcdefABCDEF")


class JsonScanner:
    """Strict JSON, but for raw control characters in strings: they are escaped, as models forget that in code.

    Attributes:
      is_done: the value is complete.
      is_broken: the next character cannot belong to the value.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._out: list[str] = []
        self._open: list[str] = []  # brackets not yet closed
        self._state = "value"
        self._is_key = False
        self._literal = ""
        self._num_hex = 0

    def scan(self, text: str, start: int = 0) -> int:
        """Goes on at `text[start]`; returns where it stopped: the text's end, the value's, or a mistake."""
        i = start
        while i < len(text) and not (self.is_done or self.is_broken):
            i = self._advance(text, i)
        return i

    def take(self) -> str:
        """The value's text that was scanned since the last call."""
        text = "".join(self._out)
        self._out.clear()
        return text

    def _advance(self, text: str, i: int) -> int:
        char = text[i]
        if self._state == "string":
            return self._string(text, i)
        if self._state == "literal":
            end = _LITERAL_RUN.match(text, i).end()  # type: ignore[union-attr]
            self._literal += text[i:end]
            self._out.append(text[i:end])
            if end < len(text):
                self.is_broken = not _LITERAL.fullmatch(self._literal)
                self._value_ended()
            return end
        if self._state in ("escape", "hex"):
            self._escaped(char)
        elif char not in _WHITESPACE and not self._structure(char):
            return i  # the first character of a literal is read again
        if self.is_broken:
            return i
        self._out.append(char)
        return i + 1

    def _string(self, text: str, i: int) -> int:
        stop = _STRING_STOP.search(text, i)
        if stop is None:
            self._out.append(text[i:])
            return len(text)
        char = stop[0]
        self._out.append(text[i : stop.start()])
        if char == '"':
            if self._is_key:
                self._state = "colon"
            else:
                self._value_ended()
        elif char == "\\":
            self._state = "escape"
        else:
            char = json.dumps(char)[1:-1]
        self._out.append(char)
        return stop.end()

    def _escaped(self, char: str) -> None:
        if self._state == "escape":
            self.is_broken = char not in '"\\/bfnrtu'
            self._state, self._num_hex = ("hex", 4) if char == "u" else ("string", 0)
        else:
            self.is_broken = char not in _HEX
            self._num_hex -= 1
            self._state = "hex" if self._num_hex else "string"

    def _structure(self, char: str) -> bool:
        """Takes a character between strings and literals; false if it is not used up."""
        state = self._state
        if state in ("value", "first item"):
            if char in _CLOSING:
                self._open.append(char)
                self._state = "first key" if char == "{" else "first item"
            elif char == '"':
                self._state, self._is_key = "string", False
            elif char == "]" and state == "first item":
                self._open.pop()
                self._value_ended()
            elif char in "-0123456789tfn":
                self._state, self._literal = "literal", ""
                return False
            else:
                self.is_broken = True
        elif state in ("key", "first key"):
            if char == '"':
                self._state, self._is_key = "string", True
            elif char == "}" and state == "first key":
                self._open.pop()
                self._value_ended()
            else:
                self.is_broken = True
        elif state == "colon":
            self.is_broken = char != ":"
            self._state = "value"
        elif char == ",":
            self._state = "key" if self._open[-1] == "{" else "value"
        elif char == _CLOSING[self._open[-1]]:
            self._open.pop()
            self._value_ended()
        else:
            self.is_broken = True
        return True

    def _value_ended(self) -> None:
        if self._open:
            self._state = "after"
        else:
            self.is_done = not self.is_broken
