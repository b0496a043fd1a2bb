"""Runs a model over token ids as the engine does: a jitted step of flat leaves, a paged cache, sequences in slots."""

import functools
from dataclasses import dataclass, field

import jax
import numpy as np

from qjax import sharding
from qjax.models.batch import Batch, DecodeMetadata, PrefillMetadata
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import ModelDef, merge

PAGE_SIZE = 16
PAGES_PER_SEQ = 4


@dataclass
class Stepper:
    """`num_seqs` sequences, each with PAGES_PER_SEQ pages of a random permutation. Unused pages hold NaN."""

    config: ModelConfig
    mesh: jax.sharding.Mesh
    modeldef: ModelDef
    leaves: tuple[jax.Array, ...]
    num_seqs: int = 1
    num_traces: int = 0
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self):
        tp = sharding.tensor_parallel_size(self.mesh)
        heads, _ = sharding.split_heads(self.config.num_attention_heads, self.config.num_key_value_heads, tp)
        num_pages = 1 + self.num_seqs * PAGES_PER_SEQ
        shape = (self.config.num_hidden_layers, 2, num_pages, heads, PAGE_SIZE, self.config.head_dim)
        empty = np.full(shape, np.nan, np.float32)
        empty[:, :, 0] = 0
        dtype = self.leaves[0].dtype
        self.cache = jax.device_put(empty.astype(dtype), sharding.kv_cache_sharding(self.mesh))
        pages = 1 + np.random.default_rng(0).permutation(num_pages - 1)
        self.page_table = pages.reshape(self.num_seqs, PAGES_PER_SEQ).astype(np.int32)
        self.lengths = [0] * self.num_seqs

        def step(leaves, cache, batch):
            self.num_traces += 1
            model = merge(self.modeldef, leaves)
            hidden, cache = model(batch, cache)
            return model.logits(hidden), cache

        self.step = jax.jit(step, donate_argnums=1)

    def run(self, decode: dict[int, int], prefill: dict[int, list[int]], pad_prefill: int = 0) -> np.ndarray:
        """One step: a token for each sequence of `decode`, a chunk for each of `prefill`. Returns logits [T, V]."""
        batch = self.batch(decode, prefill, pad_prefill)
        with jax.set_mesh(self.mesh):
            logits, self.cache = self.step(self.leaves, self.cache, batch)
        return np.asarray(logits)

    def batch(self, decode: dict[int, int], prefill: dict[int, list[int]], pad_prefill: int = 0) -> Batch:
        chunks = [(seq, [token]) for seq, token in decode.items()] + list(prefill.items())
        ids, positions, slots, context_lens = [], [], [], []
        for seq, tokens in chunks:
            where = np.arange(self.lengths[seq], self.lengths[seq] + len(tokens))
            ids += tokens
            positions.append(where)
            slots.append(self.page_table[seq, where // PAGE_SIZE] * PAGE_SIZE + where % PAGE_SIZE)
            self.lengths[seq] += len(tokens)
            context_lens.append(self.lengths[seq])
        ids += [0] * pad_prefill
        positions.append(np.zeros(pad_prefill))
        slots.append(np.full(pad_prefill, -1))
        tables = [self._pages(seq) for seq, _ in chunks]
        split, starts = len(decode), np.cumsum([0] + [len(tokens) for tokens in prefill.values()])
        row = lambda x: np.array(x, np.int32)
        batch = Batch(
            token_ids=row(ids),
            positions=row(np.concatenate(positions)),
            slots=row(np.concatenate(slots)),
            decode=DecodeMetadata(row(tables[:split]), row(context_lens[:split])) if decode else None,
            prefill=PrefillMetadata(row(tables[split:]), row(context_lens[split:]), row(starts)) if prefill else None,
        )
        return jax.device_put(batch, sharding.replicated(self.mesh))

    def _pages(self, seq: int) -> np.ndarray:
        used = -(-self.lengths[seq] // PAGE_SIZE)
        return np.where(np.arange(PAGES_PER_SEQ) < used, self.page_table[seq], 0)

    def compiled_text(self, batch: Batch) -> str:
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.leaves, self.cache, batch).compile().as_text()


@functools.cache
def mesh_of(tensor_parallel_size: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(tensor_parallel_size)
