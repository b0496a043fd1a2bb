"""`ReasoningParser`: tells an answer's reasoning (`<think>…</think>`) from its content, as the text comes.

Where it begins is read from the prompt, not from a flag: a template may have opened the block (Thinking-2507), closed
it (`enable_thinking` false), or left it to the model (hybrid models), or know none (Instruct-2507).

Newlines belong to the block as the official template writes them: those at both ends of the reasoning and those after
`</think>` are dropped. Rendering the parsed message gives the model's own tokens again.
"""

import re
from collections.abc import Sequence
from typing import Literal

from qjax.text.parsed import Content, Event, Reasoning, held_back
from qjax.text.tokenizer import Tokenizer

ReasoningFormat = Literal["auto", "qwen3", "deepseek_r1", "none"]
THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, FUNCTION = "<tool_call>", "<function="
_ASSISTANT, _TURN_END = "<|im_start|>assistant\n", "<|im_end|>"


class ReasoningParser:
    """Parses one answer. `feed` it text, `finish` at its end.

    Args:
      format: "auto" and "qwen3": reasoning is what stands in a block that the prompt or the answer opens.
        "deepseek_r1": reasoning comes first even where nobody opens the block. "none": there is only content.
      prompt: the rendered prompt; its end decides where the answer begins.
      ends_at_call: a `<tool_call>` in front of a call ends the reasoning, as models forget to close the block.

    Attributes:
      state: "start" until it is known whether the answer begins with a block, "reasoning", "content".
      was_ended_by_call: the block was not closed, so its `</think>` may still come.
    """

    def __init__(self, format: ReasoningFormat = "auto", prompt: str = "", ends_at_call: bool = False):
        self.state: Literal["start", "reasoning", "content"] = "start"
        self.was_ended_by_call = False
        self._ends_at_call = ends_at_call
        self._held = ""
        self._is_first = True  # nothing but newlines so far in this state
        self._may_open_again = False
        if format == "none":
            self.state, self._is_first = "content", False
            return
        if format == "deepseek_r1":
            self.state, self._may_open_again = "reasoning", True
        if begun := _begun_answer(prompt):
            self.feed(begun)
            self._held = ""
            self._may_open_again = self.state == "reasoning" and self._is_first

    def feed(self, text: str) -> list[Event]:
        """The events that new text releases."""
        if self.state == "content" and not self._is_first:
            return [Content(text)] if text else []
        text = self._held + text
        self._held = ""
        events: list[Event] = []
        if self.state == "start":
            text = self._start(text)
        if self.state == "reasoning":
            text = self._reason(text, events)
        if self.state == "content":
            if self._is_first:
                text = text.lstrip("\n")
            if text:
                self._is_first = False
                events.append(Content(text))
        return events

    def finish(self) -> list[Event]:
        """What was held back, when the answer has ended."""
        text, self._held = self._held, ""
        if self.state == "reasoning":
            text = text.rstrip("\n")
            return [Reasoning(text)] if text else []
        return [Content(text)] if text else []

    def _start(self, text: str) -> str:
        """Waits for the answer's first characters. Returns the text that the next state goes on with."""
        begin = text.lstrip()
        if begin.startswith(THINK):
            self.state = "reasoning"
            return begin.removeprefix(THINK)
        if THINK.startswith(begin):
            self._held = text
            return ""
        self.state, self._is_first = "content", False  # there is no block: its newlines are its own
        return text

    def _reason(self, text: str, events: list[Event]) -> str:
        """Gives reasoning out, and returns the content behind it."""
        if self._is_first:
            text = text.lstrip("\n")
            if self._may_open_again:
                if text.startswith(THINK):
                    text = text.removeprefix(THINK).lstrip("\n")
                    self._may_open_again = False
                elif THINK.startswith(text):
                    self._held = text
                    return ""
        end, rest = self._find_end(text)
        reasoning = text[:end].rstrip("\n")
        if reasoning:
            self._is_first = self._may_open_again = False
            events.append(Reasoning(reasoning))
        if self.state == "content":
            self._is_first = True
            return rest
        self._held = text[len(reasoning) :]
        return ""

    def _find_end(self, text: str) -> tuple[int, str]:
        """Up to where text is reasoning, and the content behind it; sets the state if the block has ended."""
        end = text.find(END_THINK)
        if self._ends_at_call:
            for tag in re.finditer(TOOL_CALL, text[: end if end >= 0 else len(text)]):
                follows = text[tag.end() :].lstrip()
                if FUNCTION.startswith(follows):
                    return tag.start(), ""  # wait: a call, or a remark about the tag?
                if follows.startswith(("{", FUNCTION)):
                    self.state, self.was_ended_by_call = "content", True
                    return tag.start(), text[tag.start() :]
        if end >= 0:
            self.state = "content"
            return end, text[end + len(END_THINK) :]
        markers = (END_THINK, TOOL_CALL) if self._ends_at_call else (END_THINK,)
        return len(text) - held_back(text, *markers), ""


def _begun_answer(prompt: str) -> str:
    """The part of the answer that the prompt already holds: behind the open turn of the assistant."""
    _, found, begun = prompt.rpartition(_ASSISTANT)
    if found and _TURN_END not in begun:
        return begun
    block = re.search(rf"{THINK}\s*(?:{END_THINK}\s*)?$", prompt)  # a template with other turns
    return block[0] if block else ""


class ReasoningTokens:
    """Counts the tokens of an answer's reasoning, without the tags. Does not depend on how they come."""

    def __init__(self, tokenizer: Tokenizer, parser: ReasoningParser):
        """`parser` is fresh: its state says where the answer begins."""
        self.count = 0
        self._state = parser.state
        self._tokenizer = tokenizer
        self._think = _id_of(tokenizer, THINK)
        ends = [END_THINK, TOOL_CALL] if parser._ends_at_call else [END_THINK]
        self._ends = {_id_of(tokenizer, tag) for tag in ends}

    def add(self, token_ids: Sequence[int]) -> None:
        if self._state == "content":
            return
        for token_id in token_ids:
            if self._state == "start":
                if token_id == self._think:
                    self._state = "reasoning"
                elif self._tokenizer.token_bytes(token_id).strip():
                    self._state = "content"
            elif self._state == "reasoning":
                if token_id in self._ends:
                    self._state = "content"
                elif token_id not in (self._think, self._tokenizer.eos_token_id):
                    self.count += 1


def _id_of(tokenizer: Tokenizer, tag: str) -> int | None:
    ids = tokenizer.encode(tag)
    return ids[0] if len(ids) == 1 else None
