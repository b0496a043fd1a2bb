"""`Tokenizer`: text to token ids and back, a token's bytes, and the chat template. No jax, no model.

Wraps transformers' tokenizers, imported only when one is loaded (the import costs a second). Messages are
brought into the template's form by `messages`; a growing answer is decoded by `detokenizer`.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qjax.text.messages import Message, template_messages

TOKENIZER_FILES = "tokenizer.json (or vocab.json and merges.txt), tokenizer_config.json"
# Names that `apply_chat_template` gives a meaning of its own: a template variable cannot have them.
RESERVED_TEMPLATE_NAMES = {
    *("conversation", "conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}


class Tokenizer:
    """A byte-level BPE tokenizer (Qwen3's and Qwen2's) with its chat template. Safe to use from several threads."""

    def __init__(self, hf_tokenizer: Any):
        """Use `from_pretrained`; `hf_tokenizer` is a fast tokenizer of transformers."""
        self._hf = hf_tokenizer
        self._backend = hf_tokenizer.backend_tokenizer
        added = hf_tokenizer.added_tokens_decoder
        self.special_token_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        # Added tokens that are part of an answer's text, such as <think> and <tool_call>.
        self.text_token_ids: dict[str, int] = {token.content: i for i, token in added.items() if not token.special}
        self.eos_token_id: int | None = hf_tokenizer.eos_token_id
        self.chat_template: str | None = hf_tokenizer.chat_template
        self._bytes = _byte_table(hf_tokenizer.get_vocab(), {i: token.content for i, token in added.items()})
        self._ordinary_bytes = list(self._bytes)
        for i in self.special_token_ids:
            self._ordinary_bytes[i] = b""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Loads the tokenizer of a local folder.

        Raises:
          ValueError: the folder holds no tokenizer, or one of another kind than byte-level BPE.
        """
        folder = Path(folder)
        hint = f"A tokenizer's folder has {TOKENIZER_FILES}; name another one with --tokenizer."
        has_files = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
        if not has_files:
            raise ValueError(f"{folder} holds no tokenizer. {hint}")
        try:
            hf_tokenizer = _tokenizer_class(folder).from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a broken file makes transformers raise
            raise ValueError(f"the tokenizer in {folder} cannot be read: {error}. {hint}") from error
        if not getattr(hf_tokenizer, "is_fast", False):
            raise ValueError(f"the tokenizer in {folder} is a {type(hf_tokenizer).__name__} without a tokenizer.json.")
        try:
            return cls(hf_tokenizer)
        except ValueError as error:
            raise ValueError(f"the tokenizer in {folder} cannot be used: {error}") from error

    def __len__(self) -> int:
        return len(self._bytes)

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added tokens included; a model's vocabulary is often padded to more."""
        return len(self._bytes)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`. `<|im_start|>` and its like become their one id.

        Raises:
          ValueError: the text has half a surrogate pair, which no UTF-8 text can have.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):
            if not isinstance(text, str):
                raise TypeError(f"text must be a string, got {type(text).__name__}.") from None
            raise ValueError("the text is not valid Unicode: it holds half a surrogate pair.") from None

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of whole output. Broken UTF-8 becomes U+FFFD, ids outside the vocabulary become nothing."""
        table = self.bytes_table(skip_special_tokens)
        size = len(table)
        return b"".join([table[i] for i in token_ids if 0 <= i < size]).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; `b""` for an id outside the vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        """A token alone as text, as logprobs show it: bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def grammar_tokenizer(self, vocab_size: int, eos_token_ids: list[int]) -> Any:
        """llguidance's form of this tokenizer, for a model with `vocab_size` ids. Takes a second or two.

        Raises:
          ValueError: llguidance is not installed.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise ValueError("structured output needs the package llguidance: pip install llguidance.") from None
        speller: Any = _SpellingTokenizer(self, vocab_size, eos_token_ids)
        return LLTokenizer(speller, eos_token=eos_token_ids or None)

    def bytes_table(self, skip_special_tokens: bool) -> Sequence[bytes]:
        """Token id -> bytes, for loops that cannot afford a call a token; special tokens are `b""` if skipped."""
        return self._ordinary_bytes if skip_special_tokens else self._bytes

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **chat_template_kwargs: Any,
    ) -> str:
        """The prompt's text for a conversation. `chat_template_kwargs` are the template's variables.

        Raises:
          ValueError: the messages or the options do not fit; with the template's own message where it raised one.
        """
        import jinja2

        if not (chat_template or self.chat_template):
            raise ValueError("the tokenizer has no chat template; give one with --chat-template.")
        if reserved := sorted(RESERVED_TEMPLATE_NAMES & chat_template_kwargs.keys()):
            raise ValueError(f"chat_template_kwargs cannot set {reserved[0]!r}: the name is taken.")
        try:
            return self._hf.apply_chat_template(
                template_messages(messages),
                tools=tools or None,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **chat_template_kwargs,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refused the request: {error}") from error
        except (TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"the chat template cannot render the request: {error}") from error


class _SpellingTokenizer:
    """What llguidance asks of a tokenizer: the bytes of each id, and the ids of a text that a grammar forces.

    Such a text is encoded as it is written, without the added tokens: `<think>` in a string is letters, whereas the
    token of that name is a sign, and the grammar would refuse its own forced token.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]):
        backend = tokenizer._backend
        state = json.loads(backend.to_str())
        added = [token["id"] for token in state["added_tokens"]]
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else tokenizer.eos_token_id or 0
        self.special_token_ids = added
        self.tokens = [*tokenizer._bytes, *[b""] * (vocab_size - len(tokenizer))]
        plain = {**state, "added_tokens": [], "normalizer": None, "post_processor": None, "truncation": None}
        self._plain = type(backend).from_str(json.dumps({**plain, "padding": None}))

    def __call__(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids


def _tokenizer_class(folder: Path) -> Any:
    """transformers' class for what tokenizer.json says, else AutoTokenizer, which makes a tokenizer from older files.

    AutoTokenizer imports PyTorch where it is installed, which takes ten seconds and more. Where it is not, its remark
    about that is left out: this project does not use it.
    """
    logger = logging.getLogger("transformers")

    def is_wanted(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger.addFilter(is_wanted)
    try:
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
        from transformers import AutoTokenizer

        return AutoTokenizer
    finally:
        logger.removeFilter(is_wanted)


def _byte_table(vocab: dict[str, int], added: dict[int, str]) -> list[bytes]:
    """Token id -> bytes for every id; gaps are `b""`."""
    byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
    table = [b""] * (max(max(vocab.values(), default=-1), max(added, default=-1)) + 1)
    for token, i in vocab.items():
        if i in added:
            continue
        try:
            table[i] = bytes([byte_of[char] for char in token])
        except KeyError:
            raise ValueError(f"it is not byte-level BPE: token {i} is {token!r}.") from None
    for i, content in added.items():
        table[i] = content.encode("utf-8")
    return table


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: itself, or 256 and up in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(shifted)) for b in range(256)]
