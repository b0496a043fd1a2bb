"""Which of several replicas gets a request: the one that has its beginning in its prefix cache, unless it is too busy.

A router cannot see the KV caches, but it knows what it has sent where. `PrefixMemory` remembers that for one replica,
as hashes of the text's beginning; `choose` compares. Both are plain data and arithmetic, for whatever asks: the front
of `--data-parallel-size`, another router, a simulation. Standard library only.

The idea is Preble's (Srivatsa et al. 2024, arXiv:2407.00023: go where the prefix is if that saves more than half of
the prompt, else where there is least to do) and that of SGLang's cache-aware router (the longest match, unless the
loads are out of balance by a factor and by a margin).
"""

import json
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

BLOCK_CHARS = 256  # about a page of a GPU's KV cache (64 tokens) of English
MAX_BLOCKS = 4096  # of one request that are looked at: a million characters
MEMORY_BLOCKS = 65_536  # of one replica: four million tokens, some MiB of hashes
MIN_SHARE = 0.5  # of a prompt's blocks that must be there, or the match decides nothing
MAX_RATIO = 1.5  # of loads, above which a replica is too busy,
MAX_MARGIN = 8  # where it also has this many requests more than the least busy one

# In the order in which they come in the rendered prompt, or decide which cache it is looked up in.
_FIELDS = (
    *("model", "cache_salt", "tools", "system", "instructions"),
    *("messages", "prompt", "input", "query", "documents"),
)


def prompt_text(body: Mapping[str, Any]) -> str:
    """The beginning of a request as text: of its JSON body (chat, completions, responses, messages, embeddings, …).

    Two bodies whose conversations begin alike have texts that begin alike. It is not the prompt that the model sees.
    """
    values = [value for name in _FIELDS if (value := body.get(name)) is not None]
    return "\0".join(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)


def hash_blocks(text: str, block_chars: int = BLOCK_CHARS) -> list[int]:
    """A hash for each full block of the text. It covers the blocks before it, so equal hashes are equal beginnings.

    Hashes are Python's: they differ from process to process.
    """
    hashes, parent = [], 0
    for start in range(0, min(len(text), MAX_BLOCKS * block_chars) - block_chars + 1, block_chars):
        parent = hash((parent, text[start : start + block_chars]))
        hashes.append(parent)
    return hashes


class PrefixMemory:
    """The blocks that were sent to a replica, the least recently used forgotten, tails before heads.

    Forget it (make a new one) where the replica has lost its cache.
    """

    def __init__(self, max_blocks: int = MEMORY_BLOCKS):
        self.max_blocks = max_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def num_known(self, blocks: Sequence[int]) -> int:
        """How many of a request's first blocks were sent before."""
        for i, block in enumerate(blocks):
            if block not in self._blocks:
                return i
        return len(blocks)

    def add(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):  # the head last: it is forgotten last
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self.max_blocks:
            self._blocks.popitem(last=False)


def choose[Name: Hashable](
    blocks: Sequence[int],
    memories: Mapping[Name, PrefixMemory],
    loads: Mapping[Name, int],
    *,
    min_share: float = MIN_SHARE,
    max_ratio: float = MAX_RATIO,
    max_margin: int = MAX_MARGIN,
) -> Name:
    """The replica that a request should go to. Changes nothing: `add` the blocks to the memory of whom was chosen.

    The longest known beginning wins, if it is at least `min_share` of the blocks, among the replicas that are not too
    busy: whose load is at most `max_ratio` times the least, or at most `max_margin` more. Where no match is long
    enough, the least busy replica wins; of equal ones the one with the longer match, then the one that remembers less.

    Args:
      blocks: of `hash_blocks`.
      memories: of the replicas that can serve.
      loads: how much each has to do, such as its requests in flight.

    Raises:
      ValueError: there is no replica.
    """
    if not memories:
        raise ValueError("no replica can serve.")
    least = min(loads[name] for name in memories)
    limit = max(max_ratio * least, least + max_margin)
    known = {name: memory.num_known(blocks) for name, memory in memories.items()}
    enough = max(1, min_share * len(blocks))
    holders = [name for name in memories if known[name] >= enough and loads[name] <= limit]
    if holders:
        return min(holders, key=lambda name: (-known[name], loads[name]))
    return min(memories, key=lambda name: (loads[name], -known[name], len(memories[name])))
