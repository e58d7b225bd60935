"""Processes that sample from one server, or all learn that it failed: RANK WORLD OUT PORT URL [fails]."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import char_tokenizer, tiny_model

from sppo.rollout.vllm_server import VLLMServerRollout

rank, world, out, port, url, *fails = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=int(world))
engine = VLLMServerRollout(tiny_model(), char_tokenizer(), base_url=url, timeout=5.0, max_completion_length=8)
PROMPTS, CALL = ["1+2=", "7", "12+34="], {"seed": 100 * int(rank), "temperature": 1.0, "batch_size": 3}
if fails:
    with pytest.raises(RuntimeError, match=r"the main process could not send weights .*no cache"):
        engine.generate(PROMPTS, **CALL)
else:
    for _ in range(2):
        engine.generate(PROMPTS, **CALL)
    if rank == "0":
        engine.generate(PROMPTS, **CALL)
    else:
        engine.skip()
if rank == "0":
    torch.save({}, Path(out, "result.pt"))
dist.barrier()
