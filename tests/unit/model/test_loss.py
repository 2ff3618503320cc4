"""Both ways of `next_token_loss`, whichever of them this version of torch picks."""

import logging
import math
import shutil

import pytest
import torch
from torch._inductor import compile_fx, metrics
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from gns_pretrain.model import loss as loss_module
from gns_pretrain.model.loss import logit_gradients_, next_token_loss

SLICE = 16  # of 50 tokens: three whole slices and a rest of two


@pytest.fixture(params=["chosen", "sliced"])
def way(request, monkeypatch):
    """The way that is chosen, and our own where torch's would be."""
    monkeypatch.setattr(loss_module, "CPU_SLICE_TOKENS", SLICE)
    if request.param == "sliced":
        monkeypatch.setattr(loss_module, "_HAS_LINEAR_CROSS_ENTROPY", False)
    return request.param


def inputs(dtype, tokens=50, dim=12, vocabulary=97):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, dim, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain_loss(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets)


def loss_and_gradients(function, hidden, weight, targets, scale=1.0):
    loss = function(hidden, weight, targets)
    return (loss.detach(), *torch.autograd.grad(scale * loss, (hidden, weight)))


@pytest.mark.usefixtures("way")
def test_by_hand():
    # Logits (0, ln 3) give probabilities (1/4, 3/4); targets 1 and 0 cost ln 4/3 and ln 4.
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    loss, grad_hidden, grad_weight = loss_and_gradients(
        next_token_loss, hidden, weight, torch.tensor([1, 0])
    )
    torch.testing.assert_close(loss.item(), (math.log(4 / 3) + math.log(4)) / 2)
    # d loss / d logits, half of softmax - one_hot: (1/8, -1/8) and (-3/8, 3/8).
    torch.testing.assert_close(grad_weight, torch.tensor([[-0.25], [0.25]]))
    torch.testing.assert_close(grad_hidden, math.log(3) * torch.tensor([[-0.125], [0.375]]))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_are_those_of_cross_entropy(dtype):
    # The scale is what accumulation over four micro-batches puts on the loss.
    got = loss_and_gradients(next_token_loss, *inputs(dtype), scale=0.25)
    expected = loss_and_gradients(plain_loss, *inputs(dtype), scale=0.25)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("way")
def test_without_gradients_the_loss_is_the_same():
    with torch.no_grad():
        evaluated = next_token_loss(*inputs(torch.float32))
    assert evaluated == next_token_loss(*inputs(torch.float32))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_inputs_give_equal_bits(dtype):
    first = loss_and_gradients(next_token_loss, *inputs(dtype))
    second = loss_and_gradients(next_token_loss, *inputs(dtype))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_bfloat16_inputs_give_a_float32_loss(monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_SLICE_TOKENS", SLICE)
    hidden, weight, targets = inputs(torch.bfloat16)
    loss, grad_hidden, grad_weight = loss_and_gradients(next_token_loss, hidden, weight, targets)
    expected = loss_and_gradients(
        plain_loss, *(x.detach().float().requires_grad_() for x in (hidden, weight)), targets
    )
    assert loss.dtype == torch.float32
    # Each logit is rounded to 2^-9 of itself, about 12^0.5 here; 50 tokens' errors average out.
    torch.testing.assert_close(loss, expected[0], rtol=0.0, atol=4 * 2**-9 * 12**0.5 / 50**0.5)
    for ours, theirs in zip((grad_hidden, grad_weight), expected[1:], strict=True):
        assert ours.dtype == torch.bfloat16
        # Logits, their gradients and the product are each rounded: a few 2^-8 of the whole.
        assert (ours.float() - theirs).norm() < 4 * 2**-8 * theirs.norm()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_apart_logits_cost_their_distance(dtype):
    # exp(100) overflows float32 and exp(-200) underflows.
    hidden, weight = torch.ones(1, 1, dtype=dtype), torch.tensor([[100.0], [-100.0]], dtype=dtype)
    assert next_token_loss(hidden, weight, torch.tensor([1])).item() == 200.0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_as_large_as_all_logits_is_allocated(dtype):
    tokens, dim, vocabulary = 256, 4, 1000
    hidden, weight, targets = inputs(dtype, tokens, dim, vocabulary)

    def largest_allocation(function):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function(hidden, weight, targets).backward()
        return max(event.self_cpu_memory_usage for event in profiler.events())

    # Float32 logits of one slice; bfloat16 adds a second, half as large.
    one_slice, all_logits = 4 * SLICE * vocabulary, 4 * tokens * vocabulary
    assert largest_allocation(plain_loss) >= all_logits * hidden.element_size() / 4
    assert largest_allocation(next_token_loss) <= one_slice


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")
def test_compiled_gradient_of_the_logits_moves_at_most_8_bytes_each(caplog):
    tokens, vocabulary = 128, 4096
    logits = 4 * torch.randn(tokens, vocabulary).bfloat16()
    targets = torch.randint(vocabulary, (tokens, 1))
    exact = logits.double().log_softmax(dim=1)
    metrics.reset()
    # Inductor counts the bytes of code that it generates, where it may log them.
    with caplog.at_level(logging.INFO, compile_fx.inductor_metrics_log.name), fresh_cache():
        log_probabilities = torch.compile(logit_gradients_, dynamic=False)(logits, targets)
    of_targets = exact.gather(1, targets)
    torch.testing.assert_close(log_probabilities.double(), of_targets, atol=0, rtol=1e-5)
    expected = exact.exp() - F.one_hot(targets[:, 0], vocabulary)
    torch.testing.assert_close(logits, expected.bfloat16(), atol=1e-8, rtol=2**-7)
    # 6: two reads and one write.
    assert 6.0 <= metrics.num_bytes_accessed / logits.numel() <= 8.0
