"""The front of `--data-parallel-size`, over server processes with fake engines: choice, retry, loss, restart, stop."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import aiohttp
import pytest

from qjax import LLM
from qjax.config import EngineConfig, ServerConfig
from qjax.server.app import ROUTES
from qjax.server.front import devices, replica
from qjax.server.front.app import ALL_REPLICAS, FRONTS_OWN, ONE_REPLICA, UNCHANGED
from qjax.server.front.command import command, environment, replica_config
from qjax.server.front.lifecycle import serve
from qjax.server.front.replica import Replica
from qjax.server.lifecycle import Stop
from tests.server import fake_engine
from tests.server.conftest import free_port
from tests.server.test_lifecycle import until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["transformers.models.auto.tokenization_auto", "tests.server.fake_engine", "qjax.server.lifecycle"]
)


class Process:
    """A fork of a process that has imported all: what asyncio.subprocess has of it, in a tenth of the time."""

    def __init__(self, arguments):
        self._process = FORKSERVER.Process(target=fake_engine.run_forked, args=arguments)
        self._process.start()
        self.pid, self.terminate, self.kill = self._process.pid, self._process.terminate, self._process.kill

    @property
    def returncode(self):
        return self._process.exitcode

    async def wait(self):
        while self._process.exitcode is None:
            await asyncio.sleep(0.005)
        return self._process.exitcode


class ForkedReplica(Replica):
    """Its command is the arguments of `fake_engine.main`, or an exit code."""

    async def _start(self):
        if isinstance(self._command, int):
            code = f"raise SystemExit({self._command})"
            return await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", code)
        return Process(self._command)


class Front:
    """A front on a real port, its replicas, and a client."""

    def __init__(self, replicas, url, stop, task, session):
        self.replicas, self.url, self.stop, self.task, self.session = replicas, url, stop, task, session

    async def ask(self, method, path, body=None, **options):
        async with self.session.request(method, self.url + path, json=body, **options) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith("{") else text, response.headers

    async def stream(self, i, path=CHAT, began=None):
        """The text of a stream, and its id."""
        body = {"messages": HI} if path != TEXT else {"prompt": "Hi"}
        headers = {"X-Request-Id": f"stream-{i}"}
        body |= {"stream": True, "max_tokens": 60}
        async with self.session.post(self.url + path, json=body, headers=headers) as response:
            text = b""
            async for part in response.content.iter_any():
                text += part
                if began is not None:
                    began.set()
            return response.status, text.decode(), response.headers["X-Request-Id"]


@pytest.fixture
async def start(folder, tmp_path, monkeypatch):
    """`await start("short")`: options of the fake engines, one list for all or one for each."""
    monkeypatch.delenv("QJAX_API_KEY", raising=False)
    monkeypatch.setattr(replica, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(replica, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(replica, "LOADING_POLL_SECONDS", 0.02)
    async with contextlib.AsyncExitStack() as stack:

        async def start_front(*options, delay="0.01", count=2, wait=True, **config):
            replicas = []
            for i in range(count):
                mine = options[i] if options and not isinstance(options[0], str) else options
                uds = str(tmp_path / f"{i}.sock")
                line = mine if isinstance(mine, int) else [str(folder), delay, uds, *mine]
                replicas.append(ForkedReplica(i, line, {}, uds, config.get("watchdog_timeout", 0.0)))
            stop, port = Stop(), free_port()
            task = asyncio.ensure_future(serve(replicas, ServerConfig(host="127.0.0.1", port=port, **config), stop))
            session = await stack.enter_async_context(aiohttp.ClientSession())
            front = Front(replicas, f"http://127.0.0.1:{port}", stop, task, session)
            stack.push_async_callback(end, front)
            if wait:
                await until(lambda: all(r.can_serve for r in replicas) or task.done(), 40)
            return front

        yield start_front


async def end(front):
    front.stop.ask()
    front.stop.ask()
    with contextlib.suppress(Exception):
        await front.task


def long(text):
    return [{"role": "user", "content": text * 300}]


class TestOne:
    async def test_it_answers_as_a_server_does(self, start):
        front = await start("short", api_key=["secret"])
        key = {"Authorization": "Bearer secret"}
        assert (await front.ask("POST", CHAT, {"messages": HI}))[0] == 401
        status, body, headers = await front.ask("POST", CHAT, {"messages": HI}, headers={**key, "X-Request-Id": "mine"})
        assert status == 200 and body["choices"][0]["message"]["content"] == "Hello from answer 0."
        assert body["id"] == "chatcmpl-mine" and headers["X-Request-Id"] == "mine"
        async with front.session.post(
            front.url + "/v1/messages", json={"messages": HI, "max_tokens": 9, "stream": True}, headers=key
        ) as response:
            assert (await response.text()).startswith("event: message_start\n")
        for path, expected in (("/v1/models", "org/fake-model"), ("/version", "version"), ("/openapi.json", "bearer")):
            status, body, _ = await front.ask("GET", path, headers=key)
            assert status == 200 and expected in json.dumps(body)
        assert "<html" in (await front.ask("GET", "/"))[1]
        for path, body, expected in ((CHAT, {"messages": 3}, 400), ("/nothing", None, 404), (CHAT, None, 400)):
            status, answer, _ = await front.ask("POST", path, body, headers=key)
            assert status == expected and answer["error"]["code"] == expected
        status, body, _ = await front.ask("GET", "/health")
        assert status == 200 and [r["status"] for r in body["replicas"]] == ["ready", "ready"]

    async def test_what_concerns_all_is_asked_of_all(self, start):
        front = await start("short")
        text = (await front.ask("GET", "/metrics"))[1]
        for name in ("0", "1"):
            assert f'vllm:generation_tokens_total{{replica="{name}"}} 0.0\n' in text
            assert f'qjax:replica_up{{replica="{name}"}} 1.0\n' in text
        assert (await front.ask("GET", "/load"))[1]["server_load"] == 0
        assert (await front.ask("POST", "/reset_prefix_cache"))[1] == {"success": True}
        assert (await front.ask("GET", "/is_sleeping"))[1] == {"is_sleeping": False}
        assert (await front.ask("POST", "/sleep"))[1] == {"status": "sleeping", "level": 1}
        await until(lambda: all(r.status == "sleeping" for r in front.replicas))
        assert (await front.ask("GET", "/health"))[1]["status"] == "sleeping"
        status, body, _ = await front.ask("POST", CHAT, {"messages": HI})
        assert status == 503 and "sleeps" in body["error"]["message"]
        assert (await front.ask("POST", "/wake_up"))[1]["status"] == "awake"

    async def test_a_conversation_stays_where_it_began_and_others_spread(self, start):
        front = await start("short")
        talks = {i: long(word) for i, word in enumerate(("red ", "blue ", "pink ", "grey "))}
        homes = {}
        for _ in range(3):
            for i, talk in talks.items():
                before = [len(r.memory) for r in front.replicas]
                _, body, _ = await front.ask("POST", CHAT, {"messages": talk})
                talk += [body["choices"][0]["message"], *long(f"and {i} ")]
                [home] = [r.index for r, n in zip(front.replicas, before, strict=True) if len(r.memory) > n]
                assert homes.setdefault(i, home) == home
        assert sorted(homes.values()) == [0, 0, 1, 1]

    async def test_a_client_that_goes_ends_its_request(self, start):
        front = await start()
        began = asyncio.Event()
        task = asyncio.ensure_future(front.stream(0, began=began))
        whole = asyncio.ensure_future(front.ask("POST", CHAT, {"messages": HI}))
        await began.wait()
        await until(lambda: sum(r.num_running for r in front.replicas) == 2)
        assert (await front.ask("GET", "/load"))[1]["server_load"] == 2
        task.cancel()
        whole.cancel()
        await until(lambda: sum(r.num_running for r in front.replicas) == 0)
        for _ in range(100):
            if (await front.ask("GET", "/load"))[1]["server_load"] == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("a replica still works on it")

    async def test_abort_reaches_the_replica_that_has_the_request(self, start):
        front = await start()
        began = [asyncio.Event() for _ in range(4)]
        tasks = [asyncio.ensure_future(front.stream(i, began=began[i])) for i in range(4)]
        await asyncio.gather(*(event.wait() for event in began))
        ids = [f"stream-{i}" for i in range(4)]
        status, body, _ = await front.ask("POST", "/abort_requests", {"request_ids": ids})
        assert status == 200 and body["aborted"] == 4 and sorted(body["request_ids"]) == ids
        assert all('"finish_reason":"abort"' in text for _, text, _ in await asyncio.gather(*tasks))


class TestDeath:
    @pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages"])
    async def test_of_a_replica_under_streams(self, start, path):
        """Half of the streams were on it: they end with an error that says so, all others as if nothing was."""
        front = await start(delay="0.02")
        count = 64 if path == CHAT else 4
        began = [asyncio.Event() for _ in range(count)]
        if path == "/v1/responses":
            send = lambda i: self.respond(front, i, began[i])
        else:
            send = lambda i: front.stream(i, path, began[i])
        streams = [asyncio.ensure_future(send(i)) for i in range(count)]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in began)), 20)
        victim = front.replicas[0]
        num_lost, pid = victim.num_running, victim.health["pid"]
        assert num_lost == count // 2
        os.kill(pid, signal.SIGKILL)
        waiting = [asyncio.ensure_future(front.ask("POST", CHAT, {"messages": HI, "max_tokens": 2})) for _ in range(8)]
        results = await asyncio.wait_for(asyncio.gather(*streams), 30)
        failed = [(text, i) for _, text, i in results if "Please send the request again" in text]
        assert len(failed) == num_lost and all(status == 200 for status, _, _ in results)
        for text, request_id in failed:
            events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
            assert (events.pop() == "[DONE]") if path == CHAT else True
            error = json.loads(events[-1])["error"]
            assert request_id in error["message"] and (path != CHAT or error["code"] == 503)
        assert all(status == 200 for status, _, _ in await asyncio.gather(*waiting))
        await until(lambda: victim.can_serve and victim.health["pid"] != pid, 30)
        assert victim.num_starts == 2 and len(victim.memory) == 0
        text = (await front.ask("GET", "/metrics"))[1]
        assert f"qjax:front_lost_total {num_lost}.0\n" in text and 'qjax:replica_starts{replica="0"} 2.0\n' in text

    @staticmethod
    async def respond(front, i, began):
        body, headers = {"input": "Hi", "stream": True, "max_output_tokens": 60}, {"X-Request-Id": f"stream-{i}"}
        async with front.session.post(front.url + "/v1/responses", json=body, headers=headers) as response:
            text = b""
            async for part in response.content.iter_any():
                text += part
                began.set()
            return response.status, text.decode(), f"stream-{i}"

    async def test_whole_answers_are_made_again_by_another(self, start):
        front = await start(delay="0.02")
        body = {"messages": HI, "max_tokens": 40}
        asked = [asyncio.ensure_future(front.ask("POST", CHAT, body)) for _ in range(8)]
        await until(lambda: [r.num_running for r in front.replicas] == [4, 4])
        await asyncio.sleep(0.1)
        os.kill(front.replicas[1].health["pid"], signal.SIGKILL)
        answers = await asyncio.wait_for(asyncio.gather(*asked), 20)
        assert [status for status, _, _ in answers] == [200] * 8
        assert "qjax:front_retries_total 4.0\n" in (await front.ask("GET", "/metrics"))[1]

    async def test_what_ends_a_second_replica_is_not_sent_to_a_third(self, start):
        """The engines fail after 20 tokens: a request that does it gets an error, and the third replica lives."""
        front = await start("die", count=3)
        pids = {r.health["pid"] for r in front.replicas}
        status, body, _ = await front.ask("POST", CHAT, {"messages": HI})
        assert status in (500, 503) and "error" in body
        await until(lambda: sum(r.num_failures for r in front.replicas) == 2, 10)
        assert len(pids & {r.health.get("pid") for r in front.replicas}) == 1

    async def test_one_that_cannot_start_is_named_and_the_others_serve(self, start, caplog):
        front = await start(["short"], 3, wait=False)
        await until(lambda: front.replicas[0].can_serve and front.replicas[1].num_failures > 2, 40)
        status, body, _ = await front.ask("GET", "/health")
        bad = body["replicas"][1]
        assert status == 200 and bad["status"] in ("ended", "starting") and bad["exit_code"] == 3
        assert "replica 1 ended before it could serve (exit code 3), the 3th time in a row" in caplog.text
        assert (await front.ask("POST", CHAT, {"messages": HI}))[0] == 200

    async def test_a_silent_one_is_killed(self, start, monkeypatch):
        monkeypatch.setattr(replica, "SILENT_SECONDS", 1.0)
        front = await start("short", watchdog_timeout=0.5)
        victim = front.replicas[0]
        os.kill(victim.health["pid"], signal.SIGSTOP)
        await until(lambda: not victim.can_serve, 5)
        assert (await front.ask("POST", CHAT, {"messages": HI}))[0] == 200
        await until(lambda: victim.can_serve and victim.num_starts > 1, 30)

    async def test_where_none_can_start_the_front_ends_with_their_code(self, start):
        front = await start(2, 2, wait=False)
        assert await asyncio.wait_for(front.task, 20) == 2


class TestStop:
    async def test_running_requests_finish_and_new_ones_are_refused(self, start):
        front = await start("20", delay="0.02", shutdown_timeout=20)
        began = [asyncio.Event() for _ in range(4)]
        streams = [asyncio.ensure_future(front.stream(i, began=began[i])) for i in range(4)]
        await asyncio.gather(*(event.wait() for event in began))
        front.stop.ask()
        await asyncio.sleep(0.05)
        status, body, _ = await front.ask("GET", "/health")
        assert (status, body["status"]) == (503, "stopping")
        status, body, headers = await front.ask("POST", CHAT, {"messages": HI})
        assert status == 503 and "stopping" in body["error"]["message"] and headers["Retry-After"]
        for _, text, _ in await asyncio.gather(*streams):
            assert '"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n")
        assert await asyncio.wait_for(front.task, 10) == 0
        assert all(r.exit_code == 0 for r in front.replicas)

    async def test_a_replica_ends_with_its_front_even_if_that_is_killed(self):
        child = "from qjax.server.front.child import follow_front as f; import time; f(); print('up', flush=True); "
        child += "time.sleep(60)"
        front = f"""
import os, subprocess, sys, time
environ = {{**os.environ, "QJAX_FRONT": str(os.getpid())}}
print(subprocess.Popen([sys.executable, "-c", {child!r}], env=environ).pid, flush=True)
time.sleep(60)"""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", front, stdout=pipe)
        lines = [(await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip() for _ in range(2)]
        [pid] = [line for line in lines if line != "up"]
        process.kill()

        def is_gone():
            try:
                return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                return True

        await until(is_gone, 10)


class TestOptions:
    def test_every_route_has_its_place(self):
        """A new endpoint is asked of one replica or of all: say which in `front/app.py`."""
        places = [FRONTS_OWN.keys(), UNCHANGED, ALL_REPLICAS, ONE_REPLICA]
        assert {route.path for route in ROUTES} == set().union(*places)
        assert sum(map(len, places)) == len(set().union(*places))

    def test_gpus_are_split(self, monkeypatch):
        assert devices.split(2, 2, ["0", "1", "4", "5"]) == [{devices.VISIBLE: "0,1"}, {devices.VISIBLE: "4,5"}]
        assert devices.split(2, 1, []) == [{}, {}]
        with pytest.raises(ValueError, match=r"--data-parallel-size 3 .*--tensor-parallel-size 2 needs 6 GPUs, and 4"):
            devices.split(3, 2, list("0123"))
        monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name.endswith("13_plugin"))
        assert devices.visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-5a"}) == ["3", "GPU-5a"]
        assert devices.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
        assert devices.visible_gpus({"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"}) == []

    @pytest.mark.parametrize(("engine", "server", "named"), [({"nnodes": 2}, {}, "--nnodes 2"),
                                                             ({}, {"headless": True}, "--headless")])  # fmt: skip
    def test_what_does_not_go_together_is_refused(self, engine, server, named):
        with pytest.raises(ValueError, match=f"--data-parallel-size 2 does not go with {named}"):
            devices.check(EngineConfig(**engine), ServerConfig(data_parallel_size=2, **server))
        with pytest.raises(ValueError, match="data_parallel_size must be at least 1"):
            ServerConfig(data_parallel_size=0)

    def test_llm_says_what_to_do_instead(self):
        with pytest.raises(ValueError, match=r"data_parallel_size: .*CUDA_VISIBLE_DEVICES"):
            LLM(data_parallel_size=2)

    def test_a_replica_gets_the_same_options_but_the_fronts_own(self, monkeypatch):
        from qjax.cli import make_parser
        from qjax.cli.options import read_config, read_engine_config

        monkeypatch.setenv("QJAX_API_KEY", "secret")
        monkeypatch.setenv("QJAX_DATA_PARALLEL_SIZE", "2")
        engine = EngineConfig(model="org/m", hf_token="hf_secret", max_model_len="32k", hf_overrides={"a": [1]},
                              enable_prefix_caching=False, kv_cache_memory_bytes="1GiB")  # fmt: skip
        server = ServerConfig(port=1, api_key=["k"], allowed_origins=["*"], served_model_name=["a b", "-c"],
                              data_parallel_size=2, root_path="/x", shutdown_timeout=3)  # fmt: skip
        expected = replica_config(server, "/s")
        line = command(engine, expected)
        environ = environment(engine, 1, {devices.VISIBLE: "4"})
        assert "secret" not in " ".join(line) and environ["QJAX_HF_TOKEN"] == "hf_secret"
        assert not {"QJAX_API_KEY", "QJAX_DATA_PARALLEL_SIZE"} & set(environ) and environ[devices.VISIBLE] == "4"
        monkeypatch.delenv("QJAX_API_KEY")
        monkeypatch.delenv("QJAX_DATA_PARALLEL_SIZE")
        monkeypatch.setenv("QJAX_HF_TOKEN", "hf_secret")
        args = make_parser().parse_args(line[3:])
        assert read_engine_config(args) == engine and read_config(ServerConfig, args) == expected
        assert (expected.api_key, expected.allowed_origins, expected.root_path, expected.port) == ([], [], "", 8000)
