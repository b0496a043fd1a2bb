"""The model that ships: it is whole, answers as transformers does, and serves without arguments."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import qjax
from qjax import LLM, SamplingParams
from qjax.checkpoint import hub
from tests.server.conftest import free_port

FOLDER = Path(qjax.__file__).parent / "builtin_model"
GOLDEN = json.loads((Path(__file__).parent / "golden/builtin_model.json").read_text())["cases"]


@pytest.fixture(scope="module")
def llm():
    return LLM(dtype="float32", max_model_len=1024)


def test_it_is_the_default_and_found_by_name(llm):
    assert hub.resolve("builtin") == FOLDER
    assert llm.engine.model_config.num_params == 9_442_560
    assert llm.engine.model_config.architecture == "Qwen3ForCausalLM"


def test_greedy_answers_equal_transformers(llm):
    assert len(GOLDEN) == 20
    prompts = []
    for case in GOLDEN:
        options = {"enable_thinking": False} if case.get("enable_thinking") is False else {}
        prompts.append(llm.get_tokenizer().apply_chat_template(case["messages"], tools=case.get("tools"), **options))
        assert prompts[-1] == case["prompt"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=256), use_tqdm=False)
    for case, output in zip(GOLDEN, outputs, strict=True):
        assert output.outputs[0].token_ids == case["answer_ids"]
        assert output.outputs[0].text == case["answer"]
        assert output.outputs[0].finish_reason == "stop"


def test_it_thinks_calls_tools_and_writes_json(llm):
    greedy = SamplingParams(temperature=0.0, max_tokens=200)
    parsed = llm.chat([{"role": "user", "content": "What is 17 + 25?"}], greedy, use_tqdm=False, parse=True)
    message = parsed[0].outputs[0].message
    assert message["content"] == "17 + 25 = 42" and message["reasoning"]
    case = next(c for c in GOLDEN if c.get("tools"))
    called = llm.chat(case["messages"], greedy, use_tqdm=False, tools=case["tools"], parse=True)
    call = called[0].outputs[0].message["tool_calls"][0]["function"]
    assert call["name"] == "get_weather" and json.loads(call["arguments"]) == {"city": "Oslo"}


@pytest.mark.timeout(120)
def test_serve_without_arguments_answers():
    port = free_port()
    command = [sys.executable, "-m", "qjax", "serve", "--host", "127.0.0.1", "--port", str(port)]
    started = time.monotonic()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        try:
            assert "qjax serves builtin" in server.stdout.readline()
            body = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            message = json.load(urllib.request.urlopen(request, timeout=100))["choices"][0]["message"]
            print(f"from the command to the first answer: {time.monotonic() - started:.1f} s")
            assert re.search(r"\b42\b", message["content"]) and message["reasoning"]
        finally:
            server.kill()
