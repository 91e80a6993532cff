"""FSDP2 and tensor parallelism together, on GPUs or on CPUs.

    torchrun --nproc-per-node 4 examples/fsdp_tp.py --tp 2

Shard the model first, build the optimizer after that: blocks are found by name, state is sharded as parameters are, and
the mesh does not change the result. Rank 0 prints the loss, and the state that it holds of all.
"""

import argparse
import os

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sharpwise

PLAN = {
    "self_attn.q_proj": ColwiseParallel(),
    "self_attn.k_proj": ColwiseParallel(),
    "self_attn.v_proj": ColwiseParallel(),
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="processes that share a layer")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    world = dist.get_world_size()
    mesh = init_device_mesh(device, (world // given.tp, given.tp), mesh_dim_names=("dp", "tp"))

    torch.manual_seed(0)  # the same weights on all ranks
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = transformers.LlamaForCausalLM(config).to(device)
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], PLAN)
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = sharpwise.AdamMini(model, lr=3e-3, weight_decay=0.1, max_grad_norm=1.0)

    generator = torch.Generator().manual_seed(1 + mesh["dp"].get_local_rank())  # other data per replica, not per shard
    for step in range(given.steps):
        start = torch.randint(64, (8, 1), generator=generator)
        tokens = ((start + 3 * torch.arange(32)) % 64).to(device)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and (step == 0 or step == given.steps - 1):
            print(f"step {step}: loss {loss.item():.3f}")
    if dist.get_rank() == 0:
        print(f"mesh {tuple(mesh.shape)}: {optimizer.state_bytes() / 2**10:.0f} KiB of state here")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
