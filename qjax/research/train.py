"""`Trainer`: supervised fine-tuning on packed rows, one jitted step, the host a few steps ahead of the device."""

import collections
import json
import logging
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import sharding
from qjax.checkpoint import hub
from qjax.checkpoint.safetensors import dummy_params, load_params
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import abstract_model
from qjax.research.attention import choose_implementation
from qjax.research.config import TrainConfig
from qjax.research.data import Corpus, Loader, Position, Prefetcher, open_corpus
from qjax.research.export import export_folder
from qjax.research.forward import ForwardOptions
from qjax.research.lora import (
    AdapterDef,
    load_adapter,
    make_adapter_def,
    new_adapter,
    read_adapter_config,
    save_adapter,
)
from qjax.research.metrics import LogRecord, Reporter, flops_per_token, peak_flops
from qjax.research.optimizer import learning_rate, make_optimizer
from qjax.research.packing import HostBatch
from qjax.research.step import Assemble, StepDef, StepMetrics, TrainBatch, TrainState, take_trained, train_step
from qjax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qjax.research.checkpoint import Checkpoints, Progress

log = logging.getLogger("qjax")

MAX_IN_FLIGHT = 4  # steps dispatched and not read: enough that the device never waits for Python
FIXED = ("model", "lora", "adapter", "seq_len", "batch_size", "seed", "weight_decay", "max_grad_norm")  # when resumed
MAX_SKIPPED = 20  # steps in a row without a finite gradient


class Trainer:
    """A training run: model, data, optimizer.

    Args:
      config: see `TrainConfig`.
      corpus: the documents; None: those of `config.data`.
      devices: to use the first of; None: all.

    Raises:
      ValueError: a wrong option, checkpoint or data file; the message names it.
    """

    def __init__(self, config: TrainConfig, *, corpus: Corpus | None = None, devices: list[jax.Device] | None = None):
        if not config.model:
            raise ValueError("model: no model given (a folder or a name on the hub).")
        if corpus is None and not config.data:
            raise ValueError("data: no training data given.")
        self.config = config
        self.folder = hub.resolve(config.model, need_weights=not config.from_scratch)
        self.model_config = ModelConfig.from_hf(json.loads((self.folder / "config.json").read_text()))
        self.model_config.check_not_quantized("model")
        corpus = open_corpus(config.data, partial(Tokenizer.from_pretrained, self.folder)) if corpus is None else corpus
        self._check_ids(corpus)
        self.loader = Loader(corpus, row_length=config.seq_len, batch_size=config.batch_size, seed=config.seed)

        self.mesh = sharding.make_mesh(
            config.tensor_parallel_size, devices, data_parallel_size=config.data_parallel_size
        )
        device = self.mesh.devices.flat[0]
        self.dtype = config.dtype if config.dtype != "auto" else ("float32" if device.platform == "cpu" else "bfloat16")
        self.modeldef, abstract = abstract_model(self.model_config, jnp.float32, self.mesh)
        lora_config = read_adapter_config(config.adapter) if config.adapter else config.lora_config
        heads = self.model_config.num_key_value_heads
        if lora_config is None and config.tensor_parallel_size > heads:  # copies of a head would drift apart
            raise ValueError(
                f"tensor_parallel_size={config.tensor_parallel_size} is more than num_key_value_heads={heads}: "
                "only LoRA adapters can be trained so. Lower it, or set lora."
            )
        weights_dtype = jnp.float32 if lora_config is None else self.dtype
        if config.from_scratch:
            leaves = dummy_params(abstract, self.modeldef, seed=config.seed)
        else:
            leaves = load_params(self.folder, self.model_config, self.mesh, weights_dtype)
        self.frozen: tuple[jax.Array, ...] = ()  # weights that are not trained
        self.adapterdef: AdapterDef | None = None
        paths = self.modeldef.paths
        assemble: Assemble = take_trained
        if lora_config is not None:
            self.adapterdef = make_adapter_def(lora_config, self.model_config, self.modeldef, self.mesh)
            paths, assemble, self.frozen = self.adapterdef.paths, self.adapterdef.apply, leaves
            if config.adapter:
                leaves = load_adapter(config.adapter, self.adapterdef, self.mesh)
            else:
                leaves = new_adapter(self.adapterdef, self.mesh, config.seed)
        optimizer = make_optimizer(config, paths)
        self.static = StepDef(
            modeldef=self.modeldef,
            row_length=config.seq_len,
            implementation=choose_implementation(config.attention, self.dtype, self.model_config.head_dim, device),
            forward=ForwardOptions(jnp.dtype(self.dtype), config.remat, config.num_loss_chunks),
            optimizer=optimizer,
            assemble=assemble,
            router_aux_loss_coef=self.model_config.router_aux_loss_coef,
        )
        with jax.set_mesh(self.mesh):
            self.state = TrainState(leaves, jax.jit(optimizer.init)(leaves))
        self.step = 0
        self.position = Position()
        self.seconds = 0.0  # spent in `train`, earlier runs of the same output included
        self.history: list[StepMetrics] = []  # of every step of this process
        self._compiled: Any = None
        if config.resume:
            self._resume()

    @property
    def num_steps(self) -> int | None:
        """Steps of the run; None: until max_seconds are over."""
        if self.config.num_steps is None and self.config.max_seconds is None:
            return self.loader.steps_per_epoch
        return self.config.num_steps

    @property
    def params(self) -> tuple[jax.Array, ...]:
        """The model's leaves as trained, in the order of `modeldef.paths`, adapters merged; for `LLM.update_weights`.

        Without adapters these are the arrays that the next step takes over: copy what must outlive it.
        """
        if self.adapterdef is None:
            return self.state.params
        with jax.set_mesh(self.mesh):
            return jax.jit(self.adapterdef.apply)(self.state.params, self.frozen)

    def train(self, *, progress: bool | None = None) -> list[LogRecord]:
        """Runs to the end, writes the result to `config.output` if there is one, and returns the log.

        Args:
          progress: show a bar; None: where stderr is a terminal.
        """
        config, began = self.config, time.perf_counter() - self.seconds
        checkpoints = self._checkpoints() if config.save_every else None
        if checkpoints is not None and self.step == 0 and not checkpoints.is_empty:
            raise ValueError(f"output: {config.output} has checkpoints of another run: set resume, or choose another.")
        rows = self.loader.rows(self.position.epoch)
        lengths = rows.lengths.astype(np.float64)
        mean_context = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
        devices = self.mesh.devices.flatten()
        peak = peak_flops(devices[0])
        reporter = Reporter(
            folder=Path(config.output) if config.output else None,
            tensorboard=config.tensorboard,
            log_every=config.log_every,
            total_steps=self.num_steps,
            first_step=self.step,
            flops=flops_per_token(self.model_config, mean_context),
            peak=None if peak is None else peak * len(devices),
            progress=progress,
        )
        prefetcher = Prefetcher(self.loader, self.position)
        flying: collections.deque[tuple[int, float, jax.Array]] = collections.deque()
        rate, skipped = 0.0, 0

        def read_one() -> None:
            nonlocal skipped
            step, rate, packed = flying.popleft()
            metrics = StepMetrics.read(packed)
            self.history.append(metrics)
            reporter.add(step, metrics, rate)
            skipped = 0 if math.isfinite(metrics.grad_norm) else skipped + 1
            if skipped >= MAX_SKIPPED:
                raise RuntimeError(f"{skipped} steps in a row had no finite gradient: lower learning_rate.")

        try:
            batch, position = prefetcher.next()
            self.compile()
            reporter.start_clock()
            first = time.perf_counter() - began
            while True:
                self.seconds = time.perf_counter() - began
                share = self._share(first)
                if share >= 1.0:
                    break
                rate = learning_rate(config, self.step, share)
                self.state, packed = self._compiled(self.state, self.frozen, self._place(batch), self._scalar(rate))
                packed.copy_to_host_async()
                self.step, self.position = self.step + 1, position
                flying.append((self.step, rate, packed))
                if len(flying) > MAX_IN_FLIGHT:
                    read_one()
                if checkpoints is not None and self.step % config.save_every == 0:
                    self.seconds = time.perf_counter() - began
                    checkpoints.save(self.state, self._progress())
                batch, position = prefetcher.next()
            while flying:
                read_one()
        finally:
            prefetcher.close()
            reporter.close(self.step, rate)
            if checkpoints is not None:
                checkpoints.close()
            self.seconds = time.perf_counter() - began
        if config.output:
            self.export(config.output)
            if self.adapterdef is not None:
                self.save_adapter(Path(config.output) / "adapter")
        return reporter.records

    def _share(self, first: float) -> float:
        """Share of the run that is over: of its steps or of its time after compiling, whichever is more."""
        steps = 0.0 if self.num_steps is None else self.step / self.num_steps
        limit = self.config.max_seconds
        if limit is None:
            return steps
        return max(steps, (self.seconds - first) / (limit - first) if limit > first else 1.0)

    def compile(self) -> None:
        """Compiles the step (`train` does it too). Host time, minutes at most; nothing runs on the device."""
        if self._compiled is not None:
            return
        started = time.perf_counter()
        try:
            self._compiled = self._compile(self.static)
        except Exception as error:
            if self.static.implementation == "xla" or self.config.attention != "auto":
                raise
            log.warning("the step does not compile with cuDNN's attention (%s); using XLA's.", str(error)[:300])
            self.static = replace(self.static, implementation="xla")
            self._compiled = self._compile(self.static)
        log.info("compiled the training step in %.1f s", time.perf_counter() - started)

    def _compile(self, static: StepDef) -> Any:
        zeros = np.zeros(self.config.batch_size * self.config.seq_len, np.int32)
        batch = self._place(HostBatch(zeros, zeros, zeros, zeros, zeros.astype(np.float32)))
        run = jax.jit(partial(train_step, static), donate_argnums=0)
        with jax.set_mesh(self.mesh):
            return run.lower(self.state, self.frozen, batch, self._scalar(0.0)).compile()

    def export(self, folder: str | Path) -> None:
        """Writes a Hugging Face folder (bfloat16) that transformers and qjax load."""
        export_folder(self.params, self.model_config, self.mesh, self.folder, folder, num_shards=self.config.num_shards)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the adapter in PEFT's format.

        Raises:
          ValueError: the run trains no adapter.
        """
        if self.adapterdef is None:
            raise ValueError("lora: the run trains the whole model, there is no adapter to save.")
        save_adapter(self.state.params, self.adapterdef, self.config.model, folder)

    def _checkpoints(self) -> "Checkpoints":
        from qjax.research.checkpoint import Checkpoints  # importing Orbax takes seconds

        return Checkpoints(Path(self.config.output) / "checkpoints")

    def _progress(self) -> "Progress":
        from qjax.research.checkpoint import Progress

        options = {name: getattr(self.config, name) for name in FIXED}
        return Progress(self.step, self.position.epoch, self.position.row, self.seconds, options)

    def _resume(self) -> None:
        checkpoints = self._checkpoints()
        try:
            self.state, progress = checkpoints.restore(self.state, self._progress().options)
        finally:
            checkpoints.close()
        self.step, self.seconds = progress.step, progress.seconds
        self.position = Position(progress.epoch, progress.row)

    def _place(self, batch: HostBatch) -> TrainBatch:
        """A host batch on the devices: [A, T], rows split over data."""
        where = sharding.named_sharding(self.mesh, None, "rows")
        parts = self.config.accumulation_steps
        fields = ("token_ids", "positions", "segment_ids", "targets", "weights")
        arrays = [getattr(batch, name).reshape(parts, -1) for name in fields]
        return TrainBatch(*jax.device_put(arrays, where))

    def _scalar(self, value: float) -> jax.Array:
        return jax.device_put(np.float32(value), sharding.replicated(self.mesh))

    def _check_ids(self, corpus: Corpus) -> None:
        vocab = self.model_config.vocab_size
        largest = int(corpus.token_ids.max()) if len(corpus.token_ids) else 0
        if largest >= vocab:
            raise ValueError(f"data: token id {largest} is there, but vocab_size is {vocab}.")
        if not np.any(corpus.loss_mask):
            raise ValueError("data: the loss mask is empty: no token would be learnt.")
