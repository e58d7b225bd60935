"""Rewards for tests, working and failing, in a module that the worker process imports quickly."""

import os
import time


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def misbehave(prompts, completions, *, how, **columns):
    for completion in completions:
        if completion == "bb":
            if how == "raise":
                raise KeyError("no such thing")
            if how == "loop":
                while True:
                    pass
            if how == "hang in C":
                return sum(iter(int, 1))  # stays in C, where signals are not handled
            if how == "exit":
                os._exit(3)
            if how == "close":
                os.closerange(0, 100)
                while True:
                    pass
            if how == "short":
                return [1.0] * (len(completions) - 1)
    print("noise on standard output")
    return [1.0] * len(completions)


def misbehave_on_sample(completion, *, size, how):
    if completion == "bb":
        if how == "raise":
            raise KeyError("no such thing")
        if how == "loop":
            while True:
                pass
        if how == "none":
            return None
    return size


def hang_on(completions):
    while "hang" in completions:
        time.sleep(60)
    return [1.0] * len(completions)


def sleep(completions):
    for completion in completions:
        time.sleep(float(completion))
    return [1.0] * len(completions)


def pid(prompts, completions):
    return [os.getpid()] * len(completions)


def sees(prompts, completions, **columns):
    return [float("good" in columns and "bad" not in columns)] * len(completions)


def logs(completions, completion_ids, completion_lengths, truncated, trainer_state, log_metric, log_extra):
    """Use everything that a trainer passes to a reward."""
    log_metric("mean length", sum(completion_lengths) / len(completions))
    log_extra("first token", [ids[0] for ids in completion_ids])
    return [trainer_state.global_step + 0.5 * cut for cut in truncated]


def logs_of_one(completion, completion_ids, log_metric, log_extra):
    log_metric("length", len(completion))
    log_extra("tokens", completion_ids)
    return 1.0


def fails_after_logging(completions, log_metric):
    log_metric("calls", 1)
    if "bb" in completions:
        raise ValueError("bb")
    return [1.0] * len(completions)


def has_no_history(completions, trainer_state):
    assert trainer_state.global_step == 3
    assert not hasattr(trainer_state, "log_history")
    return [1.0] * len(completions)
