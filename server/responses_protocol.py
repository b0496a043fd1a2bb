"""What a request to /v1/responses may say: OpenAI's fields, and vLLM's beside them. Nothing is stored."""

import dataclasses
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal

from qjax.server.errors import bad_request
from qjax.server.protocol import ChatRequest, SamplingFields
from qjax.server.responses_input import chat_messages
from qjax.server.schema import Refused, body_field

# What chat calls it -> what it is called here.
NAMES = {"max_tokens": "max_output_tokens", "response_format": "text.format", "messages": "input"}


def fields_of(value: Any) -> dict[str, Any]:
    """One level of `dataclasses.asdict`, which copies a client's JSON however deep it is."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


@dataclass(frozen=True, kw_only=True)
class FunctionTool:
    type: Literal["function"] = body_field("The server has no tools of its own", MISSING)
    name: str = body_field("The function's name", MISSING)
    description: str | None = body_field("What it does")
    parameters: dict[str, Any] | None = body_field("JSON schema of its arguments")
    strict: bool | None = body_field("Make the arguments obey the schema")

    REFUSED: ClassVar[dict[str, Refused]] = {
        "allowed_callers": Refused("only the model calls functions.", (["direct"],)),
        "async": Refused("calls are answered before the model goes on.", (False,)),
        "defer_loading": Refused("the model sees all tools.", (False,)),
        "output_schema": Refused("outputs are not checked."),
    }

    def chat_tool(self) -> dict[str, Any]:
        function = {k: v for k, v in fields_of(self).items() if k != "type" and v is not None}
        return {"type": "function", "function": function}


@dataclass(frozen=True, kw_only=True)
class ResponsesToolChoice:
    type: Literal["function", "allowed_tools"] = body_field("One function, or only some of the tools", MISSING)
    name: str | None = body_field("Of type function: the one to call")
    mode: Literal["auto", "required"] | None = body_field("Of type allowed_tools; auto if absent")
    tools: list[dict[str, Any]] | None = body_field('Of type allowed_tools: {"type": "function", "name": …} each')

    def __post_init__(self) -> None:
        needed = "name" if self.type == "function" else "tools"
        if getattr(self, needed) is None:
            raise bad_request(f"tool_choice.{needed} is required with type {self.type}.", f"tool_choice.{needed}")


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    type: Literal["text", "json_object", "json_schema"] = body_field("What the answer's text is", MISSING)
    name: str | None = body_field("The schema's name")
    description: str | None = body_field("What the schema is for")
    schema: dict[str, Any] | None = body_field("JSON schema that the answer obeys")
    strict: bool | None = body_field("A schema is obeyed in any case")

    def __post_init__(self) -> None:
        if self.type == "json_schema" and self.schema is None:
            raise bad_request("text.format.schema must be a JSON schema (an object).", "text.format.schema")

    def response_format(self) -> dict[str, Any]:
        return {"type": self.type, "json_schema": {"name": self.name or "", "schema": self.schema}}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    format: TextFormat | None = body_field("What the answer must obey")

    REFUSED: ClassVar[dict[str, Refused]] = {"verbosity": Refused("say it in the prompt.", ("medium",))}


@dataclass(frozen=True, kw_only=True)
class ReasoningConfig:
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = body_field(
        '"none" turns thinking off, the others turn it on'
    )

    REFUSED: ClassVar[dict[str, Refused]] = {
        "summary": Refused("reasoning comes whole, not as a summary.", ("auto",)),
        "generate_summary": Refused("reasoning comes whole, not as a summary.", ("auto",)),
        "context": Refused("the chat template decides which reasoning is shown.", ("auto",)),
        "mode": Refused("there is one.", ("standard",)),
    }


@dataclass(frozen=True, kw_only=True)
class ResponsesRequest(SamplingFields):
    """POST /v1/responses."""

    model: str | None = body_field("Name of the model; the served one if absent")
    input: str | list[dict[str, Any]] = body_field(
        "A text, or items of type message, function_call, function_call_output and reasoning", MISSING
    )
    instructions: str | None = body_field("A system message before the input")
    stream: bool = body_field("Send events as the answer is written", False)
    max_output_tokens: int | None = body_field("Tokens to write at most, reasoning included", minimum=1)
    tools: list[FunctionTool] | None = body_field("Functions that the model may call")
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = body_field("auto if absent")
    parallel_tool_calls: bool = body_field("false: only the first call of an answer is returned", True)
    text: TextConfig | None = body_field("The form of the answer")
    reasoning: ReasoningConfig | None = body_field("Whether the model thinks")
    include: list[str] | None = body_field('"reasoning.encrypted_content" changes nothing: reasoning comes in the open')
    include_reasoning: bool = body_field("false: the reasoning is left out of the answer", True)
    truncation: Literal["auto", "disabled"] = body_field("auto: the oldest turns are dropped until it fits", "disabled")
    metadata: dict[str, str] | None = body_field("Comes back with the answer")
    chat_template_kwargs: dict[str, Any] | None = body_field("Variables of the template, such as enable_thinking")

    REFUSED: ClassVar[dict[str, Refused]] = {
        "previous_response_id": Refused("nothing is stored; send the earlier items in input."),
        "conversation": Refused("nothing is stored; send the earlier items in input."),
        "background": Refused("nothing is stored; an answer is sent as it is written.", (False,)),
        "background_options": Refused("there is no background mode."),
        "prompt": Refused("there are no stored prompts."),
        "context_management": Refused("nothing is compacted; see truncation.", ([],)),
        "top_logprobs": Refused("use /v1/chat/completions.", (0,)),
        "service_tier": Refused("there is one tier.", ("auto", "default")),
        "stream_options": Refused("events are not padded.", ({}, {"include_obfuscation": False})),
        "moderation": Refused("nothing is moderated."),
        "image": Refused("the model reads only text.", ({},)),
        "access_programs": Refused("there are none."),
        "prompt_cache_options": Refused("the prefix cache lives in memory.", ({},)),
        "prompt_cache_retention": Refused("the prefix cache lives in memory.", ("in_memory", "in-memory")),
        "session_id": Refused("requests are independent; cached prompts are found by their text."),
        "enable_response_messages": Refused("use return_prompt_text of /v1/chat/completions.", (False,)),
        "previous_input_messages": Refused("send the earlier items in input."),
        "kv_transfer_params": Refused("KV caches are not moved between servers."),
        "vllm_xargs": Refused("there are no plug-ins to read it.", ({},)),
    }
    NO_EFFECT: ClassVar[dict[str, str]] = {
        "store": 'nothing is stored, as the answer\'s "store": false says; true is what clients send by default',
        "max_tool_calls": "it counts calls of built-in tools, and there are none",
        "user": "a label for OpenAI's abuse monitoring",
        "safety_identifier": "a label for OpenAI's abuse monitoring",
        "prompt_cache_key": "a hint to OpenAI's load balancer; the prefix cache needs none",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.include or []:
            if name != "reasoning.encrypted_content":
                raise bad_request(f"include {name!r} is not supported: answers have no such data.", "include")

    def chat(self) -> ChatRequest:
        """The same request to chat.

        Raises:
          ApiError: 400, an item of the input is wrong, or what chat refuses.
        """
        text_format = self.text and self.text.format
        return ChatRequest(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingFields)},
            model=self.model,
            messages=chat_messages(self.instructions, self.input),
            stream=self.stream,
            max_tokens=self.max_output_tokens,
            tools=[tool.chat_tool() for tool in self.tools or []] or None,
            tool_choice=self._chat_tool_choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=text_format.response_format() if text_format else None,
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            include_reasoning=self.include_reasoning,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def _chat_tool_choice(self) -> Any:
        choice = self.tool_choice
        if not isinstance(choice, ResponsesToolChoice):
            return None if choice == "auto" else choice  # absent means the same, and needs no tools
        if choice.type == "function":
            return {"type": "function", "function": {"name": choice.name}}
        allowed = [{"type": "function", "function": {"name": tool.get("name")}} for tool in choice.tools or []]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode or "auto", "tools": allowed}}
