import math

import pytest
import torch
from torch.nn import functional as F

from gns_pretrain.model.config import LlamaConfig, RopeScaling
from gns_pretrain.model.llama import Llama, parameter_kind
from gns_pretrain.model.loss import next_token_loss
from gns_pretrain.model.roles import Role, parameter_roles


def small_config(**changes):
    values = {
        "name": "test",
        "dim": 24,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_dim": 40,
        "vocab_size": 61,
    }
    return LlamaConfig(**(values | changes))


def small_model(seed=0, **changes):
    model = Llama(small_config(**changes))
    model.init_weights(seed)
    return model


def text(batch=2, length=16, vocabulary=61, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model, tokens, targets):
    model.zero_grad()
    loss = model(tokens, targets)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@torch.no_grad()
def test_initial_loss_is_that_of_the_published_curves():
    """ln 128256 + 1/2 within 0.03, whatever the width: only vocabulary and initialisation count."""
    vocabulary = 128_256
    model = small_model(dim=64, num_layers=2, vocab_size=vocabulary)
    tokens, targets = text(1, 32, vocabulary)
    logits = model(tokens)
    # The mean over random targets, exactly: a draw of 32 would be 0.18 off.
    expected_loss = (logits.logsumexp(-1) - logits.mean(-1)).mean()
    assert expected_loss.item() == pytest.approx(12.25, abs=0.03)
    torch.testing.assert_close(
        model(tokens, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    )


def test_a_tied_model_starts_as_ignorant_as_a_uniform_guess():
    model = small_model(dim=64, vocab_size=10_000, tie_embeddings=True)
    tokens = text(1, 32, 10_000)[0]
    with torch.no_grad():
        logits = model(tokens)
    loss = (logits.logsumexp(-1) - logits.mean(-1)).mean()
    # Logits of variance 64 * 0.02^2 add half of that.
    assert loss.item() == pytest.approx(math.log(10_000) + 0.0128, abs=0.005)


def test_initial_weights_have_torchtitans_standard_deviations():
    model = small_model(dim=256, ffn_dim=512)

    def std(weight):
        # Four standard errors of the estimate, n >= 256 * 128 draws: 1.6 %.
        return pytest.approx(weight, rel=4 / math.sqrt(2 * 256 * 128))

    assert model.embedding.weight.std().item() == std(1.0)
    # A normal cut at three standard deviations keeps 0.9866 of its own.
    assert model.output.weight.std().item() == std(0.9866 / 256**0.5)
    assert model.output.weight.abs().max().item() <= 3 / 256**0.5
    for index, block in enumerate(model.layers):
        attention, feed_forward = block.attention, block.feed_forward
        for linear in (attention.wq, attention.wk, attention.wv, feed_forward.w1):
            assert linear.weight.std().item() == std(0.02)
        for linear in (attention.wo, feed_forward.w2, feed_forward.w3):
            assert linear.weight.std().item() == std(0.02 / math.sqrt(2 * (index + 1)))
        assert (block.attention_norm.weight == 1).all()


def test_one_seed_gives_one_set_of_weights():
    first, second = small_model(seed=3).state_dict(), small_model(seed=3).state_dict()
    other = small_model(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)


def test_weights_are_not_numbers_until_filled():
    assert all(weight.isnan().all() for weight in Llama(small_config()).parameters())
    assert all(weight.isfinite().all() for weight in small_model().parameters())


def test_a_later_token_does_not_change_earlier_logits():
    model = small_model()
    tokens = text()[0]
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 61
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(dim=-1).any()


def test_the_loss_is_that_of_the_logits():
    model = small_model()
    tokens, targets = text()
    loss = model(tokens, targets)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    logits = model(tokens).flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets.flatten()))


def test_rope_scaling_changes_what_far_tokens_see():
    scaling = RopeScaling(enabled=True, original_sequence_length=8)
    tokens = text()[0]
    with torch.no_grad():
        plain, scaled = small_model()(tokens), small_model(rope_scaling=scaling)(tokens)
    assert torch.equal(plain[:, 0], scaled[:, 0])
    assert not torch.allclose(plain[:, -1], scaled[:, -1])


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_computes_from_float32_weights_with_float32_gradients(tied):
    model = small_model(tie_embeddings=tied)
    tokens, targets = text()
    loss, expected = gradients(model, tokens, targets)
    model.compute_dtype = torch.bfloat16
    rounded_loss, rounded = gradients(model, tokens, targets)
    assert model(tokens).dtype == torch.bfloat16
    assert rounded_loss.dtype == torch.float32
    assert rounded_loss != loss
    assert rounded_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    for name, gradient in rounded.items():
        assert gradient.dtype == torch.float32
        # About ten roundings of 2^-9 on the way to and from each weight.
        assert (gradient - expected[name]).norm() < 10 * 2**-8 * expected[name].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit(dtype):
    plain, checkpointed = small_model(), small_model(activation_checkpointing=True)
    plain.compute_dtype = checkpointed.compute_dtype = dtype
    loss, expected = gradients(plain, *text())
    same_loss, same = gradients(checkpointed, *text())
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(expected[name], same[name]) for name in expected)


def test_activation_checkpointing_keeps_only_the_blocks_inputs():
    def saved_bytes(**changes):
        model = small_model(**changes)
        weights = {weight.data_ptr() for weight in model.parameters()}
        saved = {}

        def keep(tensor):
            if tensor.data_ptr() not in weights:
                saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model(*text(4, 64))
        hidden.backward()
        return sum(saved.values())

    assert saved_bytes(activation_checkpointing=True) < 0.5 * saved_bytes()


def test_a_hook_on_a_tied_matrix_sees_both_uses_at_once():
    model = small_model(tie_embeddings=True)
    seen = []
    model.embedding.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    _, got = gradients(model, *text())
    assert model.output is None
    assert len(seen) == 1
    assert torch.equal(seen[0], got["embedding.weight"])
    # The output's use reaches every row, the embedding's only those of the text.
    unused = torch.ones(61, dtype=torch.bool)
    unused[text()[0]] = False
    assert (seen[0][unused] != 0).any(dim=1).all()


def test_tables_made_without_gradients_serve_training():
    model = small_model()
    with torch.inference_mode():
        model(*text(length=16))
    gradients(model, *text(length=16))


def test_a_model_made_on_the_meta_device_computes_once_filled():
    expected = small_model()
    with torch.device("meta"):
        model = Llama(small_config())
    model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict())
    tokens = text()[0]
    with torch.no_grad():
        assert torch.equal(model(tokens), expected(tokens))


def test_every_parameter_has_the_role_and_the_kind_of_its_place():
    roles = parameter_roles(Llama(small_config(num_layers=1)))
    assert [(name, role, parameter_kind(name)) for name, role in roles.items()] == [
        ("embedding.weight", Role.EMBEDDING, "embedding"),
        ("layers.0.attention_norm.weight", Role.NORM, "norm"),
        ("layers.0.attention.wq.weight", Role.MATRIX, "attention"),
        ("layers.0.attention.wk.weight", Role.MATRIX, "attention"),
        ("layers.0.attention.wv.weight", Role.MATRIX, "attention"),
        ("layers.0.attention.wo.weight", Role.MATRIX, "attention"),
        ("layers.0.feed_forward_norm.weight", Role.NORM, "norm"),
        ("layers.0.feed_forward.w1.weight", Role.MATRIX, "feed_forward"),
        ("layers.0.feed_forward.w2.weight", Role.MATRIX, "feed_forward"),
        ("layers.0.feed_forward.w3.weight", Role.MATRIX, "feed_forward"),
        ("norm.weight", Role.NORM, "norm"),
        ("output.weight", Role.OUTPUT, "output"),
    ]


def test_a_tied_matrix_is_an_embedding_and_counts_once():
    roles = parameter_roles(Llama(small_config(tie_embeddings=True)))
    assert roles["embedding.weight"] is Role.EMBEDDING
    assert Role.OUTPUT not in roles.values()


def test_the_model_uses_the_sliced_loss(monkeypatch):
    called = []

    def spy(*arguments):
        called.append(arguments[0].shape)
        return next_token_loss(*arguments)

    monkeypatch.setattr("gns_pretrain.model.llama.next_token_loss", spy)
    small_model()(*text(batch=2, length=16))
    assert called == [(32, 24)]
