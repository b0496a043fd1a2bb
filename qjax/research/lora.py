"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) on the model's fused leaves: make, apply, save and load.

A step adds each adapter's product to its weight and runs the model as it is, so the same forward pass serves full
training, adapters and merged weights. On disk an adapter is PEFT's: adapter_config.json, adapter_model.safetensors.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from qjax import sharding
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import ModelDef
from qjax.research.config import LoRAConfig

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
OWNERS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "self_attn.qkv_proj.kernel"),
    "o_proj": "self_attn.o_proj.kernel",
    **dict.fromkeys(("gate_proj", "up_proj"), "mlp.gate_up_proj.kernel"),
    "down_proj": "mlp.down_proj.kernel",
}
Leaves = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Factor:
    """One of an adapter's arrays: A maps inputs to the rank, B the rank to outputs."""

    layer: int
    module: str  # "q_proj", …
    kind: str  # "A" or "B"
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_inputs: int  # inputs of the projection

    @property
    def path(self) -> str:
        return f"layers.{self.layer}.{self.module}.{self.kind}"

    @property
    def hf_name(self) -> str:
        block = "mlp" if OWNERS[self.module].startswith("mlp") else "self_attn"
        return f"base_model.model.model.layers.{self.layer}.{block}.{self.module}.lora_{self.kind}.weight"


@dataclass(frozen=True)
class AdapterDef:
    """Which factors an adapter has, in order, and how they change the model's leaves; hashable, for jit."""

    modeldef: ModelDef
    config: LoRAConfig
    factors: tuple[Factor, ...]
    num_kv_heads: int  # K, copies of heads included
    copies: int  # of each of the checkpoint's KV heads

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(factor.path for factor in self.factors)

    def apply(self, adapter: Leaves, base: Leaves) -> Leaves:
        """The model's leaves with the adapter in them, float32 where it changes one; traceable."""
        arrays = {f.path: array for f, array in zip(self.factors, adapter, strict=True)}
        return tuple(self._changed(path, leaf, arrays) for path, leaf in zip(self.modeldef.paths, base, strict=True))

    def _changed(self, path: str, leaf: jax.Array, arrays: Mapping[str, jax.Array]) -> jax.Array:
        _, _, rest = path.partition("layers.")
        layer, _, owner = rest.partition(".")
        products = {
            module: self._product(arrays[f"layers.{layer}.{module}.A"], arrays[f"layers.{layer}.{module}.B"], module)
            for module in self.config.target_modules
            if OWNERS[module] == owner
        }
        if not products:
            return leaf
        where = jax.typeof(leaf).sharding.spec
        out = leaf.astype(jnp.float32)
        match owner:
            case "self_attn.qkv_proj.kernel":  # [D, K, G + 2, H]
                D, K, width, H = leaf.shape
                parts = []
                for module, count in (("q_proj", width - 2), ("k_proj", 1), ("v_proj", 1)):
                    zeros = jnp.zeros((D, K, count, H), jnp.float32, out_sharding=where)
                    parts.append(products.get(module, zeros).reshape(zeros.shape, out_sharding=where))
                return out + jnp.concatenate(parts, axis=2)
            case "mlp.gate_up_proj.kernel":  # [D, 2, F]
                zeros = jnp.zeros_like(out[:, 0])
                return out + jnp.stack([products.get(m, zeros) for m in ("gate_proj", "up_proj")], axis=1)
            case _:
                return out + next(iter(products.values()))

    def _product(self, a: jax.Array, b: jax.Array, module: str) -> jax.Array:
        """scale * A B: [*inputs, rank] times [rank, *outputs]."""
        out = jax.lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
        if module in ("k_proj", "v_proj") and self.copies > 1:  # [D, heads, H] whole on every device → [D, K, H]
            out = jnp.repeat(out, self.copies, axis=1)
            out = jax.sharding.reshard(out, sharding.spec("embed", "kv_heads", "head_dim"))
        return self.config.scale * out


def make_adapter_def(config: LoRAConfig, model: ModelConfig, modeldef: ModelDef, mesh: jax.sharding.Mesh) -> AdapterDef:
    """Raises ValueError for modules that have no adapters: those of experts."""
    experts = [name for name in config.target_modules if OWNERS[name].startswith("mlp")]
    if model.num_sparse_layers and experts:
        raise ValueError(
            f"lora: target_modules={', '.join(experts)}: adapters of experts (Qwen3MoeForCausalLM) are not supported. "
            "Choose among q_proj, k_proj, v_proj and o_proj."
        )
    tp = sharding.tensor_parallel_size(mesh)
    K, G = sharding.split_heads(model.num_attention_heads, model.num_key_value_heads, tp)
    D, F, H, heads, r = (
        model.hidden_size,
        model.intermediate_size,
        model.head_dim,
        model.num_key_value_heads,
        config.rank,
    )
    kv_axis = "kv_heads" if heads == K else None
    query: tuple[str | None, ...] = ("kv_heads", "heads_of_kv", "head_dim")
    ends: dict[str, tuple[tuple[int, ...], tuple[str | None, ...], tuple[int, ...], tuple[str | None, ...]]] = {
        "q_proj": ((D,), ("embed",), (K, G, H), query),
        "k_proj": ((D,), ("embed",), (heads, H), (kv_axis, "head_dim")),
        "v_proj": ((D,), ("embed",), (heads, H), (kv_axis, "head_dim")),
        "o_proj": ((K, G, H), query, (D,), ("embed",)),
        "gate_proj": ((D,), ("embed",), (F,), ("mlp",)),
        "up_proj": ((D,), ("embed",), (F,), ("mlp",)),
        "down_proj": ((F,), ("mlp",), (D,), ("embed",)),
    }
    factors = []
    for layer in range(model.num_hidden_layers):
        for module in config.target_modules:
            inputs, in_axes, outputs, out_axes = ends[module]
            size = math.prod(inputs)
            factors.append(Factor(layer, module, "A", (*inputs, r), (*in_axes, "rank"), size))
            factors.append(Factor(layer, module, "B", (r, *outputs), ("rank", *out_axes), size))
    return AdapterDef(modeldef, config, tuple(factors), K, K // heads)


def new_adapter(adapterdef: AdapterDef, mesh: jax.sharding.Mesh, seed: int) -> Leaves:
    """float32 factors that change nothing yet: A uniform in ±1 / sqrt(inputs), B zero, as PEFT begins."""
    rng = np.random.default_rng(seed)
    out = []
    for factor in adapterdef.factors:
        limit = factor.num_inputs**-0.5 if factor.kind == "A" else 0.0
        values = rng.uniform(-limit, limit, factor.shape).astype(np.float32)
        out.append(jax.device_put(values, sharding.named_sharding(mesh, *factor.axes)))
    return tuple(out)


def save_adapter(adapter: Leaves, adapterdef: AdapterDef, base_model: str, folder: str | Path) -> None:
    """Writes PEFT's two files: A as [rank, inputs], B as [outputs, rank]."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = adapterdef.config
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(description, indent=2) + "\n")
    tensors = {}
    for factor, array in zip(adapterdef.factors, adapter, strict=True):
        matrix = np.asarray(array)
        matrix = matrix.reshape(-1, config.rank) if factor.kind == "A" else matrix.reshape(config.rank, -1)
        tensors[factor.hf_name] = np.ascontiguousarray(matrix.T)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG_NAME, folder / WEIGHTS_NAME)  # save_file leaves a file that only its owner reads


def read_adapter_config(folder: str | Path) -> LoRAConfig:
    """Of a folder in PEFT's format.

    Raises:
      ValueError: it is none, or has what qjax does not do; the message names it.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"adapter: {path}: {error}") from None
    if values.get("peft_type") != "LORA":
        raise ValueError(f"adapter: {path}: peft_type={values.get('peft_type')!r} is not supported, expected 'LORA'.")
    plain = {"bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False}
    nothing = ("modules_to_save", "layers_to_transform", "rank_pattern", "alpha_pattern")
    for name in (*plain, *nothing):
        if values.get(name) and values[name] != plain.get(name):
            raise ValueError(f"adapter: {path}: {name}={values[name]!r} is not supported.")
    try:
        modules = values["target_modules"]
        return LoRAConfig(rank=values["r"], alpha=values["lora_alpha"], target_modules=tuple(modules))
    except (KeyError, TypeError) as error:
        raise ValueError(f"adapter: {path}: {error!r}.") from None


def load_adapter(folder: str | Path, adapterdef: AdapterDef, mesh: jax.sharding.Mesh) -> Leaves:
    """The factors that `save_adapter` or PEFT wrote.

    Raises:
      ValueError: a tensor is missing, of another shape, or of another module.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"adapter: {path} is missing.")
    tensors = load_file(path)
    out = []
    for factor in adapterdef.factors:
        tensor = tensors.pop(factor.hf_name, None)
        if tensor is None:
            raise ValueError(f"adapter: {path}: tensor {factor.hf_name} is missing.")
        if tensor.ndim != 2 or tensor.size != math.prod(factor.shape):
            raise ValueError(f"adapter: {path}: tensor {factor.hf_name} has shape {list(tensor.shape)}.")
        values = np.ascontiguousarray(tensor.T).astype(np.float32).reshape(factor.shape)
        out.append(jax.device_put(values, sharding.named_sharding(mesh, *factor.axes)))
    if tensors:
        raise ValueError(f"adapter: {path}: tensor {sorted(tensors)[0]} is of no target module.")
    return tuple(out)
