"""One of several processes that torchrun starts: a plain training loop, in which the schedule of one rank goes wrong.

torchrun --nproc-per-node 2 lr_worker.py LR
"""

import sys
import warnings

import torch
import torch.distributed as dist
from first_contact.tiny import batches, gpt2, loss_of
from torch.distributed.fsdp import fully_shard

import sharpwise


def main(lr: float) -> None:
    warnings.simplefilter("ignore")  # gloo's and FSDP's, about a machine without GPUs
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # with torch's own timeout of half an hour
    model = fully_shard(gpt2())
    optimizer = sharpwise.AdamMini(model, lr=1e-3)
    for step, tokens in enumerate(batches()):
        loss_of(model, tokens.chunk(2)[dist.get_rank()]).backward()
        if step == 3 and dist.get_rank() == 1:
            optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main(float(sys.argv[1]))
