"""One engine on several hosts: host 0 schedules, and every host starts the same programs on its devices, in order.

`LeadingRunner` says what it starts, `follow` does the same. The devices then find each other by themselves, in the
programs' collectives.
"""

import logging
import queue
import signal
import threading
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from qjax.config import EngineConfig
from qjax.engine.buckets import Bucket
from qjax.engine.hosts import Followers, HostLostError, Leader, Message, exit_now, find_place
from qjax.engine.kv_offload import OffloadingRunner
from qjax.engine.loading import Loaded, load
from qjax.engine.runner import Runner
from qjax.engine.step import StepOptions

log = logging.getLogger("qjax")


@dataclass
class LeadingRunner(Runner):
    """A runner whose every call to the devices is made on all hosts."""

    followers: Followers | None = None

    def run_step(self, bucket: Bucket, options: StepOptions, packed: np.ndarray) -> tuple[jax.Array, jax.Array | None]:
        self._tell(_of_step("step", bucket, options), packed)
        return super().run_step(bucket, options, packed)

    def write_table(self, updates: np.ndarray) -> None:
        self._tell({"kind": "table"}, updates)
        super().write_table(updates)

    def write_counts(self, slot: int, prompt: np.ndarray, output: np.ndarray) -> None:
        self._tell({"kind": "counts", "slot": slot, "num_prompt": len(prompt)}, np.concatenate([prompt, output]))
        super().write_counts(slot, prompt, output)

    def compile_ahead(self, options: list[StepOptions], *, progress: bool) -> None:
        self._tell({"kind": "compile", "options": [asdict(option) for option in options]})
        super().compile_ahead(options, progress=progress)

    def make_cache(self) -> None:
        self._tell({"kind": "cache"})
        super().make_cache()

    def _tell(self, header: dict[str, Any], array: np.ndarray | None = None) -> None:
        assert self.followers is not None
        self.followers.send(header, b"" if array is None else array.tobytes())


def _of_step(kind: str, bucket: Bucket, options: StepOptions) -> dict[str, Any]:
    return {"kind": kind, "bucket": asdict(bucket), "options": asdict(options)}


def make_runner(loaded: Loaded) -> Runner:
    """Of this host, which is the first or the only one.

    Raises:
      ValueError: it is another.
    """
    if isinstance(loaded.hosts, Leader):
        raise ValueError("this host follows host 0: run `qjax serve --headless` with its --node-rank here.")
    parts = (loaded.modeldef, loaded.leaves, loaded.mesh, loaded.model_config, loaded.plan, loaded.compiles)
    pooling = bool(loaded.pooling)
    if loaded.host_cache is not None:
        return OffloadingRunner(*parts, pooling=pooling, host_cache=loaded.host_cache)
    if loaded.hosts is None:
        return Runner(*parts, pooling=pooling)
    return LeadingRunner(*parts, pooling=pooling, followers=loaded.hosts)


def follows(config: EngineConfig) -> bool:
    """Whether this host is another than the first. Raises ValueError for wrong options."""
    return find_place(config).rank > 0


def follow(config: EngineConfig) -> int:
    """What a host other than 0 does until host 0 stops. Returns the exit code, 0; ends the process where it is lost.

    Raises:
      ValueError: a wrong option or checkpoint.
    """
    if not follows(config):
        raise ValueError("headless is for hosts other than the first: give --nnodes, --node-rank and --master-addr.")
    try:
        loaded = load(config, progress=False, on_phase=lambda phase: log.info("%s", phase))
    except HostLostError as error:
        exit_now(error)
    leader = loaded.hosts
    assert isinstance(leader, Leader)
    for number in (signal.SIGTERM, signal.SIGINT):
        # Both come to all hosts, and host 0 gives its requests their time.
        signal.signal(number, lambda *_: log.info("this host ends when host 0 does"))
    parts = (loaded.modeldef, loaded.leaves, loaded.mesh, loaded.model_config, loaded.plan, loaded.compiles)
    runner = Runner(*parts)
    log.info("host %d of %d follows host 0", jax.process_index(), jax.process_count())
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(leader, messages), name="qjax-hosts", daemon=True).start()
    while True:
        header, payload = messages.get()
        if header["kind"] == "stop":
            log.info("host 0 has stopped")
            return 0
        try:
            _do(runner, header, np.frombuffer(payload, np.int32))
        except Exception as error:
            log.exception("host 0 is told of this")
            leader.line.send({"kind": "error", "message": str(error)})
            exit_now(HostLostError("this host has failed"))


def _listen(leader: Leader, messages: queue.SimpleQueue[Message]) -> None:
    """By a thread of its own: the other may wait for devices of a host that is gone."""
    try:
        while True:
            message = leader.line.receive()
            if message[0]["kind"] != "alive":
                messages.put(message)
            if message[0]["kind"] == "stop":
                return
    except HostLostError as error:
        exit_now(error)


def _do(runner: Runner, header: dict[str, Any], array: np.ndarray) -> None:
    match header["kind"]:
        case "step":
            runner.run_step(Bucket(**header["bucket"]), StepOptions(**header["options"]), array)
        case "table":
            runner.write_table(array.reshape(-1, 3))
        case "counts":
            runner.write_counts(header["slot"], array[: header["num_prompt"]], array[header["num_prompt"] :])
        case "compile":
            runner.compile_ahead([StepOptions(**options) for options in header["options"]], progress=False)
        case "cache":
            runner.make_cache()
        case kind:
            raise RuntimeError(f"unknown message {kind!r}")
