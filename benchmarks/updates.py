"""One update beside TRL's GRPOTrainer: the same model, the same responses, the same algorithm.

Both trainers run their own loop, with responses that were made beforehand in place of generation; what is timed is a
whole update, from the end of one optimizer step to the end of the next: batches, advantages, log-probabilities, loss,
backward and AdamW. They take turns, round by round, so that a machine shared with others slows both. Before that, one
update by SGD is made with each, and the gradients must be the same. The exit code is 1 when they are not, when an
update is slower than TRL's on responses of equal length, or less than 1.5 times as fast on those of mixed lengths.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from benchmarks import results
from benchmarks.results import Row
from sppo import SPPOConfig, SPPOTrainer
from sppo.rollout import Sample

PROMPTS, GENERATIONS, MICRO_BATCHES = 4, 8, 4
LEAST_SPEEDUP = {"equal": 1.0, "mixed": 1.5}
TOLERANCE = 2e-3  # of the gradient: TRL adds 1e-4 to the group's deviation, GRPO's paper nothing, we 1e-6
Tokens = list[int]


class Clock(TrainerCallback):
    """The time of each optimizer step's end."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())


class Prepared:
    """Responses made beforehand, handed to either trainer in the order of the prompts that it asks for."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab: int, lengths: Sequence[int]) -> None:
        rng = random.Random(0)
        draw = lambda n: [rng.randrange(2, vocab) for _ in range(n)]
        self.tokenizer = tokenizer
        self.prompts = [draw(rng.randint(24, 40)) for _ in range(PROMPTS)]
        self.responses = [[*draw(n - 1), 1] for n in lengths]

    def tokens(self, prompts: Sequence[str]) -> list[tuple[Tokens, Tokens]]:
        """Prompt and response for each; the n-th time that a prompt is asked it has its n-th response."""
        asked = dict.fromkeys(prompts, 0)
        pairs = []
        for prompt in prompts:
            pairs.append((self.prompts[int(prompt)], self.responses[int(prompt) * GENERATIONS + asked[prompt]]))
            asked[prompt] += 1
        return pairs

    def generate(self, prompts: Sequence[str], **_: Any) -> list[Sample]:
        """As :class:`sppo.RolloutEngine`."""
        pairs = self.tokens(prompts)
        texts = self.tokenizer.batch_decode([response for _, response in pairs], skip_special_tokens=True)
        return [
            Sample(prompt, text, *pair, truncated=False)
            for prompt, text, pair in zip(prompts, texts, pairs, strict=True)
        ]

    def rollout_func(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        """As TRL's ``rollout_func``."""
        asked, answered = zip(*self.tokens(prompts), strict=True)
        return {"prompt_ids": list(asked), "completion_ids": list(answered), "logprobs": None}


def odd_letters(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(completion) % 2) for completion in completions]


def make_model(size: dict[str, int], seed: int = 0) -> LlamaForCausalLM:
    """A Llama of random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**size, pad_token_id=0, eos_token_id=1, bos_token_id=None))


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Each number is a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {name: i for i, name in enumerate(["<pad>", "<eos>", *map(str, range(vocab - 2))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def run_ours(model: LlamaForCausalLM, prepared: Prepared, settings: dict[str, Any]) -> list[float]:
    """Train, and return the marks of its clock."""
    clock = Clock()
    args = SPPOConfig(**settings, algorithm="grpo", min_agreement=0)
    SPPOTrainer(
        model, odd_letters, args=args, train_dataset=_dataset(), processing_class=prepared.tokenizer,
        rollout_engine=prepared, callbacks=[clock],
    ).train()  # fmt: skip
    return clock.marks


def run_trl(
    model: LlamaForCausalLM, prepared: Prepared, settings: dict[str, Any], callbacks: Sequence[TrainerCallback] = ()
) -> list[float]:
    """The same with TRL's."""
    from trl import GRPOConfig, GRPOTrainer

    clock = Clock()
    args = GRPOConfig(**settings, loss_type="grpo", gradient_checkpointing=False, beta=0.0, shuffle_dataset=True)
    GRPOTrainer(
        model, odd_letters, args=args, train_dataset=_dataset(), processing_class=prepared.tokenizer,
        rollout_func=prepared.rollout_func, callbacks=[*callbacks, clock],
    ).train()  # fmt: skip
    return clock.marks


TRAINERS = {"ours": run_ours, "TRL": run_trl}


def _dataset() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": list(map(str, range(PROMPTS)))})


def settings_of(folder: str, **changes: Any) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": PROMPTS * GENERATIONS // MICRO_BATCHES,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "num_generations": GENERATIONS,
        "max_completion_length": 1024,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        **changes,
    }


def gradient(name: str, size: dict[str, int], prepared: Prepared, folder: str) -> Tensor:
    """What one update by SGD moved the weights by, clipped to the norm 1."""
    model = make_model(size)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    TRAINERS[name](model, prepared, settings_of(folder, max_steps=1, optim="sgd", learning_rate=1.0))
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()]) - before


def measure(kind: str, size: dict[str, int], lengths: Sequence[int], rounds: int, updates: int) -> Row:
    """Seconds of an update with each trainer, by turns."""
    prepared = Prepared(make_tokenizer(size["vocab_size"]), size["vocab_size"], lengths)
    times: dict[str, list[float]] = {name: [] for name in TRAINERS}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = (gradient(name, size, prepared, folder) for name in TRAINERS)
        error = ((ours - theirs).norm() / theirs.norm()).item()
        for _ in range(rounds):
            for name, train in TRAINERS.items():
                marks = train(make_model(size), prepared, settings_of(folder, max_steps=updates + 1))
                times[name] += [b - a for a, b in pairwise(marks)]
    medians = {name: statistics.median(each) for name, each in times.items()}
    ratios = [b / a for a, b in zip(times["ours"], times["TRL"], strict=True)]
    return {
        "responses": kind,
        "tokens": sum(lengths),
        "longest": max(lengths),
        **size,
        "gradient_error": error,
        **{f"{name}_s": value for name, value in medians.items()},
        "speedup": medians["TRL"] / medians["ours"],
        "speedups": [round(ratio, 3) for ratio in ratios],
    }


def lengths_of(kind: str, mean: int) -> list[int]:
    """Response lengths: all equal; or mixed as chains of thought are, most short and a few long (log-normal)."""
    rng = random.Random(1)
    count = PROMPTS * GENERATIONS
    if kind == "equal":
        return [mean] * count
    return [max(2, min(8 * mean, round(mean * rng.lognormvariate(-0.5, 1.0)))) for _ in range(count)]


COLUMNS: results.Columns = {
    "responses": lambda row: row["responses"],
    "tokens": lambda row: row["tokens"],
    "longest": lambda row: row["longest"],
    "hidden": lambda row: row["hidden_size"],
    "layers": lambda row: row["num_hidden_layers"],
    "vocabulary": lambda row: row["vocab_size"],
    "ours, s": lambda row: row["ours_s"],
    "TRL, s": lambda row: row["TRL_s"],
    "times as fast": lambda row: f"{row['speedup']:.2f}",
}


def failures_of(rows: Sequence[Row], timed: bool = True) -> list[str]:
    """Gradients that differ, and updates that are not fast enough where that is what was asked."""
    found = [f"{row['responses']}: gradients differ by {row['gradient_error']:.1e}" for row in rows
             if not row["gradient_error"] <= TOLERANCE]  # fmt: skip
    return found + [
        f"{row['responses']}, hidden {row['hidden_size']}: {row['speedup']:.2f} times as fast as TRL, "
        f"wanted {LEAST_SPEEDUP[row['responses']]}"
        for row in rows
        if timed and row["speedup"] < LEAST_SPEEDUP[row["responses"]]
    ]


def chart(rows: Sequence[Row]) -> results.Chart:
    """How many times as fast as TRL."""
    bars = [(f"{row['responses']}, hidden {row['hidden_size']}", row["speedup"]) for row in rows]
    return results.Chart("times as fast as TRL 1.16", bars, 1.0)


SIZES = {
    "small": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 512},
    "medium": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 8192},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the small model, one update")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each trainer (%(default)s)")
    parser.add_argument("--mean", type=int, default=96, help="about how many tokens a response has (%(default)s)")
    results.add_out(parser)


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    import trl

    path = args.out / "updates.json"
    rows: list[Row] = []
    for name in ("small",) if args.quick else SIZES:
        for kind in LEAST_SPEEDUP:
            lengths = lengths_of(kind, 8 if args.quick else args.mean)
            row = measure(kind, SIZES[name] | HEADS, lengths, 1 if args.quick else args.rounds, 2)
            rows.append(row)
            print(f"{name}, {kind}: {row['ours_s']:.3f} s, TRL {row['TRL_s']:.3f} s", flush=True)
            results.write(
                path,
                "updates",
                chart(rows),
                device=results.device_name(results.this_device()),
                threads=torch.get_num_threads(),
                trl=trl.__version__,
                quick=args.quick,
                failures=(failures := failures_of(rows, timed=not args.quick)),
                rows=rows,
            )
    return results.conclude(results.table(rows, COLUMNS), failures, path)
