"""transformers' GPT-2 under DDP: Muon for the matrices, AdamW for the rest, all three noise scales.

torchrun --nproc-per-node 2 examples/ddp_gpt2.py
"""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from gns_pretrain import CombinedOptimizer, Muon, NoiseMeter, split_parameters

NUM_STEPS, ACCUMULATION, MICRO_BATCH = 20, 4, 2  # micro-batches a rank, sequences
SEQUENCE_LENGTH, VOCABULARY = 16, 64
MODEL = GPT2Config(
    vocab_size=VOCABULARY,
    n_positions=SEQUENCE_LENGTH,
    n_embd=48,
    n_layer=2,
    n_head=4,
    use_cache=False,
    bos_token_id=None,
    eos_token_id=None,
)


def sequences(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return token ids that count upwards from a random start in strides of 1 to 3."""
    start = torch.randint(VOCABULARY, (count, 1), generator=generator)
    stride = torch.randint(1, 4, (count, 1), generator=generator)
    return (start + stride * torch.arange(SEQUENCE_LENGTH)) % VOCABULARY


def main() -> None:
    """Train this rank's replica."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu", int(os.environ["LOCAL_RANK"]) * on_gpu)
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(GPT2LMHeadModel(MODEL).to(device))

    matrices, others = split_parameters(model)
    optimizer = CombinedOptimizer(
        [
            Muon(matrices, lr=0.02, process_group=model.process_group),
            torch.optim.AdamW(others, lr=2e-3),
        ]
    )
    meter = NoiseMeter(model, geometries=["euclidean", "manhattan", "nuclear"], every_steps=10)
    batch_size = ACCUMULATION * MICRO_BATCH * dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)  # other sequences on every rank

    for step in range(1, NUM_STEPS + 1):
        with meter.step(step):
            for i in range(ACCUMULATION):
                ids = sequences(MICRO_BATCH, generator).to(device)
                is_last = i + 1 == ACCUMULATION
                with nullcontext() if is_last else model.no_sync(), meter.sample():
                    loss = model(input_ids=ids, labels=ids).loss
                    (loss / ACCUMULATION).backward()
        readings = meter.read(batch_size=batch_size)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and readings:
            scales = ", ".join(f"{r.total.geometry} {r.total.noise_scale:.1f}" for r in readings)
            print(f"step {step}: loss {loss.item():.3f}, noise scale {scales} sequences")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
