"""A reward for verl: 1.0 where the last number of the final answer is the right one, 0.0 elsewhere.

verl calls rewards in threads, where the time limit of math-verify (the reward "math" of this project) cannot work.
"""

from sppo.rewards.builtin import numeric


def compute_score(data_source: str, solution_str: str, ground_truth: str, **_: object) -> float:
    """verl's signature of a custom reward."""
    return numeric([""], [solution_str], answer=[ground_truth])[0]
