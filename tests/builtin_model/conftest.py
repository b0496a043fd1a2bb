import pytest

from scripts.builtin_model import tokenizer


@pytest.fixture(scope="session")
def encoder():
    return tokenizer.load()
