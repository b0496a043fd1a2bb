"""Talking to a model in the terminal: what `qjax generate`, `qjax chat` and `qjax info` do.

Owns how text looks there. It drives an `Engine` itself, one request at a time.
"""

import contextlib
import itertools
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from qjax.config import EngineConfig
from qjax.sampling_params import SamplingParams
from qjax.text.answer_parser import AnswerParser
from qjax.text.parsed import Content, Event, ParsedAnswer, Reasoning

if TYPE_CHECKING:
    from qjax.engine.engine import Engine

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CHAT_HELP = """\
/clear      forget the conversation
/exit       leave (Ctrl-D too)
/think, /no_think in a message: switch the model's thinking from here on
Ctrl-C      stop an answer"""


def generate(config: EngineConfig, prompt: str, sampling: dict[str, Any]) -> None:
    """Continues a raw text and prints what comes.

    Raises:
      ValueError: a wrong option, checkpoint or prompt.
    """
    check_sampling(sampling)
    engine = _engine(config)
    token_ids = engine.tokenizer.encode(prompt)
    text = ""
    for text, _ in _stream(engine, "generate", token_ids, _params(engine, sampling)):
        print(text, end="", flush=True)
    if not text.endswith("\n"):
        print(flush=True)


def chat(
    config: EngineConfig,
    sampling: dict[str, Any],
    *,
    system: str | None = None,
    chat_template: str | None = None,
    is_thinking: bool = True,
) -> None:
    """A conversation: reads messages from standard input until it ends.

    Raises:
      ValueError: a wrong option or checkpoint, or a model without a chat template.
    """
    check_sampling(sampling)
    engine = _engine(config)
    conversation = Conversation(engine, _params(engine, sampling), system, chat_template, is_thinking)
    conversation.prompt("Hello")  # a missing template is said now, not after the first message
    is_tty = sys.stdin.isatty() and sys.stdout.isatty()
    if is_tty:
        with contextlib.suppress(ImportError):  # some Pythons are built without it
            import readline  # noqa: F401 (gives input() its history and line editing)
        print("Ask something. /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            message = input(">>> " if is_tty else "").strip()
        except EOFError:
            if is_tty:
                print()
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
            continue
        if message in ("/exit", "/quit", "/bye"):
            return
        if message == "/clear":
            conversation.clear()
        elif message == "/help":
            print(CHAT_HELP)
        elif message.startswith("/") and " " not in message and message not in ("/think", "/no_think"):
            print(f"There is no command {message}.\n{CHAT_HELP}")
        elif message:
            try:
                conversation.ask(message, sys.stdout, is_tty)
            except ValueError as error:  # too long a conversation, mostly
                print(f"qjax: error: {error}\n/clear starts a new conversation.", file=sys.stderr)


def info(config: EngineConfig, gpu_memory: int | None) -> None:
    """Prints a model's facts and what it would take, without its weights.

    Args:
      gpu_memory: plan for a GPU with so many bytes; None: for this machine.

    Raises:
      ValueError: a wrong option or checkpoint, or a model that does not fit.
    """
    from qjax.checkpoint import hub
    from qjax.models.config import ModelConfig, apply_overrides

    folder = hub.resolve(
        config.model,
        revision=config.revision,
        token=config.hf_token,
        download_dir=config.download_dir,
        need_weights=False,
        progress=sys.stderr.isatty(),
    )
    hf_config = apply_overrides(read_json(folder / "config.json"), config.hf_overrides, config.rope_scaling)
    from qjax.checkpoint.pooling import find_pooling  # imports numpy

    pooling = find_pooling(config, folder, hf_config)
    model = ModelConfig.from_hf(hf_config if pooling is None else pooling.backbone(hf_config))
    model = model.with_quantization(config.quantization)
    if config.enable_expert_parallel:
        model = model.with_expert_parallel(config.tensor_parallel_size)
    embeddings = "shared with the output" if model.tie_word_embeddings else "output separate"
    rope = f", {model.rope_scaling['rope_type']} × {model.rope_scaling['factor']}" if model.rope_scaling else ""
    quantized = "" if model.quantization is None else f", quantised: {model.quantization.method}"
    feed_forward = f"feed-forward {model.intermediate_size}"
    if model.num_sparse_layers:
        feed_forward = (
            f"in {model.num_sparse_layers} of them {model.num_experts} experts of {model.moe_intermediate_size}, "
            f"{model.num_experts_per_tok} a token ({_count(model.num_active_params)} parameters)"
        )
    rows = {
        "folder": folder,
        "architecture": model.architecture,
        "made for": "text" if pooling is None else {"embed": "embeddings", "score": "scores"}[pooling.kind],
        "parameters": f"{_count(model.num_params)} ({model.dtype}{quantized})",
        "layers": f"{model.num_hidden_layers}, hidden size {model.hidden_size}, {feed_forward}",
        "attention": f"{model.num_attention_heads} query and {model.num_key_value_heads} KV heads of {model.head_dim}",
        "vocabulary": f"{model.vocab_size} ({embeddings})",
        "context": f"{model.max_context_len} tokens{rope}",
        "KV cache": f"{model.kv_bytes_per_token(2) / 1024:.0f} KiB a token in bfloat16",
    }
    for name, value in rows.items():
        print(f"{name:<13}{value}")
    print(flush=True)

    from qjax.engine.memory import Device, plan

    if gpu_memory is not None:
        device = Device("gpu", int(gpu_memory * config.gpu_memory_utilization))
    else:
        from qjax.engine import loading  # imports jax

        device = loading.describe_device(loading.start_devices(config)[0])
    print(plan(config, model, device).table())


def read_json(path: Any) -> dict[str, Any]:
    import json

    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None


# A conversation


class Conversation:
    """Messages so far, and the engine that answers them."""

    def __init__(
        self,
        engine: "Engine",
        params: SamplingParams,
        system: str | None,
        chat_template: str | None,
        is_thinking: bool,
    ) -> None:
        self._engine, self._params = engine, params
        self._chat_template = chat_template
        self._variables: dict[str, Any] = {} if is_thinking else {"enable_thinking": False}
        self._system = [{"role": "system", "content": system}] if system else []
        self._ids = itertools.count()
        self.clear()

    def clear(self) -> None:
        self.messages: list[dict[str, Any]] = list(self._system)

    def prompt(self, message: str) -> str:
        """The template's text of the conversation with a new message."""
        messages = [*self.messages, {"role": "user", "content": message}]
        return self._engine.tokenizer.apply_chat_template(
            messages, chat_template=self._chat_template, **self._variables
        )

    def ask(self, message: str, out: TextIO, is_styled: bool) -> None:
        """Prints the answer as it comes, and remembers both.

        An answer that was stopped is remembered as far as it came, but not where it was still thinking or had not
        begun.

        Raises:
          ValueError: the conversation is too long, or the template refuses it; nothing is remembered.
        """
        prompt = self.prompt(message)
        token_ids = self._engine.tokenizer.encode(prompt)
        parser, writer = AnswerParser(prompt), AnswerWriter(out, is_styled)
        events: list[Event] = []

        def show(new: list[Event]) -> None:
            events.extend(new)
            writer.write(new)

        count, started = 0, None
        with _stop_on_interrupt() as stop:
            for text, num_tokens in _stream(self._engine, f"chat-{next(self._ids)}", token_ids, self._params, stop):
                started = started or time.monotonic()
                count += num_tokens
                show(parser.feed(text))
        show(parser.finish())
        if is_styled and stop.is_set and count == 0:
            out.write("\n")  # after the terminal's own ^C
        writer.close()
        answer = ParsedAnswer.of(events)
        if answer.content:
            self.messages += [{"role": "user", "content": message}, answer.message()]
        if is_styled:
            seconds = time.monotonic() - (started or 0)
            speed = f", {(count - 1) / seconds:.1f} tokens/s" if count > 1 and seconds > 0 else ""
            used, room = len(token_ids) + count, self._engine.max_model_len
            note = "stopped; " if stop.is_set else "cut: no room left; " if used >= room else ""
            out.write(f"{DIM}[{note}{count} tokens{speed}; {used} of {room} tokens of context]{PLAIN}\n\n")
            out.flush()


class AnswerWriter:
    """Prints an answer as it comes: its reasoning dim; unstyled, between the tags that the template writes."""

    def __init__(self, out: TextIO, is_styled: bool) -> None:
        self._out, self._is_styled = out, is_styled
        self._is_thinking = False
        self._ends_in_newline = True

    def write(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Reasoning | Content):
                if isinstance(event, Reasoning) != self._is_thinking:
                    self._switch()
                self._out.write(event.text)
                self._ends_in_newline = event.text.endswith("\n")
        self._out.flush()

    def close(self) -> None:
        """Ends the line."""
        if self._is_styled and self._is_thinking:
            self._out.write(PLAIN)
        if not self._ends_in_newline:
            self._out.write("\n")
        self._out.flush()

    def _switch(self) -> None:
        self._is_thinking = not self._is_thinking
        if self._is_thinking:
            self._out.write(DIM if self._is_styled else "<think>\n")
        else:
            self._out.write((PLAIN if self._is_styled else "\n</think>") + "\n\n")


# The engine


def check_sampling(sampling: dict[str, Any]) -> None:
    """Raises ValueError for a wrong value before a model is loaded."""
    SamplingParams.from_defaults({"max_tokens": None}, **sampling)


def _params(engine: "Engine", sampling: dict[str, Any]) -> SamplingParams:
    return SamplingParams.from_defaults({"max_tokens": None, **engine.default_sampling_params}, **sampling)


def _engine(config: EngineConfig) -> "Engine":
    from qjax.engine.pooling import make_engine

    return make_engine(config, progress=sys.stderr.isatty())


class _Stop:
    is_set = False


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[_Stop]:
    """Ctrl-C sets a flag, since an exception in the middle of a step would break the engine; twice, it is one."""
    stop = _Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set:
            raise KeyboardInterrupt
        stop.is_set = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _stream(
    engine: "Engine", request_id: str, token_ids: list[int], params: SamplingParams, stop: _Stop | None = None
) -> Iterator[tuple[str, int]]:
    """New text and its number of tokens, until the answer ends or is stopped.

    Raises:
      ValueError: the request cannot be served.
    """
    engine.add_request(request_id, token_ids, params)
    while engine.has_work:
        if stop is not None and stop.is_set and (last := engine.abort(request_id)) is not None:
            yield last.outputs[0].text, len(last.outputs[0].token_ids)
        for output in engine.step():
            for answer in output.outputs:
                yield answer.text, len(answer.token_ids)


def _count(number: int) -> str:
    """8190735360 → 8.19 billion, 9442560 → 9.44 million."""
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"
