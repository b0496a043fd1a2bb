"""Documents into rows of equal length: which go together, and the arrays of a batch of rows. numpy only.

A document of n tokens takes n - 1 places: each place has a token and the token after it as its target. Every batch is
a pure function of (seed, epoch, position), so a run that resumes sees what it would have seen.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Which pieces of documents lie in which row, in order of rows. A piece is part of one document."""

    starts: np.ndarray  # int64 [pieces] first token in the corpus
    lengths: np.ndarray  # int32 [pieces] places taken, 1 to L
    first_piece: np.ndarray  # int64 [rows + 1] row r has the pieces first_piece[r] to first_piece[r + 1]
    row_length: int

    def __len__(self) -> int:
        return len(self.first_piece) - 1

    @property
    def fill(self) -> float:
        """Share of places that hold a token."""
        return float(self.lengths.sum()) / max(1, len(self) * self.row_length)


@dataclass(frozen=True)
class HostBatch:
    """Arrays of B rows of length L, flat [T]."""

    token_ids: np.ndarray  # int32
    positions: np.ndarray  # int32
    segment_ids: np.ndarray  # int32, from 1 in each row; 0: padding
    targets: np.ndarray  # int32, the token after; 0 in padding
    weights: np.ndarray  # float32, 1 where the target counts in the loss


def pieces_of(offsets: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, places) of all documents; those with more than `row_length` places are cut, and shorter than 2 left out.

    Args:
      offsets: int64 [documents + 1], document d has the tokens offsets[d] to offsets[d + 1].
    """
    offsets = np.asarray(offsets, np.int64)
    places = np.diff(offsets) - 1
    keep = places > 0
    starts, places = offsets[:-1][keep], places[keep]
    counts = -(-places // row_length)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
    starts = np.repeat(starts, counts) + number * row_length
    lengths = np.minimum(np.repeat(places, counts) - number * row_length, row_length)
    return starts, lengths.astype(np.int32)


def pack(starts: np.ndarray, lengths: np.ndarray, row_length: int, rng: np.random.Generator) -> Rows:
    """Best fit in a random order of pieces; then the rows in a random order. No row is over-full."""
    order = rng.permutation(len(lengths))
    row_of = best_fit(lengths[order], row_length)
    num_rows = int(row_of.max()) + 1 if len(row_of) else 0
    row_of = rng.permutation(num_rows)[row_of]
    order = order[np.argsort(row_of, kind="stable")]
    counts = np.bincount(row_of, minlength=num_rows)
    first_piece = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Rows(starts[order], lengths[order], first_piece, row_length)


def best_fit(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """The row of each length, int64: always the one with the least room that suffices, else a new one."""
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # bit r is set where by_room[r] has a row: finding the best is a few operations on one integer
    out = np.empty(len(lengths), np.int64)
    num_rows = 0
    for i, length in enumerate(lengths.tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row, num_rows = row_length, num_rows, num_rows + 1
        out[i] = row
        if room > length:
            left = room - length
            if not by_room[left]:
                rooms |= 1 << left
            by_room[left].append(row)
    return out


def assemble(rows: Rows, which: np.ndarray, token_ids: np.ndarray, loss_mask: np.ndarray) -> HostBatch:
    """The rows `which` as arrays; vectorised over all their pieces.

    Args:
      token_ids, loss_mask: of the whole corpus (memory-mapped or not), [tokens]; a mask says whether a token is a
        target.
    """
    L = rows.row_length
    first, last = rows.first_piece[which], rows.first_piece[which + 1]
    counts = last - first
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its row
    piece = np.repeat(first, counts) + number
    lengths = rows.lengths[piece].astype(np.int64)
    ends = np.cumsum(lengths)
    before = ends - lengths  # places of earlier pieces, over all rows
    row = np.repeat(np.arange(len(which)), counts)
    used = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(counts)])]  # places before each row
    column = before - used[row]
    position = np.arange(ends[-1] if len(ends) else 0) - np.repeat(before, lengths)
    place = np.repeat(row * L + column, lengths) + position
    source = np.repeat(rows.starts[piece], lengths) + position

    size = len(which) * L
    zeros = lambda dtype: np.zeros(size, dtype)
    batch = HostBatch(zeros(np.int32), zeros(np.int32), zeros(np.int32), zeros(np.int32), zeros(np.float32))
    batch.token_ids[place] = token_ids[source]
    batch.positions[place] = position
    batch.segment_ids[place] = np.repeat(number + 1, lengths)
    batch.targets[place] = token_ids[source + 1]
    batch.weights[place] = loss_mask[source + 1]
    return batch
