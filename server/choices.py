"""`Choice`: one answer of a chat, from the engine's deltas to OpenAI's message or its deltas."""

from typing import Any

from qjax.config import ServerConfig
from qjax.outputs import CompletionBuilder, CompletionOutput
from qjax.server.errors import bad_request
from qjax.server.protocol import ChatRequest
from qjax.text.answer_parser import AnswerParser
from qjax.text.parsed import CallArguments, CallStarted, Content, Event, Reasoning
from qjax.text.reasoning import ReasoningTokens
from qjax.text.tokenizer import Tokenizer
from qjax.text.tool_grammar import ToolChoice


def reads_calls(config: ServerConfig, choice: ToolChoice) -> bool:
    """Whether tool calls are told from text; those that a request demands are, also where "auto" is off."""
    return config.tool_call_parser != "none" and (config.enable_auto_tool_choice or choice.mode == "required")


def check_calls(config: ServerConfig, body: ChatRequest) -> None:
    """Raises ApiError 400 where a grammar would make calls that the server's parser does not read."""
    choice = body.choice_of_tool
    is_read = reads_calls(config, choice) and config.tool_call_parser in ("auto", "hermes", "qwen3_json")
    if body.tools and choice.mode != "none" and not is_read and body.wanted_structure() is not None:
        message = (
            "Constrained tool calls (tool_choice other than auto and none, strict tools, tools beside a "
            "response_format) need a server that reads JSON calls: --tool-call-parser auto or hermes, and "
            "--enable-auto-tool-choice."
        )
        raise bad_request(message, "tools" if choice.mode == "auto" else "tool_choice")


class Choice:
    """Parses one answer; the whole and the streamed one go through the same parser.

    Args:
      prompt: the rendered prompt, whose end says where the answer begins.

    Raises:
      ApiError: 400, the request's calls would not be read.
    """

    def __init__(self, config: ServerConfig, body: ChatRequest, prompt: str, tokenizer: Tokenizer):
        check_calls(config, body)
        choice = body.choice_of_tool
        self.answer = CompletionBuilder()
        self._is_named = choice.is_named
        self._parser = AnswerParser(
            prompt,
            reasoning=config.reasoning_parser,
            tools=body.shown_tools,
            tool_calls=config.tool_call_parser if reads_calls(config, choice) else "none",
            is_parallel=body.parallel_tool_calls,
        )
        self._includes_reasoning = body.include_reasoning
        self._reasoning_tokens = ReasoningTokens(tokenizer, self._parser.reasoning)

    @property
    def num_reasoning(self) -> int:
        """Tokens between the tags."""
        return self._reasoning_tokens.count

    def count(self, delta: CompletionOutput) -> None:
        self._reasoning_tokens.add(delta.token_ids)

    def events(self, delta: CompletionOutput) -> list[Event]:
        """What the answer says more with this delta; reasoning too, wanted or not."""
        events = self._parser.feed(delta.text)
        if delta.is_finished:
            events += self._parser.finish()
        return events

    def deltas(self, delta: CompletionOutput) -> list[dict[str, Any]]:
        """OpenAI's deltas, each with one kind of text, as many clients read only one."""
        return [d for event in self.events(delta) if (d := self._delta(event))]

    def message(self, answer: CompletionOutput, echo: str) -> dict[str, Any]:
        """The whole answer's message; its content begins with `echo`."""
        message = self._parser.parse(answer.text).message(self._includes_reasoning)
        if echo:
            message["content"] = echo + (message["content"] or "")
        return {**message, "refusal": None}

    def finish_reason(self, delta: CompletionOutput) -> str | None:
        """Of an answer that has been parsed to its end. As with OpenAI, a call that the request named is no reason."""
        return delta.finish_reason if self._is_named else self._parser.finish_reason(delta.finish_reason)

    def _delta(self, event: Event) -> dict[str, Any] | None:
        match event:
            case Reasoning(text):
                return {"reasoning": text, "reasoning_content": text} if self._includes_reasoning else None
            case Content(text):
                return {"content": text}
            case CallStarted(index, id, name):
                call = {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}
                return {"tool_calls": [{"index": index, **call}]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        return None
