"""SPPOTrainer: transformers' Trainer on a stream of rollouts, which it reads through its data loader."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import datasets
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import HubStrategy, SaveStrategy, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from sppo import checkpointing, optimization
from sppo._utils import run_lock
from sppo.algorithms import algorithm_class
from sppo.config import SPPOConfig
from sppo.data import check_dataset, drop_long_prompts, named
from sppo.evaluation import answer_held_out, held_out_metrics
from sppo.interruption import EXIT_CODE, Termination, full_disk, is_full_disk
from sppo.models.actor_critic import ActorCritic, build_actor_critic
from sppo.models.fsdp import gathered
from sppo.models.lora import has_adapter, initial_adapter
from sppo.models.packed_attention import PACKED_ATTENTION, use_attention
from sppo.models.policy_io import check_tokenizer, frozen_copy, load_policy, stored_dtype
from sppo.reporting.console import install_console, report_progress
from sppo.reporting.meter import Meter, gather_lists
from sppo.reporting.model_card import write_model_card
from sppo.reporting.trackers import EpochCallback, MetricsFile, SampleCompletions, name_run, prepare_trackers
from sppo.rewards.samples import RewardFunction, resolve_rewards
from sppo.rollout import RolloutEngine, encode
from sppo.rollout.building import build_engine, build_episodes, described_tools, with_environment
from sppo.rollout.prompts import Prompts, check_template_settings, prompt_of
from sppo.rollout.records import ProcessContext, Progress
from sppo.rollout.stream import RolloutStream

logger = logging.get_logger(__name__)

_MOST_SKIPPED_UPDATES = 10  # in a row, because of gradients that are not finite

# Policy and critic are clipped apart, and held, in a method that is private to transformers and may be renamed.
if not callable(getattr(Trainer, "_clip_grad_norm", None)):
    raise ImportError(
        f"transformers {transformers.__version__} has no Trainer._clip_grad_norm, with which SPPOTrainer clips "
        "gradients; install transformers 5.24, or a version of sppo-kernels that knows this one"
    )


class SPPOTrainer(Trainer):
    """Trains a causal language model on verifiable rewards, with SPPO (arXiv 2604.08865) or a related algorithm.

    The setting ``algorithm`` selects the algorithm; see ``sppo.algorithms``.

    Args:
        model: model of ``AutoModelForCausalLM``, or its folder or hub name. By name it is loaded in float32; with
            ``bf16=True`` in ``args`` it computes in bfloat16.
        reward_funcs: one reward or a list. A reward is ``f(prompts, completions, **columns) -> list[float | None]``,
            the name of a built-in, or ``"module:function"``. With a prompt critic their weighted sum must be in [0, 1].
            May be left out if the environment has a reward, which comes last in ``reward_weights``.
        args: settings.
        critic: for algorithms with a critic, a sequence-classification model with one label, or its folder or hub name.
            None for a copy of the policy's backbone. ``"probe"`` for one linear layer on the policy's hidden states of
            the prompt, with SPPO (see ``sppo.models.probe``).
        train_dataset: dataset with a column ``prompt`` (text or chat messages); the other columns are passed to the
            rewards. None to evaluate only.
        eval_dataset: dataset of the same form, or a dict of datasets by name.
        processing_class: tokenizer; None for that of ``model``.
        callbacks: see ``transformers.Trainer``.
        peft_config: a ``peft.LoraConfig``, with which the policy learns only an adapter. The critic learns its own,
            unless ``critic_adapter`` is False in ``args``. A policy loaded with an adapter continues to learn it.
        rollout_engine: your own engine, instead of the one that ``args`` names.
        rollout_func: a function that samples, in TRL's form; see ``sppo.rollout.rollout_func.RolloutFunction``.
        environment_factory: returns an environment, which answers the policy between its turns; see
            ``sppo.rollout.environments``.
        tools: functions that the policy may call, with type hints and a docstring.

    Raises:
        ValueError: an argument is invalid, or does not fit the others.
        TypeError: ``model`` is not a causal language model, or a dataset is not a ``datasets.Dataset``.
    """

    args: SPPOConfig
    recipe: dict[str, Any] | None = None
    """Recipe that the run was built from, for its model card."""
    _staging = False  # whether a checkpoint is being written

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: RewardFunction | Sequence[RewardFunction] = (),
        *,
        args: SPPOConfig | None = None,
        critic: PreTrainedModel | str | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        rollout_engine: RolloutEngine | None = None,
        rollout_func: Callable[..., dict[str, Any]] | None = None,
        environment_factory: Callable[[], Any] | None = None,
        tools: Sequence[Callable[..., Any]] = (),
    ) -> None:
        args = args or SPPOConfig(output_dir="sppo_output")
        args.check_processes()
        policy = load_policy(model)
        self._stored_dtype = stored_dtype(policy)
        tokenizer = check_tokenizer(policy, processing_class)
        self.reward_funcs = resolve_rewards(with_environment(reward_funcs, environment_factory), args.reward_weights)
        described = described_tools(environment_factory, tools, tokenizer)

        def encode_row(row: Mapping[str, Any]) -> list[int]:
            return encode(prompt_of(row, args, described), tokenizer)

        if train_dataset is not None:
            check_dataset("train_dataset", train_dataset, tokenizer)
            check_template_settings(train_dataset, args, described)
            train_dataset = drop_long_prompts(train_dataset, encode_row, args.max_prompt_length)
        for name, dataset in named(eval_dataset).items():
            check_dataset(f"eval_dataset {name}".strip(), dataset, tokenizer)
            check_template_settings(dataset, args, described)

        self.algorithm = algorithm_class(args.algorithm)(args)
        if critic is not None and self.algorithm.critic is None and train_dataset is not None:
            logger.warning(f"algorithm={args.algorithm!r} has no critic: critic= is ignored")
        actor_critic = build_actor_critic(
            policy,
            critic,
            kind=self.algorithm.critic if train_dataset is not None else None,
            tokenizer=tokenizer,
            peft_config=peft_config,
            args=args,
            trains=train_dataset is not None,
        )
        name_run(args)
        self._skipped_in_a_row = 0
        self.termination = Termination()
        # Not transformers' own, which saves between the batches of an update and the update itself.
        at_sigterm, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
        super().__init__(
            model=actor_critic,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[EpochCallback(), MetricsFile(), self.termination, *(callbacks or [])],
            compute_loss_func=optimization.loss_already_normalized,
        )
        args.enable_jit_checkpoint = at_sigterm
        prepare_trackers(self.callback_handler.callbacks, args)
        self.console = install_console(
            self, args, callbacks or [], lambda: [] if self.train_dataset is None else self.rollouts.samples
        )
        if args.log_completions:
            self.add_callback(SampleCompletions(lambda: self.rollouts.samples, self.callback_handler.callbacks))
        actor_critic.check_packing()
        self.rollout_engine = build_engine(
            self,
            policy,
            tokenizer,
            given=rollout_engine,
            rollout_func=rollout_func,
            several_turns=environment_factory is not None or bool(tools),
            trains=train_dataset is not None,
        )
        self.episodes = build_episodes(
            self.rollout_engine, tokenizer, args, environment_factory=environment_factory, tools=tools
        )
        report_progress(self.rollout_engine, self.console)
        self.tokenizer = tokenizer
        self.meter = Meter(self.console.phase)
        if train_dataset is not None:
            reference, reference_adapter = None, None
            if args.beta > 0 and has_adapter(policy):
                reference, reference_adapter = policy, initial_adapter(policy)
            elif args.beta > 0:
                reference = frozen_copy(policy, args.device)
            self.rollouts = RolloutStream(
                prompts=Prompts(
                    train_dataset,
                    seed=args.seed,
                    shuffle=args.shuffle_dataset,
                    encode=encode_row,
                ),
                episodes=self.episodes,
                reward_funcs=self.reward_funcs,
                model=actor_critic,
                algorithm=self.algorithm,
                args=args,
                meter=self.meter,
                reference=reference,
                reference_adapter=reference_adapter,
                process=ProcessContext(
                    rank=args.process_index,
                    world_size=args.world_size,
                    gather=gather_lists,
                    autocast=self.accelerator.autocast,
                    gathered_weights=self._gathered_weights,
                ),
                trainer_state=lambda: self.state,
                vocab_size=policy.config.get_text_config().vocab_size,
            )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        allow_changes: Sequence[str] = (),
        **kwargs: Any,
    ) -> TrainOutput:
        """Train to the end; see ``transformers.Trainer.train``.

        At SIGTERM a run that saves checkpoints saves one after the update at hand, and ends with exit code 143.

        Args:
            resume_from_checkpoint: True for the last complete checkpoint in ``output_dir``, or a folder. A resumed run
                has the same weights, bit for bit, as one that was never interrupted.
            *args: arguments of ``transformers.Trainer.train``.
            allow_changes: names of settings that may differ from those of the checkpoint, of those of how memory is
                used. The results may then differ, by rounding or as the settings say.
            **kwargs: arguments of ``transformers.Trainer.train``.

        Raises:
            SystemExit: the run was ended by SIGTERM.
            OSError: the disk is full, and ``full_disk`` is "stop".
            ValueError: ``output_dir`` contains checkpoints and none is resumed, or the one to resume from is missing or
                belongs to another run, another process trains into ``output_dir``, or there is no ``train_dataset``.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset is None; pass one to train on")
        saves = self.args.save_strategy != SaveStrategy.NO or self.args.enable_jit_checkpoint
        with (
            run_lock(self.output_dir) if self.args.should_save else nullcontext(),
            self.termination.handled() if saves else nullcontext(),
            self.console.shown(),
        ):
            output = self._train(
                *args, resume_from_checkpoint=resume_from_checkpoint, allow_changes=allow_changes, **kwargs
            )
        if self.termination.stopped:
            raise SystemExit(EXIT_CODE)
        return output

    def _train(
        self, *args: Any, resume_from_checkpoint: str | bool | None, allow_changes: Sequence[str], **kwargs: Any
    ) -> TrainOutput:
        folder = checkpointing.find_checkpoint(self.output_dir, resume=resume_from_checkpoint)
        rewards = [*(reward.identity() for reward in self.reward_funcs), self.episodes.identity]
        self.identity = checkpointing.identity(self.args, self.actor_critic, self.train_dataset, rewards)
        if folder is not None:
            checkpointing.check_identity(self.identity, folder, allow_changes=allow_changes)
        if self.args.should_save:
            checkpointing.clear_staging(self.output_dir)
        self.accelerator.wait_for_everyone()
        self.rollouts.restart(Progress(), [])
        self.meter.clear()
        if folder is not None and self._load_finished(folder):
            return TrainOutput(self.state.global_step, 0.0, {})
        with use_attention(self.actor_critic, PACKED_ATTENTION):
            return super().train(folder, *args, **kwargs)

    def _load_finished(self, folder: str) -> bool:
        """Load the checkpoint if it has all updates of the run; transformers would add another update to it."""
        state = TrainerState.load_from_json(os.path.join(folder, "trainer_state.json"))
        epochs = self.args.num_train_epochs * self.rollouts.updates_per_epoch
        if state.global_step < (self.args.max_steps if self.args.max_steps > 0 else math.ceil(epochs)):
            return False
        self.state = state
        checkpointing.load_stream(self.rollouts, Path(folder))
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or folder)
        return True

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of lists of micro-batches; each rollout is made when its first list is read."""
        # With its own generator: otherwise each new loader draws a seed from the global one.
        return DataLoader(self.rollouts, batch_size=None, generator=torch.Generator())

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move inputs to the device; for DeepSpeed transformers would also round advantages to the weights' dtype."""
        return {name: tensor.to(self.args.device) for name, tensor in inputs.items()}

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward on a list of micro-batches, which the Trainer takes for one."""
        *first, last = inputs
        sync_each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        with self.accelerator.no_sync(model) if first and not sync_each else nullcontext():
            losses = [super(SPPOTrainer, self).training_step(model, batch, num_items_in_batch) for batch in first]
        return torch.stack([*losses, super().training_step(model, last, num_items_in_batch)]).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a micro-batch's share of the update's loss."""
        loss, output = optimization.update_loss(
            model, inputs, update=self.rollouts.update, algorithm=self.algorithm, args=self.args, meter=self.meter
        )
        return (loss, output) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create one optimizer, in which policy and critic have their own learning rates and weight decay."""
        if self.optimizer is None:
            actor_critic = self.actor_critic
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, actor_critic))
            decay_names = set(self.get_decay_parameter_names(actor_critic))
            self.optimizer = kind(optimization.parameter_groups(actor_critic, self.args, decay_names), **settings)
            if self.is_deepspeed_enabled:
                optimization.freeze_by_rate(self.optimizer, lambda: self.rollouts.learns)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients of policy and critic separately; DeepSpeed has already clipped and taken its step."""
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        max_norms = {"policy": self.args.max_grad_norm, "critic": self.args.critic_max_grad_norm}
        norms, finite = optimization.clip_gradients(self.actor_critic, max_norms=max_norms, learns=self.rollouts.learns)
        self.meter.sum("skipped_updates", not finite)
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row == _MOST_SKIPPED_UPDATES:
            raise FloatingPointError(
                f"the gradients of {_MOST_SKIPPED_UPDATES} updates in a row were not finite, so nothing is learned; "
                f"resume from a checkpoint before update {self.state.global_step - _MOST_SKIPPED_UPDATES + 2} with a "
                "lower learning_rate, and look at the rewards, advantages and log-probabilities in metrics.jsonl"
            )
        if finite:
            self.meter.mean({f"{name}_grad_norm": norm for name, norm in norms.items()})
        return norms.get("policy", torch.zeros((), device=self.args.device))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics since the last log added to those of a training step."""
        if "loss" in logs:
            logs |= self.meter.read(gather_lists)
            logs["total_generated_tokens"] = self.rollouts.progress.generated_tokens
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Answer and score held-out prompts; random state and metrics of training do not change.

        Returns:
            ``eval_success_rate`` (share of answers with a reward of at least 1), ``eval_reward``,
            ``eval_response_length``, ``eval_truncated``, ``eval_problems`` (number of answers that could be scored),
            and ``eval_rewards/<name>``.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = named(self.eval_dataset)[chosen]
        if chosen is None:
            raise ValueError("eval_dataset is None; pass one to evaluate on")
        if isinstance(chosen, dict):
            several = [self.evaluate(each, None, f"{metric_key_prefix}_{name}") for name, each in chosen.items()]
            return {name: value for metrics in several for name, value in metrics.items()}
        with self.console.shown(), self.meter.phase("evaluate"):
            tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
            metrics = self._held_out_metrics(check_dataset("eval_dataset", chosen, tokenizer))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_metrics(self, dataset: datasets.Dataset) -> dict[str, float]:
        rows = [dataset[i] for i in range(self.args.process_index, len(dataset), self.args.world_size)]
        # The weights are gathered by all processes, including those without rows.
        with torch.no_grad(), self.accelerator.autocast(), self._gathered_weights():
            samples = answer_held_out(self.episodes, rows, self.args)
        return held_out_metrics(samples, rows, self.reward_funcs, self.args, gather_lists, trainer_state=self.state)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the policy as an ordinary model, or its adapter, with its tokenizer; the critic in ``critic`` inside.

        In a checkpoint weights have the precision that they are trained in, elsewhere ``save_dtype``.
        """
        folder = Path(output_dir or self.output_dir)
        final_dtype = checkpointing.final_dtype(self.args, self.actor_critic.policy, self._stored_dtype)
        checkpointing.save_models(
            self.actor_critic,
            folder,
            tokenizer=self.tokenizer,
            critic_kind=self.actor_critic.critic_kind,
            gathered_weights=self._gathered_weights,
            writes=self.args.should_save,
            dtype=None if self._staging else final_dtype,
        )
        if self.args.should_save:
            (folder / "training_args.json").write_text(self.args.to_json_string())

    def create_model_card(self, **details: Any) -> None:  # type: ignore[override]
        """Write the model card, ``README.md`` in ``output_dir``; :meth:`push_to_hub` takes the same arguments.

        Args:
            details: arguments of :func:`sppo.reporting.model_card.write_model_card`.
        """
        if self.is_world_process_zero():
            write_model_card(self, self.output_dir / "README.md", **details)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpointing.load_models(self.actor_critic, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write the checkpoint, or if the disk is full remove what was written of it."""
        try:
            self._write_checkpoint(model, trial)
        except Exception as error:
            if not is_full_disk(error):
                raise
            self._staging = False
            checkpointing.clear_staging(self.output_dir)
            failure = full_disk(f"checkpoint-{self.state.global_step}", self.output_dir, error)
            if self.args.full_disk == "stop":
                raise failure from error
            logger.error(str(failure))

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint to a staging folder, then rename it."""
        output_dir, name = self.output_dir, f"checkpoint-{self.state.global_step}"
        with self.meter.phase("checkpoint"):
            self._staging = True
            super()._save_checkpoint(model, trial)
            self._staging = False
            self.accelerator.wait_for_everyone()
            staged = output_dir / checkpointing.STAGING / name
            if is_best := self.state.best_model_checkpoint == str(staged):  # on each process, as each loads it
                self.state.best_model_checkpoint = str(output_dir / name)
            if self.args.should_save:
                checkpointing.save_identity(self.identity, staged)
                if is_best:
                    self.state.save_to_json(str(staged / "trainer_state.json"))
                checkpointing.publish(staged, output_dir / name)
                checkpointing.clear_staging(output_dir)
                rotate_checkpoints(str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output_dir / name))

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, checkpointing.STAGING) if self._staging else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging:  # the folder is about to be renamed
            return
        with TemporaryDirectory() as folder:
            if self.args.save_dtype is not None and self.args.hub_strategy != HubStrategy.END:
                checkpoint_folder = os.path.join(folder, os.path.basename(checkpoint_folder))
                self._save(checkpoint_folder)
            self._push_model_of(checkpoint_folder)

    def _push_model_of(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self.create_model_card()
            checkpointing.copy_critic(Path(checkpoint_folder), self.output_dir)  # transformers copies only files
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        checkpointing.save_stream(self.rollouts, Path(output_dir))

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        super()._load_rng_state(checkpoint_folder)
        if checkpoint_folder is not None:
            checkpointing.load_stream(self.rollouts, Path(checkpoint_folder))

    @contextmanager
    def _gathered_weights(self) -> Iterator[None]:
        """Hold all weights on each process within a context, so that each can run the models independently."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        model = cast(nn.Module, self.model)
        if plugin is not None and not isinstance(model, FSDPModule):
            model.to(self.args.device)  # not sharded yet, and still on its first device
        with gathered(model, reshard_after_forward=plugin is not None and bool(plugin.reshard_after_forward)):
            yield

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.args.output_dir or ".")

    @property
    def actor_critic(self) -> ActorCritic:
        """The module that is trained, without the wrappers of accelerate."""
        return self.accelerator.unwrap_model(self.model)
