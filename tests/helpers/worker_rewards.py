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
