"""Pre-tokenised training data: dialogues of an index range as arrays, packed small and unpacked.

Unpacked, a folder holds `tokens.npy` (uint16, all dialogues after each other), `loss_mask.npy` (uint8, 1 where the
token is a target) and `offsets.npy` (int64, where each dialogue begins, and the end). Needs no tokenizer to unpack.
"""

import lzma
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

# Tokens have two bytes: alignment told to LZMA makes the packed data smaller.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 1, "lp": 1, "pb": 1, "dict_size": 1 << 24}]
BATCH = 4000  # dialogues encoded at once


@dataclass
class Arrays:
    tokens: np.ndarray  # [T] uint16
    loss_mask: np.ndarray  # [T] uint8
    lengths: np.ndarray  # [number of dialogues] int64


def encode(seed: int, indices: range, split: Literal["train", "test"] = "train") -> tuple[Arrays, Counter[str]]:
    """The dialogues of these indices, and tokens (`skill`) and documents (`#skill`) per skill."""
    from scripts.builtin_model import mixture, render, tokenizer

    encoder = tokenizer.load()
    tokens, masks, lengths = [], [], []
    counts: Counter[str] = Counter()
    for start in range(indices.start, indices.stop, BATCH):
        dialogues = [mixture.make(seed, i, split) for i in range(start, min(start + BATCH, indices.stop))]
        parts = [render.pieces(dialogue) for dialogue in dialogues]
        encodings = iter(encoder.encode_batch_fast([p.text for ps in parts for p in ps], add_special_tokens=False))
        for dialogue, ps in zip(dialogues, parts, strict=True):
            length = 0
            for piece in ps:
                ids = next(encodings).ids
                tokens.append(np.array(ids, np.uint16))
                masks.append(np.full(len(ids), piece.is_target, np.uint8))
                length += len(ids)
            lengths.append(length)
            counts[dialogue.skill] += length
            counts["#" + dialogue.skill] += 1
    return Arrays(np.concatenate(tokens), np.concatenate(masks), np.array(lengths, np.int64)), counts


def pack(arrays: Arrays) -> bytes:
    head = np.array([len(arrays.tokens), len(arrays.lengths)], np.int64)
    mask = np.packbits(arrays.loss_mask)
    data = b"".join(
        [head.tobytes(), arrays.tokens.tobytes(), arrays.lengths.astype(np.uint16).tobytes(), mask.tobytes()]
    )
    return lzma.compress(data, format=lzma.FORMAT_XZ, filters=FILTERS)


def unpack(packed: bytes) -> Arrays:
    data = lzma.decompress(packed)
    num_tokens, num_dialogues = np.frombuffer(data, np.int64, 2)
    tokens = np.frombuffer(data, np.uint16, num_tokens, 16)
    lengths = np.frombuffer(data, np.uint16, num_dialogues, 16 + 2 * num_tokens)
    bits = np.frombuffer(data, np.uint8, offset=16 + 2 * (num_tokens + num_dialogues))
    return Arrays(tokens, np.unpackbits(bits, count=int(num_tokens)), lengths.astype(np.int64))


def write(shards: Iterable[Arrays], folder: Path) -> None:
    """Writes the three arrays of all shards together."""
    all_shards = list(shards)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", np.concatenate([s.tokens for s in all_shards]))
    np.save(folder / "loss_mask.npy", np.concatenate([s.loss_mask for s in all_shards]))
    lengths = np.concatenate([s.lengths for s in all_shards])
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def unpack_folder(packed: Path, out: Path) -> None:
    """`packed/train_*.xz` to `out/train`, `packed/valid_*.xz` to `out/valid`, on all cores."""
    for part in ("train", "valid"):
        files = sorted(packed.glob(f"{part}_*.xz"))
        if not files:
            raise ValueError(f"{packed} holds no {part}_*.xz; make them with `python -m scripts.builtin_model.build`.")
        with ThreadPoolExecutor() as pool:
            write(pool.map(lambda file: unpack(file.read_bytes()), files), out / part)
