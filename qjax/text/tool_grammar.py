"""Tool calls by grammar: which calls an answer may or must make, as one structural tag with its format.

A call is written in the official template's form, Hermes' JSON. What the model may do is `tool calls | format`: with
`tool_choice` "required" or a named function there must be calls, and nothing else; with "auto" and a format, calls or
the format; with "auto" alone, free text that a call may interrupt.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qjax.sampling_params import StructuredOutputsParams
from qjax.text.grammar import format_of
from qjax.text.structural_tag import Format

CALL, END_CALL = "<tool_call>", "</tool_call>"
Tool = Mapping[str, Any]


@dataclass(frozen=True)
class ToolChoice:
    """OpenAI's `tool_choice`, checked against the tools.

    Args:
      mode: "auto": calls or text; "required": calls; "none": no calls.
      names: the functions that may be called; None: all.
      is_named: the request names one function, which is then called once.
    """

    mode: Literal["auto", "none", "required"]
    names: frozenset[str] | None = None
    is_named: bool = False

    @classmethod
    def of(cls, value: Any, tools: Sequence[Tool] | None) -> "ToolChoice":
        """Of a request's `tool_choice`; None means "auto" if there are tools.

        Raises:
          ValueError: it has none of OpenAI's forms, or names a function that is not among the tools.
        """
        if value is None:
            return cls("auto" if tools else "none")
        if value == "none":
            return cls("none")
        if not tools:
            raise ValueError(f"tool_choice {json.dumps(value)} needs tools.")
        if value in ("auto", "required"):
            return cls(value)
        kind = value.get("type") if isinstance(value, Mapping) else None
        if kind == "function":
            return cls("required", frozenset([_known(value, tools)]), is_named=True)
        if kind == "allowed_tools":
            allowed = value.get("allowed_tools")
            allowed = allowed if isinstance(allowed, Mapping) else {}
            chosen, mode = allowed.get("tools"), allowed.get("mode")
            if isinstance(chosen, list) and chosen and mode in ("auto", "required"):
                return cls(mode, frozenset(_known(tool, tools) for tool in chosen))
        raise ValueError(
            'tool_choice must be "none", "auto", "required", {"type": "function", "function": {"name": …}} or '
            '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required", "tools": [{"type": "function", '
            f'"function": {{"name": …}}}}]}}}}, got {json.dumps(value)[:200]}.'
        )


def with_tools(
    structure: StructuredOutputsParams | None,
    tools: Sequence[Tool] | None,
    choice: ToolChoice,
    *,
    is_parallel: bool = True,
) -> StructuredOutputsParams | None:
    """What an answer must obey that may have tool calls; None: it is free, calls included.

    Args:
      structure: what the content must obey.
      is_parallel: false: at most one call.

    Raises:
      ValueError: the parameters of a tool that must be obeyed are no schema of an object, or the structure is wrong.
    """
    if not tools or choice.mode == "none":
        return structure
    must_call = choice.mode == "required"
    if not (structure is not None or needs_grammar(tools, choice)):
        return None
    functions = [_function(tool) for tool in tools]
    wanted = [f for f in functions if choice.names is None or f["name"] in choice.names]
    tags = [_tag(function, is_enforced=must_call) for function in wanted]
    calls = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": "\n",
        "at_least_one": True,
        "stop_after_first": not is_parallel or choice.is_named,
    }
    fmt: Format = calls
    if not must_call and structure is not None:
        fmt = {"type": "or", "elements": [calls, format_of(structure)]}
    elif not must_call:
        fmt = {"type": "triggered_tags", "triggers": [CALL], "tags": tags, "stop_after_first": not is_parallel}
    return StructuredOutputsParams(
        structural_tag={"type": "structural_tag", "format": fmt},
        disable_any_whitespace=structure is not None and structure.disable_any_whitespace,
        whitespace_pattern=structure.whitespace_pattern if structure is not None else None,
        after_thinking=True,
    )


def needs_grammar(tools: Sequence[Tool] | None, choice: ToolChoice) -> bool:
    """Whether the calls themselves are constrained, whatever the content must obey."""
    if choice.mode != "auto" or not tools:
        return choice.mode == "required"
    return choice.names is not None or any((tool.get("function") or {}).get("strict") for tool in tools)


def _tag(function: Mapping[str, Any], is_enforced: bool) -> Format:
    """A call of one function. Its parameters' schema counts if it is strict or the call is the user's wish."""
    name = json.dumps(function["name"], ensure_ascii=False)
    schema: Any = {"type": "object"}
    if is_enforced or function.get("strict"):
        schema = _parameters(function)
    return {
        "type": "tag",
        "begin": f'{CALL}\n{{"name": {name}, "arguments": ',
        "content": {"type": "json_schema", "json_schema": schema},
        "end": f"}}\n{END_CALL}",
    }


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments, which are an object. A function without one takes none."""
    schema = function.get("parameters")
    if schema is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise ValueError(f"tools: the parameters of {function['name']!r} must be a JSON schema of an object.")
    return {"type": "object", **schema}


def _function(tool: Tool) -> Mapping[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError('tools: each must be {"type": "function", "function": {"name": …, …}}.')
    return function


def _known(tool: Any, tools: Sequence[Tool]) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    names = [_function(tool)["name"] for tool in tools]
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"tool_choice names the function {name!r}, which is not in tools: {', '.join(names)}.")
    return name
