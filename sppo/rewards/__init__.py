"""Reward functions: ``f(prompts, completions, **columns) -> list[float | None]``, one value per completion.

A function that takes ``completion`` instead of ``completions`` is called once per sample, with a single value per
column: ``f(prompt, completion, **columns) -> float | None``. Either form may be async; async calls per sample run
concurrently.

    reward = resolve("math")                       # or exact, numeric, reasoning_gym, stdin_stdout, unit_tests
    reward = resolve("my_rewards:length?limit=200")  # or path/to/my_rewards.py:length; options become keyword arguments
    reward = resolve(lambda prompts, completions, **columns: [float(len(c) < 200) for c in completions])
    scores = score([reward], prompts, completions, {"answer": answers}, timeout=60)

``columns`` are the other columns of the dataset; a function without ``**columns`` receives only those that it names. A
failure of a reward (it raises, takes too long, or returns NaN, a non-number or too few values) invalidates only the
affected samples and is listed in ``scores.failures``; it never stops the run. A reward that returns None does not apply
to the sample. How strict the time limit is depends on the kind of reward:

- **A name or ``module:function``** runs in a worker process, which is killed at the limit. This stops anything, also an
  endless loop or a call into C that never returns. The worker imports the module once and keeps it. It shares no state
  with the trainer, and it receives columns as JSON; a column that JSON cannot represent (images, dates) is omitted.
- **A function object** runs in the trainer's process and sees its state. SIGALRM interrupts it at the limit. This stops
  Python code, waiting and ``re``, but not a C extension that never returns to Python, nor code that sets SIGALRM
  itself (math-verify does) or catches BaseException forever. Outside the main thread, on Windows, or inside a running
  event loop, the function runs in a separate thread, which is abandoned at the limit.
"""

from sppo.rewards.scoring import BUILTIN, Reward, Scores, resolve, score

__all__ = ["BUILTIN", "Reward", "Scores", "resolve", "score"]
