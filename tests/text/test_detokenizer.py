import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.sampling_params import SamplingParams
from qjax.text.detokenizer import Detokenizer

PIECES = [
    "a",
    "ab",
    "</",
    "think>",
    "<think>",
    "<|im_end|>",
    "STOP",
    "ST",
    "🙂",
    "👩‍🚀",
    "日本",
    "é",
    "\n",
    " ",
    "\u2028",
]
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=12).map("".join)
STOPS = st.lists(
    st.one_of(st.sampled_from(["STOP", "ab", "aa", "aab", "</", "🙂", "本"]), st.text(min_size=1)), max_size=4
)


def encodable(text):
    return not any(0xD800 <= ord(c) < 0xE000 for c in text)


def splits(data, ids):
    """The ids in consecutive parts of random lengths, empty ones too."""
    parts = []
    while ids:
        n = data.draw(st.integers(0, 4))
        parts.append(ids[:n])
        ids = ids[n:]
    return parts


def run(tokenizer, parts, min_tokens=0, **params):
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=None, **params))
    num, texts = 0, []
    for part in parts:
        num += len(part)
        texts.append(detokenizer.append(part, num >= min_tokens))
    return [*texts, detokenizer.flush()], detokenizer


def earliest(text, stops):
    """(end, stop) of the stop string that completes first, by looking at the whole text; list order breaks ties."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end, stop
    return None


@settings(max_examples=80, deadline=None)
@given(text=TEXT.filter(encodable), skip=st.booleans(), data=st.data())
def test_streamed_text_is_the_whole_text(tokenizer, text, skip, data):
    ids = tokenizer.encode(text)
    texts, _ = run(tokenizer, splits(data, ids), skip_special_tokens=skip)
    assert "".join(texts) == tokenizer._hf.decode(ids, skip_special_tokens=skip)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 520), max_size=30), data=st.data())
def test_any_token_ids_decode_as_the_tokenizer_does(tokenizer, ids, data):
    texts, _ = run(tokenizer, splits(data, ids))
    assert "".join(texts) == tokenizer._hf.decode(ids, skip_special_tokens=True)


@settings(max_examples=120, deadline=None)
@given(text=TEXT.filter(encodable), stops=STOPS.filter(lambda s: all(map(encodable, s))), data=st.data())
def test_stop_strings(tokenizer, text, stops, data):
    ids, keep = tokenizer.encode(text), data.draw(st.booleans())
    whole = tokenizer.decode(ids)
    texts, detokenizer = run(tokenizer, splits(data, ids), stop=stops, include_stop_str_in_output=keep)
    found = earliest(whole, stops)
    if found is None:
        assert "".join(texts) == whole and detokenizer.stop_match is None and detokenizer.num_tokens == len(ids)
    else:
        end, stop = found
        assert detokenizer.stop_match == stop
        assert "".join(texts) == whole[: end if keep else end - len(stop)]
        assert stop in tokenizer.decode(ids[: detokenizer.num_tokens])


@settings(max_examples=80, deadline=None)
@given(text=TEXT.filter(encodable), stops=STOPS.filter(lambda s: all(map(encodable, s))), data=st.data())
def test_no_beginning_of_a_stop_string_leaks(tokenizer, text, stops, data):
    """What is out is all that no continuation can make part of a stop string: not a character more or less."""
    parts = splits(data, tokenizer.encode(text))
    texts, _ = run(tokenizer, parts, stop=stops)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    seen = out = ""
    for part, released in zip(parts, texts, strict=False):
        seen += decoder.decode(b"".join(tokenizer.bytes_table(True)[i] for i in part))
        out += released
        if earliest(seen, stops):
            break
        num_held = max((n for s in stops for n in range(1, len(s)) if seen.endswith(s[:n])), default=0)
        assert out == seen[: len(seen) - num_held]


def test_incomplete_characters_wait_for_their_bytes(tokenizer):
    ids = tokenizer.encode("☃!")
    assert len(ids) == 4  # the snowman is three tokens, no merge knows it
    texts, _ = run(tokenizer, [[i] for i in ids])
    assert texts == ["", "", "☃", "!", ""]
    texts, _ = run(tokenizer, [[i] for i in ids[:2]])
    assert texts == ["", "", "\ufffd"]


def test_a_stop_string_across_tokens_leaks_nothing(tokenizer):
    ids = [i for c in "go </stop> on" for i in tokenizer.encode(c)]
    texts, detokenizer = run(tokenizer, [[i] for i in ids], stop="</stop>")
    assert texts == ["g", "o", " ", *[""] * 10, ""]
    assert detokenizer.stop_match == "</stop>"
    assert detokenizer.num_tokens == len("go </stop>")


def test_a_beginning_that_turns_out_to_be_none_is_released(tokenizer):
    ids = [i for c in "</stp" for i in tokenizer.encode(c)]
    texts, _ = run(tokenizer, [[i] for i in ids], stop="</stop>")
    assert texts == ["", "", "", "", "</stp", ""]
    texts, _ = run(tokenizer, [[i] for i in ids[:3]], stop="</stop>")
    assert texts == ["", "", "", "</s"]


def test_of_two_that_complete_together_the_first_listed_wins(tokenizer):
    ids = tokenizer.encode("xab")
    assert run(tokenizer, [ids], stop=["b", "ab"])[1].stop_match == "b"
    assert run(tokenizer, [ids], stop=["ab", "b"])[1].stop_match == "ab"
    assert run(tokenizer, [ids], stop=["xabc", "a"])[1].stop_match == "a"


def test_before_min_tokens_a_stop_string_is_text(tokenizer):
    ids = [i for c in "abxab" for i in tokenizer.encode(c)]
    texts, detokenizer = run(tokenizer, [[i] for i in ids], min_tokens=3, stop="ab")
    assert "".join(texts) == "abx" and detokenizer.num_tokens == 5
    # completed before, held back as another's beginning: it must not end the answer afterwards
    texts, detokenizer = run(tokenizer, [[i] for i in ids], min_tokens=4, stop=["ab", "abxaz"])
    assert "".join(texts) == "abx" and detokenizer.num_tokens == 5


def test_nothing_comes_after_the_stop(tokenizer):
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop="a"))
    assert detokenizer.append(tokenizer.encode("xay")) == "x"
    assert detokenizer.append(tokenizer.encode("more")) == detokenizer.flush() == ""


def test_detokenize_off_gives_no_text(tokenizer):
    texts, detokenizer = run(tokenizer, [tokenizer.encode("hello")], detokenize=False)
    assert texts == ["", ""] and detokenizer.num_tokens == len(tokenizer.encode("hello"))


@pytest.mark.parametrize("size", [1, 1000])
def test_a_long_stop_string_costs_no_more_a_token(tokenizer, size):
    stop = "a" * 20_000 + "b"
    texts, _ = run(tokenizer, [tokenizer.encode("a" * size)] * 3, stop=stop)
    assert "".join(texts) == "a" * size * 3 and texts[:3] == ["", "", ""]
