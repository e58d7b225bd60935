"""A tiny model and its tokenizer, new for each test, and runs that nothing interrupted."""

import pytest
from interrupted_runs import Uninterrupted, preload
from tiny_models import char_tokenizer, tiny_model


@pytest.fixture
def tokenizer():
    return char_tokenizer()


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    preload()
    return Uninterrupted(tmp_path_factory.mktemp("uninterrupted"))
