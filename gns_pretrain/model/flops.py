"""FLOPs: what a token takes, and what a GPU computes at most."""

from gns_pretrain.model.config import LlamaConfig, count_parameters

# Dense bfloat16 matmuls by NVIDIA's data sheets, in 1e12 FLOP/s; the first name that a GPU's holds.
PEAK_TERAFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}


def flops_per_token(shape: LlamaConfig, sequence_length: int) -> float:
    """Return the FLOPs of forward and backward for one token; recomputation is not counted.

        6 P + 6 L D T

    P parameters that multiply (all but an untied embedding), each used once forward and twice
    backward at 2 FLOPs; L layers whose causal attention averages T / 2 keys of width D, scored and
    mixed.
    """
    attention = shape.num_layers * shape.dim * sequence_length
    return 6.0 * (count_parameters(shape).with_output + attention)


def peak_flops(gpu: str) -> float | None:
    """Return a GPU's bfloat16 FLOP/s by its name; None for one that is not listed."""
    return next((1e12 * peak for name, peak in PEAK_TERAFLOPS.items() if name in gpu), None)
