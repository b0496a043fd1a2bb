"""Training's dense forward pass against the engine's paged one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import sharding
from qjax.models.qwen3 import merge
from qjax.research.attention import choose_implementation
from qjax.research.batch import PackedBatch
from qjax.research.forward import ForwardOptions, hidden_states, token_logprobs
from qjax.research.packing import assemble, pack, pieces_of
from tests.models.test_qwen3 import golden, stepper_of


def packed_logprobs(stepper, batch, L: int, chunks: int):
    options = ForwardOptions(jnp.dtype("float32"), num_loss_chunks=chunks)

    def run(leaves, token_ids, positions, segment_ids, targets):
        packed = PackedBatch(token_ids, positions, segment_ids, L)
        hidden = hidden_states(stepper.modeldef, leaves, packed, options)
        logits = merge(stepper.modeldef, leaves).logits(hidden)
        return logits, token_logprobs(stepper.modeldef, leaves, hidden, targets, L, options)

    arrays = (batch.token_ids, batch.positions, batch.segment_ids, batch.targets)
    with jax.set_mesh(stepper.mesh):
        return [
            np.asarray(x)
            for x in jax.jit(run)(
                stepper.leaves, *jax.device_put(arrays, sharding.named_sharding(stepper.mesh, "rows"))
            )
        ]


@pytest.mark.parametrize(("name", "chunks"), [("untied_gqa4", 1), ("yarn", 4), ("qwen2", 2)])
def test_logits_of_packed_documents_equal_the_paged_ones(name, chunks):
    """Three documents in rows with padding; each has the logits that it has alone in the engine."""
    ids, _ = golden(name)
    documents = [ids[:20], ids[5:16], ids[2:33], ids[:2]]
    L = 32
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
    tokens = np.concatenate(documents)
    rows = pack(*pieces_of(offsets, L), L, np.random.default_rng(0))
    batch = assemble(rows, np.arange(len(rows)), tokens, np.ones(len(tokens), bool))
    logits, logprobs = packed_logprobs(stepper_of(name), batch, L, chunks)
    assert len(rows) == 2 and (batch.segment_ids == 0).any()

    together = stepper_of(name, num_seqs=4).run({}, dict(enumerate(documents)))
    alone = np.split(together, offsets[1:-1])
    starts = {tuple(d[:-1]): logits for d, logits in zip(documents, alone, strict=True)}
    for row in range(len(rows)):
        for segment in range(1, batch.segment_ids.reshape(-1, L)[row].max() + 1):
            where = np.flatnonzero((batch.segment_ids == segment) & (np.arange(len(batch.token_ids)) // L == row))
            expected = starts[tuple(batch.token_ids[where].tolist())][: len(where)]
            np.testing.assert_allclose(logits[where], expected, rtol=0, atol=1e-4)
            expected = jax.nn.log_softmax(expected)[np.arange(len(where)), batch.targets[where]]
            np.testing.assert_allclose(logprobs[where], expected, rtol=0, atol=1e-4)


def test_the_attention_is_chosen_by_the_device():
    cpu = jax.devices()[0]
    assert choose_implementation("auto", "bfloat16", 64, cpu) == "xla"
    assert choose_implementation("xla", "float32", 64, cpu) == "xla"
    with pytest.raises(ValueError, match="attention='cudnn' does not run here: it needs an NVIDIA GPU"):
        choose_implementation("cudnn", "bfloat16", 64, cpu)
