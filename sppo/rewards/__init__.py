"""Rewards: ``f(prompts, completions, **columns) -> list[float | None]``, plain or async, one value a completion.

One that takes ``completion`` in place of ``completions`` is called once a sample: ``f(prompt, completion, **columns) ->
float | None``, each column a single value; where it is async, all samples of a batch wait side by side.

    reward = resolve("math")                       # built in: exact, numeric, math, reasoning_gym, unit_tests
    reward = resolve("my_rewards:length?limit=200")  # or path/to/my_rewards.py:length; options become keyword arguments
    reward = resolve(lambda prompts, completions, **columns: [float(len(c) < 200) for c in completions])
    scores = score([reward], prompts, completions, {"answer": answers}, timeout=60)

``columns`` are the other columns of the dataset; a function without ``**columns`` gets only what it names. What
a reward does wrong (it raises, takes too long, or returns None, NaN, no number or too few) costs the samples it went
wrong on and is listed in ``scores.failures``; it never stops the run. How firm the time limit is depends on the kind:

- **A name or ``module:function``** runs in a worker process, which is killed at the limit: nothing outlasts it, neither
  an endless loop nor a call into C that never comes back. The worker imports the module once and keeps it; state is not
  shared with the trainer, columns travel as JSON, and one that JSON cannot hold (an image, a date) is left out.
- **A function object** runs here, in the trainer's process, and sees its state. SIGALRM ends it at the limit: enough
  for Python code, waiting and ``re``, not for a C extension that never returns to Python, nor for code that sets
  SIGALRM itself (math-verify does) or catches BaseException for ever. Off the main thread, on Windows or inside a
  running event loop it runs in a thread of its own, which is abandoned at the limit.
"""

from sppo.rewards.scoring import BUILTIN, Reward, Scores, resolve, score

__all__ = ["BUILTIN", "Reward", "Scores", "resolve", "score"]
