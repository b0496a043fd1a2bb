import json
from pathlib import Path

import pytest

from qjax.text.tokenizer import Tokenizer
from tests.text.make_golden import RENDERINGS, USER, WEATHER_TOOL
from tests.text.small_tokenizer import NUM_ADDED, write_small_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "qwen3.json").read_text(encoding="utf-8"))
TEXTS = [case["text"] for case in GOLDEN["encodings"]]


def render(tokenizer, **case):
    return tokenizer.apply_chat_template(case.pop("messages"), **case)


class TestOfficial:
    @pytest.mark.parametrize("case", GOLDEN["encodings"], ids=lambda c: ascii(c["text"][:12]))
    def test_encodes_as_transformers_did(self, official, case):
        assert official.encode(case["text"]) == case["ids"]

    @pytest.mark.parametrize("case", GOLDEN["renderings"], ids=lambda c: c["name"])
    def test_renders_and_encodes_chats_as_transformers_did(self, official, case):
        text = render(official, **RENDERINGS[case["name"]])
        assert text == case["text"]
        assert official.encode(text) == case["ids"]

    def test_knows_its_size_and_its_special_tokens(self, official):
        assert (len(official), official.eos_token_id) == (151669, 151645)
        assert official.special_token_ids == frozenset(range(151643, 151657))

    def test_bytes_of_all_tokens_agree_with_decode(self, official):
        ids = list(range(0, len(official), 97))
        assert official.decode(ids, skip_special_tokens=False) == official._hf.decode(ids)


class TestTemplate:
    """The small tokenizer carries the official template, so the golden renderings hold for it."""

    @pytest.mark.parametrize("case", GOLDEN["renderings"], ids=lambda c: c["name"])
    def test_renders_as_transformers_did(self, tokenizer, case):
        assert render(tokenizer, **RENDERINGS[case["name"]]) == case["text"]

    def test_parts_are_joined_where_the_template_would_drop_them(self, tokenizer):
        parts = [{"type": "text", "text": "Give me "}, {"type": "text", "text": USER[0]["content"][8:]}]
        assert render(tokenizer, messages=[{"role": "user", "content": parts}]) == render(tokenizer, messages=USER)

    @pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
    def test_both_names_of_reasoning_reach_the_template(self, tokenizer, name):
        text = render(tokenizer, messages=[*USER, {"role": "assistant", "content": "Yes.", name: "Because."}])
        assert "<think>\nBecause.\n</think>\n\nYes." in text

    def test_tool_arguments_as_json_text_equal_those_as_an_object(self, tokenizer):
        def call(arguments):
            calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
            return [*USER, {"role": "assistant", "content": None, "tool_calls": calls}]

        text = render(tokenizer, messages=call('{"city":"Tromsø","n":1}'))
        assert text == render(tokenizer, messages=call({"city": "Tromsø", "n": 1}))
        assert '{"name": "f", "arguments": {"city": "Tromsø", "n": 1}}' in text
        assert '"arguments": {"city": }' in render(tokenizer, messages=call('{"city": }'))  # broken: as it came

    def test_the_callers_messages_are_left_alone(self, tokenizer):
        messages = [*USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}], "reasoning": "y"}]
        before = json.dumps(messages)
        render(tokenizer, messages=messages, tools=[WEATHER_TOOL])
        assert json.dumps(messages) == before

    @pytest.mark.parametrize(
        ("messages", "said"),
        [
            ([], "non-empty list"),
            ("hi", "non-empty list"),
            (["hi"], r"messages\[0\] must be an object"),
            ([{"role": "robot", "content": "x"}], r"messages\[0\].role must be one of .* got 'robot'"),
            ([{"role": "user"}], r"messages\[0\].content must be a string"),
            ([{"role": "user", "content": 3}], r"messages\[0\].content must be .* got 3"),
            ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url': the model reads"),
            ([*USER, {"role": "assistant", "tool_calls": [{}]}], r"messages\[1\].tool_calls\[0\] must have a function"),
        ],
    )
    def test_bad_messages_are_refused_by_name(self, tokenizer, messages, said):
        with pytest.raises(ValueError, match=said):
            render(tokenizer, messages=messages)

    def test_the_templates_own_refusal_is_passed_on(self, tokenizer):
        with pytest.raises(ValueError, match="no cats allowed"):
            render(tokenizer, messages=USER, chat_template="{{ raise_exception('no cats allowed') }}")
        with pytest.raises(ValueError, match="chat template"):
            render(tokenizer, messages=USER, chat_template="{{ nothing.at.all }}")

    def test_template_variables_cannot_take_a_name_of_the_call(self, tokenizer):
        with pytest.raises(ValueError, match="cannot set 'tokenize'"):
            render(tokenizer, messages=USER, tokenize=True)


class TestSmall:
    @pytest.mark.parametrize("text", TEXTS, ids=ascii)
    def test_decode_agrees_with_transformers(self, tokenizer, text):
        ids = tokenizer.encode(text)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == tokenizer._hf.decode(ids, skip_special_tokens=skip)

    def test_ids_cut_inside_a_character_decode_as_transformers_does(self, tokenizer):
        ids = tokenizer.encode("☃🙂 日本")
        for start in range(len(ids)):
            for end in range(start + 1, len(ids) + 1):
                assert tokenizer.decode(ids[start:end]) == tokenizer._hf.decode(ids[start:end])

    def test_token_bytes(self, tokenizer):
        ids = tokenizer.encode("🙂x<think><|im_end|>")
        assert b"".join(tokenizer.token_bytes(i) for i in ids) == "🙂x<think><|im_end|>".encode()
        assert tokenizer.token_bytes(10**6) == tokenizer.token_bytes(-1) == b""
        assert tokenizer.decode([10**6, *tokenizer.encode("a"), -1]) == "a"
        assert tokenizer.token_text(tokenizer.encode("🙂")[-1]) == "\ufffd"

    def test_special_tokens(self, tokenizer):
        size = len(tokenizer)
        assert tokenizer.special_token_ids == frozenset(range(size - NUM_ADDED, size - 12))
        assert tokenizer.decode(tokenizer.encode("<|im_start|><think>")) == "<think>"

    def test_half_a_surrogate_pair_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="not valid Unicode"):
            tokenizer.encode("a\ud83d")

    def test_a_folder_without_tokenizer_files_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"holds no tokenizer.*tokenizer\.json.*--tokenizer"):
            Tokenizer.from_pretrained(tmp_path)

    def test_a_broken_file_is_named(self, tmp_path):
        folder = write_small_tokenizer(tmp_path / "broken")
        (folder / "tokenizer.json").write_text('{"version": "1.0", ')
        with pytest.raises(ValueError, match=r"broken cannot be read"):
            Tokenizer.from_pretrained(folder)

    def test_another_kind_of_tokenizer_is_refused(self, tmp_path):
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import WordLevel

        Backend(WordLevel({"two words": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        with pytest.raises(ValueError, match="not byte-level BPE"):
            Tokenizer.from_pretrained(tmp_path)

    def test_loading_does_not_disturb_logging(self, tokenizer, caplog):
        import logging

        assert logging.getLogger("transformers").filters == []
