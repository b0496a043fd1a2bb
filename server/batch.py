"""`qjax run-batch`: a file of requests in OpenAI's batch format, answered by the server's own handlers.

The application listens on a Unix socket in a private folder, and each line of the file is a request to it. So a batch
has the fields, checks and errors of the HTTP API, for every route there is, and no code of its own for them.
"""

import asyncio
import contextlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp
from aiohttp import web
from tqdm import tqdm

from qjax.config import EngineConfig, ServerConfig
from qjax.server.app import api_keys, make_app
from qjax.server.errors import ApiError, bad_request
from qjax.server.lifecycle import read_chat_template
from qjax.server.listening import make_runner
from qjax.server.schema import body_field, parse
from qjax.server.sse import encode_json
from qjax.server.state import AsyncEngine, ServerState


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What to read, what to write, and how many requests are on their way at a time.

    Raises:
      ValueError: a file cannot be used; the message names it.
    """

    input_file: str
    output_file: str
    max_inflight: int = 1024

    def __post_init__(self) -> None:
        for name in ("input_file", "output_file"):
            path = getattr(self, name)
            if "://" in path:
                raise ValueError(f"{name} must be a local path, got {path!r}: files are not fetched from URLs.")
        if self.max_inflight < 1:
            raise ValueError(f"max_inflight must be at least 1, got {self.max_inflight}.")
        if os.path.realpath(self.input_file) == os.path.realpath(self.output_file):
            raise ValueError("output_file must be another file than input_file.")
        try:
            with open(self.input_file, "rb"):
                pass
        except OSError as error:
            raise ValueError(f"input_file {self.input_file!r} cannot be read: {error.strerror}.") from None
        if not os.path.isdir(os.path.dirname(self.output_file) or "."):
            raise ValueError(f"output_file {self.output_file!r} is in a folder that does not exist.")


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """A line of the input file."""

    custom_id: str = body_field("Your name for the request; it comes back with the answer", MISSING)
    method: str = body_field('"POST"', MISSING)
    url: str = body_field("The path of the API, such as /v1/chat/completions", MISSING)
    body: dict[str, Any] = body_field("The request as it would be sent to that path", MISSING)

    def __post_init__(self) -> None:
        if self.method != "POST":
            raise bad_request('method must be "POST".', "method", self.method)
        if not self.url.startswith("/v1/"):
            raise bad_request("url must be a path of the API, such as /v1/chat/completions.", "url", self.url)
        if self.body.get("stream"):
            raise bad_request("body.stream must be false: a batch has whole answers.", "body.stream", True)


@dataclass(frozen=True)
class Summary:
    num_answered: int
    num_failed: int
    seconds: float


def run(engine_config: EngineConfig, server_config: ServerConfig, options: BatchOptions) -> int:
    """Answers a batch, and prints a line about it. Returns the exit code: 0, or 1 where the engine failed.

    Raises:
      ValueError: a wrong option or checkpoint. A wrong request is an error in its own line of the output.
    """
    from qjax.engine.async_engine import AsyncEngine as RealEngine  # imports jax

    engine = RealEngine(engine_config)
    summary = asyncio.run(run_engine(engine, server_config, options))
    counts = f"{summary.num_answered} answered, {summary.num_failed} failed"
    print(f"{options.output_file}: {counts}, {summary.seconds:.1f} s")
    return 0 if engine.error is None else 1


async def run_engine(engine: AsyncEngine, config: ServerConfig, options: BatchOptions) -> Summary:
    """`run` with an engine of the caller's, which is started and shut down."""
    async with _application(engine, config) as session:
        started = time.monotonic()
        num_answered, num_failed = await _answer_file(session, options)
    return Summary(num_answered, num_failed, time.monotonic() - started)


@contextlib.asynccontextmanager
async def _application(engine: AsyncEngine, config: ServerConfig) -> AsyncIterator[aiohttp.ClientSession]:
    """The server's application on a socket of its own, its engine ready, and a client for it."""
    runner = make_runner(make_app(ServerState(engine, config, read_chat_template(config))), config)
    headers = {"Content-Type": "application/json"}
    if keys := api_keys(config):
        headers["Authorization"] = f"Bearer {keys[0]}"
    with tempfile.TemporaryDirectory(prefix="qjax-") as folder:
        socket = str(Path(folder) / "socket")
        await runner.setup()
        try:
            await web.UnixSite(runner, socket).start()
            engine.start()
            await engine.wait_ready()
            connector, no_limit = aiohttp.UnixConnector(socket, limit=0), aiohttp.ClientTimeout()
            async with aiohttp.ClientSession(
                "http://localhost", connector=connector, headers=headers, timeout=no_limit
            ) as session:
                yield session
        finally:
            await runner.cleanup()
            if engine.phase in ("ready", "stopping"):  # else its thread is inside a download or a compiler
                await engine.shutdown()


async def _answer_file(session: aiohttp.ClientSession, options: BatchOptions) -> tuple[int, int]:
    """Returns how many lines were answered and how many failed."""
    counts, reason = (0, 0), None
    try:
        with (
            # half a surrogate pair of a custom_id becomes the JSON escape that it came as
            open(options.output_file, "w", encoding="utf-8", errors="backslashreplace") as out,
            tqdm(total=_count_lines(options.input_file), desc="Requests", disable=None) as progress,
        ):
            counts = await _answer_all(session, options, out, progress)
    except* OSError as errors:
        reason = str(errors.exceptions[0])
    if reason is not None:
        raise ValueError(f"output_file {options.output_file!r} cannot be written: {reason}.")
    return counts


async def _answer_all(
    session: aiohttp.ClientSession, options: BatchOptions, out: IO[str], progress: tqdm
) -> tuple[int, int]:
    """Sends all lines, so many at a time, and writes results in the order of the lines as soon as they are known."""
    room = asyncio.Semaphore(options.max_inflight)
    results: asyncio.Queue[asyncio.Task[dict[str, Any]] | None] = asyncio.Queue()
    counts = [0, 0]

    async def answer(line: BatchLine | ApiError, custom_id: str | None) -> dict[str, Any]:
        try:
            return await _send(session, line) if isinstance(line, BatchLine) else _result(custom_id, None, line.body)
        finally:
            room.release()
            progress.update()

    async def write() -> None:
        while (task := await results.get()) is not None:
            result = await task
            out.write(encode_json(result) + "\n")
            out.flush()
            counts[result["error"] is not None] += 1

    async with asyncio.TaskGroup() as group:  # a full disk ends everything
        group.create_task(write())
        for line, custom_id in _read_lines(options.input_file):
            await room.acquire()
            results.put_nowait(group.create_task(answer(line, custom_id)))
        results.put_nowait(None)
    return counts[0], counts[1]


def _read_lines(path: str) -> Iterator[tuple[BatchLine | ApiError, str | None]]:
    """Each line as a request, or as what is wrong with it, and its `custom_id` if it has one."""
    seen: set[str] = set()
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            given: Any = None
            try:
                given = json.loads(text)
                line = parse(BatchLine, given)
                if line.custom_id in seen:
                    raise bad_request("custom_id must be of this line alone.", "custom_id", line.custom_id)
                seen.add(line.custom_id)
                yield line, line.custom_id
            except ApiError as error:
                custom_id = given.get("custom_id") if isinstance(given, dict) else None
                message = f"Line {number}: {error}"
                yield bad_request(message, error.param), custom_id if isinstance(custom_id, str) else None
            except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
                yield bad_request(f"Line {number} is not valid JSON: {error}."), None


async def _send(session: aiohttp.ClientSession, line: BatchLine) -> dict[str, Any]:
    try:
        async with session.post(line.url, data=json.dumps(line.body)) as response:
            body = await response.json()
    except (aiohttp.ClientError, ValueError) as error:
        return _result(line.custom_id, None, {"error": {"message": f"The request failed: {error}", "code": 500}})
    request_id = response.headers.get("X-Request-Id") or f"req-{uuid.uuid4().hex}"
    answer = {"status_code": response.status, "request_id": request_id, "body": body}
    return _result(line.custom_id, answer, body if response.status >= 400 else None)


def _result(custom_id: str | None, response: dict[str, Any] | None, failure: dict[str, Any] | None) -> dict[str, Any]:
    """A line of the output file. `error` is the API's error object, null where the request was answered."""
    error = failure and failure.get("error", failure)
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}


def _count_lines(path: str) -> int:
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())
