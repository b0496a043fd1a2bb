"""`TrainConfig`: every option of a training run, once. `qjax train` makes its flags of the fields, and reads a file.

Standard library only: help and wrong options must not wait for jax.
"""

import difflib
import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from qjax.config import coerce_fields, option, parse_json

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + alpha / rank * B A. Names are PEFT's."""

    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = LORA_MODULES

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"lora: rank must be at least 1, got {self.rank!r}.")
        if not isinstance(self.alpha, int | float) or self.alpha <= 0:
            raise ValueError(f"lora: alpha must be above 0, got {self.alpha!r}.")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        wrong = [name for name in self.target_modules if name not in LORA_MODULES]
        if wrong or not self.target_modules:
            raise ValueError(f"lora: target_modules must be some of {', '.join(LORA_MODULES)}, got {wrong or 'none'}.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A supervised fine-tuning run.

    Raises:
      ValueError: a value is out of range; the message names the option.
    """

    model: str = option("", "Folder or hub name: shape, tokenizer and first weights", group="Model", metavar="MODEL")
    from_scratch: bool = option(False, "Random weights instead of the model's", group="Model")
    lora: dict[str, Any] | None = option(
        None,
        'JSON object, such as {"rank":16,"alpha":32}: train adapters alone',
        group="Model",
        metavar="JSON",
        parse=parse_json,
    )

    adapter: str | None = option(
        None, "Folder of a LoRA adapter in PEFT's format to go on from", group="Model", metavar="FOLDER"
    )

    data: str = option("", "JSONL file of chats, or folder of token arrays", group="Data", metavar="PATH")
    seq_len: int = option(1024, "Places in a row; documents are packed into rows", group="Data", metavar="TOKENS")
    batch_size: int = option(8, "Rows of one optimizer step", group="Data", metavar="ROWS")
    accumulation_steps: int = option(1, "Parts that a step's rows are computed in, one after the other", group="Data")
    seed: int = option(0, "Of the order of the data, and of random weights", group="Data", metavar="NUMBER")

    num_steps: int | None = option(None, "Optimizer steps [one epoch]", group="Schedule")
    max_seconds: float | None = option(
        None, "End after this time; the learning rate decays by the share of it", group="Schedule", metavar="SECONDS"
    )
    learning_rate: float = option(1e-5, "Highest learning rate", group="Schedule")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = option(
        "cosine", "Decay of the learning rate; wsd: constant, then linear at the end", group="Schedule"
    )
    warmup_steps: int = option(0, "Steps of linear rise to the learning rate", group="Schedule")
    min_learning_rate_ratio: float = option(0.0, "Last learning rate over the highest", group="Schedule")
    decay_share: float = option(0.2, "Share of the run in which wsd decays", group="Schedule", metavar="SHARE")

    weight_decay: float = option(0.0, "AdamW's decay of all but norms and biases", group="Optimizer")
    beta1: float = option(0.9, "AdamW's first decay rate", group="Optimizer")
    beta2: float = option(0.95, "AdamW's second decay rate", group="Optimizer")
    epsilon: float = option(1e-8, "AdamW's epsilon", group="Optimizer")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0: never", group="Optimizer")

    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "Of the computation; auto: bfloat16 on a GPU, float32 on a CPU. Masters are float32", group="Compute"
    )
    attention: Literal["auto", "cudnn", "xla"] = option("auto", "Implementation of the attention", group="Compute")
    remat: bool = option(False, "Compute each layer again in the backward pass: less memory", group="Compute")
    num_loss_chunks: int = option(1, "Parts of a row whose logits exist at a time", group="Compute")
    tensor_parallel_size: int = option(1, "Devices that share a copy of the model", group="Compute")
    data_parallel_size: int = option(1, "Copies of the model that share a batch", group="Compute")

    output: str = option("", "Folder of the result, the log and the checkpoints", group="Output", metavar="FOLDER")
    num_shards: int = option(1, "Safetensors files of the result", group="Output", metavar="FILES")
    log_every: int = option(10, "Steps between two log lines", group="Output", metavar="STEPS")
    save_every: int = option(0, "Steps between two checkpoints; 0: none", group="Output", metavar="STEPS")
    resume: bool = option(False, "Go on from the newest checkpoint in the output folder", group="Output")
    tensorboard: bool = option(False, "Write TensorBoard events (needs the extra qjax[tensorboard])", group="Output")

    def __post_init__(self) -> None:
        coerce_fields(self)
        at_least_one = (
            *("seq_len", "batch_size", "accumulation_steps", "num_loss_chunks", "tensor_parallel_size"),
            *("data_parallel_size", "num_shards", "log_every", "num_steps"),
        )
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("learning_rate", "epsilon", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("beta1", "beta2", "min_learning_rate_ratio", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        rows = self.accumulation_steps * self.data_parallel_size
        if self.batch_size % rows:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulation_steps × data_parallel_size = {rows}."
            )
        if self.seq_len % self.num_loss_chunks:
            raise ValueError(f"num_loss_chunks={self.num_loss_chunks} must divide seq_len={self.seq_len}.")
        for name in ("save_every", "resume", "tensorboard"):
            if getattr(self, name) and not self.output:
                raise ValueError(f"{name} needs output, a folder.")
        if self.lora is not None and self.from_scratch:
            raise ValueError("lora trains adapters of a model's weights; it does not go with from_scratch.")
        if self.adapter and (self.lora is not None or self.from_scratch):
            raise ValueError(
                "adapter brings its own lora, and goes with a model's weights: leave lora and from_scratch."
            )
        self.lora_config  # noqa: B018 checked here

    @property
    def lora_config(self) -> LoRAConfig | None:
        if self.lora is None:
            return None
        known = {f.name for f in fields(LoRAConfig)}
        if unknown := sorted(set(self.lora) - known):
            raise ValueError(f"lora: unknown key {unknown[0]!r}; it has {', '.join(sorted(known))}.")
        return LoRAConfig(**self.lora)


def read_train_config(path: str | Path, **overrides: Any) -> TrainConfig:
    """A `.toml` or `.json` file of `TrainConfig`'s fields; `overrides` replace what it says.

    Raises:
      ValueError: the file cannot be read, or names an option that does not exist.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object of options.")
    known = {f.name for f in fields(TrainConfig)}
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]}?" if close else "."
            raise ValueError(f"{path}: there is no option {name!r}{hint}")
    return TrainConfig(**(values | overrides))
