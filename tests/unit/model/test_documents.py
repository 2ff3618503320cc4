"""Documents that do not see each other: the mask, and what a packed sequence computes with it."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from gns_pretrain.model import llama
from gns_pretrain.model.config import LlamaConfig
from gns_pretrain.model.llama import Llama, document_block_mask, document_mask, document_numbers

BOS, EOS = 1, 2


@pytest.mark.parametrize(
    ("tokens", "bos_id", "eos_id", "documents"),
    [
        # The end of one document, a whole one, and the beginning of a third.
        ([5, EOS, BOS, 6, 7, EOS, BOS, 8], BOS, EOS, [0, 0, 1, 1, 1, 1, 2, 2]),
        ([5, EOS, 6, 7, EOS, 8], None, EOS, [0, 0, 1, 1, 1, 2]),
        ([5, BOS, 6, 7, BOS, 8], BOS, None, [0, 1, 1, 1, 2, 2]),
        ([5, EOS, 6, EOS, EOS], EOS, EOS, [0, 0, 1, 1, 2]),  # one token for both ends documents
    ],
)
def test_documents_are_numbered_by_the_tokens_around_them(tokens, bos_id, eos_id, documents):
    found = document_numbers(torch.tensor([tokens]), bos_id=bos_id, eos_id=eos_id)
    assert found.tolist() == [documents]


def test_mask_by_hand():
    mask = document_mask(torch.tensor([[0, 0, 1]]))
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]


def model(**changes) -> Llama:
    values = {"dim": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 40}
    made = Llama(LlamaConfig(name="test", vocab_size=31, **(values | changes)))
    made.init_weights(seed=0)
    made.double()
    made.compute_dtype = torch.float64
    return made


def packed() -> tuple[list[list[Tensor]], Tensor]:
    """Two sequences of 16 tokens and a target: their documents, and the sequences."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for lengths in ((4, 7, 6), (9, 1, 7)):  # the last one is cut off by the sequence's end
        documents = [torch.randint(3, 31, (n,), generator=generator) for n in lengths]
        for document in documents[:-1]:
            document[-1] = EOS
        sequences.append(documents)
    return sequences, torch.stack([torch.cat(documents) for documents in sequences])


def gradients(model: Llama, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.fixture
def flex_on_cpus(monkeypatch):
    """Let models here take the mask of compiled blocks on a GPU, and flex attention take it.

    Uncompiled, flex attention computes a CPU's gradients as well as any; only its check says no.
    """
    monkeypatch.setattr(llama, "document_mask", document_block_mask)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["dense mask", "flex attention"])
def test_packed_documents_give_the_logits_and_gradients_of_each_alone(
    attention, checkpointing, request
):
    if attention == "flex attention":
        request.getfixturevalue("flex_on_cpus")
    alone = model()
    together = model(activation_checkpointing=checkpointing)
    together.separate_documents(bos_id=None, eos_id=EOS)
    sequences, tokens = packed()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    expected_loss = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        logits = together(inputs)
        without_mask = alone(inputs)
    for row, documents in enumerate(sequences):
        start = 0
        for document in documents:
            stop = min(start + len(document), inputs.shape[1])
            part, target = inputs[row : row + 1, start:stop], targets[row : row + 1, start:stop]
            # The rotary tables are float32: at other positions they differ in its last bits.
            torch.testing.assert_close(
                logits[row, start:stop], alone(part)[0], rtol=1e-5, atol=1e-6
            )
            expected_loss = expected_loss + alone(part, target) * (stop - start) / inputs.numel()
            if start:
                assert not torch.allclose(without_mask[row, start:stop], alone(part)[0], rtol=1e-2)
            start = stop
    loss = together(inputs, targets)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0.0)
    pairs = zip(gradients(together, loss), gradients(alone, expected_loss), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_sequence_of_one_document_is_as_without_a_mask():
    plain, masked = model(), model()
    masked.separate_documents(bos_id=None, eos_id=EOS)
    tokens = torch.randint(3, 31, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(masked(tokens), plain(tokens), rtol=1e-12, atol=1e-12)
