"""What a checkpoint's `quantization_config` says, and which tensors a quantised projection is made of. No jax."""

from dataclasses import dataclass
from typing import Any, Literal

GROUP = 128  # weights that share a scale: a side of FP8's square blocks, the inputs of AWQ's groups
HALF = 64  # the smallest head: two share a scale
MIN_BLOCK = 32  # what is left of a side of FP8's blocks where devices split them
Method = Literal["awq", "fp8", "gptq", "int4"]  # int4: what is made while loading
# The checkpoint's modules that are one here.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SUPPORTED = (
    "Supported: quant_method 'fp8' (fmt e4m3, activation_scheme dynamic, weight_block_size [128, 128]), 'awq' "
    "(bits 4, group_size 128, zero_point true, version gemm) and 'gptq' (bits 4, group_size 128, sym true, desc_act "
    "false, checkpoint_format gptq)."
)


@dataclass(frozen=True)
class Stored:
    """A tensor of a projection with a weight [out, in]: one element stands for `out_step` × `in_step` weights."""

    name: str  # in the checkpoint, after the module's
    dtype: str  # on the device
    out_step: int
    in_step: int
    is_transposed: bool = False  # the checkpoint has [in, out]
    is_kept: bool = False  # [*outputs, *inputs] on the device, as the checkpoint has it

    def shape(self, kernel: tuple[int, ...], num_inputs: int) -> tuple[int, ...]:
        """Of the tensor for a kernel [*inputs, *outputs]: the last input axis and the last output axis are shorter."""
        inputs, outputs = kernel[:num_inputs], kernel[num_inputs:]
        return (*inputs[:-1], inputs[-1] // self.in_step, *outputs[:-1], outputs[-1] // self.out_step)


# By method and by the name in the checkpoint. Scales are float32, which holds bfloat16 and float16 exactly.
TENSORS: dict[str, dict[str, Stored]] = {
    "fp8": {
        "weight": Stored("weight", "float8_e4m3fn", 1, 1, is_kept=True),
        "weight_scale_inv": Stored("weight_scale_inv", "float32", GROUP, GROUP, is_kept=True),
    },
    "awq": {  # eight outputs in an int32
        "qweight": Stored("qweight", "int32", 8, 1, is_transposed=True),
        "qzeros": Stored("qzeros", "int32", 8, GROUP, is_transposed=True),
        "scales": Stored("scales", "float32", 1, GROUP, is_transposed=True),
    },
    "gptq": {  # eight inputs, but of the zero points eight outputs
        "qweight": Stored("qweight", "int32", 1, 8, is_transposed=True),
        "qzeros": Stored("qzeros", "int32", 8, GROUP, is_transposed=True),
        "scales": Stored("scales", "float32", 1, GROUP, is_transposed=True),
    },
}


@dataclass(frozen=True)
class Quantization:
    """How the projections of the decoder's layers are stored; embeddings, norms and lm_head never are quantised."""

    method: Method
    modules_to_not_convert: tuple[str, ...] = ()  # names, or beginnings or ends of names, at their dots
    is_made: bool = False  # the checkpoint has plain weights, which are quantised while they are loaded

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Quantization":
        """Reads `quantization_config`.

        Raises:
          ValueError: a method or a variant of it that qjax does not serve; the message names the field.
        """
        method = config.get("quant_method")
        expected: dict[str, Any]
        if method == "fp8":
            expected = {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]}
            optional = {"fmt"}
        elif method == "awq":
            expected = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
            optional = {"version"}
        elif method == "gptq":
            expected = {"bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
            expected |= {"lm_head": False, "dynamic": None, "modules_in_block_to_quantize": None}
            optional = {"checkpoint_format", "lm_head"}
        else:
            raise ValueError(f"config.json: quantization_config: quant_method={method!r} is not supported. {SUPPORTED}")
        for name, value in expected.items():
            found = config.get(name)
            found = found.lower() if isinstance(found, str) else found
            if found != value and not (found is None and name in optional):
                raise ValueError(
                    f"config.json: quantization_config: {name}={found!r} of quant_method={method!r} is not supported. "
                    + SUPPORTED
                )
        skipped = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
        return cls(method, tuple(skipped))

    def covers(self, module: str) -> bool:
        """Whether the module, such as "model.layers.0.self_attn.qkv_proj", is quantised.

        Raises:
          ValueError: a fused module is so in part.
        """
        owner, _, name = module.rpartition(".")
        if owner.endswith(".experts") and self._is_skipped(owner):
            return False
        parts = [f"{owner}.{part}" for part in FUSED.get(name, (name,))]
        skipped = [part for part in parts if self._is_skipped(part)]
        if skipped and len(skipped) < len(parts):
            raise ValueError(
                f"config.json: quantization_config: modules_to_not_convert has {', '.join(skipped)}, but not all of "
                f"{', '.join(parts)}, which are one weight here: name all of them or none."
            )
        return not skipped

    @property
    def is_int4(self) -> bool:
        """Repacked at load to `words` and `scales_zeros` of `kernels.int4_matmul`, whatever the method."""
        return self.method != "fp8"

    def check_sizes(
        self,
        tp: int,
        *,
        head_dim: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        hidden_size: int,
        intermediate_size: int | None = None,
    ) -> None:
        """Raises ValueError naming the first size that is not made of whole groups, on each of `tp` devices.

        Args:
          intermediate_size: None: no layer is dense.
        """
        sizes = {"hidden_size": hidden_size, "num_attention_heads * head_dim": num_attention_heads * head_dim}
        sizes["num_key_value_heads * head_dim"] = num_key_value_heads * head_dim
        for name, size, multiple in (("head_dim", head_dim, HALF), *((n, sizes[n], GROUP) for n in sizes)):
            if size % multiple:
                raise ValueError(
                    f"{name}={size} is no multiple of {multiple}, and {GROUP} weights share a scale: "
                    f"quantised ({self.method}) models with it are not supported."
                )
        if self.is_int4 and head_dim % GROUP and tp > 1:
            raise ValueError(
                f"head_dim={head_dim} is no multiple of {GROUP}: a group of weights that share a scale ({self.method}) "
                f"is of two heads, which tensor_parallel_size={tp} would split. Set --tensor-parallel-size 1."
            )
        if intermediate_size is not None:
            self.check_split("intermediate_size", intermediate_size, tp)

    def check_split(self, name: str, size: int, tp: int) -> None:
        """`check_sizes` of the size of a feed-forward."""
        if self.method == "fp8":  # the blocks of its scales are cut at the devices' ends
            if size % GROUP or size // tp % MIN_BLOCK:
                raise ValueError(
                    f"{name}={size} is no multiple of {GROUP}, or split by "
                    f"tensor_parallel_size={tp} no multiple of {MIN_BLOCK}: a block of weights that share a scale "
                    f"cannot be cut so (fp8). Lower --tensor-parallel-size{_or_else(name)}."
                )
        elif size % (GROUP * tp):
            raise ValueError(
                f"{name}={size} is no multiple of {GROUP} × tensor_parallel_size={tp}: a group "
                f"of weights that share a scale ({self.method}) cannot be split. Lower --tensor-parallel-size"
                f"{_or_else(name)}."
            )

    def num_bytes(self, num_weights: int) -> int:
        """Of a projection with so many weights."""
        if self.is_int4:  # a scale and its zero point are one word
            return num_weights // 2 + num_weights // GROUP * 4
        itemsize = {"float8_e4m3fn": 1, "float32": 4}
        tensors = TENSORS[self.method].values()
        return sum(num_weights * itemsize[t.dtype] // (t.out_step * t.in_step) for t in tensors)

    def _is_skipped(self, module: str) -> bool:
        dotted = f".{module}."
        return any(
            dotted.startswith(f".{name}.") or dotted.endswith(f".{name}.") for name in self.modules_to_not_convert
        )


def _or_else(size: str) -> str:
    return ", or set --enable-expert-parallel" if size == "moe_intermediate_size" else ""
