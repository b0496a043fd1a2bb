"""What an embedder and a reranker are fed: Qwen3-Embedding's closing token, and Qwen3-Reranker's prompt. No model.

Both forms are those of the official model cards (Zhang et al., 2025, "Qwen3 Embedding").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qjax.outputs import EmbeddingOutput, PoolingRequestOutput, ScoringOutput
from qjax.text.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

Side = Literal["left", "right"]


def embedding_ids(
    tokenizer: Tokenizer,
    text: str,
    *,
    add_special_tokens: bool = True,
    limit: int | None = None,
    side: Side = "right",
) -> list[int]:
    """Token ids of a text to embed: they end with `<|endoftext|>`, whose hidden state is the embedding.

    The official tokenizer appends it itself since June 2025; older copies do not, and get it here.

    Args:
      add_special_tokens: whether it is appended.
      limit: tokens to keep, the closing one included.
      side: which end of a longer text is cut off.
    """
    ids = tokenizer.encode(text, add_special_tokens)
    ending = tokenizer.encode(END_OF_TEXT) if add_special_tokens else []
    if ending and ids[-len(ending) :] == ending:
        ids = ids[: -len(ending)]
    return cut(ids, None if limit is None else limit - len(ending), side) + ending


def cut(ids: list[int], limit: int | None, side: Side) -> list[int]:
    """At most `limit` ids; `side` is the end that is cut off."""
    if limit is None or len(ids) <= limit:
        return ids
    return ids[len(ids) - max(limit, 0) :] if side == "left" else ids[: max(limit, 0)]


def instructed(query: str, instruction: str | None) -> str:
    """A query as Qwen3-Embedding was trained on it. Documents have no instruction."""
    return query if instruction is None else f"Instruct: {instruction}\nQuery:{query}"


@dataclass(frozen=True)
class RerankPrompt:
    """How a query and a document become a reranker's prompt.

    Args:
      instruction: what makes a document relevant; None: that of web search.
      chat_template: text of a Jinja template that replaces the official prompt. It sees messages of the roles
        "query" and "document", before them the instruction as "system".
      limit: tokens to keep; the end of the document is cut off, never what comes after it.
    """

    tokenizer: Tokenizer
    instruction: str | None = None
    chat_template: str | None = None
    limit: int | None = None

    def token_ids(self, query: str, document: str) -> list[int]:
        """Raises ValueError if the text is not Unicode, the template fails, or the limit leaves no room."""
        encode = self.tokenizer.encode
        if self.chat_template is not None:
            ids = encode(self._rendered(query, document))
            if self.limit is not None and len(ids) > self.limit:
                raise ValueError("truncate_prompt_tokens would cut off the end of what --chat-template makes.")
            return ids
        body = f"<Instruct>: {self.instruction or INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
        prefix, suffix = encode(PREFIX), encode(SUFFIX)
        room = None if self.limit is None else self.limit - len(prefix) - len(suffix)
        if room is not None and room < 1:
            raise ValueError(
                f"truncate_prompt_tokens must be more than the {len(prefix) + len(suffix)} tokens of the reranker's "
                f"prompt, got {self.limit}."
            )
        return prefix + cut(encode(body), room, "right") + suffix

    def _rendered(self, query: str, document: str) -> str:
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        if self.instruction is not None:
            messages.insert(0, {"role": "system", "content": self.instruction})
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            return environment.from_string(self.chat_template or "").render(messages=messages)
        except TemplateError as error:
            raise ValueError(f"the chat template cannot render the request: {error}") from error


def shortened(tokenizer: Tokenizer, text: str, limit: int | None) -> str:
    """The text of the first `limit` tokens, without the part of a character that the cut may leave."""
    if limit is None:
        return text
    ids = tokenizer.encode(text)
    return text if len(ids) <= limit else tokenizer.decode(ids[:limit], skip_special_tokens=False).rstrip("\ufffd")


def pairs(queries: Sequence[Any], documents: Sequence[Any]) -> list[tuple[int, int]]:
    """Which query meets which document: one with each, or each with its own.

    Raises:
      ValueError: neither; or there is none.
    """
    if not queries or not documents:
        raise ValueError("At least one query and one document are needed.")
    if len(queries) == 1:
        return [(0, i) for i in range(len(documents))]
    if len(queries) != len(documents):
        raise ValueError(
            f"Input lengths must be either 1:1, 1:N or N:N, got {len(queries)} queries and {len(documents)} documents."
        )
    return [(i, i) for i in range(len(documents))]


def cosine(
    query: PoolingRequestOutput[EmbeddingOutput], document: PoolingRequestOutput[EmbeddingOutput]
) -> PoolingRequestOutput[ScoringOutput]:
    """The score of two embeddings of length 1."""
    if query.outputs is None or document.outputs is None:
        raise RuntimeError("an embedding is missing")
    return PoolingRequestOutput(
        request_id=document.request_id,
        prompt_token_ids=query.prompt_token_ids + document.prompt_token_ids,
        outputs=ScoringOutput(float(query.outputs.vector @ document.outputs.vector)),
        num_cached_tokens=query.num_cached_tokens + document.num_cached_tokens,
        finish_reason="stop",
    )
