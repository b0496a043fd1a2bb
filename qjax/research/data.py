"""Where training text comes from: arrays on disk, chat messages in a JSONL file, or arrays in memory.

A `Corpus` is all documents' tokens in one array; `Loader` turns it into batches without end, from any position.
"""

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qjax.research.packing import HostBatch, Rows, assemble, pack, pieces_of
from qjax.text.tokenizer import Tokenizer

ARRAY_NAMES = {"token_ids": "tokens.npy", "loss_mask": "loss_mask.npy", "offsets": "offsets.npy"}


@dataclass(frozen=True)
class Corpus:
    """Documents, one after the other."""

    token_ids: np.ndarray  # any integer type [tokens]
    loss_mask: np.ndarray  # bool or uint8 [tokens] whether a token is learnt (as a target)
    offsets: np.ndarray  # int64 [documents + 1]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.loss_mask) or len(self.offsets) < 2:
            raise ValueError(
                f"data: {len(self.token_ids)} token ids, {len(self.loss_mask)} mask values and "
                f"{len(self.offsets) - 1} documents do not fit together."
            )
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.token_ids) or np.any(np.diff(self.offsets) < 0):
            raise ValueError("data: the document offsets must rise from 0 to the number of tokens.")

    def save(self, folder: str | Path) -> None:
        """Writes tokens.npy, loss_mask.npy and offsets.npy."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for field, name in ARRAY_NAMES.items():
            np.save(folder / name, getattr(self, field))

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """Maps what `save` wrote into memory.

        Raises:
          ValueError: a file is missing or the arrays do not fit together.
        """
        arrays = {}
        for field, name in ARRAY_NAMES.items():
            path = Path(folder) / name
            if not path.is_file():
                raise ValueError(f"data: {path} is missing (a folder has {', '.join(ARRAY_NAMES.values())}).")
            arrays[field] = np.load(path, mmap_mode="r")
        return cls(**arrays)

    @classmethod
    def from_documents(cls, documents: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> "Corpus":
        """Of (token ids, mask) pairs of equal length."""
        ids, masks = [], []
        for tokens, mask in documents:
            if len(tokens) != len(mask):
                raise ValueError(f"data: a document has {len(tokens)} tokens but {len(mask)} mask values.")
            ids.append(np.asarray(tokens, np.int32))
            masks.append(np.asarray(mask, bool))
        offsets = np.concatenate([[0], np.cumsum([len(x) for x in ids])]).astype(np.int64)
        return cls(np.concatenate([*ids, []]).astype(np.int32), np.concatenate([*masks, []]).astype(bool), offsets)


def open_corpus(path: str | Path, load_tokenizer: Callable[[], Tokenizer]) -> Corpus:
    """A folder of arrays, or a JSONL file of chats (`{"messages": [...], "tools": [...]}` a line).

    Args:
      load_tokenizer: called for chats alone.

    Raises:
      ValueError: there is no such file, or a line is wrong; the message names the line.
    """
    path = Path(path)
    if path.is_dir():
        return Corpus.open(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"data: {path} must be a folder of arrays or a .jsonl file of chat messages.")
    if not path.is_file():
        raise ValueError(f"data: {path} is missing.")
    return Corpus.from_documents(_read_chats(path, load_tokenizer()))


def _read_chats(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                chat = json.loads(line)
                yield from render_chat(tokenizer, chat["messages"], tools=chat.get("tools"))
            except KeyError as error:
                raise ValueError(f"data: {path} line {number}: {error} is missing.") from None
            except (TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"data: {path} line {number}: {error}") from None


def render_chat(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None
) -> list[tuple[list[int], list[bool]]]:
    """Documents (token ids, mask) of a conversation by the chat template; the mask holds the assistant's turns alone.

    A turn is learnt as the engine would ask for it: from the end of its prompt (add_generation_prompt) to its
    end-of-turn token. Where the template drops the thinking of turns before the last question, a conversation makes
    one document for each question, so that no turn is learnt without its thinking.

    Raises:
      ValueError: the template does not render a turn as its prompt continued.
    """
    documents: list[tuple[str, list[tuple[int, int]]]] = []
    ends = [i for i, message in enumerate(messages) if message["role"] == "user" and i > 0] + [len(messages)]
    begin = 0
    for end in ends:
        turns = [i for i in range(begin, end) if messages[i]["role"] == "assistant"]
        begin = end
        if not turns:
            continue
        text = tokenizer.apply_chat_template(messages[: turns[-1] + 1], tools=tools, add_generation_prompt=False)
        spans = [_span_of(tokenizer, text, messages, i, tools) for i in turns]
        if documents and text.startswith(documents[-1][0]):
            spans = documents.pop()[1] + spans
        documents.append((text, spans))
    return [_encode_spans(tokenizer, *document) for document in documents]


def _span_of(
    tokenizer: Tokenizer, text: str, messages: list[dict[str, Any]], turn: int, tools: list[dict[str, Any]] | None
) -> tuple[int, int]:
    """Where the answer `messages[turn]` stands in a rendering.

    An empty think block is the prompt's (enable_thinking=false), not learnt, unless the user wrote /no_think.
    """
    prompt = tokenizer.apply_chat_template(messages[:turn], tools=tools, add_generation_prompt=True)
    closed = tokenizer.apply_chat_template(
        messages[:turn], tools=tools, add_generation_prompt=True, enable_thinking=False
    )
    if not text.startswith(prompt):
        raise ValueError(f"the chat template does not render message {turn} as a continuation of its prompt.")
    question = next((m.get("content") for m in reversed(messages[:turn]) if m["role"] == "user"), None)
    if text.startswith(closed) and "/no_think" not in str(question):
        prompt = closed
    eos = "" if tokenizer.eos_token_id is None else tokenizer.token_text(tokenizer.eos_token_id)
    end = text.find(eos, len(prompt)) if eos else -1
    return len(prompt), len(text) if end < 0 else end + len(eos)


def _encode_spans(tokenizer: Tokenizer, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Encodes prompt and answer apart, as the engine does: no token spans both. What follows the last is left out."""
    token_ids: list[int] = []
    mask: list[bool] = []
    at = 0
    for start, end in spans:
        for part, is_learnt in ((text[at:start], False), (text[start:end], True)):
            ids = tokenizer.encode(part)
            token_ids += ids
            mask += [is_learnt] * len(ids)
        at = end
    return token_ids, mask


@dataclass
class Position:
    """Where a loader stands: the next row of an epoch's order."""

    epoch: int = 0
    row: int = 0


class Loader:
    """Batches of a corpus, epoch after epoch, each epoch packed anew. The last rows of an epoch that do not fill a
    batch are left out of it.

    Raises:
      ValueError: the corpus does not fill one batch.
    """

    def __init__(self, corpus: Corpus, *, row_length: int, batch_size: int, seed: int):
        self.corpus, self.row_length, self.batch_size, self.seed = corpus, row_length, batch_size, seed
        self._pieces = pieces_of(corpus.offsets, row_length)
        self._packed: tuple[int, Rows] | None = None
        if len(self.rows(0)) < batch_size:
            raise ValueError(
                f"data: the corpus fills {len(self.rows(0))} rows of seq_len={row_length}, less than "
                f"batch_size={batch_size}. Lower one of them."
            )

    def rows(self, epoch: int) -> Rows:
        if self._packed is None or self._packed[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._packed = (epoch, pack(*self._pieces, self.row_length, rng))
        return self._packed[1]

    @property
    def steps_per_epoch(self) -> int:
        """Of the first epoch; others differ by a few rows."""
        return len(self.rows(0)) // self.batch_size

    def batch(self, position: Position) -> tuple[HostBatch, Position]:
        """The batch at a position, and the position after it. A pure function of the position."""
        rows = self.rows(position.epoch)
        if position.row > 0 and position.row + self.batch_size > len(rows):
            position = Position(position.epoch + 1, 0)
            rows = self.rows(position.epoch)
        which = np.arange(position.row, position.row + self.batch_size) % len(rows)  # an epoch may be one row short
        batch = assemble(rows, which, self.corpus.token_ids, self.corpus.loss_mask)
        return batch, Position(position.epoch, position.row + self.batch_size)


class Prefetcher:
    """Makes batches in a thread, `depth` ahead of who takes them. `close` ends the thread."""

    def __init__(self, loader: Loader, position: Position, depth: int = 8):
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(loader, position), name="qjax-data", daemon=True)
        self._thread.start()

    def _run(self, loader: Loader, position: Position) -> None:
        item: Any
        while not self._stopped.is_set():
            try:
                batch, position = loader.batch(position)
                item = (batch, position)
            except BaseException as error:
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def next(self) -> tuple[HostBatch, Position]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
