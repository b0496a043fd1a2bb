"""What a request may say: every field of OpenAI's and vLLM's chat and completion requests, checked.

A field is implemented (a dataclass field), refused by name (`REFUSED`), or changes nothing by its meaning
(`NO_EFFECT`). None is accepted and then ignored.
"""

import dataclasses
import re
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal

from qjax.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams
from qjax.server.errors import bad_request, from_value_error
from qjax.server.schema import Refused, body_field
from qjax.server.structured import GUIDED, structured_outputs
from qjax.text.tool_grammar import ToolChoice, with_tools

MAX_N = 128  # OpenAI's limit; each answer is a sequence of its own in the engine
MAX_PROMPTS = 1024
MAX_STOP_STRINGS = 16
MAX_BAD_WORDS = 128
REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
CACHE_SALT = re.compile(r"[^@/\\\x00]{1,128}")
SAMPLING_NAMES = frozenset(f.name for f in dataclasses.fields(SamplingParams))
PARAM_NAMES = SAMPLING_NAMES | {"prompt", "priority", "request_id", "cache_salt"}  # that an error may begin with

_REFUSED_BY_BOTH = {
    "guided_decoding_backend": Refused("there is one, llguidance."),
    "guided_whitespace_pattern": Refused("use structured_outputs.whitespace_pattern."),
    "use_beam_search": Refused("there is no beam search.", (False,)),
    "length_penalty": Refused("there is no beam search.", (1.0,)),
    "best_of": Refused("use n.", (1,)),
    "logprob_token_ids": Refused("use logprobs.", ([],)),
    "spaces_between_special_tokens": Refused("tokens are joined as the model wrote them.", (True,)),
    "stream_interval": Refused("every step is sent.", (1,)),
    "watermarking": Refused("there is none."),
    "session_id": Refused("requests are independent; cached prompts are found by their text."),
    "kv_transfer_params": Refused("KV caches are not moved between servers."),
    "ec_transfer_params": Refused("KV caches are not moved between servers."),
    "vllm_xargs": Refused("there are no plug-ins to read it.", ({},)),
    "routed_experts_prompt_start": Refused("the experts of a token are not returned.", (0,)),
    "return_weight_versions": Refused("weights have no versions.", (False,)),
    "return_token_offsets": Refused("it is for rendering alone.", (False,)),
}
_NO_EFFECT_IN_BOTH = {
    "user": "a label for OpenAI's abuse monitoring",
}


def _range(low: float, high: float) -> dict[str, float]:
    return {"minimum": low, "maximum": high}


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """What a stream carries beside the text."""

    include_usage: bool = body_field("Send a last chunk with the usage and no choices", False)
    continuous_usage_stats: bool = body_field("Send the usage so far with every chunk", False)

    REFUSED: ClassVar[dict[str, Refused]] = {"include_obfuscation": Refused("chunks are not padded.", (False,))}


@dataclass(frozen=True, kw_only=True)
class RepetitionDetection:
    """When an answer counts as caught in a loop: its last tokens are one pattern, several times in a row."""

    max_pattern_size: int = body_field("Tokens of the longest pattern; 0: off", 0)
    min_pattern_size: int = body_field("Tokens of the shortest pattern", 0)
    min_count: int = body_field("Times that the pattern must have come, at least 2", 0)
    end_thinking: bool = body_field("A loop in a think block closes the block instead of ending the answer", False)


@dataclass(frozen=True, kw_only=True)
class SamplingFields:
    """What every endpoint that writes text takes under the same names."""

    temperature: float | None = body_field("In [0, 2]; 0 is greedy", schema=_range(0, 2))
    top_p: float | None = body_field(
        "In (0, 1]: only the likeliest tokens with this share", schema={"exclusiveMinimum": 0, "maximum": 1}
    )
    top_k: int | None = body_field("Only this many of the likeliest tokens; 0 or -1: all")
    min_p: float | None = body_field(
        "In [0, 1]: only tokens at least this likely, relative to the likeliest", schema=_range(0, 1)
    )
    seed: int | None = body_field("Makes the answer repeatable; null or -1: random")
    presence_penalty: float | None = body_field(
        "In [-2, 2]: subtracted once for a token that was written", schema=_range(-2, 2)
    )
    frequency_penalty: float | None = body_field(
        "In [-2, 2]: subtracted for each time a token was written", schema=_range(-2, 2)
    )
    repetition_penalty: float | None = body_field(
        "Above 0; divides the logits of tokens of prompt and answer", schema={"exclusiveMinimum": 0}
    )
    logit_bias: dict[int, float] | None = body_field("Token id to a number added to its logit, cut to [-100, 100]")
    allowed_token_ids: list[int] | None = body_field("Only these tokens are sampled")
    bad_words: list[str] | None = body_field("Strings that are never written", max_items=MAX_BAD_WORDS)
    min_tokens: int | None = body_field("Tokens to write at least", minimum=0)
    stop: str | list[str] | None = body_field("Strings that end the answer", max_items=MAX_STOP_STRINGS)
    stop_token_ids: list[int] | None = body_field("Token ids that end the answer")
    include_stop_str_in_output: bool | None = body_field("Keep the stop string in the text")
    ignore_eos: bool | None = body_field("Go on after the model's end of text")
    skip_special_tokens: bool | None = body_field("Leave special tokens out of the text")
    structured_outputs: dict[str, Any] | None = body_field(
        "One of json, regex, choice, grammar, json_object, structural_tag"
    )
    thinking_token_budget: int | None = body_field("Tokens after which the think block is closed; -1: any", minimum=-1)
    repetition_detection: RepetitionDetection | None = body_field("Ends an answer that has run into a loop")
    priority: int = body_field("Lower runs earlier, with --scheduling-policy priority", 0)
    cache_salt: str | None = body_field(
        "Only requests with the same salt share cached prompts", schema={"pattern": rf"^{CACHE_SALT.pattern}$"}
    )
    request_id: str | None = body_field(
        "Becomes a part of the answer's id", schema={"pattern": f"^{REQUEST_ID.pattern}$"}
    )

    def __post_init__(self) -> None:
        if self.request_id is not None:
            check_request_id(self.request_id, "request_id")
        if self.cache_salt is not None and not CACHE_SALT.fullmatch(self.cache_salt):
            raise bad_request("cache_salt must be 1 to 128 characters without @, /, \\ and NUL.", "cache_salt")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(SamplingFields):
    """The fields that chat and text completions share."""

    model: str | None = body_field("Name of the model; the served one if absent")
    stream: bool = body_field("Send the answer in chunks as it is written", False)
    stream_options: StreamOptions | None = body_field("Only with stream")
    n: int = body_field("Answers to the same prompt", 1, minimum=1, schema={"maximum": MAX_N})

    max_tokens: int | None = body_field("Tokens to write at most", minimum=0)
    detokenize: bool | None = body_field("false: no text, only token ids")
    response_format: dict[str, Any] | None = body_field(
        '{"type": "text" | "json_object" | "json_schema" | "structural_tag", …}'
    )
    guided_json: Any = body_field("The older name of structured_outputs.json")
    guided_regex: str | None = body_field("The older name of structured_outputs.regex")
    guided_choice: list[str] | None = body_field("The older name of structured_outputs.choice")
    guided_grammar: str | None = body_field("The older name of structured_outputs.grammar")
    prompt_logprobs: int | None = body_field("Logprobs of the prompt's tokens, with this many alternatives")

    echo: bool = body_field("Begin the answer with the prompt", False)
    add_special_tokens: bool | None = body_field("Let the tokenizer add its special tokens")
    truncate_prompt_tokens: int | None = body_field("Keep this many of the prompt's tokens; -1: what fits", minimum=-1)
    truncation_side: Literal["left", "right"] = body_field("The side that is cut off", "left")
    return_token_ids: bool = body_field("Return the token ids of prompt and answer", False)
    return_tokens_as_token_ids: bool = body_field("Write tokens in logprobs as token_id:N", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream_options is not None and not self.stream:
            raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")
        if self.n > MAX_N:
            raise bad_request(f"n must be at most {MAX_N}, got {self.n}.", "n", self.n)
        if self.stream and self.prompt_logprobs is not None:
            raise bad_request("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise bad_request("truncate_prompt_tokens must be -1 or at least 1, got 0.", "truncate_prompt_tokens", 0)

    def wanted_logprobs(self) -> int | None:
        """`SamplingParams.logprobs`; the two kinds of request say it differently."""
        raise NotImplementedError

    def wanted_max_tokens(self) -> int | None:
        return self.max_tokens

    def wanted_structure(self) -> StructuredOutputsParams | None:
        guided = {name: getattr(self, name) for name in GUIDED}
        # Only a chat's template opens think blocks; a completion is constrained from its first token on.
        is_chat = isinstance(self, ChatRequest)
        return structured_outputs(self.response_format, self.structured_outputs, guided, after_thinking=is_chat)

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """The request's values, then the model's defaults, then OpenAI's.

        Raises:
          ApiError: 400, a value is out of range.
        """
        given = {name: getattr(self, name) for name in SAMPLING_NAMES if hasattr(self, name)}
        given["logprobs"] = self.wanted_logprobs()
        given["structured_outputs"] = self.wanted_structure()
        given["max_tokens"] = self.wanted_max_tokens()
        if self.repetition_detection is not None:
            try:
                loops = RepetitionDetectionParams(**dataclasses.asdict(self.repetition_detection))
            except ValueError as error:
                raise from_value_error(error, SAMPLING_NAMES) from None
            given["repetition_detection"] = loops
        if self.logit_bias is not None:
            given["logit_bias"] = {i: min(100.0, max(-100.0, bias)) for i, bias in self.logit_bias.items()}
        try:
            return SamplingParams.from_defaults({"max_tokens": None, **defaults}, **given)
        except ValueError as error:
            api_error = from_value_error(error, SAMPLING_NAMES)
            value = given.get(api_error.param or "")
            raise api_error if value is None else bad_request(str(error), api_error.param, value) from None


@dataclass(frozen=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = body_field("The conversation", MISSING, schema={"minItems": 1})
    max_completion_tokens: int | None = body_field("Tokens to write at most; absent: what the context has", minimum=0)
    logprobs: bool = body_field("Return the logprob of each token", False)
    top_logprobs: int | None = body_field("Likeliest tokens to return at each position", minimum=-1)
    tools: list[dict[str, Any]] | None = body_field("Functions that the chat template describes to the model")
    tool_choice: Any = body_field(
        '"auto", "none" (the tools are not shown to the model), "required", one function or allowed_tools'
    )
    parallel_tool_calls: bool = body_field("false: an answer has at most one tool call", True)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = body_field(
        '"none" turns thinking off, the others turn it on'
    )
    include_reasoning: bool = body_field("false: the reasoning is left out of the answer", True)
    add_generation_prompt: bool | None = body_field("Let the template open the assistant's turn; yes if absent")
    continue_final_message: bool = body_field("Continue the last message instead of answering it", False)
    chat_template_kwargs: dict[str, Any] | None = body_field("Variables of the template, such as enable_thinking")
    return_prompt_text: bool = body_field("Return the rendered prompt", False)

    REFUSED: ClassVar[dict[str, Refused]] = {
        **_REFUSED_BY_BOTH,
        "functions": Refused("it is deprecated; use tools."),
        "function_call": Refused("it is deprecated; use tool_choice.", ("none", "auto")),
        "chat_template": Refused(
            "Chat template is passed with request, but the server does not trust templates of requests; "
            "use --chat-template."
        ),
        "documents": Refused("Qwen's chat templates know no documents.", ([],)),
        "modalities": Refused("the model writes only text.", (["text"],)),
        "audio": Refused("the model writes only text."),
        "prediction": Refused("there are no predicted outputs."),
        "verbosity": Refused("say it in the prompt.", ("medium",)),
        "web_search_options": Refused("the server searches nothing."),
        "service_tier": Refused("there is one tier.", ("auto", "default")),
        "store": Refused("nothing is stored.", (False,)),
        "moderation": Refused("nothing is moderated."),
        "prompt_cache_options": Refused("the prefix cache lives in memory.", ({},)),
        "prompt_cache_retention": Refused("the prefix cache lives in memory.", ("in_memory", "in-memory")),
        "media_io_kwargs": Refused("the model reads only text.", ({},)),
        "mm_processor_kwargs": Refused("the model reads only text.", ({},)),
        "mm_payload": Refused("the model reads only text."),
    }
    NO_EFFECT: ClassVar[dict[str, str]] = {
        **_NO_EFFECT_IN_BOTH,
        "safety_identifier": "a label for OpenAI's abuse monitoring",
        "metadata": "labels for OpenAI's stored completions; nothing is stored",
        "prompt_cache_key": "a hint to OpenAI's load balancer; the prefix cache needs none",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_logprobs and not self.logprobs:
            raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise bad_request("max_tokens and max_completion_tokens differ; send one of them.", "max_tokens")
        if self.continue_final_message and self.add_generation_prompt:
            message = "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
            raise bad_request(message, "continue_final_message")
        _check_tools(self.tools)
        _ = self.choice_of_tool  # is refused now if it is wrong

    @property
    def choice_of_tool(self) -> ToolChoice:
        try:
            return ToolChoice.of(self.tool_choice, self.tools)
        except ValueError as error:
            raise bad_request(str(error), "tool_choice") from None

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the template describes to the model."""
        return None if self.tool_choice == "none" else self.tools

    def wanted_structure(self) -> StructuredOutputsParams | None:
        """`tool calls | format`."""
        structure = super().wanted_structure()
        try:
            return with_tools(structure, self.tools, self.choice_of_tool, is_parallel=self.parallel_tool_calls)
        except ValueError as error:
            raise from_value_error(error, ("tools", *SAMPLING_NAMES)) from None

    def template_variables(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """The template's variables: the server's, then what `reasoning_effort` means, then the request's own."""
        effort = {} if self.reasoning_effort is None else {"enable_thinking": self.reasoning_effort != "none"}
        return {**defaults, **effort, **(self.chat_template_kwargs or {})}

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def wanted_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = body_field("Text, token ids, or a list of either", MISSING)
    max_tokens: int | None = body_field("Tokens to write at most; 0 with echo: none", 16, minimum=0)
    logprobs: int | None = body_field("Return the logprob of each token and of this many of the likeliest", minimum=-1)

    REFUSED: ClassVar[dict[str, Refused]] = {
        **_REFUSED_BY_BOTH,
        "suffix": Refused("the model fills no gaps.", ("",)),
        "prompt_embeds": Refused("send text or token ids."),
    }
    NO_EFFECT: ClassVar[dict[str, str]] = _NO_EFFECT_IN_BOTH

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def wanted_max_tokens(self) -> int | None:
        """The engine writes at least one token; where none is wanted, that one is dropped from the answer."""
        return 1 if self.is_echo_only else self.max_tokens

    @property
    def is_echo_only(self) -> bool:
        return self.echo and self.max_tokens == 0

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        params = super().sampling_params(defaults)
        if self.echo and params.logprobs is not None and params.prompt_logprobs is None:
            params = params.with_(prompt_logprobs=params.logprobs)  # the echoed tokens have logprobs too
        return params

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one.

        Raises:
          ApiError: 400, there is none, or there are too many.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise bad_request("prompt must not be an empty list.", "prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        if len(self.prompt) > MAX_PROMPTS:
            raise bad_request(f"prompt can have at most {MAX_PROMPTS} prompts, got {len(self.prompt)}.", "prompt")
        return self.prompt  # type: ignore[return-value]


def check_request_id(request_id: str, param: str) -> str:
    if not REQUEST_ID.fullmatch(request_id):
        raise bad_request(f"{param} must be 1 to 128 letters, digits, '.', '_', ':' or '-'.", param, request_id)
    return request_id


def _check_tools(tools: list[dict[str, Any]] | None) -> None:
    if tools is not None and not tools:
        raise bad_request("tools must not be an empty list; leave it out.", "tools")
    for i, tool in enumerate(tools or []):
        function = tool.get("function")
        where = f"tools[{i}]"
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise bad_request(f'{where} must be {{"type": "function", "function": {{…}}}}.', where, tool)
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise bad_request(f"{where}.function.name must be a non-empty string.", f"{where}.function.name")
        if not isinstance(function.get("strict"), bool | None):
            param = f"{where}.function.strict"
            raise bad_request(f"{param} must be true or false.", param, function["strict"])
