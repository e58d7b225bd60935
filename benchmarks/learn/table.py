"""Tables of the study beyond the comparison of all variants."""

from __future__ import annotations

from benchmarks.harness.results import Columns

OF_PAPER = ("ppo", "grpo", "grpo, 64 prompts", "rloo", "remax", "sppo, centred")
SPEEDUP: Columns = {
    "task": lambda line: line["task"],
    "compared with SPPO": lambda line: line["variant"],
    "seconds per update": lambda line: line["update_to_sppo"],
    "seconds to each one's own best": lambda line: line["own_best_to_sppo"],
    "seconds to the threshold": lambda line: line["seconds_to_sppo"],
    "tokens to it": lambda line: line["tokens_to_sppo"],
    "updates to it": lambda line: line["updates_to_sppo"],
}
"""One speed-up in several measures, each relative to SPPO's, seed by seed; and the variants that it is measured for."""
