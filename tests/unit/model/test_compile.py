import pytest
import torch
from torch._dynamo.utils import counters

from gns_pretrain.model import loss
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.llama import Llama


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def compiled_model(**changes):
    values = {"dim": 16, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24}
    model = Llama(LlamaConfig(name="test", vocab_size=31, **(values | changes)))
    model.init_weights(0)
    # Traces and differentiates as the default backend does, but runs torch's own kernels.
    model.compile_blocks(backend="aot_eager")
    return model


def text(batch):
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(31, (batch, 13), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def graphs():
    return counters["stats"]["unique_graphs"]


def graphs_of_the_loss(dtype=torch.float32):
    """The softmax has a graph where the loss is ours and not torch's."""
    return int(dtype == torch.bfloat16 or not loss._HAS_LINEAR_CROSS_ENTROPY)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_blocks_and_batch_sizes_share_one_graph(checkpointing, dtype, monkeypatch):
    monkeypatch.setattr(loss, "CPU_SLICE_TOKENS", 40)  # slices of 40, 24, 8, 36 and 32 tokens
    model = compiled_model(activation_checkpointing=checkpointing)
    model.compute_dtype = dtype
    for batch in (4, 4, 6, 2, 3, 16):  # the first two accumulate
        model(*text(batch)).backward()
    assert graphs() == 1 + graphs_of_the_loss(dtype)


def test_documents_of_all_batch_sizes_share_one_graph():
    model = compiled_model()
    plain = Llama(model.config)
    plain.load_state_dict(model.state_dict())
    for one in (model, plain):
        one.separate_documents(bos_id=None, eos_id=3)
        for batch in (4, 4, 6, 2, 3):
            one(*text(batch)).backward()
    assert graphs() == 1 + graphs_of_the_loss()
    for compiled, eager in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, eager.grad)


def test_evaluation_adds_one_graph():
    model = compiled_model()
    model(*text(4)).backward()
    for batch in (4, 7):
        with torch.no_grad():
            model(*text(batch))
    model(*text(5)).backward()
    assert graphs() == 2 + graphs_of_the_loss()


def test_compiled_blocks_compute_the_same():
    model = compiled_model()
    plain = Llama(model.config)
    plain.load_state_dict(model.state_dict())
    for one in (model, plain):
        one(*text(4)).backward()
    for compiled, eager in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, eager.grad)
