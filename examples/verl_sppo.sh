#!/usr/bin/env bash
# SPPO on a Ray cluster with verl 0.9: one response per prompt, a critic, the paper's settings for 1.5B (arXiv 2604.08865).
#
#   pip install 'verl[fsdp,vllm]==0.9.1' && pip install .      on every node, in a checkout of this repository
#   ray start --head                                           on the first, ray start --address=... on the others
#   MODEL=... DATA=train.parquet NNODES=2 bash examples/verl_sppo.sh trainer.total_epochs=3
#
# DATA has the columns prompt (chat messages), reward_model.ground_truth (an integer or decimal), data_source.
# Tested without a GPU: verl accepts every setting below and builds its configuration from them, and each part that the
# settings name agrees with verl's own. Not tested: training itself, for which verl requires GPUs.
set -euo pipefail
HERE="$(cd "$(dirname "$0")" && pwd)"

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=sppo_seq \
    critic.loss_agg_mode=sppo_seq \
    actor_rollout_ref.actor.policy_loss.loss_mode=sppo_seq \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
    actor_rollout_ref.model.use_fused_kernels=True \
    actor_rollout_ref.model.fused_kernel_options.impl_backend=sppo_kernels \
    \
    data.train_files="${DATA:?a parquet file}" \
    data.val_files="${VALIDATION:-$DATA}" \
    data.train_batch_size=256 \
    data.max_prompt_length=1024 \
    data.max_response_length=8192 \
    reward.custom_reward_function.path="$HERE/verl_reward.py" \
    \
    actor_rollout_ref.model.path="${MODEL:?a model}" \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=1 \
    actor_rollout_ref.rollout.temperature=0.6 \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.clip_ratio=0.2 \
    actor_rollout_ref.actor.clip_ratio_c=3.0 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    \
    critic.model.path="${CRITIC:-$MODEL}" \
    critic.strategy=fsdp2 \
    critic.optim.lr=5e-6 \
    trainer.critic_warmup=2 \
    \
    trainer.nnodes="${NNODES:-1}" \
    trainer.n_gpus_per_node="${GPUS:-8}" \
    trainer.project_name=sppo \
    trainer.logger='[console]' \
    "$@"
