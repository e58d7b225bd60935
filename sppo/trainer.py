"""SPPOTrainer: transformers' Trainer, fed with experience through its data loader."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import HubStrategy, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from sppo import agreement
from sppo import checkpointing as checkpoint
from sppo._utils import replacing, sole_run
from sppo.algorithms import algorithm_class
from sppo.config import SPPOConfig
from sppo.data import check_dataset, named, short_enough
from sppo.models.actor_critic import ActorCritic
from sppo.models.critic_io import build_critic, load_critic, save_critic
from sppo.models.critics import PromptCritic, TokenCritic, head
from sppo.models.fsdp import full, full_state, gathered, load_weights
from sppo.models.lora import add_adapter, continue_adapter, has_adapter, merged_weights, save_adapter
from sppo.models.packed_attention import NAME, use_attention
from sppo.models.policy_io import check_tokenizer, load_policy, with_master_weights
from sppo.reporting.meter import Meter
from sppo.reporting.model_card import model_card
from sppo.reporting.trackers import MetricsFile, SampleCompletions, name_run, prepare_trackers
from sppo.rewards import Reward, resolve
from sppo.rewards.samples import score_samples
from sppo.rollout import RolloutEngine, Sample, make_engine, rollout_seed
from sppo.rollout.prompts import Prompts
from sppo.rollout.stream import ExperienceStream, Progress
from sppo_kernels import policy_loss

logger = logging.get_logger(__name__)

RewardFunction = Reward | Callable[..., Any] | str


class SPPOTrainer(Trainer):
    """Trains a causal language model on verifiable rewards, by Sequence-Level PPO (arXiv 2604.08865) or its kin.

    Which one is the setting ``algorithm``; see :mod:`sppo.algorithms`.

    Args:
        model: model of ``AutoModelForCausalLM``, or a folder or hub name (loaded in float32; ``bf16=True`` in
            ``args`` then computes in bfloat16).
        reward_funcs: one reward or a list: ``f(prompts, completions, **columns) -> list[float | None]``, a built-in's
            name or ``"module:function"``. With a prompt critic their weighted sum must stay in [0, 1].
        args: settings.
        critic: for algorithms that have one, what predicts success: a sequence-classification model with one label, a
            folder or hub name of one, or None for a copy of the policy's backbone.
        train_dataset: column ``prompt`` (text or chat messages); the other columns go to the rewards. None: only
            evaluate.
        eval_dataset: the same, or a dict of such by name.
        processing_class: tokenizer; None: that of ``model``.
        callbacks: as in transformers.
        peft_config: a ``peft.LoraConfig``: the policy learns by an adapter alone, and so does the critic, in one of its
            own, unless ``critic_adapter`` is False in ``args``. A policy loaded with an adapter goes on learning by it.
        rollout_engine: one of your own in place of the one that ``args`` names.
    """

    args: SPPOConfig
    recipe: dict[str, Any] | None = None
    """What the run was built from, for its model card."""

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        *,
        args: SPPOConfig | None = None,
        critic: PreTrainedModel | str | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        rollout_engine: RolloutEngine | None = None,
    ) -> None:
        args = args or SPPOConfig(output_dir="sppo_output")
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process; start with accelerate launch, or show one GPU only")
        if (launched := int(os.environ.get("WORLD_SIZE", "1"))) > 1 and args.world_size == 1:
            raise ValueError(
                f"WORLD_SIZE={launched}, but this process trains alone (parallel_mode={args.parallel_mode.value}): on "
                "CPUs set use_cpu=True, on GPUs give each process one"
            )
        policy = load_policy(model)
        tokenizer = check_tokenizer(policy, processing_class)
        funcs = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [cast(RewardFunction, reward_funcs)]
        self.reward_funcs = [resolve(func) for func in funcs]
        if args.reward_weights is not None and len(args.reward_weights) != len(funcs):
            raise ValueError(f"reward_weights has {len(args.reward_weights)} values for {len(funcs)} reward_funcs")
        if train_dataset is not None:
            train_dataset = short_enough(
                check_dataset("train_dataset", train_dataset, tokenizer), tokenizer, args.max_prompt_length
            )
        for name, dataset in named(eval_dataset).items():
            check_dataset(f"eval_dataset {name}".strip(), dataset, tokenizer)

        self.algorithm = algorithm_class(args.algorithm)(args)
        kind = self.algorithm.critic if train_dataset is not None else None
        judge: PromptCritic | TokenCritic | None = None
        classifier = build_critic(critic, policy, tokenizer, kind) if kind is not None else None
        _choose_what_learns(policy, classifier, peft_config, args)
        if classifier is not None:
            judge = PromptCritic(classifier) if kind == "prompt" else TokenCritic(classifier, args.cliprange_value)
        elif critic is not None and train_dataset is not None:
            logger.warning(f"algorithm={args.algorithm!r} has no critic: the one given is not used")
        pair = ActorCritic(policy, judge)
        name_run(args)
        super().__init__(
            model=pair,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[_EpochCallback(), MetricsFile(), *(callbacks or [])],
            compute_loss_func=policy_loss,  # tells Trainer that compute_loss has divided by the whole update's count
        )
        prepare_trackers(self.callback_handler.callbacks, args)
        if args.log_completions:
            self.add_callback(SampleCompletions(lambda: self.experience.samples, self.callback_handler.callbacks))
        pair.check_packing()
        self.rollout_engine: RolloutEngine = rollout_engine or make_engine(
            args.rollout_engine,
            policy,
            tokenizer,
            args.rollout_engine_kwargs or {},
            max_completion_length=args.max_completion_length,
            top_p=args.top_p,
            top_k=args.top_k,
        )
        self.tokenizer = tokenizer
        self.meter = Meter()
        if train_dataset is not None:
            reference = None
            if args.beta > 0:
                reference = policy if has_adapter(policy) else _frozen_copy(policy, args.device)
            self.experience = ExperienceStream(
                Prompts(train_dataset, seed=args.seed, shuffle=args.shuffle_dataset),
                self.rollout_engine,
                self.reward_funcs,
                pair,
                self.algorithm,
                args,
                self.meter,
                gather=self._gather,
                rank=args.process_index,
                world=args.world_size,
                reference=reference,
                autocast=self.accelerator.autocast,
                whole=self._whole,
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train to the end; see ``transformers.Trainer.train``.

        Args:
            resume_from_checkpoint: True for the last whole checkpoint in ``output_dir``, or a folder. Resuming gives
                the same weights, to the bit, as a run that was never stopped.

        Raises:
            ValueError: ``output_dir`` holds another run's checkpoint, or there is none to resume from.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset is None; give one to train on")
        with sole_run(self.output_dir) if self.args.should_save else nullcontext():
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        folder = checkpoint.find_checkpoint(self.output_dir, resume_from_checkpoint)
        names = [reward.name for reward in self.reward_funcs]
        self.identity = checkpoint.identity(self.args, self._pair, self.train_dataset, names)
        if folder is not None:
            checkpoint.check_identity(self.identity, folder)
        if self.args.should_save:
            checkpoint.clear_staging(self.output_dir)
        self.accelerator.wait_for_everyone()
        self.experience.restart(Progress(), [])
        self.meter.clear()
        if folder is not None and self._load_finished(folder):
            return TrainOutput(self.state.global_step, 0.0, {})
        with use_attention(self._pair, NAME):
            return super().train(folder, *args, **kwargs)

    def _load_finished(self, folder: str) -> bool:
        """Where a checkpoint has all updates of the run, load it: transformers would add another update."""
        state = TrainerState.load_from_json(os.path.join(folder, "trainer_state.json"))
        epochs = self.args.num_train_epochs * self.experience.updates_per_epoch
        if state.global_step < (self.args.max_steps if self.args.max_steps > 0 else math.ceil(epochs)):
            return False
        self.state = state
        checkpoint.load_experience(self.experience, Path(folder))
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or folder)
        return True

    def get_train_dataloader(self) -> DataLoader:
        """Experience, some micro-batches at a time; each rollout is made when its first ones are read."""
        # Its own generator: a loader draws a seed from the global one otherwise, one more each time it is made.
        return DataLoader(self.experience, batch_size=None, generator=torch.Generator())

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the device, as they are: for DeepSpeed transformers would round advantages to the precision of weights."""
        return {name: tensor.to(self.args.device) for name, tensor in inputs.items()}

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of the micro-batches that the Trainer takes for one."""
        *first, last = inputs
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        with self.accelerator.no_sync(model) if first and not each else nullcontext():
            losses = [super(SPPOTrainer, self).training_step(model, batch, num_items_in_batch) for batch in first]
        return torch.stack([*losses, super().training_step(model, last, num_items_in_batch)]).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the update's loss."""
        update, args = self.experience.update, self.args
        output = model(
            inputs,
            temperature=args.temperature,
            max_length=update.max_length,
            critic_normalizer=update.critic_normalizer,
            backward=args.logprobs_backward,
            logits_budget_bytes=args.logits_budget_bytes,
            mass_tolerance=args.mass_tolerance,
        )
        policy = policy_loss(
            output.logprobs,
            inputs.get("old_logprobs", output.logprobs.detach()),
            inputs["advantages"],
            cu_seqlens=inputs["response_cu_seqlens"],
            normalizer=update.policy_normalizer,
            ref_logprobs=inputs.get("ref_logprobs"),
            **self._correction(inputs),
            **self.algorithm.loss_arguments(),
        )
        loss = policy.loss if output.critic_loss is None else policy.loss + output.critic_loss
        sequences = len(inputs["response_cu_seqlens"]) - 1
        self._measure(output, policy, sequences, corrected="rollout_logprobs" in inputs)
        return (loss, output) if return_outputs else loss

    def _correction(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of the loss that answer for an engine whose log-probabilities are not the trainer's."""
        if "rollout_logprobs" not in inputs:
            return {}
        kind = None if self.args.rollout_correction == "none" else self.args.rollout_correction
        return {
            "rollout_logprobs": inputs["rollout_logprobs"],
            "rollout_correction": kind,
            "rollout_cap": self.args.rollout_cap,
        }

    def _measure(self, output: Any, policy: Any, sequences: int, corrected: bool) -> None:
        parts = len(self.experience.update.micro_batches)  # they add up to an update; their mean does not
        self.meter.mean({"policy_loss": policy.loss * parts}, weight=1 / parts)
        if output.critic_loss is not None:
            self.meter.mean({"critic_loss": output.critic_loss * parts}, weight=1 / parts)
        if tokens := output.logprobs.numel():
            by_token = self.args.ratio_level == "token"
            unused = set() if corrected else {"rollout_kl", "rollout_weight_mean"}
            unused |= set() if self.args.beta else {"kl"}
            for name in policy.metrics.keys() - unused:
                of_tokens = by_token or name in ("approx_kl", "kl", "rollout_kl")
                self.meter.mean({name: policy.metrics[name]}, weight=tokens if of_tokens else sequences)
            self.meter.mean({"entropy": output.entropy.mean()}, weight=tokens)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer; policy and critic have parameter groups, learning rates and clipping of their own."""
        if self.optimizer is None:
            decaying = set(self.get_decay_parameter_names(self._pair))
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, self._pair))
            groups = []
            for part, rate, decay in (
                ("policy.", self.args.learning_rate, self.args.weight_decay),
                ("critic.", self.args.critic_learning_rate, self.args.critic_weight_decay),
            ):
                for decays in (True, False):
                    params = [
                        p
                        for name, p in self._pair.named_parameters()
                        if name.startswith(part) and p.requires_grad and (name in decaying) == decays
                    ]
                    weight_decay = decay if decays else 0.0
                    groups.append({"params": params, "lr": rate, "weight_decay": weight_decay, "part": part})
            self.optimizer = kind([group for group in groups if group["params"]], **settings)
            self.optimizer.register_step_pre_hook(lambda optimizer, *_: self._scale_rates(optimizer))
            self.optimizer.register_step_post_hook(lambda optimizer, *_: self._restore_rates(optimizer))
        return self.optimizer

    def _scale_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Slow the policy down for this step until its gradients have agreed.

        DeepSpeed keeps gradients to itself, so there what may not learn is held still by a rate of 0.
        """
        scale = {"policy.": 1.0 if self._policy_is_trusted else agreement.UNTRUSTED_RATE, "critic.": 1.0}
        if self.is_deepspeed_enabled:
            scale["policy."] *= self.experience.policy_learns
            scale["critic."] *= self.experience.update.critic_learns
        for group in optimizer.param_groups:
            group["full_lr"], group["lr"] = group["lr"], group["lr"] * scale[group["part"]]

    def _restore_rates(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group.pop("full_lr")

    @property
    def _policy_is_trusted(self) -> bool:
        return self.experience.progress.trusted or self.args.min_agreement == 0

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip policy and critic apart. What may not learn, and both where a gradient is not finite, get no gradient.

        Optimizers leave parameters without a gradient alone, momentum and weight decay too. DeepSpeed has clipped, and
        made its step, by now.
        """
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        policy, critic = self._pair.policy, self._pair.critic
        norms = {}
        for name, part, limit, learns in (
            ("policy", policy, self.args.max_grad_norm, self.experience.policy_learns),
            ("critic", critic, self.args.critic_max_grad_norm, self.experience.update.critic_learns),
        ):
            if part is not None and not learns:
                part.zero_grad(set_to_none=True)
            elif part is not None:
                norms[f"{name}_grad_norm"] = full(nn.utils.clip_grad_norm_(part.parameters(), limit))
        finite = all(torch.isfinite(norm) for norm in norms.values())
        if finite:
            self.meter.mean(norms)
            if "policy_grad_norm" in norms and self.experience.is_fresh and not self._policy_is_trusted:
                progress, least = self.experience.progress, self.args.min_agreement
                agreement.watch(progress, cast(torch.optim.Optimizer, self.optimizer), policy.parameters(), least)
                self.meter.mean({"gradient_agreement": agreement.standard_errors(progress)})
        else:
            self._pair.zero_grad(set_to_none=True)
        self.meter.sum("skipped_updates", not finite)
        return norms.get("policy_grad_norm", torch.zeros((), device=self.args.device))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log to those of a training step."""
        if "loss" in logs:
            logs |= self.meter.read(self._gather)
            logs["total_generated_tokens"] = self.experience.progress.generated_tokens
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Answer held-out prompts and grade the answers; the random state and the metrics of training are left alone.

        Returns:
            ``eval_success_rate`` (share of answers with the full reward of 1), ``eval_reward``,
            ``eval_response_length``, ``eval_truncated``, ``eval_problems`` (those that a reward was had for),
            ``eval_rewards/<name>``.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = named(self.eval_dataset)[chosen]
        if chosen is None:
            raise ValueError("eval_dataset is None; give one to evaluate on")
        if isinstance(chosen, dict):
            several = [self.evaluate(each, None, f"{metric_key_prefix}_{name}") for name, each in chosen.items()]
            return {name: value for metrics in several for name, value in metrics.items()}
        with self.meter.phase("evaluate"):
            metrics = self._answer(
                check_dataset("eval_dataset", chosen, cast(PreTrainedTokenizerBase, self.processing_class))
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _answer(self, dataset: datasets.Dataset) -> dict[str, float]:
        rank, world = self.args.process_index, self.args.world_size
        rows = [dataset[i] for i in range(rank, len(dataset), world)]
        meter = Meter()
        samples: list[Sample] = []
        with torch.no_grad(), self.accelerator.autocast(), self._whole():  # by all processes, those without rows too
            if rows:
                samples = self.rollout_engine.generate(
                    [row["prompt"] for row in rows],
                    seed=rollout_seed(self.args.seed, 2**32 - 1, rank),
                    temperature=self.args.eval_temperature,
                    batch_size=self.args.per_device_eval_batch_size,
                )
        for start in range(0, len(rows), self.args.rollout_size):  # so many at once as reward_timeout is meant for
            part = slice(start, start + self.args.rollout_size)
            means = score_samples(samples[part], rows[part], self.reward_funcs, self.args, as_probability=False)
            meter.mean(dict(means), weight=len(rows[part]))
        facts = [(s.reward, len(s.response_ids), s.truncated) for s in samples]
        for reward, length, truncated in facts:
            meter.mean({"response_length": length, "truncated": truncated})
            if reward is not None:
                meter.mean({"success_rate": reward >= 1, "reward": reward})
        problems = len(self._gather([1 for reward, *_ in facts if reward is not None]))
        read = meter.read(self._gather)
        wanted = ("response_length", "truncated", "success_rate", "reward")
        by_reward = {name: value for name, value in read.items() if name.startswith("rewards/")}
        return {name: read.get(name, 0.0) for name in wanted} | by_reward | {"problems": problems}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The policy as an ordinary model, or its adapter, and its tokenizer; the critic in the folder ``critic``."""
        folder = Path(output_dir or self.output_dir)
        policy, critic = self._pair.policy, self._pair.critic
        weights = full_state(self._pair)  # by all processes, as in the next lines
        of_critic = _part(weights, "critic.")
        if critic is not None and has_adapter(critic):
            with self._whole():
                of_critic = {name: weight.to("cpu", copy=True) for name, weight in merged_weights(critic)}
        if self.args.should_save:
            if has_adapter(policy):
                save_adapter(policy, _part(weights, "policy."), folder)
                checkpoint.save_learned(self._pair, weights, folder)
            else:
                policy.save_pretrained(folder, state_dict=_part(weights, "policy."))
            self.tokenizer.save_pretrained(folder)
            if critic is not None:
                save_critic(critic, folder / "critic", str(self.algorithm.critic), of_critic)
                self.tokenizer.save_pretrained(folder / "critic")
            (folder / "training_args.json").write_text(self.args.to_json_string())

    def create_model_card(  # type: ignore[override]
        self,
        *,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
        language: str | None = None,
    ) -> None:
        """Write the model card into ``README.md`` of ``output_dir``; :meth:`push_to_hub` takes the same arguments.

        Args:
            model_name: its title; None: the name of ``output_dir``.
            finetuned_from: hub name of the model before training; None: where it was loaded from.
            dataset_tags: hub names of the training data; None: the recipe's.
            dataset: what the card's text calls them.
            tags: more tags.
            license, language: left out where None.
        """
        if self.is_world_process_zero():
            names, hub_names, more = ([x] if isinstance(x, str) else x or [] for x in (dataset, dataset_tags, tags))
            card = model_card(
                self,
                model_name=model_name,
                base_model=finetuned_from,
                datasets=hub_names,
                dataset_names=names,
                tags=more,
                license=license,
                language=language,
            )
            with replacing(self.output_dir / "README.md") as staged:
                staged.write_text(str(card), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if has_adapter(self._pair.policy):
            load_weights(self._pair, checkpoint.load_learned(resume_from_checkpoint), strict=False)
            return
        # Read in float32 so that no weight of a mixed-precision model is rounded on the way.
        policy = type(self._pair.policy).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        weights = {f"policy.{name}": weight for name, weight in policy.state_dict().items()}
        if self._pair.critic is not None:
            critic = load_critic(Path(resume_from_checkpoint, "critic"), torch.float32)
            weights |= {f"critic.{name}": weight for name, weight in critic.state_dict().items()}
        load_weights(self._pair, weights)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write the whole checkpoint aside, then give it its name."""
        output_dir, name = self.output_dir, f"checkpoint-{self.state.global_step}"
        with self.meter.phase("checkpoint"):
            self._staging = True
            super()._save_checkpoint(model, trial)
            self._staging = False
            self.accelerator.wait_for_everyone()
            staged = output_dir / checkpoint.STAGING / name
            if is_best := self.state.best_model_checkpoint == str(staged):  # on each process, which will load it
                self.state.best_model_checkpoint = str(output_dir / name)
            if self.args.should_save:
                checkpoint.save_identity(self.identity, staged)
                if is_best:
                    self.state.save_to_json(str(staged / "trainer_state.json"))
                checkpoint.publish(staged, output_dir / name)
                checkpoint.clear_staging(output_dir)
                rotate_checkpoints(str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output_dir / name))

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, checkpoint.STAGING) if self._staging else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging:  # the folder is about to move
            return
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self.create_model_card()
            if self._pair.critic is not None:  # transformers takes the policy's files along, and no folders
                shutil.copytree(Path(checkpoint_folder, "critic"), self.output_dir / "critic", dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    _staging = False

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        checkpoint.save_experience(self.experience, Path(output_dir))

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        super()._load_rng_state(checkpoint_folder)
        if checkpoint_folder is not None:
            checkpoint.load_experience(self.experience, Path(checkpoint_folder))

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Each process has all weights, to run the models by itself."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        model = cast(nn.Module, self.model)
        if plugin is not None and not isinstance(model, FSDPModule):
            model.to(self.args.device)  # not sharded yet, and transformers left it where it was made
        with gathered(model, reshard_after_forward=plugin is not None and bool(plugin.reshard_after_forward)):
            yield

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.args.output_dir or ".")

    @property
    def _pair(self) -> ActorCritic:
        return self.accelerator.unwrap_model(self.model)

    def _gather(self, items: list[Any]) -> list[Any]:
        if self.args.world_size == 1:
            return items
        everyone: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(everyone, items)
        return [item for each in everyone for item in each]


def _choose_what_learns(
    policy: PreTrainedModel, critic: PreTrainedModel | None, peft_config: Any, args: SPPOConfig
) -> None:
    """Adapters where they are asked for or there already; else all weights, in the precision that learning needs."""
    if peft_config is not None:
        add_adapter(policy, peft_config)
    elif has_adapter(policy):
        continue_adapter(policy)
    else:
        with_master_weights(policy, args)
    if critic is not None and has_adapter(policy) and args.critic_adapter:
        config: Any = copy.copy(peft_config or policy.peft_config["default"])
        config.task_type = "SEQ_CLS"  # by which PEFT knows that the head is one
        add_adapter(critic, config, also=[head(critic)])
    elif critic is not None:
        with_master_weights(critic, args)


def _frozen_copy(policy: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    return copy.deepcopy(policy).eval().requires_grad_(False).to(device)


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


class _EpochCallback(TrainerCallback):
    """Epochs as the data has them, also in the epoch that a resumed run begins in the middle of."""

    def on_step_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        state.epoch = state.global_step / train_dataloader.dataset.updates_per_epoch
        control.should_log |= state.global_step >= state.max_steps  # so that totals have every update
