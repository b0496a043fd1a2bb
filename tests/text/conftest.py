import os

import pytest

from qjax.text.tokenizer import Tokenizer
from tests.text.small_tokenizer import write_small_tokenizer


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    return write_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(small_folder):
    return Tokenizer.from_pretrained(small_folder)


@pytest.fixture(scope="session")
def official():
    folder = os.environ.get("QJAX_QWEN3_TOKENIZER")
    if not folder:
        pytest.skip("QJAX_QWEN3_TOKENIZER names no folder with the official Qwen3 tokenizer")
    return Tokenizer.from_pretrained(folder)
