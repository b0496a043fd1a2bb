"""`SamplingParams`: how one request is sampled and when it stops. Names and defaults are vLLM's."""

from dataclasses import dataclass, fields, replace
from typing import Any

GREEDY_EPS = 1e-5  # a temperature below this is greedy
MIN_TEMPERATURE = 1e-2  # lower temperatures overflow: raised to this, as in vLLM


STRUCTURES = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an answer must obey. Exactly one of the first six is set.

    Args:
      json: JSON schema, as an object or as text.
      regex: regular expression (Rust's syntax) that the whole answer matches.
      choice: the answer is one of these texts.
      grammar: context-free grammar, Lark or GBNF.
      json_object: any JSON object.
      structural_tag: text and formats put together, as an object or as JSON text: see `qjax.text.structural_tag`.
      disable_any_whitespace: JSON has no white space outside of strings.
      whitespace_pattern: regular expression of the white space at each place where JSON has some; None: up to 8
        characters.
      after_thinking: a think block may stand before it, and is free; `LLM.chat` and the chat endpoint set it.

    Raises:
      ValueError: none or several are set, or one is of the wrong type.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    after_thinking: bool = False

    def __post_init__(self) -> None:
        given = [kind for kind in STRUCTURES if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"structured_outputs needs exactly one of {', '.join(STRUCTURES)}, got {given or 'none'}.")
        if not isinstance(self.json, dict | str | None):
            raise ValueError(f"structured_outputs.json must be a JSON schema (an object), got {self.json!r}.")
        if not isinstance(self.structural_tag, dict | str | None):
            raise ValueError(f"structured_outputs.structural_tag must be an object, got {self.structural_tag!r}.")
        for kind in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, kind), bool):
                raise ValueError(f"structured_outputs.{kind} must be true or false, got {getattr(self, kind)!r}.")
        for kind in ("regex", "grammar", "whitespace_pattern"):
            if not isinstance(getattr(self, kind), str | None):
                raise ValueError(f"structured_outputs.{kind} must be a string, got {getattr(self, kind)!r}.")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("structured_outputs.whitespace_pattern means nothing with disable_any_whitespace.")
        is_texts = isinstance(self.choice, list) and self.choice and all(isinstance(c, str) and c for c in self.choice)
        if self.choice is not None and not is_texts:
            raise ValueError(f"structured_outputs.choice must be a list of non-empty strings, got {self.choice!r}.")


MAX_PATTERN = 1024  # tokens; each token is compared with this many before it


@dataclass(frozen=True)
class RepetitionDetectionParams:
    """Ends an answer that has run into a loop: the same tokens again and again at its end.

    Args:
      max_pattern_size: the longest loop that is looked for, in tokens; 0: none.
      min_pattern_size: the shortest; 0 and 1 are the same.
      min_count: times that it must have come, at least 2.
      end_thinking: a loop in a think block closes the block instead, and the model goes on with its answer.

    Raises:
      ValueError: an option is out of range.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0
    end_thinking: bool = False

    def __post_init__(self) -> None:
        sizes = (self.min_pattern_size, self.max_pattern_size)
        if not all(_is_int(size) for size in (*sizes, self.min_count)) or not 0 <= sizes[0] <= sizes[1] <= MAX_PATTERN:
            raise ValueError(
                f"repetition_detection needs 0 <= min_pattern_size <= max_pattern_size <= {MAX_PATTERN}, got {sizes}."
            )
        if self.max_pattern_size and self.min_count < 2:
            raise ValueError(f"repetition_detection.min_count must be at least 2, got {self.min_count}.")
        if not isinstance(self.end_thinking, bool):
            raise ValueError(f"repetition_detection.end_thinking must be true or false, got {self.end_thinking!r}.")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request.

    Args:
      n: answers to the same prompt.
      presence_penalty, frequency_penalty: in [-2, 2]; over generated tokens.
      repetition_penalty: > 0; over prompt and generated tokens; 1 is off (Keskar et al., 2019).
      temperature: in [0, 2]; 0 is greedy.
      top_p: in (0, 1]; nucleus sampling (Holtzman et al., 2019).
      top_k: 0 or -1 is off.
      min_p: in [0, 1]; drops tokens less likely than `min_p` times the likeliest.
      seed: makes the request's text repeatable, whatever else is in the batch; None or -1 is random.
      stop: strings that end the answer; the text before the first of them is kept.
      stop_token_ids: token ids that end the answer.
      ignore_eos: keep generating after the model's end-of-text tokens.
      max_tokens: tokens to generate at most; None is the rest of the context.
      min_tokens: tokens before which neither EOS nor stop ids are sampled and no stop string ends the answer.
      logprobs: number of likeliest tokens to return beside the sampled one; -1 is the whole vocabulary.
      prompt_logprobs: the same for each prompt token.
      detokenize: return text; when false, only token ids (and no `stop` strings).
      skip_special_tokens: leave special tokens out of the text.
      include_stop_str_in_output: keep the stop string in the text.
      logit_bias: token id -> number added to its logit.
      allowed_token_ids: only these tokens are sampled.
      bad_words: strings that are never generated.
      thinking_token_budget: tokens after which the think block is closed; None or -1: any number.
      structured_outputs: a schema, regex, choice or grammar that the answer obeys.
      repetition_detection: when an answer counts as caught in a loop; the finish_reason is then "repetition".

    Raises:
      ValueError: an option is out of range; the message names it.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    thinking_token_budget: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    repetition_detection: RepetitionDetectionParams | None = None

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)
        if self.stop is None:
            set_("stop", [])
        elif isinstance(self.stop, str):
            set_("stop", [self.stop])
        else:
            set_("stop", list(self.stop))
        set_("stop_token_ids", list(self.stop_token_ids or []))
        set_("bad_words", list(self.bad_words or []))
        if self.top_k == -1:
            set_("top_k", 0)
        if self.seed == -1:
            set_("seed", None)
        if self.thinking_token_budget == -1:
            set_("thinking_token_budget", None)
        self._check()
        if GREEDY_EPS <= self.temperature < MIN_TEMPERATURE:
            set_("temperature", MIN_TEMPERATURE)

    def _check(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"{name} must {rule}, got {getattr(self, name)!r}.")

        need(_is_int(self.n) and self.n >= 1, "n", "be an integer of at least 1")
        for name in ("presence_penalty", "frequency_penalty"):
            need(-2.0 <= getattr(self, name) <= 2.0, name, "be in [-2, 2]")
        need(0.0 < self.repetition_penalty < float("inf"), "repetition_penalty", "be greater than zero")
        need(0.0 <= self.temperature <= 2.0, "temperature", "be in [0, 2]")
        need(0.0 < self.top_p <= 1.0, "top_p", "be in (0, 1]")
        need(_is_int(self.top_k) and self.top_k >= 0, "top_k", "be 0 (off), -1 (off) or at least 1")
        need(0.0 <= self.min_p <= 1.0, "min_p", "be in [0, 1]")
        need(
            self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**63),
            "seed",
            "be a 64-bit integer",
        )
        need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "be at least 1")
        budget = self.thinking_token_budget
        need(
            budget is None or (_is_int(budget) and budget >= 0), "thinking_token_budget", "be at least 0, or -1 for any"
        )
        need(self.min_tokens >= 0, "min_tokens", "be at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}.")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            need(value is None or value >= -1, name, "be at least 0, or -1 for the whole vocabulary")
        need(all(isinstance(s, str) and s for s in self.stop or []), "stop", "hold non-empty strings")
        need(all(_is_int(i) for i in self.stop_token_ids or []), "stop_token_ids", "hold integers")
        need(all(isinstance(s, str) and s for s in self.bad_words or []), "bad_words", "hold non-empty strings")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True: they are found in the text.")
        need(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids",
            "not be empty",
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPS

    def with_(self, **changes: Any) -> "SamplingParams":
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    @classmethod
    def from_defaults(cls, defaults: dict[str, Any], **given: Any) -> "SamplingParams":
        """The model's defaults (from `generation_config.json`), overridden by what the user gave (not None)."""
        names = {f.name for f in fields(cls)}
        values = {k: v for k, v in defaults.items() if k in names}
        values.update({k: v for k, v in given.items() if v is not None})
        return cls(**values)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
