"""What the tests ask of transformers beyond its oldest supported version."""

import pytest
import transformers

IS_OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)
REASON = "tested with transformers 5.24 or newer"

needs_a_newer_one = pytest.mark.skipif(IS_OLD, reason=REASON)


def skip_if_old():
    if IS_OLD:
        pytest.skip(REASON)
