"""Every field with every kind of wrong value: refused by name, or understood; never a crash."""

import dataclasses
import json
from pathlib import Path
from typing import get_type_hints

import pytest

from qjax.sampling_params import SamplingParams
from qjax.server import protocol
from qjax.server.errors import ApiError
from qjax.server.protocol import ChatRequest, CompletionRequest
from qjax.server.schema import describe, parse

DEEP = json.loads("[" * 700 + "]" * 700)
VALUES = [
    *(True, False, 0, 1, -1, 7, 2**63, -(2**63) - 1, 10**400, 0.5, 1.0, -3.5, float("inf"), "", "x", "1", "\ud83d"),
    *([], [1], ["x"], [None], [[1]], [["x"]], [True], [1.5], {}, {"x": 1}, {"1": 1}, {"1": "x"}, {"1": None}, DEEP),
]
MINIMAL = {ChatRequest: {"messages": [{"role": "user", "content": "x"}]}, CompletionRequest: {"prompt": "x"}}


@pytest.mark.parametrize("cls", [ChatRequest, CompletionRequest])
def test_any_value_of_any_field_is_understood_or_refused_by_name(cls):
    names = [f.name for f in dataclasses.fields(cls)]
    for name in [*names, *cls.REFUSED, *cls.NO_EFFECT, "nonsense"]:
        for value in VALUES:
            try:
                request = parse(cls, {**MINIMAL[cls], "stream": name == "stream_options", name: value})
                assert isinstance(request.sampling_params({}), SamplingParams)
            except ApiError as error:
                assert error.status == 400 and error.param is not None
                json.dumps(error.body)
                assert name in error.param or name in str(error) or error.param in ("max_tokens", "min_tokens")


@pytest.mark.parametrize("body", [None, 3, "x", [], True])
def test_a_body_that_is_no_object(body):
    with pytest.raises(ApiError, match="The body must be a JSON object"):
        parse(ChatRequest, body)


def test_all_sampling_params_can_be_sent():
    missing = {f.name for f in dataclasses.fields(SamplingParams)}
    for cls in (ChatRequest, CompletionRequest):
        assert missing <= {f.name for f in dataclasses.fields(cls)}


OPENAI_CHAT = """messages model audio frequency_penalty function_call functions logit_bias logprobs
max_completion_tokens max_tokens metadata modalities moderation n parallel_tool_calls prediction presence_penalty
prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier seed
service_tier stop store stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity
web_search_options"""
OPENAI_TEXT = """model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
stream stream_options suffix temperature top_p user"""
VLLM = """top_k min_p repetition_penalty use_beam_search length_penalty stop_token_ids include_stop_str_in_output
ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
prompt_logprobs logprob_token_ids allowed_token_ids bad_words watermarking thinking_token_budget echo add_special_tokens
structured_outputs priority request_id session_id return_tokens_as_token_ids return_token_ids return_weight_versions
cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval
routed_experts_prompt_start return_token_offsets guided_json guided_regex guided_choice guided_grammar
guided_decoding_backend response_format"""
VLLM_CHAT = """include_reasoning add_generation_prompt continue_final_message documents chat_template
chat_template_kwargs return_prompt_text media_io_kwargs mm_processor_kwargs mm_payload"""


def test_all_fields_of_openai_and_vllm_are_known():
    for cls, names in (
        (ChatRequest, " ".join((OPENAI_CHAT, VLLM, VLLM_CHAT))),
        (CompletionRequest, f"{OPENAI_TEXT} {VLLM}"),
    ):
        known = {f.name for f in dataclasses.fields(cls)} | cls.REFUSED.keys() | cls.NO_EFFECT.keys()
        assert set(names.split()) - known == set()


@pytest.mark.parametrize("cls", [ChatRequest, CompletionRequest])
def test_each_field_is_described_and_in_one_table_only(cls):
    names = {f.name for f in dataclasses.fields(cls)}
    assert not names & cls.REFUSED.keys() and not names & cls.NO_EFFECT.keys()
    assert not cls.REFUSED.keys() & cls.NO_EFFECT.keys()
    hints = get_type_hints(cls)
    assert all(f.metadata["help"] and describe(hints[f.name]) for f in dataclasses.fields(cls))


def test_defaults_are_the_requests_then_the_models_then_openais():
    model = {"temperature": 0.6, "top_k": 20, "unknown": 1}
    params = parse(ChatRequest, {**MINIMAL[ChatRequest], "top_k": 0}).sampling_params(model)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.6, 0, 1.0, None)


def test_the_server_imports_no_jax():
    import subprocess
    import sys

    code = "import sys, qjax.server.lifecycle; sys.exit('jax' in sys.modules or 'transformers' in sys.modules)"
    root = Path(protocol.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
