"""One engine on two hosts (processes of a CPU): the same text as on one, an end in order, and lost hosts."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys

import aiohttp
import pytest

from qjax import EngineConfig, SamplingParams
from qjax.engine import hosts
from qjax.engine.hosts import Followers, HostLostError, Leader, Place, find_place, first_of_nodelist
from qjax.sampling_params import StructuredOutputsParams
from tests.engine.conftest import make_llm
from tests.server.conftest import free_port

OPTIONS = {"load_format": "dummy", "kv_cache_memory_bytes": "4MiB", "max_num_seqs": 4, "max_num_batched_tokens": 32}
BODY = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
PROMPTS = [[5 + i, 6, 7, 8 + i] * (1 + 9 * i) for i in range(5)]


def free_ports():
    """Two that follow each other."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port + 1))
            return port


class Cluster:
    """`qjax serve` as several processes."""

    def __init__(self, folder, num_hosts, *extra):
        self.port, meeting = free_port(), free_ports()
        flags = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        flags += ["-tp", str(num_hosts), "--nnodes", str(num_hosts), "--master-port", str(meeting)]
        serve = [sys.executable, "-m", "qjax", "serve", str(folder), *flags, *extra]
        self.commands = [[*serve, "--host", "127.0.0.1", "--port", str(self.port), "--shutdown-timeout", "5"]]
        self.commands += [[*serve, "--node-rank", str(rank), "--headless"] for rank in range(1, num_hosts)]
        self.url = f"http://127.0.0.1:{self.port}"

    async def __aenter__(self):
        flags = "--xla_force_host_platform_device_count=1"
        environ = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "QJAX_DEBUG": "1"}
        pipe = asyncio.subprocess.PIPE
        self.processes = [
            await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=environ)
            for command in self.commands
        ]
        self.logs = [asyncio.ensure_future(p.stderr.read()) for p in self.processes]
        async with asyncio.timeout(200):
            while b"qjax serves" not in (line := await self.processes[0].stdout.readline()):  # gloo writes there too
                if not line:
                    raise AssertionError([(await log).decode()[-2000:] for log in self.logs])
        self.session = aiohttp.ClientSession()
        return self

    async def __aexit__(self, *_):
        await self.session.close()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def ask(self, **fields):
        async with self.session.post(
            self.url + "/v1/completions", json={**BODY, "return_token_ids": True, **fields}
        ) as response:
            body = await response.json()
            assert response.status == 200, body
            return [choice["token_ids"] for choice in body["choices"]]

    async def ends(self, seconds=20):
        """The exit codes and logs."""
        async with asyncio.timeout(seconds):
            codes = [await process.wait() for process in self.processes]
        return codes, [(await log).decode() for log in self.logs]


async def check_same_text(llm, cluster):
    """Several at a time with prompts of many pages, then one with all that takes another way to the devices."""
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, greedy, use_tqdm=False)]
    together = await asyncio.gather(*(cluster.ask(prompt=p) for p in PROMPTS))
    assert [tokens for [tokens] in together] == expected
    rich = {"temperature": 1.0, "seed": 3, "presence_penalty": 0.7}
    digits = StructuredOutputsParams(regex="[0-9]{8}")
    params = SamplingParams(max_tokens=24, structured_outputs=digits, **rich)
    [output] = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    fields = {**rich, "structured_outputs": {"regex": digits.regex}, "ignore_eos": False}
    assert await cluster.ask(prompt=PROMPTS[0], **fields) == [output.outputs[0].token_ids]


async def check_lost_host(cluster, lost):
    body = {**BODY, "prompt": PROMPTS[0], "max_tokens": 480, "stream": True}
    async with cluster.session.post(cluster.url + "/v1/completions", json=body) as response:
        await response.content.readline()
        cluster.processes[lost].kill()
        with contextlib.suppress(aiohttp.ClientError):  # where host 0 is the lost one
            text = (await asyncio.wait_for(response.read(), 15)).decode()
            error = json.loads([line for line in text.splitlines() if line.startswith("data: {")][-1][6:])["error"]
            assert error["code"] == 500 and "engine has failed" in error["message"] and lost
    codes, logs = await cluster.ends()
    others = [i for i in range(len(codes)) if i != lost]
    assert all(codes[i] != 0 for i in others), codes
    assert f"host {lost} is lost" in logs[others[0]], logs[others[0]]
    assert codes[0] == 1 or not lost


@pytest.mark.timeout(240)
async def test_two_hosts_say_what_one_says_until_one_is_lost(llm, tiny_folder):
    async with Cluster(tiny_folder, 2) as cluster:
        await check_same_text(llm, cluster)
        await check_lost_host(cluster, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_four_hosts_and_a_clean_end(tiny_folder):
    # One process with as many devices: with more of them than KV heads, made-up weights have other shapes.
    llm = make_llm(tiny_folder, tensor_parallel_size=4)
    async with Cluster(tiny_folder, 4) as cluster:
        await check_same_text(llm, cluster)
        for process in cluster.processes:
            process.send_signal(signal.SIGTERM)
        codes, logs = await cluster.ends()
        assert codes == [0] * 4, logs
        assert all("host 0 has stopped" in log for log in logs[1:])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("lost", [0, 2])
async def test_any_host_may_be_lost(tiny_folder, lost):
    async with Cluster(tiny_folder, 4) as cluster:
        await cluster.ask(prompt=PROMPTS[0])
        await check_lost_host(cluster, lost)


# The line between the hosts, without processes


def config(**options):
    return EngineConfig(**{"tensor_parallel_size": 2, "nnodes": 2, **options})


@pytest.fixture
def place(monkeypatch):
    monkeypatch.setattr(hosts, "JOIN_SECONDS", 5.0)
    return Place(2, 0, "127.0.0.1", free_ports())


async def meet(place, mine, theirs):
    """Host 0 and host 1, or what they raised."""
    other = Place(2, 1, place.address, place.port)
    both = (asyncio.to_thread(Followers, place, mine), asyncio.to_thread(Leader, other, theirs))
    return await asyncio.gather(*both, return_exceptions=True)


async def test_hosts_with_other_options_are_refused_on_both_sides(place):
    first, second = await meet(place, config(), config(node_rank=1, max_num_seqs=3))
    for error in (first, second):
        assert isinstance(error, ValueError) and "host 1 has max_num_seqs=3, host 0 has None" in str(error)


async def test_a_silent_host_is_noticed(place, monkeypatch):
    """Its machine has lost its power: the connection is not closed, nothing comes any more."""
    monkeypatch.setattr(hosts, "LOST_SECONDS", 0.3)
    first, second = await meet(place, config(), config(node_rank=1))
    lost = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()
    first.on_lost = lambda error: loop.call_soon_threadsafe(lost.set_result, error)
    for line in first._lines:
        line.keep_alive()
    listening = asyncio.create_task(asyncio.to_thread(first._listen, first._lines[0]))
    error = await asyncio.wait_for(lost, 5)
    assert isinstance(error, HostLostError) and "host 1 is lost: not a word for 0.3 s" in str(error)
    await listening
    second.close()


async def test_a_host_that_does_not_come_is_named(place, monkeypatch):
    monkeypatch.setattr(hosts, "JOIN_SECONDS", 0.2)
    with pytest.raises(HostLostError, match=r"hosts \[1\] did not come"):
        await asyncio.to_thread(Followers, place, config())
    with pytest.raises(HostLostError, match=r"host 0 is not at .*--master-addr"):
        await asyncio.to_thread(Leader, Place(2, 1, "127.0.0.1", place.port), config(node_rank=1))


async def test_what_is_no_host_is_left_out(place):
    joining = asyncio.create_task(asyncio.to_thread(Followers, place, config()))
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", place.port + 1)
                break
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    leader = await asyncio.to_thread(Leader, Place(2, 1, place.address, place.port), config(node_rank=1))
    followers = await asyncio.wait_for(joining, 5)
    followers.send({"kind": "step"}, b"1234")
    assert await asyncio.to_thread(leader.line.receive) == ({"kind": "step"}, b"1234")


def test_places():
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "gpu[003-005,9]"}
    auto = EngineConfig(nnodes="auto", tensor_parallel_size=8)
    assert find_place(auto, slurm) == Place(4, 2, "gpu003", 29501)
    lws = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "q-0.q.ns"}
    assert find_place(auto, lws) == Place(2, 1, "q-0.q.ns", 29501)
    assert find_place(config(node_rank=1, master_addr="10.0.0.1", master_port=1)) == Place(2, 1, "10.0.0.1", 1)
    assert find_place(EngineConfig()).num_hosts == 1
    lists = {"a,b": "a", "n7": "n7", "x[1,3]": "x1", "gpu-a[10-12],b": "gpu-a10"}
    assert {text: first_of_nodelist(text) for text in lists} == lists


def test_wrong_places_are_named():
    with pytest.raises(ValueError, match="Slurm"):
        find_place(EngineConfig(nnodes="auto"), {})
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3 must be a multiple of nnodes=2"):
        find_place(config(tensor_parallel_size=3))
    with pytest.raises(ValueError, match="pooling"):
        find_place(config(runner="pooling"))
    for wrong in ({"node_rank": 2}, {"nnodes": 0}, {"nnodes": "many"}, {"master_port": 70000}):
        with pytest.raises(ValueError, match=r"node_rank|nnodes|master_port"):
            config(**wrong)
