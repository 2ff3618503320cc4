"""Which parameters of any model are matrices, and which belong to one block."""

import pytest
import torch
from torch import nn

from gns_pretrain.errors import InputError
from gns_pretrain.model.roles import Role, blocks_of, layer_of, parameter_roles


def roles(model: nn.Module, matrices=None) -> dict[str, str]:
    return {name: role.name for name, role in parameter_roles(model, matrices).items()}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 8)


class Vision(nn.Module):
    """Convolution, positions, a stack in an nn.Sequential, a head within another one."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2)
        self.positions = nn.Parameter(torch.zeros(1, 9, 4))
        self.stack = nn.Sequential()
        self.stack.add_module("layer_0", Block())
        self.stack.add_module("layer_1", Block())
        self.heads = nn.Sequential(nn.Dropout(), nn.Linear(4, 10))


def test_matrices_are_inside_the_model_with_two_dimensions_or_more():
    assert roles(Vision()) == {
        "positions": "OTHER",
        "patches.weight": "MATRIX",
        "patches.bias": "OTHER",
        **{
            f"stack.layer_{i}.{name}": role
            for i in (0, 1)
            for name, role in {
                "norm.weight": "NORM",
                "norm.bias": "NORM",
                "up.weight": "MATRIX",
                "up.bias": "OTHER",
            }.items()
        },
        "heads.1.weight": "OUTPUT",
        "heads.1.bias": "OTHER",
    }


def test_last_layer_of_a_plain_stack_is_the_head_and_the_last_one_of_a_backbone_is_not():
    perceptron = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    assert roles(perceptron)["2.weight"] == "OUTPUT"
    backbone = nn.ModuleDict({"layers": nn.ModuleList([Block()])})
    assert roles(backbone)["layers.0.up.weight"] == "MATRIX"


def test_weight_tied_to_an_embedding_is_one_embedding():
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "mix": nn.Linear(4, 4)})
    model["head"] = nn.Linear(4, 6, bias=False)
    model["head"].weight = model["table"].weight
    assert roles(model) == {
        "table.weight": "EMBEDDING",
        "mix.weight": "MATRIX",
        "mix.bias": "OTHER",
    }


def test_conv1d_of_gpt2_is_a_matrix_and_its_tied_head_and_positions_are_not():
    transformers = pytest.importorskip("transformers", reason="the huggingface extra is missing")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=5)
    found = roles(transformers.GPT2LMHeadModel(config))
    matrices = [name for name, role in found.items() if role == "MATRIX"]
    assert matrices == [
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert found["transformer.wte.weight"] == found["transformer.wpe.weight"] == "EMBEDDING"


def test_user_chooses_matrices_by_function_by_list_or_over_the_default():
    model = Vision()
    by_function = roles(model, lambda name, parameter: parameter.shape[-1] == 9)
    assert "MATRIX" not in by_function.values()
    by_function = roles(model, lambda name, parameter: parameter.ndim == 4)
    assert [n for n, r in by_function.items() if r == "MATRIX"] == ["patches.weight"]
    listed = roles(model, ["stack.*.up.weight"])
    assert [n for n, r in listed.items() if r == "MATRIX"] == [
        "stack.layer_0.up.weight",
        "stack.layer_1.up.weight",
    ]
    assert listed["heads.1.weight"] == "OUTPUT"
    over = roles(model, {"patches.*eight": False, "heads.1.weight": True})
    assert (over["patches.weight"], over["heads.1.weight"]) == ("OTHER", "MATRIX")
    assert over["stack.layer_0.up.weight"] == "MATRIX"


@pytest.mark.parametrize(
    ("matrices", "says"),
    [
        (["stak.*"], r"pattern 'stak\.\*', which matches no trainable parameter"),
        ({"patches.bias": True}, r"patches\.bias, whose shape is \[4\]"),
        (lambda name, parameter: True, r"positions|bias|norm"),
        ("patches.weight", "is one name; use a list"),
    ],
)
def test_choice_that_cannot_be_is_an_error_that_names_it(matrices, says):
    with pytest.raises(InputError, match=says):
        parameter_roles(Vision(), matrices)


def test_block_is_the_layer_of_a_stack_or_the_module():
    assert set(blocks_of(Vision()).values()) == {
        "positions",
        "patches",
        "stack.layer_0",
        "stack.layer_1",
        "heads.1",
    }
    assert blocks_of(Vision(), ["stack.*"])["stack.layer_1.up.bias"] == "stack.*"
    assert blocks_of(Vision(), lambda name: "all")["positions"] == "all"
    assert layer_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "1.weight") is None


def test_wrappers_do_not_show_in_names_and_frozen_parameters_have_no_role():
    inner = nn.Sequential(torch.compile(Block()), torch.compile(Block()), nn.Linear(4, 3))
    inner[0].norm.requires_grad_(False)
    model = torch.compile(inner)
    assert list(roles(model)) == [
        "0.up.weight",
        "0.up.bias",
        "1.norm.weight",
        "1.norm.bias",
        "1.up.weight",
        "1.up.bias",
        "2.weight",
        "2.bias",
    ]
    assert blocks_of(model)["1.up.weight"] == "1"
    assert parameter_roles(model)["2.weight"] is Role.OUTPUT
