"""SimpleViT and ResNet: their sizes and first weights are the papers', their roles sensible."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gns_pretrain.errors import InputError
from gns_pretrain.model.batch_norm import BatchNorm
from gns_pretrain.model.classifier import ImageClassifier
from gns_pretrain.model.resnet import ResNetConfig
from gns_pretrain.model.roles import Role, blocks_of, matrix_shape, parameter_roles
from gns_pretrain.model.simple_vit import SimpleViTConfig, positions_2d
from gns_pretrain.parallel.running_statistics import update_running_statistics


def vit(**changes) -> SimpleViTConfig:
    sizes = {"patch_size": 4, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}
    return SimpleViTConfig("vit", **(sizes | changes))


def resnet() -> ResNetConfig:
    return ResNetConfig("resnet", width=4, blocks_per_stage=[1, 2])


MODELS = pytest.mark.parametrize("config", [vit(), resnet()], ids=lambda c: c.name)


def built(config, seed: int = 0) -> ImageClassifier:
    model = config.build(image_shape=(3, 8, 8), num_classes=5)
    model.init_weights(seed)
    return model


def images(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_full_sizes_have_the_papers_numbers_of_parameters():
    s16 = SimpleViTConfig("s16", 16, 384, 12, 6, 1536).build((3, 224, 224), 1000)
    # 16 * 16 * 3 * 384 + 384, 12 blocks of 1,774,464, a norm of 768, a head of 385,000.
    assert sum(p.numel() for p in s16.parameters()) == 21_974_632
    resnet18 = ResNetConfig("resnet18").build((3, 32, 32), 10)
    assert sum(p.numel() for p in resnet18.parameters()) == 11_173_962


@MODELS
def test_first_weights_depend_on_the_seed_alone(config):
    first = built(config).state_dict()
    torch.manual_seed(9)
    again, other = built(config).state_dict(), built(config, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@MODELS
def test_logits_are_finite_and_float32_also_where_blocks_compute_in_bfloat16(config):
    model = built(config)
    nn.init.normal_(model.head.weight)
    exact = model(images())
    model.compute_dtype = torch.bfloat16
    rounded = model(images())
    assert exact.shape == rounded.shape == (6, 5)
    assert exact.dtype == rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0.05)


@MODELS
def test_compiled_blocks_make_the_same_logits(config):
    plain, compiled = built(config), built(config)
    compiled.compile_blocks("eager")
    for count in (6, 4):
        torch.testing.assert_close(plain(images(count)), compiled(images(count)))


def test_simple_vit_starts_at_the_loss_of_a_guess():
    loss = F.cross_entropy(built(vit())(images()), torch.tensor([0, 1, 2, 3, 4, 0]))
    assert loss.item() == pytest.approx(math.log(5))


def test_positions_are_sines_and_cosines_of_column_and_row():
    grid = positions_2d(2, 3, 8)  # frequencies 1 and 1e-4
    assert grid.shape == (6, 8)
    row, column = 1, 2
    expected = [math.sin(column), math.sin(column * 1e-4), math.cos(column), math.cos(2e-4)]
    expected += [math.sin(row), math.sin(1e-4), math.cos(row), math.cos(1e-4)]
    torch.testing.assert_close(grid[5], torch.tensor(expected))


def test_roles_leave_patches_head_and_norms_out_of_the_matrices():
    model = built(vit())
    roles = parameter_roles(model)
    assert roles["patches.weight"] is Role.EMBEDDING
    assert roles["head.weight"] is Role.OUTPUT
    matrices = {name for name, role in roles.items() if role is Role.MATRIX}
    ours = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "w1", "w2")
    assert matrices == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ours}
    assert set(blocks_of(model).values()) == {"patches", "layers.0", "layers.1", "norm", "head"}


def test_roles_of_convolutions_are_matrices_of_out_by_in_times_window():
    model = built(resnet())
    roles = parameter_roles(model)
    matrices = {name: p for name, p in model.named_parameters() if roles[name] is Role.MATRIX}
    assert {name: matrix_shape(p) for name, p in matrices.items()} == {
        "stem.weight": (4, 27),
        "layers.0.conv1.weight": (4, 36),
        "layers.0.conv2.weight": (4, 36),
        "layers.1.conv1.weight": (8, 36),
        "layers.1.conv2.weight": (8, 72),
        "layers.1.shortcut.0.weight": (8, 4),
        "layers.2.conv1.weight": (8, 72),
        "layers.2.conv2.weight": (8, 72),
    }
    assert roles["head.weight"] is Role.OUTPUT


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: vit(num_heads=3), "model.num_heads=3 does not divide model.dim=16"),
        (lambda: vit(dim=18), "model.dim=18 is not a multiple of 4"),
        (lambda: built(vit(patch_size=3)), "model.patch_size=3 does not divide images of 8 x 8"),
        (lambda: ResNetConfig("r", blocks_per_stage=[]), "model.blocks_per_stage="),
        (lambda: ResNetConfig("r", blocks_per_stage=[2, 0]), "must be at least 1"),
    ],
)
def test_shape_that_cannot_be_is_an_error_that_names_the_setting(build, says):
    with pytest.raises(InputError, match=says):
        build()


def test_batch_norm_with_one_micro_batch_a_step_is_torchs():
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    for seed in range(3):
        x, y = (images(seed=seed).requires_grad_() for _ in range(2))
        made, expected = ours(x), theirs(y)
        torch.testing.assert_close(made, expected)
        made.square().mul(x.detach()).sum().backward()
        expected.square().mul(y.detach()).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        update_running_statistics(ours)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(images()), theirs.eval()(images()))


def test_running_statistics_take_the_mean_of_a_steps_micro_batches_in_any_order():
    forward, backward, skipped = BatchNorm(3), BatchNorm(3), BatchNorm(3)
    parts = images(8).chunk(4)
    for part, last in zip(parts, reversed(parts), strict=True):
        forward(part)
        backward(last)
        skipped(part)
    for norm in (forward, backward):
        update_running_statistics(norm)
    torch.testing.assert_close(forward.running_mean, backward.running_mean)
    mean = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    torch.testing.assert_close(forward.running_mean, 0.1 * mean)
    update_running_statistics(skipped, keep=False)
    assert not skipped.running_mean.any()
    assert not skipped.pending.any()


def test_only_running_statistics_are_in_checkpoints():
    names = [name for name in built(resnet()).state_dict() if "stem_norm" in name]
    assert names == [
        f"stem_norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    ]
