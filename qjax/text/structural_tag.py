"""Structural tags: text and formats put together, written as one grammar for llguidance (its dialect of Lark).

The vocabulary is xgrammar's, which vLLM and SGLang take too: `{"type": "structural_tag", "format": {…}}`, and the older
form with `structures` and `triggers`. Everything that an answer may have to obey is made into such a format first.

Where free text ends at a tag, the tag must not occur in it, however the model spells it: a terminal of llguidance is
read greedily, and one that could swallow the tag would.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Format = Mapping[str, Any]
MAX_DEPTH = 64  # formats inside formats
# Bounded: with free white space a small model can write blanks for ever.
WHITESPACE = r"[ \n\r\t]{0,8}"
_ANYTHING = "/(?s:.*)/"


def tag_format(tag: Any) -> Format:
    """The format of a structural tag in the newer or the older form, as an object or as JSON text.

    Raises:
      ValueError: it has neither form.
    """
    if isinstance(tag, str):
        try:
            tag = json.loads(tag)
        except ValueError as error:
            raise ValueError(f"structural_tag is not valid JSON: {error}.") from None
    if not isinstance(tag, Mapping) or tag.get("type", "structural_tag") != "structural_tag":
        raise ValueError('structural_tag must be {"type": "structural_tag", "format": {…}}.')
    if "format" in tag:
        _check_fields(tag, "structural_tag", {"type", "format"})
        return tag["format"]
    _check_fields(tag, "structural_tag", {"type", "structures", "triggers"})
    structures = tag.get("structures")
    if not isinstance(structures, list) or not all(isinstance(s, Mapping) for s in structures):
        raise ValueError("structural_tag needs a format, or structures (a list of objects) and triggers.")
    tags = []
    for i, structure in enumerate(structures):
        _check_fields(structure, f"structural_tag.structures[{i}]", {"begin", "schema", "end"})
        content = {"type": "json_schema", "json_schema": structure.get("schema", True)}
        tags.append({"type": "tag", "begin": structure.get("begin"), "content": content, "end": structure.get("end")})
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}


def lark_source(fmt: Format, tokens: Mapping[str, int], whitespace: str = WHITESPACE) -> str:
    """llguidance's text of a format.

    Args:
      tokens: text -> id of the added tokens that stand for themselves in fixed text, such as `<tool_call>`.
      whitespace: regular expression of the white space at each place where JSON has some.

    Raises:
      ValueError: the format is wrong or cannot be honoured; names the part.
    """
    return _Writer(tokens, whitespace).source(fmt)


class _Writer:
    """Writes one grammar. Rules and terminals get numbers for names; what cannot be inlined is a grammar beside it."""

    def __init__(self, tokens: Mapping[str, int], whitespace: str):
        self._tokens = tokens
        self._whitespace = whitespace
        self._lines: list[str] = []
        self._names: dict[str, str] = {}
        self._grammars: list[dict[str, str]] = []
        self._kinds: dict[str, tuple[set[str], Callable[..., str]]] = {
            "const_string": ({"value"}, self._const_string),
            "json_schema": ({"json_schema", "style"}, self._json_schema),
            "regex": ({"pattern"}, self._regex),
            "grammar": ({"grammar"}, self._grammar),
            "any_text": ({"excludes"}, self._any_text),
            "sequence": ({"elements"}, self._sequence),
            "or": ({"elements"}, self._or),
            "optional": ({"content"}, self._repeat),
            "star": ({"content"}, self._repeat),
            "plus": ({"content"}, self._repeat),
            "repeat": ({"content", "min", "max"}, self._repeat),
            "tag": ({"begin", "content", "end"}, self._tag),
            "triggered_tags": (
                {"triggers", "tags", "at_least_one", "stop_after_first", "excludes"},
                self._triggered_tags,
            ),
            "tags_with_separator": (
                {"tags", "separator", "at_least_one", "stop_after_first"},
                self._tags_with_separator,
            ),
        }

    def source(self, fmt: Format) -> str:
        start = self._format(fmt, "format", (), True)
        lark = "\n".join([f"start: {start}", *self._lines])
        return json.dumps({"grammars": [{"name": "start", "lark_grammar": lark}, *self._grammars]}, ensure_ascii=False)

    def _format(self, fmt: Any, where: str, ends: Sequence[str], is_last: bool) -> str:
        """The expression of a format and of one of the `ends` behind it, if there are any.

        `is_last`: nothing else follows, so that free text may go on to the end of the answer.
        """
        if where.count(".") > MAX_DEPTH:
            raise ValueError(f"structural_tag: formats are more than {MAX_DEPTH} deep.")
        kind = fmt.get("type") if isinstance(fmt, Mapping) else None
        if kind not in self._kinds:
            raise ValueError(f"structural_tag: {where}.type must be one of {', '.join(self._kinds)}; got {kind!r}.")
        fields, write = self._kinds[kind]
        _check_fields(fmt, f"structural_tag: {where}", fields | {"type"})
        return write(fmt, where, ends, is_last)

    # Formats of one kind of text

    def _const_string(self, fmt: Format, where: str, ends: Sequence[str], is_last: bool) -> str:
        return f"{self._literal(_text(fmt, 'value', where))} {self._one_of(ends)}"

    def _json_schema(self, fmt: Format, where: str, ends: Sequence[str], is_last: bool) -> str:
        schema = fmt.get("json_schema")
        if fmt.get("style", "json") != "json":
            raise ValueError(f'structural_tag: {where}.style must be "json", got {fmt["style"]!r}.')
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ValueError(f"the JSON schema is not valid JSON: {error}.") from None
        if not isinstance(schema, Mapping | bool):
            raise ValueError(f"structural_tag: {where}.json_schema must be a JSON schema (an object), got {schema!r}.")
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        # llguidance's own options in a schema could turn its checks off.
        schema = {**schema, "x-guidance": {"whitespace_pattern": self._whitespace}}
        return f"%json {json.dumps(schema, ensure_ascii=False)} {self._one_of(ends)}"

    def _regex(self, fmt: Format, where: str, ends: Sequence[str], is_last: bool) -> str:
        from llguidance import LLMatcher

        source = json.loads(LLMatcher.grammar_from_regex(_text(fmt, "pattern", where)))
        return f"{self._beside(source['grammars'][0]['lark_grammar'])} {self._one_of(ends)}"

    def _grammar(self, fmt: Format, where: str, ends: Sequence[str], is_last: bool) -> str:
        return f"{self._beside(_lark_of(_text(fmt, 'grammar', where)))} {self._one_of(ends)}"

    def _any_text(self, fmt: Format, where: str, ends: Sequence[str], is_last: bool) -> str:
        return self._text_up_to(_texts(fmt, "excludes", where), ends, where, is_last)

    # Formats of formats

    def _sequence(self, fmt: Format, where: str, ends: Sequence[str], is_last: bool) -> str:
        parts = [(e, f"{where}.elements[{i}]") for i, e in enumerate(_list(fmt, "elements", where))]
        first = [self._format(e, at, (), False) for e, at in parts[:-1]]
        return " ".join([*first, self._format(*parts[-1], ends, is_last)])

    def _or(self, fmt: Format, where: str, ends: Sequence[str], is_last: bool) -> str:
        elements = enumerate(_list(fmt, "elements", where))
        return _either([self._format(e, f"{where}.elements[{i}]", ends, is_last) for i, e in elements])

    def _repeat(self, fmt: Format, where: str, ends: Sequence[str], is_last: bool) -> str:
        low, high = {"optional": (0, 1), "star": (0, -1), "plus": (1, -1)}.get(
            fmt["type"], (fmt.get("min"), fmt.get("max"))
        )
        is_right = type(low) is int and type(high) is int and (high == -1 or high >= low) and low >= 0
        if not is_right:
            raise ValueError(f"structural_tag: {where} needs min and max (-1: any number), got {low!r} and {high!r}.")
        body = self._format(fmt.get("content"), f"{where}.content", (), False)
        return f"({body}){{{low},{'' if high == -1 else high}}} {self._one_of(ends)}"

    def _tag(self, fmt: Format, where: str, ends: Sequence[str], is_last: bool) -> str:
        return f"{self._literal(_text(fmt, 'begin', where))} {self._tag_rest(fmt, where)} {self._one_of(ends)}"

    def _tag_rest(self, fmt: Format, where: str) -> str:
        """A tag's content and end."""
        ends = [_text(fmt, "end", where)] if not isinstance(fmt.get("end"), list) else _texts(fmt, "end", where)
        return self._format(fmt.get("content"), f"{where}.content", ends or [""], False)

    def _triggered_tags(self, fmt: Format, where: str, ends: Sequence[str], is_last: bool) -> str:
        """Free text that turns into a tag where a trigger appears in it."""
        triggers, at_least_one, only_one = _texts(fmt, "triggers", where), _flag(fmt, 0, where), _flag(fmt, 1, where)
        tags = _tags(fmt, where)
        excludes = [*_texts(fmt, "excludes", where), *triggers, *ends]
        after: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        whole = []
        for tag, at in tags:
            _check_fields(tag, f"structural_tag: {at}", {"type", "begin", "content", "end"})
            begin = _text(tag, "begin", at)
            found = [trigger for trigger in triggers if trigger and begin.startswith(trigger)]
            if len(found) != 1:
                raise ValueError(f"structural_tag: {at}.begin must start with exactly one of the triggers.")
            rest = self._rule(self._tag_rest(tag, at))
            after[found[0]].append(f"{self._literal(begin[len(found[0]) :])} {rest}")
            whole.append(f"{self._literal(begin)} {rest}")
        triggered = self._rule(
            _either(
                [
                    f"{self._text_up_to(excludes, [trigger], where, False)} {_either(bodies)}"
                    for trigger, bodies in after.items()
                    if bodies
                ]
            )
        )
        if only_one and at_least_one:
            return f"{_either(whole)} {self._one_of(ends)}"
        rest = self._text_up_to(excludes, ends, where, is_last)
        if only_one:
            return _either([f"{triggered} {self._one_of(ends)}", rest])
        first = _either(whole) if at_least_one else ""
        return f"{first} ({triggered})* {rest}"

    def _tags_with_separator(self, fmt: Format, where: str, ends: Sequence[str], is_last: bool) -> str:
        tags = [self._format({**tag, "type": "tag"}, at, (), False) for tag, at in _tags(fmt, where)]
        one = self._rule(_either(tags))
        separator = self._literal(_text(fmt, "separator", where))
        several = one if _flag(fmt, 1, where) else f"{one} ({separator} {one})*"
        return f"({several}){'' if _flag(fmt, 0, where) else '?'} {self._one_of(ends)}"

    # Pieces of the grammar

    def _text_up_to(self, excludes: Sequence[str], ends: Sequence[str], where: str, is_last: bool) -> str:
        """Free text and the first of `ends` behind it; none of them, nor of `excludes`, is in the text."""
        if not ends:
            if not is_last:
                raise ValueError(
                    f"structural_tag: {where} is free text with something behind it. It must be the last part of the "
                    "format, or the content of a tag."
                )
            return self._terminal(self._without(excludes))
        if not all(ends):
            raise ValueError(f"structural_tag: {where} is free text in a tag whose end is empty.")
        text = self._terminal(self._without([*excludes, *ends]))
        out = []
        for end in ends:
            first, *rest = self._pieces(end)
            rest_literal = self._literal("".join(rest))
            if first in self._tokens:
                out.append(f"{text} <[{self._tokens[first]}]> {rest_literal}")
            elif rest:
                raise ValueError(f"structural_tag: {where}: free text cannot end at {end!r}, a token in other text.")
            else:
                out.append(self._rule(f"{text} {_quoted(end)}", "[lazy]"))
        return _either(out)

    def _without(self, texts: Sequence[str]) -> str:
        """Terminal of any text that has none of these in it."""
        if not any(texts):
            return _ANYTHING
        one = " | ".join(_quoted(text) for text in dict.fromkeys(texts) if text)
        return f"{_ANYTHING} & ~( {_ANYTHING} ({one}) {_ANYTHING} )"

    def _literal(self, text: str) -> str:
        """Fixed text. An added token in it is that token, as the model knows it; special ones are spelled out."""
        return " ".join(
            f"<[{self._tokens[piece]}]>" if piece in self._tokens else _quoted(piece) for piece in self._pieces(text)
        )

    def _pieces(self, text: str) -> list[str]:
        """The text, split into added tokens and what is between; one empty piece if there is no text."""
        pieces = []
        rest = text
        while rest:
            found = [(i, -len(token), token) for token in self._tokens if (i := rest.find(token)) >= 0]
            if not found:
                break
            start, _, token = min(found)
            pieces += [rest[:start], token] if start else [token]
            rest = rest[start + len(token) :]
        return [*pieces, rest] if rest or not pieces else pieces

    def _one_of(self, texts: Sequence[str]) -> str:
        return _either([self._literal(text) for text in texts]) if texts else ""

    def _rule(self, body: str, options: str = "") -> str:
        return self._named(f"r{{}}{options}: {body}")

    def _terminal(self, body: str) -> str:
        return self._named(f"T{{}}: {body}")

    def _named(self, line: str) -> str:
        """The name of a line with this body, which is written once. `{}` stands for its number."""
        if line not in self._names:
            number = len(self._lines)
            self._names[line] = f"{line[0]}{number}"
            self._lines.append(line.replace("{}", str(number), 1))
        return self._names[line]

    def _beside(self, lark: str) -> str:
        name = f"g{len(self._grammars)}"
        self._grammars.append({"name": name, "lark_grammar": lark})
        return f"@{name}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _either(expressions: Sequence[str]) -> str:
    return f"({' | '.join(expressions)})"


def _lark_of(grammar: str) -> str:
    """Lark as it is; GBNF (llama.cpp's EBNF, with `::=`) translated."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # its parser raises what it likes
        raise ValueError(f"Grammar error: the EBNF cannot be read: {error}") from error


# Fields of formats


def _check_fields(fmt: Mapping[str, Any], where: str, known: set[str]) -> None:
    for name, value in fmt.items():
        if name not in known and value is not None:
            raise ValueError(f"{where}.{name} is not supported; there are {', '.join(sorted(known))}.")


def _text(fmt: Format, name: str, where: str) -> str:
    if not isinstance(fmt.get(name), str):
        raise ValueError(f"structural_tag: {where}.{name} must be a string, got {fmt.get(name)!r}.")
    return fmt[name]


def _list(fmt: Format, name: str, where: str) -> list[Any]:
    if not isinstance(fmt.get(name), list) or not fmt[name]:
        raise ValueError(f"structural_tag: {where}.{name} must be a list with at least one item.")
    return fmt[name]


def _texts(fmt: Format, name: str, where: str) -> list[str]:
    texts = fmt.get(name) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"structural_tag: {where}.{name} must be a list of strings.")
    return texts


def _flag(fmt: Format, index: int, where: str) -> bool:
    name = ("at_least_one", "stop_after_first")[index]
    if not isinstance(fmt.get(name, False), bool):
        raise ValueError(f"structural_tag: {where}.{name} must be true or false.")
    return fmt.get(name, False)


def _tags(fmt: Format, where: str) -> list[tuple[Format, str]]:
    tags = [(tag, f"{where}.tags[{i}]") for i, tag in enumerate(_list(fmt, "tags", where))]
    for tag, at in tags:
        if not isinstance(tag, Mapping) or tag.get("type", "tag") != "tag":
            raise ValueError(f"structural_tag: {at} must be a tag.")
    return tags
