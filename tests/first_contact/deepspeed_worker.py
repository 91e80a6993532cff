"""One of two gloo processes under DeepSpeed: what it does with an optimizer of ours at each stage of ZeRO.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m first_contact.deepspeed_worker OUTPUT.json
"""

import os
import sys
from typing import Any

import torch.distributed as dist
from distributed.serving import serve
from first_contact.tiny import batches, gpt2, loss_of

import sharpwise

STEPS = 10


def trained(name: str, stage: int) -> dict[str, Any]:
    """Each process sees half of every batch, one process alone sees all of it."""
    import deepspeed

    model, alone = gpt2(), gpt2()
    # With this eps a key's bias, whose gradient is 0 but for rounding, stays where it is.
    optimizer, reference = (sharpwise.create_optimizer(m, name, lr=1e-2, eps=1e-4) for m in (model, alone))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # 1.0 if nothing is said
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        losses, worst = [], 0.0
        for tokens in batches(STEPS):
            loss = loss_of(engine, tokens.chunk(2)[dist.get_rank()])
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            whole = loss_of(alone, tokens)
            whole.backward()
            reference.step()
            reference.zero_grad()
            losses.append(whole.item())
            worst = max(worst, abs(mean.item() / 2 - whole.item()))
    except ValueError as refused:
        return {"said": str(refused)}
    steps = sorted({float(own["step"]) for own in optimizer.state.values()})
    return {"steps": steps, "losses": worst, "moved": losses[0] - losses[-1]}


if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": os.environ["RANK"]}
    names, stages = ("adamw", "adam-mini"), range(4)
    serve({f"{n}, {s}": lambda n=n, s=s: trained(n, s) for n in names for s in stages}, sys.argv[1])
