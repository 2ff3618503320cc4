"""Images: a classifier, and images with labels."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gns_pretrain.config.schema import Config
from gns_pretrain.data.image_settings import ImageDataSettings
from gns_pretrain.data.images import TrainingImages
from gns_pretrain.data.read_ahead import ReadAhead, Step
from gns_pretrain.data.shards import joint_fingerprint
from gns_pretrain.errors import InputError, counted
from gns_pretrain.model.resnet import ResNetConfig
from gns_pretrain.model.roles import Role, matrix_shape, parameter_roles
from gns_pretrain.model.simple_vit import SimpleViTConfig
from gns_pretrain.parallel.mesh import World
from gns_pretrain.parallel.sharding import parallelize
from gns_pretrain.runs.progress import images_in
from gns_pretrain.tracking.console import short_number
from gns_pretrain.tracking.unit import IMAGES
from gns_pretrain.training.evaluate import mean_over
from gns_pretrain.training.workload import Description, Evaluation, MicroBatch, Size, Workload

EVALUATED_TOGETHER = 250  # images in a forward pass, on every layout


class ImageWorkload(Workload):
    """Classification; budget and axes count images, which settings give in epochs."""

    unit = IMAGES
    trains_on = "images"
    refused = (
        "token_budget",
        "evaluation.every_tokens",
        "evaluation.num_sequences",
        "data.stage_to",
    )

    def __init__(
        self, config: Config, data: ImageDataSettings, model: SimpleViTConfig | ResNetConfig
    ) -> None:
        self.refuse_settings_of_others(config)
        if (config.epochs is None) == (config.sample_budget is None):
            raise InputError(
                f"epochs={config.epochs} and sample_budget={config.sample_budget}, but a run on "
                "images ends by one of them; give that, and null for the other"
            )
        self.config, self.data = config, data
        self.training, self.validation = data.open_splits()
        num_images, initial = self.training.num_images, config.batch_size.initial
        self.budget = config.sample_budget or images_in(config.epochs or 0.0, num_images)
        if self.budget < initial:
            raise InputError(
                f"the budget of {self.budget:,} images is less than one step's batch_size.initial="
                f"{initial} ({num_images:,} are an epoch); raise it, or make the batch smaller"
            )
        self.evaluate_every = max(images_in(config.evaluation.every_epochs, num_images), 1)
        if config.noise_scale.every_epochs is not None:
            self.measure_every = max(images_in(config.noise_scale.every_epochs, num_images), 1)
        self.fingerprint = joint_fingerprint(
            split.fingerprint for split in (self.training, self.validation)
        )
        shape, num_classes = self.training.image_shape, self.training.num_classes
        with torch.device("meta"):
            self._counted = model.build(shape, num_classes)
        self._settings = model
        self.model = self._counted.config  # with the size of a patch, which the images decide

    def check(self) -> None:
        """Check that the average of weights, if there is one, is of a model that can have it."""
        self.config.averaging.build(self.config.optimizer, self._counted)

    def size(self) -> Size:
        """Counted from the model; a micro-batch is its images alone."""
        roles = parameter_roles(self._counted)
        matrices = [
            weight
            for name, weight in self._counted.named_parameters()
            if roles[name] is Role.MATRIX
        ]
        channels, rows, columns = self.training.image_shape
        return Size(
            parameters=sum(weight.numel() for weight in self._counted.parameters()),
            matrices=sum(weight.numel() for weight in matrices),
            micro_batch=4 * self.config.micro_batch_size * channels * rows * columns,  # float32
            grams=8 * sum(min(matrix_shape(weight)) ** 2 for weight in matrices),  # float64
            sample=f"images of {rows} x {columns}",
        )

    def describe(self, device: str) -> Description:
        """With the images that were found."""
        size, training = self.size(), self.training
        channels, rows, columns = training.image_shape
        return Description(
            model=f"{self.model.name}, {size.parameters:,} parameters ({size.matrices:,} in "
            f"matrices), {self.config.dtype_on(device)}",
            data=f"{self.data.found}, {training.num_images:,} images of {rows} x {columns} x "
            f"{channels} in {training.num_classes} classes; the budget of "
            f"{short_number(self.budget)} is {self.budget / training.num_images:.3g} epochs",
            batch=counted(self.config.batch_size.initial, "image"),
            notes=[],
        )

    def build_model(self, world: World) -> nn.Module:
        """Build the classifier."""
        with world.device:
            model = self._settings.build(self.training.image_shape, self.training.num_classes)
        model.init_weights(self.config.seed)
        if self.config.compiles_on(world.device.type):
            model.compile_blocks()
        dtype = getattr(torch, self.config.dtype_on(world.device.type))
        return parallelize(model, world, compute_dtype=dtype)

    def begin(self, world: World) -> None:
        """Read the validation images, normalized."""
        there = self.validation.num_images
        count = min(self.config.evaluation.num_images or there, there)
        images, labels = self.validation.subset(count).read_in_order(0, count)
        self._validation = images.to(world.device), labels.to(world.device)
        reader = TrainingImages(self.training, self.data.augmentation, seed=self.config.seed)

        def read(step: Step) -> tuple[Tensor, Tensor]:
            positions = step.cursor + np.arange(step.batch_size, dtype=np.int64)
            ours = step.of_rank(positions, world.data_rank, world.num_data_ranks)
            return reader.read(ours)

        self._batches = ReadAhead(read, world.device)

    def micro_batches(
        self, cursor: int, *, batch_size: int, micro_batch_size: int
    ) -> Iterator[MicroBatch]:
        """Yield images, float32 [micro_batch_size, C, H, W], and labels, int64 [...]."""
        return self._batches.micro_batches(Step(cursor, batch_size, micro_batch_size))

    def used_up(self, cursor: int) -> list[str]:
        """No news of a run in epochs."""
        return []

    def evaluate(self, model: nn.Module, *, chunk: int, world: World) -> Evaluation:
        """Take the cross-entropy and the share of images that are classified right.

        Batch normalization goes by its running statistics, so that the size of a chunk does not
        matter.
        """

        def loss_and_accuracy(micro_batch: MicroBatch) -> Tensor:
            images, labels = micro_batch
            logits = model(images)
            right = (logits.argmax(dim=1) == labels).float().mean()
            return torch.stack([F.cross_entropy(logits, labels), right])

        parts = (tensor.split(EVALUATED_TOGETHER) for tensor in self._validation)
        model.eval()
        loss, accuracy = mean_over(zip(*parts, strict=True), loss_and_accuracy, world=world)
        model.train()
        return Evaluation(loss, {"accuracy": accuracy})

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()
