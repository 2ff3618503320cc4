"""transformers' Llama under FSDP2: the batch follows the Manhattan noise scale, Signum trains.

torchrun --nproc-per-node 2 examples/fsdp2_llama.py
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from gns_pretrain import AdaptiveBatchSize, NoiseMeter, Signum

TOTAL_SEQUENCES, INITIAL_BATCH, MICRO_BATCH = 1024, 16, 2  # sequences
SEQUENCE_LENGTH, VOCABULARY = 16, 64
PEAK_LR, GRADIENT_CLIP = 2e-3, 1.0
MODEL = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=SEQUENCE_LENGTH,
    use_cache=False,
)


def sequences(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return token ids that count upwards from a random start in strides of 1 to 3."""
    start = torch.randint(VOCABULARY, (count, 1), generator=generator)
    stride = torch.randint(1, 4, (count, 1), generator=generator)
    return (start + stride * torch.arange(SEQUENCE_LENGTH)) % VOCABULARY


def main() -> None:
    """Train this rank's shard."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu", int(os.environ["LOCAL_RANK"]) * on_gpu)
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (num_ranks,))

    torch.manual_seed(0)  # the same weights on every rank
    model = LlamaForCausalLM(MODEL).to(device)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = Signum(model.parameters(), lr=PEAK_LR, momentum=0.9, weight_decay=0.1)
    meter = NoiseMeter(model, geometries=["manhattan"], every_steps=5)
    adaptive = AdaptiveBatchSize(
        batch_size=INITIAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        num_ranks=num_ranks,
        total_samples=TOTAL_SEQUENCES,
        geometry="manhattan",
        decide_every_steps=5,
    )
    generator = torch.Generator().manual_seed(rank)  # other sequences on every rank

    while adaptive.samples < TOTAL_SEQUENCES:
        accumulation = adaptive.accumulation
        with meter.step(adaptive.steps + 1):
            for i in range(accumulation):
                model.set_requires_gradient_sync(i + 1 == accumulation)
                ids = sequences(adaptive.micro_batch_size, generator).to(device)
                with meter.sample():
                    loss = model(input_ids=ids, labels=ids).loss
                    (loss / accumulation).backward()
        readings = meter.read(batch_size=adaptive.batch_size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * adaptive.lr_multiplier
        optimizer.step()
        optimizer.zero_grad()
        change = adaptive.step(readings)
        if rank == 0 and change:
            size, step = change.split.batch_size, adaptive.steps + 1
            print(f"step {step}: batch {change.previous} -> {size}, loss {loss.item():.3f}")
    if rank == 0:
        print(f"loss {loss.item():.3f} after {adaptive.steps} steps")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
