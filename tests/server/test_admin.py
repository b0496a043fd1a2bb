"""What an operator meets: sleep and wake-up, aborts by id, a full queue, a step that does not end."""

import asyncio
import logging

import pytest

from tests.server.test_errors import error_of
from tests.server.test_lifecycle import endless, until

HI = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class TestSleep:
    async def test_asleep_requests_are_refused_and_the_server_is_healthy(self, start):
        server = await start({"server_dev_mode": True})
        assert (await server.get("/is_sleeping"))[1] == {"is_sleeping": False}
        status, body, _ = await server.post("/sleep")
        assert (status, body) == (200, {"status": "sleeping", "level": 1}) and server.engine.sleep_level == 1
        assert (await server.get("/is_sleeping"))[1] == {"is_sleeping": True}
        for path, request in ((CHAT, {"messages": HI}), (TEXT, {"prompt": ["x", "y"]}), (TEXT, {"prompt": "x"})):
            for is_stream in (False, True):
                status, body, headers = await server.post(path, {**request, "stream": is_stream})
                assert status == 503 and headers["Retry-After"]
                assert "/wake_up" in error_of(body, 503, "ServiceUnavailableError")
        assert (await server.get("/health"))[:2] == (200, {"status": "sleeping"})
        assert (await server.get("/v1/models"))[0] == (await server.post("/tokenize", {"prompt": "x"}))[0] == 200
        status, body, _ = await server.post("/sleep?level=2")
        assert status == 400 and "sleeps" in error_of(body, 400)
        assert (await server.post("/wake_up?tags=weights"))[1] == {"status": "sleeping", "tags": ["weights"]}
        assert (await server.post("/wake_up"))[1] == {"status": "awake", "tags": ["weights", "kv_cache"]}
        assert (await server.post(CHAT, {"messages": HI}))[0] == 200 and not server.engine.num_unfinished

    async def test_running_requests_are_ended_or_waited_for(self, start):
        server = await start({"server_dev_mode": True}, answer=endless, delay=0.01)
        stream = asyncio.ensure_future(server.events(CHAT, {"messages": HI}))
        await until(lambda: server.engine.num_tokens > 3)
        assert (await server.post("/sleep?level=2"))[1]["level"] == server.engine.sleep_level == 2
        assert (await stream)[-1]["choices"][0]["finish_reason"] == "abort"
        await server.post("/wake_up")
        stream = asyncio.ensure_future(server.events(CHAT, {"messages": HI, "max_tokens": 30}))
        await until(lambda: server.engine.num_unfinished == 1)
        asleep = asyncio.ensure_future(server.post("/sleep?mode=wait"))
        await asyncio.sleep(0.05)
        status, body, _ = await server.post(TEXT, {"prompt": "x"})
        assert status == 503 and "about to sleep" in error_of(body, 503, "ServiceUnavailableError")
        assert (await stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert (await asleep)[0] == 200 and server.engine.is_sleeping

    @pytest.mark.parametrize(
        ("path", "said"),
        [
            ("/sleep?level=0", "level must be 1 or 2, got 0."),
            ("/sleep?level=deep", 'level must be 1 or 2, got "deep".'),
            ("/sleep?mode=keep", 'mode must be "abort" or "wait", got "keep".'),
            ("/sleep?deep=1", "Unrecognized request argument supplied: deep"),
            ("/wake_up?tags=weights&tags=scheduling", "tags must be"),
        ],
    )
    async def test_wrong_wishes_are_named(self, start, path, said):
        server = await start({"server_dev_mode": True})
        status, body, _ = await server.post(path)
        assert status == 400 and said in error_of(body, 400) and not server.engine.is_sleeping

    async def test_it_needs_the_option_and_a_key(self, start, caplog):
        server = await start({"api_key": ["k"]})
        key = {"Authorization": "Bearer k"}
        for method, path in ((server.post, "/sleep"), (server.post, "/wake_up"), (server.get, "/is_sleeping")):
            assert (await method(path))[0] == 401
            status, body, _ = await method(path, headers=key)
            assert status == 404 and "--server-dev-mode" in error_of(body, 404, "NotFoundError")
            assert path not in (await server.get("/openapi.json", headers=key))[1]["paths"]
        with caplog.at_level(logging.WARNING, "qjax.server"):
            await start({"server_dev_mode": True})
        assert "without --api-key" in caplog.text


class TestAbort:
    async def test_by_the_answers_id_or_the_requests_own(self, start):
        server = await start(answer=endless, delay=0.01)
        stream = asyncio.ensure_future(server.events(CHAT, {"messages": HI, "request_id": "a"}))
        whole = asyncio.ensure_future(server.post(TEXT, {"prompt": ["x", "y"], "request_id": "b", "max_tokens": None}))
        stays = asyncio.ensure_future(server.post(TEXT, {"prompt": "x", "request_id": "b-11", "max_tokens": 90}))
        await until(lambda: server.engine.num_unfinished == 4 and server.engine.num_tokens > 20)
        status, body, _ = await server.post("/abort_requests", {"request_ids": ["chatcmpl-a", "b", "nobody", "b"]})
        assert status == 200
        assert body == {"status": "aborted", "aborted": 2, "request_ids": ["chatcmpl-a", "b"]}
        assert (await stream)[-1]["choices"][0]["finish_reason"] == "abort"
        status, answer, _ = await whole
        assert status == 200 and [c["finish_reason"] for c in answer["choices"]] == ["abort", "abort"]
        assert answer["choices"][0]["text"].startswith("word")
        assert (await stays)[1]["choices"][0]["finish_reason"] == "length"
        status, body, _ = await server.post("/abort_requests", {"request_ids": ["chatcmpl-a"]})
        assert body == {"status": "aborted", "aborted": 0, "request_ids": []}

    async def test_ids_that_meet(self, start):
        """Those of a request's prompts are made of its own."""
        server = await start(answer=endless, delay=0.01)
        first = asyncio.ensure_future(server.post(TEXT, {"prompt": ["x", "y"], "request_id": "b"}))
        await until(lambda: server.engine.num_unfinished == 2)
        status, body, _ = await server.post(TEXT, {"prompt": "x", "request_id": "b-1"})
        assert status == 400 and "in use" in error_of(body, 400)
        assert (await first)[0] == 200

    async def test_all_at_once(self, start):
        server = await start()
        status, body, _ = await server.post("/abort_requests", {})
        assert status == 400 and "--server-dev-mode" in error_of(body, 400)
        server = await start({"server_dev_mode": True}, answer=endless, delay=0.01)
        answers = [asyncio.ensure_future(server.post(CHAT, {"messages": HI})) for _ in range(3)]
        await until(lambda: server.engine.num_unfinished == 3)
        status, body, _ = await server.post("/abort_requests", {})
        assert body["aborted"] == 3
        ended = [(await answer)[1] for answer in answers]
        assert sorted(body["request_ids"]) == sorted(answer["id"] for answer in ended)
        assert (await server.post(CHAT, {"messages": HI, "max_tokens": 1}))[0] == 200  # nothing is closed for good


class TestQueue:
    async def test_over_the_limit_is_503(self, start):
        server = await start({"max_num_queued_reqs": 1}, answer=endless, delay=0.01)
        server.engine.num_places = 2
        running = [asyncio.ensure_future(server.post(CHAT, {"messages": HI})) for _ in range(3)]
        await until(lambda: server.engine.num_unfinished == 3)
        assert (await server.get("/load"))[1] == {"server_load": 3, "num_queued": 1, "num_rejected": 0}
        for is_stream in (False, True):
            status, body, headers = await server.post(CHAT, {"messages": HI, "stream": is_stream})
            message = error_of(body, 503, "ServiceUnavailableError")
            assert status == 503 and headers["Retry-After"] and "--max-num-queued-reqs" in message
        assert (await server.get("/load"))[1]["num_rejected"] == 2
        server.engine.abort(next(iter(server.engine.ends)))
        await until(lambda: server.engine.num_unfinished == 2)
        more = asyncio.ensure_future(server.post(TEXT, {"prompt": ["x", "y", "z"], "max_tokens": 1}))
        assert (await more)[0] == 200  # one request: its prompts come in together, or not at all
        server.engine.num_places = 1
        assert (await server.get("/load"))[1]["num_rejected"] == 2
        for task in running:
            task.cancel()

    async def test_no_queue_at_all(self, start):
        server = await start({"max_num_queued_reqs": 0})
        server.engine.num_places = 1
        assert (await server.post(CHAT, {"messages": HI}))[0] == 200


class TestWatchdog:
    async def test_a_step_that_does_not_end(self, start, caplog):
        server = await start({"watchdog_timeout": 30}, answer=endless, delay=0.01)
        running = asyncio.ensure_future(server.events(CHAT, {"messages": HI}))
        await until(lambda: server.engine.num_unfinished == 1)
        server.engine.seconds_stalled = 29.9
        assert (await server.get("/health"))[0] == 200
        server.engine.seconds_stalled = 31.04
        for path in ("/health", "/ping"):
            assert (await server.get(path))[:2] == (503, {"status": "stalled", "seconds": 31.0})
        status, body, headers = await server.post(CHAT, {"messages": HI})
        assert status == 503 and headers["Retry-After"]
        assert "31 seconds" in error_of(body, 503, "ServiceUnavailableError")
        await until(lambda: "going on for 31 s" in caplog.text)
        server.engine.seconds_stalled = 0.0
        assert (await server.get("/health"))[0] == 200
        await until(lambda: "the engine goes on" in caplog.text)
        running.cancel()

    async def test_it_can_be_off(self, start):
        server = await start({"watchdog_timeout": 0})
        server.engine.seconds_stalled = 1e6
        assert (await server.get("/health"))[0] == 200

    async def test_the_process_can_still_be_stopped(self, start):
        server = await start({"shutdown_timeout": 0.1})
        server.engine.seconds_stalled = 400.0
        server.stop.ask()
        assert await server.task == 1
        assert server.engine.phase == "hung"  # for which `run_engine` leaves without waiting for threads
