"""`Buckets`: every batch within the limits has a shape that holds it, and a prompt that comes alone one made ahead."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.engine.buckets import Buckets

LIMITS = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_num_prefills": 64, "max_pages": 64}


@given(st.data(), st.booleans(), st.integers(1, 300), st.integers(1, 9000), st.integers(1, 64))
def test_a_bucket_holds_the_batch(data, is_gpu, num_seqs, num_tokens, num_pages):
    most_chunks = min(num_seqs, 64)
    limits = {"max_num_seqs": num_seqs, "max_num_batched_tokens": num_tokens, "max_num_prefills": most_chunks}
    buckets = Buckets(is_gpu=is_gpu, **limits, max_pages=num_pages)
    chunks = data.draw(st.integers(0, min(most_chunks, num_tokens)))
    tokens = data.draw(st.integers(chunks, num_tokens)) if chunks else 0
    decodes = data.draw(st.integers(0 if chunks else 1, num_seqs))
    pages = data.draw(st.integers(1, num_pages))
    bucket = buckets.choose(decodes, tokens, chunks, pages)
    assert bucket.num_decodes >= decodes and bucket.num_tokens >= tokens
    assert bucket.num_prefills >= chunks and bucket.num_pages >= pages


@pytest.mark.parametrize(("num_tokens", "places"), [(20, 4), (128, 8), (500, 32), (2048, 64)])
def test_a_short_prompt_does_not_pay_for_many(num_tokens: int, places: int):
    buckets = Buckets(is_gpu=True, **LIMITS)
    bucket = buckets.choose(0, num_tokens, 1, 1)
    assert bucket.num_prefills == places and bucket in buckets.ahead()


def test_many_short_chunks_take_a_larger_bucket():
    assert Buckets(is_gpu=True, **LIMITS).choose(0, 64, 64, 1).num_prefills == 64
