"""One update of fsdp2_loop.py, then its loop, in one process of several; see test_fsdp2_loop.py."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import fsdp2_loop
from plain_loop import ActorCritic


def run(out: Path) -> None:
    given = torch.load(out / "given.pt", weights_only=True)
    model = ActorCritic()
    model.load_state_dict(given["weights"])
    accelerator, model, optimizer = fsdp2_loop.sharded(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert all(isinstance(x, torch.distributed.tensor.DTensor) for x in model.parameters())
    mine = [x.chunk(accelerator.num_processes)[accelerator.process_index] for x in given["samples"]]
    norm = fsdp2_loop.update(accelerator, model, optimizer, mine)
    weights = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
    norm = norm.full_tensor()
    fsdp2_loop.main(updates=1)
    if accelerator.is_main_process:
        torch.save({"weights": weights, "norm": norm}, out / "result.pt")


if __name__ == "__main__":
    rank, world, out, port = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    run(out)
