"""The clients that people have, against a live server with the built-in model: openai, LangChain, lm-eval.

The Python examples of docs/api.md run here too.
"""

import asyncio
import json
import re
import threading
from pathlib import Path

import openai
import pydantic
import pytest

from qjax import EngineConfig
from qjax.checkpoint import hub
from tests.server.serving import serving

HELLO = [{"role": "user", "content": "What is 17 + 25?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# One request at a time in steps of two shapes: most of this file's time is compilation.
OPTIONS = {
    "max_model_len": 1024,
    "block_size": 128,
    "kv_cache_memory_bytes": "64MiB",
    "max_num_seqs": 1,
    "max_num_batched_tokens": 32,
    "override_generation_config": {"temperature": 0.0},  # of the examples, which name none
}
API = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
OTHER_MODELS = ("Embeddings and reranking",)  # their examples need other servers
EXAMPLES = {
    f"{section.partition('\n')[0]} {i}": code
    for section in API.split("\n## ")
    if not section.startswith(OTHER_MODELS)
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S))
}


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def url():
    """A server in a thread, for the length of the module."""
    ready, loop, addresses = threading.Event(), asyncio.new_event_loop(), []
    stop = asyncio.Event()

    async def run():
        try:
            async with serving(EngineConfig(**OPTIONS)) as (address, _):
                addresses.append(address)
                ready.set()
                await stop.wait()
        finally:
            ready.set()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    ready.wait()
    yield addresses[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()


class TestOpenAI:
    @pytest.fixture
    def client(self, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            yield client

    def test_models(self, client):
        assert [m.id for m in client.models.list()] == ["builtin"]
        assert client.models.retrieve("builtin").id == "builtin"
        with pytest.raises(openai.NotFoundError, match="The model `gpt` does not exist"):
            client.models.retrieve("gpt")

    def test_chat_and_stream(self, client):
        whole = client.chat.completions.create(model="builtin", messages=HELLO, temperature=0)
        message = whole.choices[0].message
        assert "42" in message.content and message.reasoning and whole.choices[0].finish_reason == "stop"
        with client.chat.completions.stream(model="builtin", messages=HELLO, temperature=0) as stream:
            texts = [event.delta for event in stream if event.type == "content.delta"]
            final = stream.get_final_completion()
        assert "".join(texts) == message.content == final.choices[0].message.content

    def test_tools_there_and_back(self, client):
        messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
        options = {"model": "builtin", "tools": [WEATHER], "temperature": 0}
        first = client.chat.completions.create(messages=messages, **options).choices[0]
        (call,) = first.message.tool_calls
        assert first.finish_reason == "tool_calls" and call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Oslo"}
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 7}'}
        second = client.chat.completions.create(messages=[*messages, first.message, result], **options).choices[0]
        assert second.finish_reason == "stop" and "7" in second.message.content
        with client.chat.completions.stream(messages=messages, **options) as stream:
            done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        assert [(event.name, json.loads(event.arguments)) for event in done] == [("get_weather", {"city": "Oslo"})]

    def test_structured_output(self, client):
        messages = [{"role": "user", "content": "Tom is 32 years old. Give name and age as JSON."}]
        answer = client.chat.completions.parse(
            model="builtin", messages=messages, response_format=Person, temperature=0, max_tokens=200
        )
        assert isinstance(answer.choices[0].message.parsed, Person)

    def test_completions_with_logprobs(self, client):
        prompts = ["The capital of France is", "One, two,"]
        answer = client.completions.create(
            model="builtin", prompt=prompts, max_tokens=3, logprobs=2, echo=True, temperature=0
        )
        assert [c.text.startswith(p) for c, p in zip(answer.choices, prompts, strict=True)] == [True, True]
        logprobs = answer.choices[0].logprobs
        assert logprobs.token_logprobs[0] is None and all(x <= 0 for x in logprobs.token_logprobs[1:])
        assert "".join(logprobs.tokens) == answer.choices[0].text
        assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
        assert answer.usage.completion_tokens == 6

    def test_errors_have_openais_classes(self, client):
        with pytest.raises(openai.BadRequestError, match="temperature must be in") as caught:
            client.chat.completions.create(model="builtin", messages=HELLO, temperature=3)
        assert caught.value.param == "temperature" and caught.value.type == "BadRequestError"


class TestLangChain:
    @pytest.fixture
    def chat(self, url):
        pytest.importorskip("langchain_openai")
        from langchain_openai import ChatOpenAI

        options = {"api_key": "none", "max_retries": 0, "temperature": 0, "timeout": 120, "max_tokens": 200}
        return ChatOpenAI(base_url=f"{url}/v1", model="builtin", **options)

    def test_invoke_and_stream(self, chat):
        whole = chat.invoke("What is 17 + 25?")
        assert "42" in whole.content and whole.usage_metadata["output_tokens"] > 0
        chunks = list(chat.stream("What is 17 + 25?"))
        assert "".join(chunk.content for chunk in chunks) == whole.content and len(chunks) > 3

    def test_bind_tools(self, chat):
        from langchain_core.messages import HumanMessage, ToolMessage

        bound = chat.bind_tools([WEATHER])
        question = HumanMessage("What is the weather in Oslo?")
        answer = bound.invoke([question])
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Oslo"})
        end = bound.invoke([question, answer, ToolMessage('{"temperature": 7}', tool_call_id=call["id"])])
        assert "7" in end.content
        merged = None
        for chunk in bound.stream([question]):
            merged = chunk if merged is None else merged + chunk
        assert [(c["name"], c["args"]) for c in merged.tool_calls] == [("get_weather", {"city": "Oslo"})]

    @pytest.mark.parametrize(
        ("method", "question"),
        [
            ("json_schema", "Tom is 32 years old. Give name and age as JSON."),
            ("function_calling", "Tom is 32 years old."),
        ],
    )
    def test_with_structured_output(self, chat, method, question):
        asked = chat.with_structured_output(Person, method=method, include_raw=True)
        answer = asked.invoke(question)
        assert isinstance(answer["parsed"], Person), answer


class TestExamples:
    def test_there_are_some(self):
        assert {"Chat 0", "Chat 1", "Chat 2", "Completions 0"} <= set(EXAMPLES)

    @pytest.mark.parametrize("name", EXAMPLES)
    def test_it_runs_as_it_stands(self, url, name, capsys):
        code = EXAMPLES[name]
        assert "http://localhost:8000" in code
        if "anthropic" in code:
            pytest.importorskip("anthropic")
        exec(compile(code.replace("http://localhost:8000", url), name, "exec"), {"__name__": "example"})
        assert capsys.readouterr().out.strip()


class TestLmEval:
    def test_local_completions(self, url, tmp_path):
        """The task needs `echo` with logprobs; each figure is compared with the server's own."""
        pytest.importorskip("lm_eval")
        from lm_eval import evaluator
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        data = tmp_path / "capitals.jsonl"
        rows = [("France", "Paris", "Oslo"), ("Norway", "Oslo", "Paris"), ("Italy", "Rome", "Berlin")]
        data.write_text("\n".join(json.dumps({"q": f"The capital of {c} is", "a": [x, y]}) for c, x, y in rows))
        task = ConfigurableTask(
            config={
                "task": "capitals",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path)},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": "{{a}}",
                "doc_to_target": 0,
                "metric_list": [{"metric": "acc"}],
            }
        )
        model = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model="builtin",
            tokenizer=str(hub.resolve("builtin")),
            tokenizer_backend="huggingface",
            num_concurrent=2,
            max_retries=1,
            max_length=512,
        )
        results = evaluator.evaluate(lm=model, task_dict={"capitals": task}, log_samples=True, bootstrap_iters=0)
        samples = results["samples"]["capitals"]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        for sample, (country, right, wrong) in zip(samples, rows, strict=True):
            for (loglikelihood, _), city in zip(sample["filtered_resps"], (right, wrong), strict=True):
                text = f"The capital of {country} is {city}"
                echoed = client.completions.create(model="builtin", prompt=text, max_tokens=0, echo=True, logprobs=1)
                logprobs = echoed.choices[0].logprobs
                begin = len(text) - len(city) - 1
                parts = zip(logprobs.text_offset, logprobs.token_logprobs, strict=True)
                assert loglikelihood == pytest.approx(sum(x for at, x in parts if at >= begin), abs=1e-3)
        assert results["results"]["capitals"]["acc,none"] == sum(s["acc"] for s in samples) / 3
