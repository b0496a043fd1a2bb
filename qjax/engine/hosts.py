"""The hosts that share an engine, and the line between them: host 0 says what to run, the others that they live.

The line is plain TCP beside the devices' own network. A step's inputs are a few KiB that host 0 has in numpy anyway;
a broadcast over the devices would queue behind the step in flight and hang with it, and it could not tell a lost host
from a slow one. Messages are JSON and bytes, no pickles. Whoever can reach the ports can join: use a private network.
"""

import atexit
import json
import logging
import os
import queue
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NoReturn

import jax

from qjax.config import EngineConfig
from qjax.engine.memory import Plan

log = logging.getLogger("qjax")

JOIN_SECONDS = 300.0  # that hosts wait for each other at the start
HEARTBEAT_SECONDS = 1.0
LOST_SECONDS = 10.0  # without a word
MAX_MESSAGE = 2**30  # bytes
OF_ONE_HOST = {"node_rank", "master_addr", "hf_token", "download_dir", "compilation_cache_dir", "nnodes"}  # may differ
_LENGTHS = struct.Struct("!II")

type Message = tuple[dict[str, Any], bytes]


class HostLostError(RuntimeError):
    """Another host of the engine is gone, or says that it failed."""


@dataclass(frozen=True)
class Place:
    """Where this process stands: `rank` of `num_hosts`; host 0 listens at `address`, on `port` (jax) and `port` + 1."""

    num_hosts: int
    rank: int
    address: str
    port: int


def find_place(config: EngineConfig, environ: Mapping[str, str] = os.environ) -> Place:
    """From the options or, with `nnodes="auto"`, from Slurm's variables or those of a Kubernetes LeaderWorkerSet.

    Raises:
      ValueError: the options contradict each other, or nothing says where this process stands.
    """
    if config.nnodes != "auto":
        return _checked(Place(config.nnodes, config.node_rank, config.master_addr, config.master_port), config)
    if "LWS_GROUP_SIZE" in environ:
        found = environ["LWS_GROUP_SIZE"], environ["LWS_WORKER_INDEX"], environ["LWS_LEADER_ADDRESS"]
    elif "SLURM_PROCID" in environ:  # one task a host
        hosts = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        found = environ["SLURM_NTASKS"], environ["SLURM_PROCID"], first_of_nodelist(hosts)
    else:
        raise ValueError(
            "nnodes='auto' reads the variables of Slurm (srun) or of a Kubernetes LeaderWorkerSet, and there are none. "
            "Give --nnodes, --node-rank and --master-addr."
        )
    num_hosts, rank, address = found
    return _checked(Place(int(num_hosts), int(rank), address, config.master_port), config)


def first_of_nodelist(nodelist: str) -> str:
    """Of Slurm's form: `gpu[003-005,9],login` is gpu003."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodelist)
    if match is None:
        raise ValueError(f"SLURM_JOB_NODELIST={nodelist!r} names no host.")
    return match[1] + (match[2] or "")


def _checked(place: Place, config: EngineConfig) -> Place:
    if not 0 <= place.rank < place.num_hosts:
        raise ValueError(
            f"node_rank must be 0 to {place.num_hosts - 1} with nnodes={place.num_hosts}, got {place.rank}."
        )
    if place.num_hosts == 1:
        return place
    if config.tensor_parallel_size % place.num_hosts:
        raise ValueError(
            f"tensor_parallel_size={config.tensor_parallel_size} must be a multiple of nnodes={place.num_hosts}: each "
            "host brings the same number of devices."
        )
    if config.runner == "pooling":
        raise ValueError("runner='pooling' is not supported with several hosts (--nnodes).")
    return place


def join(config: EngineConfig) -> "Followers | Leader | None":
    """Waits for the other hosts and starts `jax.distributed`; before jax makes its devices. None with one host.

    Raises:
      ValueError: a wrong option, or hosts that were started with different ones.
      HostLostError: some host did not come in time.
    """
    place = find_place(config)
    if place.num_hosts == 1:
        return None
    hosts = Followers(place, config) if place.rank == 0 else Leader(place, config)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the server
    jax.distributed.initialize(
        f"{place.address}:{place.port}", place.num_hosts, place.rank, initialization_timeout=int(JOIN_SECONDS)
    )
    atexit.register(hosts.close)  # before jax's own, which waits for all hosts to end
    return hosts


def exit_now(error: HostLostError) -> NoReturn:
    """Ends the process at once: its main thread may wait for a device that waits for the lost host."""
    log.critical("%s", error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class Line:
    """One connection. `send` may be called by any thread."""

    def __init__(self, sock: socket.socket, name: str):
        self.name = name
        self._socket = sock
        self._lock = threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.set_timeout(JOIN_SECONDS)

    def set_timeout(self, seconds: float) -> None:
        """How long `receive` waits for a word."""
        self._socket.settimeout(seconds)

    def send(self, header: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
        """Raises HostLostError."""
        text = json.dumps(header).encode()
        try:
            with self._lock:
                self._socket.sendall(b"".join((_LENGTHS.pack(len(text), len(payload)), text, payload)))
        except OSError as error:
            raise HostLostError(f"{self.name} is lost: {error}") from error

    def receive(self) -> Message:
        """Raises HostLostError: the line is cut, or silent."""
        try:
            num_header, num_payload = _LENGTHS.unpack(self._read(_LENGTHS.size))
            if num_header + num_payload > MAX_MESSAGE:
                raise HostLostError(f"{self.name} does not speak qjax's protocol")
            return json.loads(self._read(num_header)), self._read(num_payload)
        except TimeoutError:
            raise HostLostError(f"{self.name} is lost: not a word for {self._socket.gettimeout():g} s") from None
        except (OSError, ValueError) as error:
            raise HostLostError(f"{self.name} is lost: {error}") from error

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise OSError("it has closed the connection")
            data += part
        return bytes(data)

    def keep_alive(self) -> None:
        """From now on a word comes every second from either side, by a thread of its own."""
        self.set_timeout(LOST_SECONDS)

        def beat() -> None:
            try:
                while True:
                    self.send({"kind": "alive"})
                    time.sleep(HEARTBEAT_SECONDS)
            except HostLostError:
                pass  # whoever reads the line says so

        threading.Thread(target=beat, name="qjax-heartbeat", daemon=True).start()

    def close(self) -> None:
        self._socket.close()


class Followers:
    """The other hosts, as host 0 sees them.

    Attributes:
      on_lost: called in a thread of its own, once, when a host is gone; the default ends the process.
    """

    def __init__(self, place: Place, config: EngineConfig):
        self.on_lost: Callable[[HostLostError], None] = exit_now
        self._is_closed = False
        self._lost: queue.SimpleQueue[HostLostError] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._lines: list[Line] = []
        with socket.create_server(("", place.port + 1), backlog=place.num_hosts) as server:
            end = time.monotonic() + JOIN_SECONDS
            ranks: set[int] = set()
            while len(ranks) < place.num_hosts - 1:
                server.settimeout(max(end - time.monotonic(), 0.01))
                try:
                    sock, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, place.num_hosts)) - ranks)
                    raise HostLostError(f"hosts {missing} did not come within {JOIN_SECONDS:g} s") from None
                line = Line(sock, "a host")
                try:
                    ranks.add(self._welcome(line, config))
                except HostLostError as error:
                    log.warning("%s", error)
                    line.close()

    def _welcome(self, line: Line, config: EngineConfig) -> int:
        line.set_timeout(LOST_SECONDS)
        header, _ = line.receive()
        line.set_timeout(JOIN_SECONDS)
        line.name = f"host {header['rank']}"
        mine, theirs = shared_options(config), header["options"]
        wrong = next((name for name in mine if theirs.get(name) != mine[name]), None)
        if wrong is not None:
            message = f"{line.name} has {wrong}={theirs.get(wrong)!r}, host 0 has {mine[wrong]!r}: start all alike"
            line.send({"error": message})
            raise ValueError(f"{message}.")
        line.send({"error": None})
        self._lines.append(line)
        return int(header["rank"])

    def agree(self, plan: Plan) -> Plan:
        """The plan of the host with the least memory, for all. From now on lost hosts are noticed."""
        plans = [plan, *(Plan(**line.receive()[0]) for line in self._lines)]
        smallest = min(plans, key=lambda p: p.num_pages)
        of_memory: dict[str, Any] = {"num_pages": 0, "kv_bytes": 0, "budget_bytes": 0}
        if any(replace(p, **of_memory) != replace(smallest, **of_memory) for p in plans):
            raise ValueError("the hosts' devices differ, so that one plan of the memory does not fit all of them.")
        self.send(asdict(smallest))
        for line in self._lines:
            line.keep_alive()
            threading.Thread(target=self._listen, args=(line,), name="qjax-hosts", daemon=True).start()
        return smallest

    def send(self, header: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
        """To all.

        Raises:
          HostLostError: one is gone.
        """
        for line in self._lines:
            line.send(header, payload)

    def _listen(self, line: Line) -> None:
        try:
            while True:
                header, _ = line.receive()
                if header["kind"] == "error":
                    raise HostLostError(f"{line.name} has failed: {header['message']}")
        except HostLostError as error:
            with self._lock:
                if self._is_closed:
                    return
                self._is_closed = True
            lost = HostLostError(f"{error}; the engine cannot go on without it")
            self._lost.put(lost)
            self.on_lost(lost)

    def failure(self, cause: BaseException | None) -> Exception:
        """Why a step failed here: by a host that is lost, which the devices may notice a moment before us, or else."""
        try:
            return self._lost.get(timeout=2 * HEARTBEAT_SECONDS)
        except queue.Empty:
            return RuntimeError(f"a step failed, and nobody knows what the other hosts have done: {cause}")

    def close(self) -> None:
        """Tells the others to end."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            try:
                self.send({"kind": "stop"})
            except HostLostError as error:
                log.warning("%s", error)


class Leader:
    """Host 0, as the others see it. What it says is received by `follow`."""

    def __init__(self, place: Place, config: EngineConfig):
        end = time.monotonic() + JOIN_SECONDS
        while True:
            try:
                sock = socket.create_connection((place.address, place.port + 1), timeout=5)
                break
            except OSError as error:
                if time.monotonic() > end:
                    where = f"{place.address}:{place.port + 1}"
                    raise HostLostError(f"host 0 is not at {where} (--master-addr): {error}") from error
                time.sleep(0.2)
        self.line = Line(sock, "host 0")
        self.line.send({"rank": place.rank, "options": shared_options(config)})
        header, _ = self.line.receive()
        if header["error"] is not None:
            raise ValueError(f"{header['error']}.")

    def agree(self, plan: Plan) -> Plan:
        self.line.send(asdict(plan))
        header, _ = self.line.receive()
        self.line.keep_alive()
        return Plan(**header)

    def close(self) -> None:
        self.line.close()


def shared_options(config: EngineConfig) -> dict[str, Any]:
    """Those that must be the same on all hosts, as JSON has them."""
    options = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in OF_ONE_HOST}
    return json.loads(json.dumps(options))
