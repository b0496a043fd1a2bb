"""`Program`: all that a compiled step depends on besides its bucket and options, and no array."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from qjax import sharding
from qjax.engine.buckets import Bucket, Buckets
from qjax.engine.memory import Plan
from qjax.engine.step import DeviceState, Layout, StepOptions, TokenCounts, step
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import ModelDef

type Key = tuple[Bucket, StepOptions]

DONATED = (1, 2, 3)  # cache, state and counts of `step`'s arguments


@dataclass(frozen=True)
class Program:
    """Of an engine. With an abstract mesh it can be pickled, and traced where its devices are not."""

    model_config: ModelConfig
    plan: Plan
    mesh: Mesh | AbstractMesh

    @property
    def replicated(self) -> jax.sharding.NamedSharding:
        return sharding.replicated(self.mesh)

    def buckets(self) -> Buckets:
        plan = self.plan
        return Buckets(
            is_gpu=plan.is_gpu,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_num_prefills=plan.max_num_prefills,
            max_pages=plan.pages_per_sequence,
        )

    def ahead(self, options: Sequence[StepOptions]) -> list[Key]:
        """The steps that are compiled before the first request, most needed first."""
        keys = [(bucket, option) for option in options for bucket in self.buckets().ahead()]
        if (num_steps := self.plan.num_scheduler_steps) > 1:
            keys += [(b, replace(o, num_steps=num_steps)) for b, o in keys if not b.num_tokens]
        return [(b, o) for b, o in keys if not (o.pooling and b.num_decodes)]

    def cache(self) -> tuple[jax.ShapeDtypeStruct, DeviceState]:
        """The KV cache and the device's state."""
        plan, model, num_slots = self.plan, self.model_config, self.plan.max_num_seqs
        heads, _ = sharding.split_heads(
            model.num_attention_heads, model.num_key_value_heads, sharding.tensor_parallel_size(self.mesh)
        )
        shape = (model.num_hidden_layers, 2, plan.num_pages, heads, plan.page_size, model.head_dim)
        kv = jax.ShapeDtypeStruct(shape, jnp.dtype(plan.kv_dtype), sharding=sharding.kv_cache_sharding(self.mesh))
        table: Any = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.replicated)
        return kv, DeviceState(table(num_slots + 1), table(num_slots + 1, plan.pages_per_sequence))

    def layout(self, bucket: Bucket, options: StepOptions) -> Layout:
        return Layout(bucket, options, self.plan.page_size, self.model_config.vocab_size)

    def step(self, modeldef: ModelDef, bucket: Bucket, options: StepOptions):
        """The jitted step."""
        return jax.jit(partial(step, modeldef, bucket, options, self.plan.page_size), donate_argnums=DONATED)

    def arguments(self, leaves: tuple[jax.ShapeDtypeStruct, ...], bucket: Bucket, options: StepOptions) -> tuple:
        """What the jitted step takes, in form."""
        everywhere = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated)
        counts: Any = None
        if options.penalties:
            shape = (self.plan.max_num_seqs + 1, self.model_config.vocab_size)
            made = lambda: TokenCounts(jnp.zeros(shape, jnp.int16), jnp.zeros(shape, jnp.bool_))
            counts = jax.tree.map(everywhere, jax.eval_shape(made))
        packed = jax.ShapeDtypeStruct((self.layout(bucket, options).size,), jnp.int32, sharding=self.replicated)
        return leaves, *self.cache(), counts, packed
