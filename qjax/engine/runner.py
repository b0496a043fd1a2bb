"""`Runner`: turns a `ScheduledBatch` into one dispatched step, and the step's packed output back into Python.

It owns everything that lies on the devices: weights, KV cache, per-request state. Nothing here waits for the device
but `collect`, and the engine dispatches the next step before it calls that.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import sharding
from qjax.engine.addresses import StepInputs, make_holes
from qjax.engine.buckets import Bucket
from qjax.engine.compiling import CompiledSteps
from qjax.engine.logit_edits import edits_of
from qjax.engine.memory import Plan
from qjax.engine.request import Request, RequestError
from qjax.engine.sampler import MAX_FEW, split_seed
from qjax.engine.scheduled import ScheduledBatch
from qjax.engine.step import Layout, StepOptions, TokenCounts, write_counts, write_page_table
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import ModelDef
from qjax.sampling_params import SamplingParams

EDIT_SIZES = (16, 128, 1024, 8192)  # M: how many logit edits a row has room for
SAMPLING_FIELDS = ("temperature", "top_p", "min_p", "top_k", "seeds")
PENALTY_FIELDS = ("repetition", "presence", "frequency")


@dataclass(frozen=True)
class Logprobs:
    """Of one row: the token's own logprob and rank, and the likeliest tokens with theirs."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True)
class StepResult:
    """What a step has sampled, in the order of `batch.sampling`; -1 where the logits were not numbers."""

    token_ids: list[list[int]]  # of each of the batch's steps
    logprobs: list[Logprobs] | None
    prompt_logprobs: dict[int, list[Logprobs]]  # index in batch.prefills -> one entry a token of the chunk
    hidden: np.ndarray | None = None  # float32 [n, D] of a runner that pools; its token ids are 0, or -1 for NaN


@dataclass(frozen=True)
class InFlight:
    """A dispatched step whose output the host has not read."""

    batch: ScheduledBatch
    rows: list[int]  # of batch.sampling in the output
    query_starts: np.ndarray  # int32 [Bp + 1]
    out: jax.Array
    prompt_out: jax.Array | None

    @property
    def is_done(self) -> bool:
        """Whether the device has ended it."""
        return self.out.is_ready()  # type: ignore[attr-defined]  # every array has it, the abstract class does not


@dataclass
class _Slot:
    """What the host has told the device about the request in a slot."""

    request: Request | None = None
    admission: int = -1  # the request's preemption count when it got the slot
    num_pages: int = 0


@dataclass
class Runner:
    """Built by the engine once the weights are loaded."""

    modeldef: ModelDef
    leaves: tuple[jax.Array, ...]
    mesh: jax.sharding.Mesh
    model_config: ModelConfig
    plan: Plan
    compiles: CompiledSteps
    pooling: bool = False
    kv: jax.Array = field(init=False)
    usual: StepOptions | None = None

    def __post_init__(self) -> None:
        plan = self.plan
        self.program = self.compiles.program
        self.buckets = self.program.buckets()
        self.replicated = sharding.replicated(self.mesh)
        self.inputs = StepInputs(self.replicated)
        self.walls = make_holes(self.replicated) if plan.is_gpu else []
        num_slots = plan.max_num_seqs
        self.params = {
            "temperature": np.zeros(num_slots + 1, np.float32),
            "top_p": np.ones(num_slots + 1, np.float32),
            "min_p": np.zeros(num_slots + 1, np.float32),
            "top_k": np.zeros(num_slots + 1, np.int32),
            "seeds": np.zeros((num_slots + 1, 2), np.uint32),
            "repetition": np.ones(num_slots + 1, np.float32),
            "presence": np.zeros(num_slots + 1, np.float32),
            "frequency": np.zeros(num_slots + 1, np.float32),
        }

    def make_cache(self) -> None:
        """An empty KV cache, and tables that know of no request."""
        zeros = lambda array: jax.jit(partial(jnp.zeros, array.shape, array.dtype), out_shardings=array.sharding)()
        self.kv, self.state = jax.tree.map(zeros, self.program.cache())
        self.counts: TokenCounts | None = None
        self.slots = [_Slot() for _ in range(self.plan.max_num_seqs + 1)]

    def drop_cache(self) -> None:
        """Frees what `make_cache` made, whatever has become of it: a step that failed may have consumed it."""
        for array in jax.tree.leaves((self.kv, self.state, self.counts)):
            array.delete()
        self.inputs = StepInputs(self.replicated)

    # From the host to the device

    def dispatch(self, batch: ScheduledBatch) -> InFlight:
        """Starts the step of a batch and returns at once."""
        self._admit(batch)
        options = self._options(batch)
        num_tokens = sum(chunk.num_tokens for chunk in batch.prefills)
        num_pages = max(len(chunk.request.page_ids) for chunk in [*batch.decodes, *batch.prefills])
        bucket = self.buckets.choose(len(batch.decodes), num_tokens, len(batch.prefills), num_pages)
        layout = self.program.layout(bucket, options)
        packed = np.zeros(layout.size, np.int32)
        fields = layout.views(packed)
        rows = self._fill_rows(fields, batch, bucket)
        self._fill_table(fields, batch, layout)
        self._fill_sampling(fields, batch, rows, options)

        out, prompt_out = self.run_step(bucket, options, packed)
        out.copy_to_host_async()
        if prompt_out is not None:
            prompt_out.copy_to_host_async()
        return InFlight(batch, rows, fields["query_starts"], out, prompt_out)

    # What runs on the devices: this, `make_cache` and `compile_ahead`, on every host the same (see `lockstep`)

    def run_step(self, bucket: Bucket, options: StepOptions, packed: np.ndarray) -> tuple[jax.Array, jax.Array | None]:
        """`step`'s out and prompt_out."""
        run = self.compiles.get(bucket, options)
        counts = self.counts if options.penalties else None
        inputs = self.inputs.put(packed)
        self.kv, self.state, counts, out, prompt_out = run(self.leaves, self.kv, self.state, counts, inputs)
        if options.penalties:
            self.counts = counts
        return out, prompt_out

    def write_table(self, updates: np.ndarray) -> None:
        """int32 [U, 3]: see `write_page_table`."""
        self.state = write_page_table(self.state, jax.device_put(updates, self.replicated))

    def write_counts(self, slot: int, prompt: np.ndarray, output: np.ndarray) -> None:
        """Padded token ids, int32: see `step.write_counts`."""
        if self.counts is None:
            shape = (self.plan.max_num_seqs + 1, self.model_config.vocab_size)
            zeros = lambda dtype: jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=self.replicated)()
            self.counts = TokenCounts(zeros(jnp.int16), zeros(jnp.bool_))
        self.counts = write_counts(self.counts, np.int32(slot), prompt, output)

    def _admit(self, batch: ScheduledBatch) -> None:
        """Starts the state of requests that came into a slot."""
        for chunk in batch.prefills:
            request, slot = chunk.request, self.slots[chunk.slot]
            if slot.request is request and slot.admission == request.num_preemptions:
                continue
            self.slots[chunk.slot] = _Slot(request, request.num_preemptions)
            p = request.params
            row: dict[str, Any] = {
                "temperature": p.temperature,
                "top_p": p.top_p,
                "min_p": p.min_p,
                "top_k": p.top_k,
                "seeds": split_seed(request.seed),
                "repetition": p.repetition_penalty,
                "presence": p.presence_penalty,
                "frequency": p.frequency_penalty,
            }
            try:
                for name, value in row.items():
                    self.params[name][chunk.slot] = value
            except (TypeError, OverflowError) as error:
                raise RequestError(request) from error
            if request.has_penalties:
                self._start_counts(chunk.slot, request)

    def _start_counts(self, slot: int, request: Request) -> None:
        def padded(ids: list[int]) -> np.ndarray:
            size = max(64, 1 << max(len(ids) - 1, 0).bit_length())
            return np.array(ids + [self.model_config.vocab_size] * (size - len(ids)), np.int32)

        self.write_counts(slot, padded(request.prompt_token_ids), padded(request.output_token_ids))

    def _options(self, batch: ScheduledBatch) -> StepOptions:
        if self.pooling:
            return StepOptions(pooling=True)
        requests = [chunk.request for chunk in batch.sampling]
        longest = max((len(edits_of(r)[0]) for r in requests if r.has_edits), default=0)
        logprobs = [r.params.logprobs for r in requests if r.params.logprobs is not None]
        prompt_logprobs = [c.request.params.prompt_logprobs for c in batch.prefills]
        random = [r.params for r in requests if not r.params.is_greedy]
        options = StepOptions(
            sampling=bool(random),
            filtering=any(map(is_filtered, random)),
            few=bool(random) and all(map(keeps_few, random)),
            penalties=any(r.has_penalties for r in requests),
            num_edits=next((n for n in (0, *EDIT_SIZES) if n >= longest), self.model_config.vocab_size),
            masked=any(r.constraint is not None for r in requests),
            num_logprobs=self._num_logprobs(logprobs),
            num_prompt_logprobs=self._num_logprobs([n for n in prompt_logprobs if n is not None]),
        )
        if self.usual is not None and self.usual.covers(options):
            options = self.usual
        return replace(options, num_steps=batch.num_steps)

    def _num_logprobs(self, asked: list[int]) -> int | None:
        if not asked:
            return None
        most = self.model_config.vocab_size if -1 in asked else max(asked)
        return next((n for n in (0, 5, 20, 128) if n >= most), self.model_config.vocab_size)

    def _fill_rows(self, fields: dict[str, np.ndarray], batch: ScheduledBatch, bucket: Bucket) -> list[int]:
        """Which sequences and tokens the step computes. Returns the output row of each sampling chunk."""
        padding = self.plan.max_num_seqs
        fields["decode_slots"][:] = padding
        fields["prefill_slots"][:] = padding
        fields["sample_slots"][:] = padding
        rows = list(range(len(batch.decodes)))
        if batch.decodes:
            n = len(batch.decodes)
            slots = [chunk.slot for chunk in batch.decodes]
            fields["decode_slots"][:n] = slots
            fields["sample_slots"][:n] = slots
            fields["decode_lens"][:n] = [chunk.start + 1 for chunk in batch.decodes]
        start = 0
        for i, chunk in enumerate(batch.prefills):
            request, end = chunk.request, start + chunk.num_tokens
            fields["token_ids"][start:end] = request.tokens(chunk.start, chunk.start + chunk.num_tokens)
            fields["prefill_slots"][i] = chunk.slot
            fields["prefill_lens"][i] = chunk.start + chunk.num_tokens
            fields["query_starts"][i] = start
            if chunk.samples:
                rows.append(bucket.num_decodes + i)
                fields["sample_slots"][bucket.num_decodes + i] = chunk.slot
            if "targets" in fields:
                targets = request.tokens(
                    chunk.start + 1, min(chunk.start + chunk.num_tokens + 1, request.num_known_tokens)
                )
                fields["targets"][start : start + len(targets)] = targets
            start = end
        fields["query_starts"][len(batch.prefills) :] = start
        return rows

    def _fill_table(self, fields: dict[str, np.ndarray], batch: ScheduledBatch, layout: Layout) -> None:
        """Tells the device of pages that its page table does not have yet."""
        updates: list[tuple[int, int, int]] = []
        for chunk in [*batch.decodes, *batch.prefills]:
            request, slot = chunk.request, self.slots[chunk.slot]
            if len(request.page_ids) > slot.num_pages:
                updates += [
                    (chunk.slot, column, request.page_ids[column])
                    for column in range(slot.num_pages, len(request.page_ids))
                ]
                slot.num_pages = len(request.page_ids)
        room = layout.num_updates
        nowhere = self.plan.max_num_seqs + 1  # out of range: dropped
        if len(updates) > room:
            ahead, updates = updates[room:], updates[:room]
            size = 1 << (len(ahead) - 1).bit_length()
            extra = np.full((max(size, 64), 3), nowhere, np.int32)
            extra[: len(ahead)] = ahead
            self.write_table(extra)
        fields["table_updates"][:] = nowhere
        if updates:
            fields["table_updates"][: len(updates)] = updates

    def _fill_sampling(
        self, fields: dict[str, np.ndarray], batch: ScheduledBatch, rows: list[int], options: StepOptions
    ) -> None:
        slots = fields["sample_slots"]
        for name in (*SAMPLING_FIELDS, *PENALTY_FIELDS):
            if name in fields:
                fields[name][:] = self.params[name][slots]
        if options.masked:
            fields["mask"][:] = -1
            for row, chunk in zip(rows, batch.sampling, strict=True):
                if chunk.request.constraint is not None:
                    try:
                        chunk.request.constraint.fill(fields["mask"][row])
                    except Exception as error:
                        raise RequestError(chunk.request) from error
        if options.num_edits:
            fields["edit_ids"][:] = -1
            for row, chunk in zip(rows, batch.sampling, strict=True):
                if chunk.request.has_edits:
                    edits, only_listed = edits_of(chunk.request)
                    fields["edit_ids"][row, : len(edits)] = list(edits)
                    fields["edit_values"][row, : len(edits)] = list(edits.values())
                    fields["only_listed"][row] = only_listed

    # From the device to the host

    def collect(self, flight: InFlight) -> StepResult:
        """Waits for a step and reads what it sampled."""
        out = np.asarray(flight.out)[flight.rows]
        if self.pooling:
            hidden = out.view(np.float32)
            return StepResult([np.where(np.isfinite(hidden).all(1), 0, -1).tolist()], None, {}, hidden)
        prompt_logprobs = {}
        if flight.prompt_out is not None:
            prompt_out = np.asarray(flight.prompt_out)
            for i, chunk in enumerate(flight.batch.prefills):
                if chunk.request.params.prompt_logprobs is not None:
                    start = flight.query_starts[i]
                    prompt_logprobs[i] = _unpack(prompt_out[start : start + chunk.num_tokens])
        num_steps = flight.batch.num_steps
        logprobs = _unpack(out) if out.shape[1] > num_steps else None
        return StepResult(out[:, :num_steps].T.tolist(), logprobs, prompt_logprobs)

    # Compiling

    def compile_ahead(self, options: list[StepOptions], *, progress: bool) -> None:
        """Compiles the buckets that the first requests need; batches that these options cover use them.

        Before `make_cache`: XLA tries each product's kernels on operands of its own, and the cache leaves no room for
        many at a time.
        """
        self.usual = options[0]
        self.compiles.ahead(self.program.ahead(options), progress=progress)


def is_filtered(params: SamplingParams) -> bool:
    return not params.is_greedy and (params.top_k > 0 or params.top_p < 1.0)


def keeps_few(params: SamplingParams) -> bool:
    return not params.is_greedy and 0 < params.top_k <= MAX_FEW


def _unpack(rows: np.ndarray) -> list[Logprobs]:
    """Rows of `step`'s packed logprobs, int32 [n, 3 + 2 N]."""
    num = (rows.shape[1] - 3) // 2
    floats = rows.view(np.float32)
    return [
        Logprobs(float(f[1]), int(r[2]), r[3 : 3 + num].tolist(), f[3 + num :].tolist())
        for r, f in zip(rows, floats, strict=True)
    ]
