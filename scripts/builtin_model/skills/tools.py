"""Hermes tool calls: one or several, from one to three tools; answers from results; no call where none helps."""

import json
from dataclasses import dataclass
from typing import Any

from scripts.builtin_model.dialogue import Dialogue, Expected, Message, assistant, contains, user
from scripts.builtin_model.skills.tool_catalog import Tool, Value, any_tool, made_up
from scripts.builtin_model.world import World

JOIN = (" Also: ", " And ", " Then: ", "\n", " ")


@dataclass
class Call:
    tool: Tool
    arguments: dict[str, Value]
    spoken: list[str]  # the values of the required parameters, as the user wrote them

    def as_json(self) -> dict[str, Any]:
        return {"name": self.tool.name, "arguments": self.arguments}


def _spoken(value: Value) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _toolbox(world: World, count: int) -> list[Tool]:
    """Tools of different names and jobs; some are close to another one, with its action or its thing."""
    tools: list[Tool] = []
    while len(tools) < count:
        near = world.pick(tools) if tools and world.chance(0.35) else None
        tool = made_up(world, near) if near and near.is_made_up else any_tool(world)
        if all(tool.name != t.name and tool.job != t.job for t in tools):
            tools.append(tool)
    world.rng.shuffle(tools)
    return tools


def _make_call(world: World, tool: Tool) -> tuple[Call, str]:
    """A call and the user's words for it."""
    arguments, spoken, suffix = {}, [], ""
    for p in tool.parameters:
        value = p.make(world)
        if p.required:
            spoken.append(_spoken(value))
        elif world.chance(0.5):
            suffix = " " + tool.optional[p.name].format(v=_spoken(value))
        else:
            continue
        arguments[p.name] = value
    phrase = world.pick(tool.phrases).format(*spoken)
    if suffix:
        phrase = phrase[:-1] + suffix + phrase[-1]
    return Call(tool, arguments, spoken), phrase


def _looked_at(tools: list[Tool], wanted: tuple[str, str]) -> list[str]:
    """The tools in their order up to the one that fits, word by word: each word stands beside the wanted one."""
    lines = [f"Wanted: {' '.join(wanted)}."]
    for tool in tools:
        seen = f"{tool.name}:"
        for word, other in zip(tool.job, wanted, strict=True):
            seen += f" {word} = {other}? {'Yes' if word == other else 'No'}."
            if word != other:
                break
        lines.append(seen)
        if tool.job == wanted:
            break
    return lines


def _plan(tools: list[Tool], calls: list[Call]) -> str:
    lines: list[str] = []
    for i, call in enumerate(calls):
        if i == 0 or call.tool is not calls[i - 1].tool:
            lines += _looked_at(tools, call.tool.job)
        lines.append(f"{call.tool.name} fits: {json.dumps(call.arguments, ensure_ascii=False)}.")
    return "\n".join(lines)


def _request(world: World) -> tuple[list[Tool], list[Call], str]:
    """(tools, calls, the user's words)."""
    tools = _toolbox(world, world.pick((1, 1, 2, 2, 3, 3)))
    kind = world.rng.random()
    if kind < 0.72:
        call, text = _make_call(world, world.pick(tools))
        return tools, [call], text
    if kind < 0.86 or len(tools) == 1:  # one tool for several values
        tool = world.pick(tools)
        made = [_make_call(world, tool) for _ in range(world.pick((2, 2, 3)))]
        calls = [call for call, _ in made]
        if len(tool.parameters) == 1 and world.chance(0.7):
            values = [call.spoken[0] for call in calls]
            text = world.pick(tool.phrases).format(", ".join(values[:-1]) + " and " + values[-1])
            return tools, calls, text
        return tools, calls, world.pick(JOIN).join(text for _, text in made)
    made = [_make_call(world, tool) for tool in world.some(tools, 2)]
    return tools, [call for call, _ in made], world.pick(JOIN).join(text for _, text in made)


def _result(world: World, call: Call) -> tuple[str, str]:
    """(what the tool returns, how the model says it)."""
    values = {name: make(world) for name, make in call.tool.results}
    kind = world.rng.random()
    if kind < 0.06:
        return json.dumps({"error": "not found"}), f"The tool {call.tool.name} failed: not found."
    if kind < 0.12:
        values = {world.pick(("result", "value", "output")): world.integer(1, 9999)}
    text = json.dumps(values, ensure_ascii=False)
    if call.tool.reply and kind >= 0.3:
        return text, call.tool.reply.format(*call.spoken, **values)
    if kind < 0.36 and kind >= 0.12:
        plain = _said(values)
        return plain, f"{call.tool.name}: {plain}."
    return text, f"{call.tool.name}: {_said(values)}."


def _said(values: dict[str, Value]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_spoken(value)}" for name, value in values.items())


def calling(world: World) -> Dialogue:
    """Ends with the call."""
    tools, calls, text = _request(world)
    made = [call.as_json() for call in calls]
    last = assistant("", _plan(tools, calls) if world.thinks else "", made)
    return Dialogue([user(text), last], Expected("calls", made), [t.schema(world) for t in tools], can_be_history=False)


def answering(world: World) -> Dialogue:
    """Ends with the answer made of the results. Many clients send the call back without the thought before it."""
    tools, calls, text = _request(world)
    results = [_result(world, call) for call in calls]
    plan = _plan(tools, calls) if world.thinks and world.chance(0.6) else ""
    messages: list[Message] = [user(text), assistant("", plan, [c.as_json() for c in calls])]
    messages += [{"role": "tool", "content": given} for given, _ in results]
    content = "\n".join(said for _, said in results)
    messages.append(assistant(content, "I have the result and say it." if world.thinks else ""))
    return Dialogue(messages, contains(content), [t.schema(world) for t in tools], can_be_history=False)


def unfitting(world: World) -> Dialogue:
    """No tool fits, or a value is missing."""
    if world.chance(0.35):
        tools = _toolbox(world, world.integer(1, 3))
        tool = world.pick(tools)
        text = world.pick(
            ("Please use {n}.", "Call {n}.", "Can you run {n} for me?", "Use the tool {n}.", "I need {n}.")
        ).format(n=tool.name)
        needed = [p.name for p in tool.parameters if p.required]
        labels = " and the ".join(name.replace("_", " ") for name in needed)
        reasoning = f"Wanted: {tool.name}. It needs {', '.join(needed)}. The user gave nothing."
        last = assistant(f"Please tell me the {labels}.", reasoning)
        expected = contains(f"tell me the {labels}.")
        return Dialogue([user(text), last], expected, [t.schema(world) for t in tools], can_be_history=False)
    tools = _toolbox(world, world.integer(2, 4))
    _, text = _make_call(world, tools[0])
    reasoning = "\n".join([*_looked_at(tools[1:], tools[0].job), "None of them fits."])
    last = assistant("Sorry, I have no tool for that.", reasoning)
    return Dialogue([user(text), last], contains("no tool"), [t.schema(world) for t in tools[1:]], can_be_history=False)


def offer(world: World, dialogue: Dialogue) -> Dialogue:
    """Another skill's question with tools at hand that it does not need."""
    tools = [t for t in _toolbox(world, world.integer(1, 3)) if t.description != "Evaluate an expression"]
    if not tools:
        return dialogue
    last = dialogue.messages[-1]
    if "reasoning_content" in last:
        last["reasoning_content"] = "No tool is needed. " + last["reasoning_content"]
    dialogue.tools = [t.schema(world) for t in tools]
    return dialogue
