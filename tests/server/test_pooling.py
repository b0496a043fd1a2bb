"""Embeddings, scores and reranking over HTTP: a real engine's numbers, and a fake one's errors."""

import asyncio
import base64
import json
import re
import struct
from pathlib import Path

import aiohttp
import httpx
import numpy as np
import openai
import pytest

from qjax import LLM, EngineConfig, PoolingParams
from qjax.outputs import EmbeddingOutput, PoolingRequestOutput, ScoringOutput
from tests.engine.conftest import tiny_folder  # noqa: F401 (a fixture)
from tests.server.fake_engine import FakeEngine
from tests.server.serving import serving
from tests.server.test_errors import HI, error_of

OPTIONS = {"load_format": "dummy", "kv_cache_memory_bytes": "4MiB", "max_num_seqs": 8, "max_num_batched_tokens": 32}
OPTIONS["max_model_len"] = 256
RERANKER = {"hf_overrides": {"classifier_from_token": ["n", "y"]}}
CLOSE = {"rtol": 0, "atol": 1e-5}
END = 486  # <|endoftext|>
API = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
TEXTS = ["Hello", "What is the capital of Norway? " * 8, "One, two"]
EMBEDDINGS = "/v1/embeddings"


class PoolingFake(FakeEngine):
    """Gives the prompt's length, after `delay`."""

    kind = "embed"

    def __init__(self, tokenizer, **options):
        super().__init__(tokenizer, **options)
        self.pooling_kind = self.kind
        self.finish_reason = "stop"
        self.num_begun = 0

    async def encode(self, prompt_token_ids, params, request_id, *, priority=0, cache_salt=None):
        if priority:
            raise ValueError(f"priority={priority} needs --scheduling-policy priority.")
        if params.dimensions is not None and params.dimensions > 4:
            raise ValueError(f"dimensions must be at most 4, the model's hidden size, got {params.dimensions}.")
        self.calls.append((request_id, prompt_token_ids, params, priority, cache_salt))
        self.num_begun += 1
        try:
            await asyncio.sleep(self._delay)
        except asyncio.CancelledError:
            self.ends[request_id] = "cancelled"
            raise
        if self.finish_reason == "dead":
            self.die()
            raise RuntimeError("dead")
        length = len(prompt_token_ids)
        vector = np.array([length, 1, 0, 0], np.float32)
        outputs = EmbeddingOutput(vector) if self.kind == "embed" else ScoringOutput(1 / length)
        is_whole = self.finish_reason == "stop"
        return PoolingRequestOutput(request_id, prompt_token_ids, outputs if is_whole else None, 0, self.finish_reason)


class RerankingFake(PoolingFake):
    kind = "score"


@pytest.fixture
async def embedder(start, monkeypatch):
    monkeypatch.setattr("tests.server.conftest.FakeEngine", PoolingFake)
    return await start()


@pytest.fixture
async def reranker(start, monkeypatch):
    monkeypatch.setattr("tests.server.conftest.FakeEngine", RerankingFake)
    return await start()


async def run_example(index, url, capsys):
    """What the index-th Python example of the documentation prints."""
    section = re.search(r"^## Embeddings and reranking\n(.*?)(?=^## |\Z)", API, re.M | re.S)[1]
    code = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)[index]
    capsys.readouterr()
    await asyncio.to_thread(exec, code.replace("http://localhost:8000", url), {})
    return capsys.readouterr().out


async def post(url, path, body):
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as response:
        return response.status, await response.json()


async def refused(server, path, body, param=None):
    status, got, _ = await server.post(path, body)
    assert status == 400, got
    if param is not None:
        assert got["error"]["param"] == param
    return error_of(got, 400)


class TestRealEngine:
    async def test_embeddings(self, tiny_folder, capsys):  # noqa: F811
        llm = LLM(str(tiny_folder), runner="pooling", **OPTIONS)
        expected = np.array([o.outputs.embedding for o in llm.embed(TEXTS, use_tqdm=False)])
        config = EngineConfig(model=str(tiny_folder), runner="pooling", **OPTIONS)
        async with serving(config, served_model_name=["tiny"]) as (url, engine):
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            got = await client.embeddings.create(model="tiny", input=TEXTS)  # the client asks for base64
            np.testing.assert_allclose([d.embedding for d in got.data], expected, **CLOSE)
            assert [d.index for d in got.data] == [0, 1, 2] and got.model == "tiny" and got.object == "list"
            ids = [[*engine.tokenizer.encode(text), END] for text in TEXTS]
            assert got.usage.prompt_tokens == got.usage.total_tokens == sum(map(len, ids))

            by_ids = await client.embeddings.create(model="", input=ids, encoding_format="float")
            np.testing.assert_allclose([d.embedding for d in by_ids.data], expected, **CLOSE)
            (one,) = (await client.embeddings.create(model="", input=ids[0], encoding_format="float")).data
            np.testing.assert_allclose(one.embedding, expected[0], **CLOSE)

            short = await client.embeddings.create(model="", input=TEXTS[0], dimensions=8, encoding_format="float")
            wanted = expected[0, :8] / np.linalg.norm(expected[0, :8])
            np.testing.assert_allclose(short.data[0].embedding, wanted, **CLOSE)

            messages = [{"role": "user", "content": "Hello"}]
            status, chat = await post(url, EMBEDDINGS, {"messages": messages})
            text = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
            (as_text,) = llm.embed(text, use_tqdm=False)
            assert status == 200 and chat["id"].startswith("embd-")
            np.testing.assert_allclose(chat["data"][0]["embedding"], as_text.outputs.embedding, **CLOSE)

            query = {"query": "Hello", "documents": TEXTS}
            status, ranked = await post(url, "/rerank", query)
            assert [r["index"] for r in ranked["results"]] == np.argsort(-(expected @ expected[0])).tolist()
            assert ranked["results"][0]["relevance_score"] == pytest.approx(1.0, abs=1e-5)
            assert ranked["usage"]["prompt_tokens"] == len(ids[0]) + sum(map(len, ids))  # the query is read once

            status, body = await post(url, "/v1/chat/completions", {"messages": HI})
            assert status == 400 and "--runner generate" in error_of(body, 400)
            assert engine.num_unfinished == 0 and not engine.engine.has_work
            assert "/v1/embeddings" in capsys.readouterr().out, "the example that is printed"
            assert len(json.loads(await run_example(0, url, capsys))) == 2
            engine.engine.scheduler.check_integrity()

    async def test_scores_and_reranking(self, tiny_folder, capsys):  # noqa: F811
        llm = LLM(str(tiny_folder), **RERANKER, **OPTIONS)
        documents = ["Oslo", "Paris is a city.", "x"]
        expected = [o.outputs.score for o in llm.score("Which city?", documents, use_tqdm=False)]
        birds = [o.outputs.score for o in llm.score("q", documents, instruction="Birds", use_tqdm=False)]
        (logit,) = llm.score("q", "d", pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        async with serving(EngineConfig(model=str(tiny_folder), **RERANKER, **OPTIONS)) as (url, _):
            for path in ("/v1/score", "/score"):
                status, got = await post(url, path, {"text_1": "Which city?", "text_2": documents})
                assert status == 200 and [d["index"] for d in got["data"]] == [0, 1, 2]
                np.testing.assert_allclose([d["score"] for d in got["data"]], expected, **CLOSE)
            _, pairs = await post(url, "/score", {"queries": ["Which city?"] * 3, "documents": documents})
            np.testing.assert_allclose([d["score"] for d in pairs["data"]], expected, **CLOSE)
            _, got = await post(url, "/score", {"data_1": "q", "data_2": documents, "instruction": "Birds"})
            np.testing.assert_allclose([d["score"] for d in got["data"]], birds, **CLOSE)
            _, got = await post(url, "/score", {"text_1": "q", "text_2": "d", "use_activation": False})
            assert got["data"][0]["score"] == pytest.approx(logit.outputs.score, abs=1e-5)

            order = np.argsort(-np.array(expected)).tolist()
            for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
                status, got = await post(url, path, {"query": "Which city?", "documents": documents})
                assert status == 200 and [r["index"] for r in got["results"]] == order
                assert [r["document"]["text"] for r in got["results"]] == [documents[i] for i in order]
                np.testing.assert_allclose(
                    [r["relevance_score"] for r in got["results"]], sorted(expected)[::-1], **CLOSE
                )
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            body = {"query": "Which city?", "documents": documents}
            by_client = await client.post("/rerank", body=body, cast_to=httpx.Response)
            assert [r["index"] for r in by_client.json()["results"]] == order
            objects = {"query": "Which city?", "documents": [{"text": d} for d in documents], "top_n": 1}
            _, got = await post(url, "/rerank", {**objects, "return_documents": False})
            assert [set(r) for r in got["results"]] == [{"index", "relevance_score"}]
            assert got["results"][0]["index"] == order[0] and got["usage"]["prompt_tokens"] > 300
            assert "/v1/rerank" in capsys.readouterr().out
            assert "Oslo is the capital of Norway." in await run_example(1, url, capsys)


class TestEmbeddings:
    async def test_base64_is_little_endian_float32(self, embedder):
        status, got, headers = await embedder.post(EMBEDDINGS, {"input": "Hello", "encoding_format": "base64"})
        assert status == 200 and got["id"] == f"embd-{headers['X-Request-Id']}"
        assert struct.unpack("<4f", base64.b64decode(got["data"][0]["embedding"])) == (3.0, 1.0, 0.0, 0.0)

    async def test_what_reaches_the_engine(self, embedder):
        body = {"input": ["Hello", "Hi"], "cache_salt": "s", "request_id": "r", "dimensions": 2, "user": "me"}
        assert (await embedder.post(EMBEDDINGS, body))[0] == 200
        assert [call[0] for call in embedder.engine.calls] == ["embd-r-0", "embd-r-1"]
        assert embedder.engine.calls[0][1:] == ([393, 299, END], PoolingParams(dimensions=2), 0, "s")
        embedder.engine.calls.clear()
        cases = [
            ({"input": "Hello"}, [393, 299, END]),
            ({"input": "Hello", "add_special_tokens": False}, [393, 299]),
            ({"input": [393, 299]}, [393, 299]),
            ({"input": "Hello", "truncate_prompt_tokens": 2}, [393, END]),
            ({"input": "Hello", "truncate_prompt_tokens": 2, "truncation_side": "left"}, [299, END]),
            ({"input": [1, 2, 3], "truncate_prompt_tokens": 2}, [1, 2]),
            ({"input": [1] * 300, "truncate_prompt_tokens": -1}, [1] * 256),
        ]
        for body, ids in cases:
            status, got, _ = await embedder.post(EMBEDDINGS, body)
            assert status == 200, got
            assert embedder.engine.calls.pop()[1] == ids

    @pytest.mark.parametrize(
        ("body", "said", "param"),
        [
            ({}, "input is required", "input"),
            ({"input": ""}, "must not be empty", "input"),
            ({"input": []}, "must not be empty", "input"),
            ({"input": ["x", ""]}, "must not hold empty", "input"),
            ({"input": [[1], []]}, "must not hold empty", "input"),
            ({"input": ["x", 1]}, "input must be a string or a list of strings or", "input"),
            ({"input": {"text": "x"}}, "input must be", "input"),
            ({"input": [[520]]}, "0 to 519", "input"),
            ({"input": [-1]}, "0 to 519", "input"),
            ({"input": ["x"] * 2049}, "at most 2048 items, got 2049", "input"),
            ({"input": [1] * 257}, "maximum context length is 256 tokens. However, an input has 257", "input_tokens"),
            ({"input": "x", "dimensions": 0}, "dimensions must be at least 1", "dimensions"),
            ({"input": "x", "dimensions": 5}, "dimensions must be at most 4", "dimensions"),
            ({"input": "x", "dimensions": "4"}, "dimensions must be an integer", "dimensions"),
            ({"input": "x", "encoding_format": "bytes"}, '"float" or "base64"', "encoding_format"),
            ({"input": "x", "truncate_prompt_tokens": 0}, "must be -1, or from 1", "truncate_prompt_tokens"),
            ({"input": "x", "truncate_prompt_tokens": 257}, "context of 256", "truncate_prompt_tokens"),
            ({"input": "x", "embed_dtype": "float16"}, "embed_dtype is not supported", "embed_dtype"),
            ({"input": "x", "cache_salt": "a/b"}, "cache_salt must be", "cache_salt"),
            ({"input": "x", "request_id": "a b"}, "request_id must be", "request_id"),
            ({"input": "x", "priority": 1}, "--scheduling-policy priority", "priority"),
            ({"input": "x", "nonsense": 1}, "Unrecognized", "nonsense"),
            ({"input": "x\ud83d"}, "surrogate", None),
            ({"messages": []}, "non-empty list", "messages"),
            ({"messages": HI, "input": "x"}, "Unrecognized", "input"),
        ],
    )
    async def test_refusals(self, embedder, body, said, param):
        assert said in await refused(embedder, EMBEDDINGS, body, param)

    async def test_unknown_model(self, embedder):
        status, got, _ = await embedder.post(EMBEDDINGS, {"model": "nope", "input": "x"})
        assert status == 404 and error_of(got, 404, "NotFoundError")

    async def test_many_numbers(self, embedder, monkeypatch):
        monkeypatch.setattr("qjax.server.pooling.MANY_NUMBERS", 3)
        status, got, headers = await embedder.post(EMBEDDINGS, {"input": "Hello"})
        assert status == 200 and got["data"][0]["embedding"] == [3.0, 1.0, 0.0, 0.0]
        assert headers["Content-Type"].startswith("application/json")


class TestScores:
    @pytest.mark.parametrize(
        ("path", "body", "said", "param"),
        [
            ("/score", {"text_2": "x"}, "Exactly one of text_1, queries, data_1 is needed, got none", "text_1"),
            ("/score", {"text_1": "x", "queries": "x", "text_2": "x"}, "got ['text_1', 'queries']", "text_1"),
            ("/score", {"text_1": "x"}, "Exactly one of text_2, documents, data_2, items", "text_2"),
            ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "1:1, 1:N or N:N, got 2 queries", None),
            ("/score", {"text_1": "a", "text_2": []}, "At least one query and one document", None),
            ("/score", {"text_1": 1, "text_2": "a"}, "text_1 must be a string or a list of strings", "text_1"),
            ("/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 20}, "must be more than the", None),
            ("/score", {"text_1": "a", "text_2": "b", "chat_template_kwargs": {"x": 1}}, "use instruction", None),
            ("/rerank", {"documents": ["x"]}, "query is required", "query"),
            ("/rerank", {"query": "x"}, "documents is required: a list of strings or a list of objects", "documents"),
            ("/rerank", {"query": "x", "documents": []}, "At least one query and one document", None),
            ("/rerank", {"query": "x", "documents": [1]}, "documents must be", "documents"),
            ("/rerank", {"query": "x", "documents": [{"content": "x"}]}, "documents", None),
            ("/rerank", {"query": "x", "documents": ["x"], "top_n": -1}, "top_n must be at least 0", "top_n"),
            ("/rerank", {"query": "x", "documents": ["x"] * 2049}, "at most 2048 documents", "documents"),
            ("/rerank", {"query": "x", "documents": ["word " * 300]}, "maximum context length is 256", "input_tokens"),
        ],
    )
    async def test_refusals(self, reranker, path, body, said, param):
        assert said in await refused(reranker, path, body, param)
        assert not reranker.engine.calls

    async def test_long_documents_can_be_cut(self, reranker):
        tokenizer, long = reranker.engine.tokenizer, "word " * 300
        whole = {"query": "q", "documents": [long, "x"], "truncate_prompt_tokens": -1}
        assert (await reranker.post("/rerank", whole))[0] == 200
        first, second = (call[1] for call in reranker.engine.calls)
        assert len(first) == 256 and len(second) < 256
        assert tokenizer.decode(first).endswith("assistant\n<think>\n\n</think>\n\n")
        reranker.engine.calls.clear()
        limits = {"max_tokens_per_doc": 5, "max_tokens_per_query": 1}
        assert (await reranker.post("/rerank", {"query": "q w e", "documents": [long], **limits}))[0] == 200
        text = tokenizer.decode(reranker.engine.calls[0][1], skip_special_tokens=False)
        kept = tokenizer.decode(tokenizer.encode(long)[:5])
        assert f"<Query>: q\n<Document>: {kept}<|im_end|>" in text

    async def test_the_servers_own_template(self, start, monkeypatch, tmp_path):
        monkeypatch.setattr("tests.server.conftest.FakeEngine", RerankingFake)
        (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
        server = await start({"chat_template": str(tmp_path / "t.jinja")})
        assert (await server.post("/score", {"text_1": "a", "text_2": "b", "instruction": "c"}))[0] == 200
        assert server.engine.tokenizer.decode(server.engine.calls[0][1]) == "system=c;query=a;document=b;"

    async def test_results_are_sorted_and_ties_keep_their_order(self, reranker):
        body = {"query": "q", "documents": ["b", "a much longer text", "a"], "top_n": 2}
        _, got, headers = await reranker.post("/v1/rerank", body)
        assert [r["index"] for r in got["results"]] == [0, 2]  # the fake likes short prompts
        assert got["id"] == f"rerank-{headers['X-Request-Id']}"


class TestTheWrongKind:
    async def test_a_server_of_text(self, server):
        assert "--runner pooling" in await refused(server, EMBEDDINGS, {"input": "x"})
        assert "--runner pooling" in await refused(server, "/rerank", {"query": "x", "documents": ["x"]})

    async def test_a_reranker_embeds_nothing(self, reranker):
        assert "use /v1/score or /v1/rerank" in await refused(reranker, EMBEDDINGS, {"input": "x"})

    async def test_a_cosine_has_no_logit(self, embedder):
        body = {"text_1": "a", "text_2": "b", "use_activation": False}
        assert "cosine" in await refused(embedder, "/score", body, "use_activation")


class TestFaults:
    @pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 503), ("dead", 500)])
    async def test_the_engine_fails(self, embedder, reason, status):
        embedder.engine.finish_reason = reason
        got_status, got, _ = await embedder.post(EMBEDDINGS, {"input": ["x", "y"]})
        assert got_status == status and set(got["error"]) == {"message", "type", "param", "code"}
        assert "secret" not in json.dumps(got)

    async def test_a_client_that_goes_away_ends_all(self, start, monkeypatch):
        monkeypatch.setattr("tests.server.conftest.FakeEngine", PoolingFake)
        server = await start(delay=30.0)
        task = asyncio.ensure_future(server.post(EMBEDDINGS, {"input": ["a", "b", "c"]}))
        while server.engine.num_begun < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        for _ in range(500):
            if len(server.engine.ends) == 3:
                break
            await asyncio.sleep(0.01)
        assert set(server.engine.ends.values()) == {"cancelled"} and len(server.engine.ends) == 3
        assert (await server.get("/load"))[1]["server_load"] == 0
