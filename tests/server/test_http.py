"""What HTTP itself asks for: ids, CORS, TLS, a unix socket, limits, and errors of the parser."""

import asyncio
import json
import ssl
import subprocess

import aiohttp
import pytest

from qjax.config import ServerConfig
from qjax.server.lifecycle import Stop, serve
from tests.server.fake_engine import FakeEngine
from tests.server.test_errors import error_of

HI = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PAGE = {"Origin": "https://page.example"}


async def raw(server, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """What the server answers to these bytes: status, headers in lower case, body; it must close the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}, body


class TestRequestId:
    async def test_it_is_the_clients_own_on_every_response(self, server):
        own = {"X-Request-Id": "my-id.1"}
        for path in ("/health", "/v1/models", "/nothing", CHAT):
            _, _, headers = await server.get(path, headers=own)
            assert headers["X-Request-Id"] == "my-id.1"
        for body in ({"messages": HI}, {"messages": HI, "stream": True}, {"messages": 3}):
            async with server.session.post(server.url + CHAT, json=body, headers=own) as response:
                assert response.headers["X-Request-Id"] == "my-id.1"
                text = await response.text()
                assert response.status == 400 or '"chatcmpl-my-id.1"' in text

    async def test_else_a_random_one_and_the_answer_has_it_too(self, server):
        ids = [(await server.get("/health"))[2]["X-Request-Id"] for _ in range(2)]
        assert len({*ids}) == 2 and all(len(i) == 32 for i in ids)
        _, body, headers = await server.post(TEXT, {"prompt": "x"})
        assert body["id"] == "cmpl-" + headers["X-Request-Id"]

    async def test_what_is_no_id_is_not_sent_back(self, server):
        bad = {"X-Request-Id": "a b<script>"}
        status, _, headers = await server.get("/health", headers=bad)
        assert status == 200 and "script" not in headers["X-Request-Id"]
        status, body, headers = await server.post(CHAT, {"messages": HI}, headers=bad)
        assert status == 200 and body["id"] == "chatcmpl-" + headers["X-Request-Id"] and "script" not in body["id"]


class TestParser:
    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (b"what is this\r\n\r\n", 400),
            (b"GET /health HTTP/9.9\r\n\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 400),  # TLS to the plain port
            (b"GET /health HTTP/1.1\r\nHost: x\r\nNo colon\r\n\r\n", 400),
            (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -3\r\n\r\n", 400),
            (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
            (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 9000 + b"\r\n\r\n", 431),
            (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n", 400),
        ],
    )
    async def test_what_is_no_http_gets_the_error_object_too(self, server, data, expected):
        status, headers, body = await raw(server, data)
        type = "BadRequestError" if expected == 400 else "RequestHeaderFieldsTooLargeError"
        assert status == expected and error_of(json.loads(body), expected, type)
        assert headers["content-type"].startswith("application/json") and headers["x-request-id"]
        assert (await server.get("/health"))[0] == 200

    async def test_a_body_that_breaks_off_in_its_encoding(self, server):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        status, _, body = await raw(server, head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n")
        assert status == 400 and error_of(json.loads(body), 400)

    async def test_the_limits_are_options(self, start):
        server = await start({"max_header_size": 20_000, "max_header_count": 300})
        many = {f"A{i}": "b" for i in range(200)}
        assert (await server.get("/health", headers={**many, "Long": "x" * 15_000}))[0] == 200

    async def test_expect(self, server):
        body = json.dumps({"prompt": "x"}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        head += f"Content-Length: {len(body)}\r\n".encode()
        status, _, rest = await raw(server, head + b"Expect: 100-continue\r\n\r\n" + body)
        assert status == 100 and rest.startswith(b"HTTP/1.1 200 OK")
        status, _, got = await raw(server, head + b"Expect: wonders\r\n\r\n" + body)
        assert status == 417 and "wonders" in error_of(json.loads(got), 417, "ExpectationFailedError")


class TestCors:
    def asks(self, method="POST", headers="authorization, content-type", origin="https://page.example"):
        asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
        return {"Origin": origin, **asked}

    async def preflight(self, server, **options):
        async with server.session.options(server.url + CHAT, headers=self.asks(**options)) as response:
            return response.status, response.headers, await response.text()

    async def test_it_is_off_by_default(self, server):
        status, headers, text = await self.preflight(server)
        assert status == 405 and error_of(json.loads(text), 405, "MethodNotAllowedError")
        _, _, more = await server.get("/health", headers=PAGE)
        assert not [name for name in [*headers, *more] if name.lower().startswith("access-control")]

    async def test_an_allowed_page(self, start):
        server = await start({"allowed_origins": ["https://page.example", "http://localhost:3000"], "api_key": ["k"]})
        status, headers, _ = await self.preflight(server)  # without the key
        assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://page.example"
        assert "POST" in headers["Access-Control-Allow-Methods"] and headers["Vary"] == "Origin"
        assert headers["Access-Control-Allow-Headers"] == "authorization, content-type"
        key = {"Authorization": "Bearer k"}
        for path, given in (("/v1/models", key), ("/v1/models", {}), ("/nothing", key)):  # errors can be read too
            _, _, headers = await server.get(path, headers={**PAGE, **given})
            assert headers["Access-Control-Allow-Origin"] == "https://page.example"
            assert headers["Access-Control-Expose-Headers"] == "X-Request-Id"
        _, _, headers = await server.get("/health", headers={"Origin": "https://other.example"})
        assert "Access-Control-Allow-Origin" not in headers and headers["Vary"] == "Origin"

    async def test_what_is_refused_is_named(self, start):
        server = await start(
            {"allowed_origins": ["https://page.example"], "allowed_methods": ["POST"], "allowed_headers": ["A", "b"]}
        )
        assert (await self.preflight(server, headers="a,B"))[0] == 200
        for options, said in (
            ({"origin": "https://other.example"}, "--allowed-origins"),
            ({"method": "DELETE"}, "--allowed-methods"),
            ({"headers": "c"}, "--allowed-headers"),
        ):
            status, _, text = await self.preflight(server, **{"headers": "a", **options})
            assert status == 400 and said in error_of(json.loads(text), 400)

    async def test_all_pages_with_and_without_credentials(self, start):
        server = await start({"allowed_origins": ["*"]})
        async with server.session.post(
            server.url + CHAT, json={"messages": HI, "stream": True}, headers=PAGE
        ) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "*"
        server = await start({"allowed_origins": ["*"], "allow_credentials": True})
        _, _, headers = await server.get("/health", headers=PAGE)
        assert headers["Access-Control-Allow-Origin"] == "https://page.example"
        assert headers["Access-Control-Allow-Credentials"] == "true"


class TestSockets:
    @pytest.fixture
    def pem(self, tmp_path):
        key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost", "-days", "1"]
        try:
            subprocess.run([*command, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("openssl is not installed")
        return {"ssl_keyfile": str(key), "ssl_certfile": str(certificate)}

    async def served(self, tokenizer, capsys, **options):
        stop = Stop()
        task = asyncio.ensure_future(
            serve(FakeEngine(tokenizer), ServerConfig(port=0, host="localhost", **options), stop)
        )
        line = ""
        while not line and not task.done():
            await asyncio.sleep(0.01)
            line = capsys.readouterr().out
        return stop, task, line

    async def test_https(self, tokenizer, capsys, pem):
        stop, task, line = await self.served(tokenizer, capsys, **pem)
        url = next(word for word in line.split() if word.startswith("https://localhost:"))
        trust = ssl.create_default_context(cafile=pem["ssl_certfile"])
        async with aiohttp.ClientSession() as session, session.get(f"{url}/health", ssl=trust) as response:
            assert response.status == 200
        stop.ask()
        assert await task == 0

    async def test_https_with_clients_certificates(self, tokenizer, capsys, pem):
        stop, task, line = await self.served(
            tokenizer, capsys, ssl_ca_certs=pem["ssl_certfile"], ssl_cert_reqs=2, **pem
        )
        url = next(word for word in line.split() if word.startswith("https://localhost:"))
        trust = ssl.create_default_context(cafile=pem["ssl_certfile"])
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"{url}/health", ssl=trust)
            trust.load_cert_chain(pem["ssl_certfile"], pem["ssl_keyfile"])
            async with session.get(f"{url}/health", ssl=trust) as response:
                assert response.status == 200
        stop.ask()
        assert await task == 0

    async def test_a_wrong_certificate_is_named(self, tokenizer, tmp_path, pem):
        (tmp_path / "no.pem").write_text("no certificate")
        for wrong, said in (
            ({**pem, "ssl_certfile": str(tmp_path / "no.pem")}, "--ssl-certfile"),
            ({**pem, "ssl_keyfile": "/no/such"}, "--ssl-keyfile"),
            ({**pem, "ssl_ca_certs": str(tmp_path / "no.pem")}, "--ssl-ca-certs"),
        ):
            with pytest.raises(ValueError, match=said):
                await serve(FakeEngine(tokenizer), ServerConfig(host="127.0.0.1", port=0, **wrong), Stop())

    async def test_a_unix_socket(self, tokenizer, capsys, tmp_path):
        path = str(tmp_path / "qjax.sock")
        stop, task, line = await self.served(tokenizer, capsys, uds=path)
        assert f"curl --unix-socket {path} http://localhost/v1/chat/completions" in line
        connector = aiohttp.UnixConnector(path)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post("http://localhost" + CHAT, json={"messages": HI}) as response,
        ):
            assert response.status == 200
        with pytest.raises(ValueError, match="--uds"):
            await serve(FakeEngine(tokenizer), ServerConfig(uds="/no/such/folder/x.sock"), Stop())
        stop.ask()
        assert await task == 0

    async def test_a_prefix_of_a_proxy(self, start):
        server = await start({"root_path": "/a/b", "api_key": ["k"]})
        for prefix in ("", "/a/b"):
            assert (await server.get(prefix + "/health"))[0] == 200
            assert (await server.get(prefix + "/v1/models"))[0] == 401
            assert (await server.get(prefix + "/v1/models", headers={"Authorization": "Bearer k"}))[0] == 200


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"root_path": "a/"}, "root_path"),
        ({"ssl_keyfile": "x"}, "ssl_certfile"),
        ({"ssl_ca_certs": "x"}, "ssl_certfile"),
        ({"ssl_keyfile": "x", "ssl_certfile": "x", "ssl_cert_reqs": 2}, "ssl_ca_certs"),
        ({"ssl_cert_reqs": 3}, "0, 1 or 2"),
        ({"allowed_origins": ["example.org"]}, "https://example.org"),
        ({"allowed_origins": ['["*"]']}, "allowed_origins"),
        ({"allow_credentials": True}, "allowed_origins"),
        ({"max_num_queued_reqs": -1}, "max_num_queued_reqs"),
        ({"max_body_size": "0"}, "max_body_size"),
        ({"watchdog_timeout": -1}, "watchdog_timeout"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        ServerConfig(**options)
