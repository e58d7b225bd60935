"""A reward for verl: 1.0 if the last number of the final answer is correct, else 0.0.

verl calls rewards in threads, in which the time limit of math-verify (the reward "math" of this project) does not work.
"""

from sppo.rewards.builtin import numeric


def compute_score(data_source: str, solution_str: str, ground_truth: str, **_: object) -> float:
    """Score one solution, with verl's signature of a custom reward."""
    return numeric([""], [solution_str], answer=[ground_truth])[0]
