"""A tiny model and its tokenizer, new for each test."""

import pytest
from tiny_models import char_tokenizer, tiny_model


@pytest.fixture
def tokenizer():
    return char_tokenizer()


@pytest.fixture
def model():
    return tiny_model()
