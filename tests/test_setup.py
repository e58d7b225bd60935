"""The metadata of the package: the page that the package index shows."""

import re
import runpy
from pathlib import Path

import setuptools

SETUP = Path(__file__).parents[1] / "setup.py"


def test_the_page_of_the_package_index_needs_nothing_from_the_repository(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: given.update(settings))
    runpy.run_path(str(SETUP))
    page = given["long_description"]
    assert re.findall(r"\]\((?!https:)[^)]*\)", page) == []
    assert "linear_logprobs(hidden, lm_head, labels, temperature=0.6)" in page
    assert "Left:" not in page  # the caption of a figure that is not there
    assert "bibtex" in page
