"""Functions whose GPU path is another one than the CPU's."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gns_pretrain.geometry.square_root import TOLERANCE, trace_square_root
from gns_pretrain.model.llama import Llama
from gns_pretrain.model.loss import (
    compiled_logit_gradients_,
    logit_gradients_,
    next_token_loss,
)
from gns_pretrain.optim.adamw import AdamWPart
from gns_pretrain.optim.base import OptimizerSettings
from gns_pretrain.optim.signum import SignumSettings
from gns_pretrain.optim.spectral import MuonSettings
from tests.settings import odd_model
from tests.unit.geometry.test_square_root import WIDTH, basis, spectra

TOKENS, DIM, VOCABULARY = 5000, 64, 1000  # two whole slices and a rest


def loss_and_gradients(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    value = loss(*leaves, targets)
    return [t.detach().cpu().double() for t in (value, *torch.autograd.grad(value, leaves))]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_loss_and_gradients_are_those_of_cross_entropy_in_float64(gpu, dtype, rel, compiled):
    gradients = compiled_logit_gradients_() if compiled else logit_gradients_
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, generator=generator).to(dtype)
    weight = (torch.randn(VOCABULARY, DIM, generator=generator) * DIM**-0.5).to(dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    found = loss_and_gradients(
        partial(next_token_loss, logit_gradients=gradients),
        hidden.to(gpu),
        weight.to(gpu),
        targets.to(gpu),
    )
    expected = loss_and_gradients(
        lambda h, w, t: F.cross_entropy(F.linear(h, w), t),
        hidden.double(),
        weight.double(),
        targets,
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= rel * theirs.norm()


def test_square_roots_of_known_spectra_need_no_eigenvalues(gpu):
    values, vectors = torch.stack(list(spectra(WIDTH).values())), basis(WIDTH)
    grams = (vectors * values.square().unsqueeze(-2)) @ vectors.mT
    result = trace_square_root(grams.to(gpu))
    assert result.num_fallbacks == 0
    truth = values.sum(-1)
    assert ((result.values.cpu() - truth).abs() <= TOLERANCE * truth).all()


def updates(settings: OptimizerSettings, device: torch.device) -> list[Tensor]:
    """What two steps on given gradients add to each weight."""
    model = Llama(odd_model())
    model.init_weights(seed=0)
    model.to(device)
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer = settings.build(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator).to(device)
        optimizer.step()
    return [
        (weight - old).detach().cpu()
        for weight, old in zip(model.parameters(), before, strict=True)
    ]


@pytest.mark.parametrize(
    ("settings", "rel"),
    [
        (SignumSettings(lr=0.05), 1e-5),
        (SignumSettings(lr=0.05, momentum=0.0), 1e-5),
        (MuonSettings(lr=0.05, precision="float32", adamw=AdamWPart(lr=0.05)), 1e-4),
        # Five bfloat16 steps: each rounds a singular value near 1 by up to 2^-8 of it.
        (MuonSettings(lr=0.05, adamw=AdamWPart(lr=0.05)), 0.05),
    ],
    ids=["signum", "signsgd", "muon in float32", "muon in bfloat16"],
)
def test_rule_takes_the_steps_that_it_takes_on_a_cpu(gpu, settings, rel):
    for ours, expected in zip(
        updates(settings, gpu), updates(settings, torch.device("cpu")), strict=True
    ):
        assert (ours - expected).norm() <= rel * expected.norm()


@pytest.mark.parametrize("length", [64, 320], ids=["documents together", "documents apart"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_bfloat16_blocks_give_the_loss_and_gradients_of_float32(gpu, compiled, length):
    # Heads of 64: the fused attention kernels of training, and flex attention over three blocks.
    model = Llama(odd_model(dim=128, num_heads=2, num_kv_heads=1, ffn_dim=256))
    model.init_weights(seed=0)
    text = torch.randint(61, (4, length + 1), generator=torch.Generator().manual_seed(0))
    if length > 64:
        model.separate_documents(bos_id=None, eos_id=0)

    def step(device: torch.device) -> tuple[Tensor, list[Tensor]]:
        model.to(device)
        model.zero_grad()
        loss = model(text[:, :-1].to(device), text[:, 1:].to(device))
        loss.backward()
        gradients = [w.grad for w in model.parameters() if w.grad is not None]
        # Clones: moving the model moves its gradients along.
        return loss.detach().cpu(), [gradient.cpu().clone() for gradient in gradients]

    loss, gradients = step(torch.device("cpu"))
    model.compute_dtype = torch.bfloat16
    if compiled:
        model.compile_blocks()
    found, theirs = step(gpu)
    torch.testing.assert_close(found, loss, rtol=5e-3, atol=0)
    norm = nn.utils.get_total_norm
    difference = [a - b for a, b in zip(theirs, gradients, strict=True)]
    assert norm(difference) <= 0.05 * norm(gradients)
