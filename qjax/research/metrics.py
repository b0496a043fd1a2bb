"""What a run reports: a progress bar, JSON lines, TensorBoard events; and the arithmetic behind tokens/s and MFU."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from qjax.models.config import ModelConfig
from qjax.research.step import StepMetrics

# Dense bfloat16 FLOP/s of a device, by a part of its name (makers' data sheets).
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class LogRecord:
    """Of the steps since the record before."""

    step: int  # steps done
    loss: float  # mean over the steps
    learning_rate: float  # of the last step
    grad_norm: float  # of the last step
    tokens: int  # seen since the run's first step
    tokens_per_second: float
    mfu: float | None  # share of the devices' peak; None: the peak is not known
    seconds: float  # since the run began
    skipped: int  # steps that changed nothing, since their gradient was no number


def flops_per_token(config: ModelConfig, mean_context: float) -> float:
    """Of a forward and a backward pass: 6 a weight that is multiplied, 12 N H a layer and token attended to
    (Chowdhery et al. 2022, arXiv:2204.02311, appendix B; causal, so `mean_context` is what a token really sees)."""
    weights = config.num_active_params
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size  # the lookup multiplies nothing
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * mean_context
    return 6 * weights + attention


def peak_flops(device: jax.Device) -> float | None:
    longest_first = sorted(PEAK_FLOPS, key=len, reverse=True)
    return next((PEAK_FLOPS[name] for name in longest_first if name in device.device_kind), None)


class Reporter:
    """Collects steps, and writes a record every `log_every` of them.

    Args:
      folder: of train_log.jsonl and the TensorBoard events; None: no files.
      flops: of one token.
      peak: FLOP/s of all devices together, if known.

    Raises:
      ValueError: `tensorboard` without the package that writes its files.
    """

    def __init__(
        self,
        *,
        folder: Path | None,
        tensorboard: bool,
        log_every: int,
        total_steps: int | None,
        first_step: int,
        flops: float,
        peak: float | None,
        progress: bool | None,
    ):
        self.records: list[LogRecord] = []
        self._log_every, self._flops, self._peak = log_every, flops, peak
        self._writer = _tensorboard_writer(folder) if tensorboard and folder is not None else None
        self._file: Any = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / "train_log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 until `close`
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="Training",
            unit="step",
            disable=None if progress is None else not progress,
        )
        self._since: list[StepMetrics] = []
        self._started = self._last_time = time.perf_counter()
        self._tokens = 0

    def start_clock(self) -> None:
        """The first step starts now: what came before (compiling) is not its time."""
        self._last_time = time.perf_counter()

    def add(self, step: int, metrics: StepMetrics, learning_rate: float) -> None:
        self._since.append(metrics)
        self._bar.update()
        if step % self._log_every == 0:
            self._log(step, learning_rate)

    def close(self, step: int, learning_rate: float) -> None:
        """Writes what is left, and closes the files."""
        if self._since:
            self._log(step, learning_rate)
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _log(self, step: int, learning_rate: float) -> None:
        now = time.perf_counter()
        tokens = sum(metrics.num_tokens for metrics in self._since)
        speed = tokens / max(now - self._last_time, 1e-9)
        good = [metrics.loss for metrics in self._since if metrics.grad_norm < float("inf")]
        self._tokens += tokens
        record = LogRecord(
            step=step,
            loss=sum(good) / len(good) if good else float("nan"),
            learning_rate=learning_rate,
            grad_norm=self._since[-1].grad_norm,
            tokens=self._tokens,
            tokens_per_second=speed,
            mfu=None if self._peak is None else speed * self._flops / self._peak,
            seconds=now - self._started,
            skipped=len(self._since) - len(good),
        )
        self._since, self._last_time = [], now
        self.records.append(record)
        share = "" if record.mfu is None else f", MFU {record.mfu:.1%}"
        self._bar.set_postfix_str(f"loss {record.loss:.4f}, {speed:,.0f} tokens/s{share}, lr {learning_rate:.2e}")
        if self._file is not None:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in asdict(record).items():
                if value is not None and name != "step":
                    self._writer.add_scalar(f"train/{name}", value, step)


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard=true needs the package tensorboardX: pip install 'qjax[tensorboard]'.") from None
    return SummaryWriter(str(folder / "tensorboard"))
