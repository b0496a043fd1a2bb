"""What a request to /v1/messages may say: Anthropic's fields, and vLLM's few beside them."""

from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal

from qjax.server.errors import bad_request
from qjax.server.messages_input import CACHE_CONTROL, InputMessage, chat_messages
from qjax.server.protocol import MAX_STOP_STRINGS, ChatRequest
from qjax.server.schema import Refused, body_field

# What chat calls it -> what it is called here.
NAMES = {
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking.budget_tokens",
    "response_format": "output_config.format",
}
_CHOICES = {"auto": None, "any": "required", "none": "none"}  # chat's auto may stand without tools if it is left out


@dataclass(frozen=True, kw_only=True)
class MessagesTool:
    type: Literal["custom"] = body_field("The server has no tools of its own", "custom")
    name: str = body_field("The tool's name", MISSING)
    description: str | None = body_field("What it does")
    input_schema: dict[str, Any] = body_field("JSON schema of its input", MISSING)
    strict: bool | None = body_field("Make the input obey the schema")

    NO_EFFECT: ClassVar[dict[str, str]] = CACHE_CONTROL
    REFUSED: ClassVar[dict[str, Refused]] = {
        "allowed_callers": Refused("only the model calls tools.", (["direct"],)),
        "defer_loading": Refused("the model sees all tools.", (False,)),
        "eager_input_streaming": Refused("inputs are streamed as they are written.", (True,)),
        "input_examples": Refused("put them into the description.", ([],)),
    }

    def chat_tool(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        given = {k: v for k, v in {**function, "strict": self.strict}.items() if v is not None}
        return {"type": "function", "function": given}


@dataclass(frozen=True, kw_only=True)
class MessagesToolChoice:
    type: Literal["auto", "any", "tool", "none"] = body_field("any: at least one call; tool: of the one named", MISSING)
    name: str | None = body_field("Of type tool: the tool to call")
    disable_parallel_tool_use: bool = body_field("Only the first call of an answer is returned", False)

    def __post_init__(self) -> None:
        if (self.type == "tool") != (self.name is not None):
            raise bad_request("tool_choice.name belongs to type tool, and is required there.", "tool_choice.name")


@dataclass(frozen=True, kw_only=True)
class ThinkingConfig:
    type: Literal["enabled", "disabled", "adaptive"] = body_field("disabled turns it off, the others on", MISSING)
    budget_tokens: int | None = body_field("Of type enabled: tokens after which thinking is closed", minimum=1)
    display: Literal["summarized", "omitted"] | None = body_field(
        "omitted: thinking is left out of the answer; else it comes whole"
    )

    def __post_init__(self) -> None:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            message = "thinking.budget_tokens belongs to type enabled, and is required there."
            raise bad_request(message, "thinking.budget_tokens")


@dataclass(frozen=True, kw_only=True)
class OutputFormat:
    type: Literal["json_schema"] = body_field("The form of the answer", MISSING)
    schema: dict[str, Any] = body_field("JSON schema that the answer obeys", MISSING)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = body_field(
        "Turns thinking on, unless thinking says otherwise: Qwen3 knows no degrees"
    )
    format: OutputFormat | None = body_field("What the answer must obey")


@dataclass(frozen=True, kw_only=True)
class CountTokensRequest:
    """POST /v1/messages/count_tokens: what of a request decides its prompt."""

    model: str | None = body_field("Name of the model; the served one if absent")
    messages: list[InputMessage] = body_field(
        "The conversation; if the assistant has the last word, it goes on", MISSING
    )
    system: str | list[dict[str, Any]] | None = body_field("A text or text blocks")
    tools: list[MessagesTool] | None = body_field("Tools that the model may call")
    tool_choice: MessagesToolChoice | None = body_field("Whether it must")
    thinking: ThinkingConfig | None = body_field("Whether the model thinks; absent: as its chat template has it")
    output_config: OutputConfig | None = body_field("Effort and form of the answer")
    chat_template_kwargs: dict[str, Any] | None = body_field("Variables of the template, such as enable_thinking")

    REFUSED: ClassVar[dict[str, Refused]] = {
        # what is kept is all thinking, and the template decides which of it is shown
        "context_management": Refused(
            "messages are taken as they come.",
            ({}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
        ),
        "mcp_servers": Refused("the server calls no tools.", ([],)),
        "speed": Refused("there is one.", ("standard",)),
        "user_profile_id": Refused("there are no profiles."),
        "workspace_id": Refused("there are no workspaces."),
    }
    NO_EFFECT: ClassVar[dict[str, str]] = CACHE_CONTROL

    def chat(self, **fields: Any) -> ChatRequest:
        """The same request to chat.

        Args:
          fields: more of chat's.

        Raises:
          ApiError: 400, a block is wrong, or what chat refuses.
        """
        messages = chat_messages(self.system, self.messages)
        choice, output = self.tool_choice, self.output_config or OutputConfig()
        effort: Any = output.effort
        thinking = self.thinking
        if thinking is not None:
            effort = "none" if thinking.type == "disabled" else effort or "medium"
        tool_choice: Any = None
        if choice is not None:
            named = {"type": "function", "function": {"name": choice.name}}
            tool_choice = named if choice.type == "tool" else _CHOICES[choice.type]
        response_format = None
        if output.format is not None:
            response_format = {"type": "json_schema", "json_schema": {"name": "", "schema": output.format.schema}}
        return ChatRequest(
            model=self.model,
            messages=messages,
            tools=[tool.chat_tool() for tool in self.tools or []] or None,
            tool_choice=tool_choice,
            parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
            reasoning_effort=effort,
            thinking_token_budget=thinking and thinking.budget_tokens,
            include_reasoning=not (thinking and thinking.display == "omitted"),
            response_format=response_format,
            continue_final_message=messages[-1]["role"] == "assistant",
            chat_template_kwargs=self.chat_template_kwargs,
            **fields,
        )


@dataclass(frozen=True, kw_only=True)
class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: int = body_field("Tokens to write at most, thinking included", MISSING, minimum=1)
    stream: bool = body_field("Send events as the answer is written", False)
    stop_sequences: list[str] | None = body_field("Strings that end the answer", max_items=MAX_STOP_STRINGS)
    temperature: float | None = body_field("In [0, 2]; 0 is greedy", schema={"minimum": 0, "maximum": 2})
    top_p: float | None = body_field("In (0, 1]: only the likeliest tokens with this share")
    top_k: int | None = body_field("Only this many of the likeliest tokens; 0 or -1: all")
    cache_salt: str | None = body_field("Only requests with the same salt share cached prompts")

    REFUSED: ClassVar[dict[str, Refused]] = {
        **CountTokensRequest.REFUSED,
        "container": Refused("there are no containers."),
        "diagnostics": Refused("there are none."),
        "inference_geo": Refused("the model runs where the server is."),
        "service_tier": Refused("there is one tier.", ("auto", "standard_only")),
        "vllm_xargs": Refused("there are no plug-ins to read it.", ({},)),
    }
    NO_EFFECT: ClassVar[dict[str, str]] = {
        **CountTokensRequest.NO_EFFECT,
        "metadata": "its user_id is a label for Anthropic's abuse monitoring",
    }

    def chat(self, **fields: Any) -> ChatRequest:
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k", "cache_salt")
        return super().chat(**{name: getattr(self, name) for name in same}, stop=self.stop_sequences, **fields)
