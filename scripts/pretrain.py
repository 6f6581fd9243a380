"""Pre-train a backbone as an image classifier on one folder per class, and write the backbone's weights.

    python scripts/pretrain.py --data FOLDER --epochs 20 --output runs/pretrain         # FOLDER/{train,val}/CLASS/*
    python scripts/pretrain.py --data train_0.zip train_1.zip val.zip --minutes 4 --output runs/pretrain

Set --epochs or --minutes. With --minutes, learning rate and image sizes follow the elapsed time since the program's
start, so the cosine ends in time on any machine. With --epochs they follow the steps, and a run is reproducible.

Random numbers of a step depend on (seed, step) only. The state is saved to OUTPUT/last.ckpt every --checkpoint-minutes
and on Ctrl-C or SIGTERM; the same command resumes from it.

Writes to OUTPUT: `NAME.safetensors` (moving average of the weights in float16; also at each evaluation), `NAME.md`
(their origin), `metrics.json` and `last.ckpt`.

Sizes: steps sample from the smallest of --sizes at first, from all of them in the end. Swin's windows have 7x7 tokens;
smaller maps are padded, so relative positions beyond the map learn only from padding. The last stage (stride 32) fills
a window from 224 pixels on, the third from 112.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
from batch_augmentation import Augmentation, resize
from labeled_images import LabeledImages, decode, find_images, load_images
from pretraining_outputs import write_outputs, write_weights
from timm.layers import ClassifierHead
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, IterableDataset

from e3va_cli.config.composition import load_config, validate_overrides
from e3va_cli.config.run_config import TrainConfig
from e3va_cli.data.sampling import derive_seed
from e3va_cli.errors import UserError, print_errors
from e3va_cli.models.backbones import BackboneOptions, ResidualBackbone, build_backbone
from e3va_cli.training.graceful_shutdown import GracefulShutdown
from e3va_cli.utils.environment import package_versions

LAST = "last.ckpt"
REFERENCE_BATCH = 1024  # of --lr, which scales with the square root of the batch size
BETAS = (0.9, 0.999)
GRADIENT_NORM = 1.0
MARGIN = 1.15  # decoded images are larger than the largest training size by this factor
SHOWN = (
    "step {step:,}, epoch {epoch:.1f}, {seconds:,.0f} s, {images_per_second:,.0f} images/s: "
    "loss {loss:.3f}, top-1 {top1:.2f} %"
)
STARTED = time.monotonic()


class Classifier(nn.Module):
    """A backbone with timm's classifier of Swin: norm, average pooling, linear layer."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: ResidualBackbone, classes: int) -> None:
        super().__init__()
        width = backbone.out_channels[-1]
        self.backbone = backbone
        self.norm = nn.LayerNorm(width)
        self.head = ClassifierHead(width, classes, input_fmt="NHWC")
        nn.init.trunc_normal_(self.head.fc.weight, std=0.02)
        nn.init.zeros_(self.head.fc.bias)
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, 3, H, W) in 0..1."""
        return self.head(self.norm(self.backbone((images - self.mean) / self.std)[-1]))


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of (images, labels) from step `start` on; each epoch is shuffled."""

    def __init__(self, data: LabeledImages, batch_size: int, seed: int, start: int) -> None:
        self.data, self.batch_size, self.seed, self.start = data, batch_size, seed, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        per_epoch = len(self.data.labels) // self.batch_size
        epoch, first = divmod(self.start, per_epoch)
        while True:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            order = torch.randperm(len(self.data.labels), generator=generator).to(self.data.labels.device)
            for step in range(first, per_epoch):
                chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
                yield self.data.images[chosen], self.data.labels[chosen]
            epoch, first = epoch + 1, 0


class Pretraining(L.LightningModule):
    """Cross-entropy with label smoothing, a cosine after a linear warm-up, a moving average of the weights.

    Attributes:
        ema: the moving average, which is evaluated and saved.
        rows: results of each evaluation.
    """

    loss_sum: Tensor
    loss_count: Tensor

    def __init__(
        self, net: Classifier, train: LabeledImages, val: LabeledImages, options: argparse.Namespace, output: Path
    ) -> None:
        super().__init__()
        self.net, self.options, self.output = net, options, output
        self.data, self.val = train, val
        self.ema = ModelEmaV3(net, decay=options.ema, use_warmup=True)
        self.augment = Augmentation(least_area=options.least_area, color=options.color, mixing=options.mixing)
        self.mix = self.augment.mixer(len(train.classes))
        self.steps_per_epoch = len(train.labels) // options.batch_size
        self.started, self.prepared = STARTED, math.inf
        self.rows: list[dict[str, float]] = []
        self.register_buffer("loss_sum", torch.zeros(()))  # since the last evaluation
        self.register_buffer("loss_count", torch.zeros(()))
        if options.compile:
            net.compile(dynamic=False)

    @property
    def seconds(self) -> float:
        """Return the seconds since the start, earlier parts of a resumed run included."""
        return time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """Return the fraction of the training time or of the steps, 0 to 1."""
        if self.options.minutes is not None:
            left = max(1.0, 60 * self.options.minutes - self.prepared)
            return min(1.0, max(0.0, self.seconds - self.prepared) / left)
        return min(1.0, self.global_step / max(1, round(self.options.epochs * self.steps_per_epoch)))

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW, without weight decay for vectors and relative position biases."""
        undecayed = {f"backbone.{name}" for name in self.net.backbone.no_weight_decay()}
        groups = param_groups_weight_decay(self.net, self.options.weight_decay, no_weight_decay_list=undecayed)
        return AdamW(groups, lr=self.options.lr, betas=BETAS, fused=True)

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Clip by norm; Lightning's does not support a fused optimizer."""
        clip_grad_norm_(self.net.parameters(), GRADIENT_NORM)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches from the next step on."""
        return DataLoader(
            Batches(self.data, self.options.batch_size, self.options.seed, self.global_step), batch_size=None
        )

    def on_train_start(self) -> None:
        """Note when training starts; stop if the run had ended."""
        self.prepared = min(self.prepared, self.seconds)
        self.trainer.should_stop = self.progress >= 1

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate and seed the step."""
        progress = self.progress
        warm = min(1.0, (progress + 1e-3) / self.options.warmup)
        factor = warm if warm < 1 else 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.options.lr * math.sqrt(self.options.batch_size / REFERENCE_BATCH) * factor
        seed = derive_seed(self.options.seed, 1, self.global_step)
        torch.manual_seed(seed)
        sizes = self.options.sizes
        self.side = random.Random(seed).choice(sizes[: 1 + min(len(sizes) - 1, int(progress * len(sizes)))])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of an augmented batch."""
        with torch.autocast(self.device.type, enabled=False):  # sampling coordinates need more than 8 bits
            images, labels = self.mix(self.augment(batch[0], self.side), batch[1])
        loss = cross_entropy(self.net(images).float(), labels, label_smoothing=self.options.label_smoothing)
        self.loss_sum += loss.detach()
        self.loss_count += 1
        return loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Update the weights, then their average."""
        optimizer.step(closure=optimizer_closure)
        self.ema.update(self.net, step=self.global_step)

    def evaluate(self) -> None:
        """Evaluate the moving average, and write its weights.

        Raises:
            UserError: the loss is not finite.
        """
        loss = float(self.loss_sum / self.loss_count)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.global_step:,}; restart with a lower --lr")
        self.loss_sum.zero_()
        self.loss_count.zero_()
        top1 = accuracy(self.ema.module, self.val, self.options.val_size, self.device)
        row = {"step": self.global_step, "epoch": self.global_step / self.steps_per_epoch, "seconds": self.seconds}
        before = self.rows[-1] if self.rows else {"step": 0, "seconds": self.prepared}
        images = self.options.batch_size * (row["step"] - before["step"])
        row |= {"loss": loss, "top1": top1, "images_per_second": images / (row["seconds"] - before["seconds"])}
        self.rows.append(row)
        print(SHOWN.format(**row), flush=True)
        write_weights(self.ema.module.backbone, self.output / f"{self.options.name}.safetensors")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add times, results and options."""
        state = {"seconds": self.seconds, "prepared": self.prepared, "rows": self.rows, "options": vars(self.options)}
        checkpoint["pretraining"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore times and results."""
        state = checkpoint["pretraining"]
        self.started = time.monotonic() - state["seconds"]
        self.prepared, self.rows = state["prepared"], state["rows"]


class EvaluateAndSave(L.Callback):
    """Evaluate and save the state at intervals, and stop the run at its end.

    The state is saved every `minutes`, at the end, and when a signal stops the run.
    """

    def __init__(self, path: Path, minutes: float, stop: GracefulShutdown) -> None:
        self.path, self.minutes, self.stop = path, minutes, stop
        self.saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate, save and stop after a step."""
        assert isinstance(pl_module, Pretraining)
        ended = pl_module.progress >= 1
        if ended or trainer.global_step % (pl_module.options.evaluate_every * pl_module.steps_per_epoch) == 0:
            pl_module.evaluate()
        if ended or self.stop.agreed or time.monotonic() - self.saved > 60 * self.minutes:
            trainer.save_checkpoint(self.path)
            self.saved = time.monotonic()
        trainer.should_stop = ended


@torch.no_grad()
def accuracy(net: Classifier, data: LabeledImages, side: int, device: torch.device, batch_size: int = 512) -> float:
    """Return the top-1 accuracy in percent at side x side, in float32."""
    training = net.training
    net.eval()
    correct = torch.zeros((), device=device)
    with torch.autocast(device.type, enabled=False):
        for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True):
            logits = net(resize(images.to(device), side))
            correct += (logits.argmax(1) == labels.to(device)).sum()
    net.train(training)
    return 100 * float(correct) / len(data.labels)


def load_backbone_options(backbone: str) -> BackboneOptions:
    """Return the options of `backbone=NAME`, with random weights."""
    overrides = [f"backbone={backbone}", "backbone.pretrained=false"]
    validate_overrides("train", overrides)
    config: TrainConfig = load_config("train", overrides)
    return config.backbone


def load_data(options: argparse.Namespace) -> tuple[LabeledImages, LabeledImages]:
    """Return the images of both splits.

    Raises:
        UserError: images cannot be loaded, the classes of the splits differ, or there are too few for a batch.
    """
    files = {split: find_images(options.data, split) for split in ("train", "val")}
    side = min(*decode(files["train"][0]).shape[-2:], round(MARGIN * max(options.sizes)))
    train, val = (load_images(files[split], side, options.workers) for split in ("train", "val"))
    if train.classes != val.classes:
        raise UserError(f"--data: {len(train.classes)} classes in train differ from {len(val.classes)} in val")
    if len(train.labels) < options.batch_size:
        raise UserError(f"--batch-size: {options.batch_size} is larger than the {len(train.labels)} training images")
    return train, val


def check_same_options(checkpoint: Path, options: argparse.Namespace) -> None:
    """Check that a run to resume has the same options.

    Raises:
        UserError: it has other options.
    """
    before = torch.load(checkpoint, map_location="cpu", weights_only=False)["pretraining"]["options"]
    free = {"workers", "checkpoint_minutes", "data", "compile"}
    other = [f"--{key.replace('_', '-')}" for key, value in vars(options).items() if before[key] != value]
    other = [name for name in other if name.removeprefix("--").replace("-", "_") not in free]
    if other:
        raise UserError(f"{checkpoint}: different {', '.join(other)}; use the same options, or another --output")


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, with defaults that depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="folders or zip files: {train,val}/CLASS/*")
    parser.add_argument("--data-name", default="the images of --data", help="name of the data set, for the card")
    parser.add_argument("--data-terms", default="not stated", help="license of the data set, for the card")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--backbone", default="swin_nano")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", type=float)
    length.add_argument("--minutes", type=float, help="from the start of the program to the end of training")
    parser.add_argument("--sizes", type=int, nargs="+", default=[112, 160, 224], help="pixels, smallest first")
    parser.add_argument(
        "--val-sizes", type=int, nargs="+", default=[64, 112, 224], help="pixels; the last is used during training"
    )
    parser.add_argument("--batch-size", type=int, help="default: 1000 on a GPU, 128 on a CPU")
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="for a batch of 1024; scaled by the square root of the batch"
    )
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=float, default=0.05, help="fraction of the run")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--drop-path", type=float, default=0.05, help="stochastic depth of the last block")
    parser.add_argument("--least-area", type=float, default=0.25, help="minimum area of random crops")
    parser.add_argument("--color", type=float, default=0.4, help="maximum change of brightness, contrast, saturation")
    parser.add_argument("--mixing", type=float, default=0.5, help="fraction of batches with CutMix or mixup")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the moving average after its warm-up")
    parser.add_argument("--evaluate-every", type=int, default=5, metavar="EPOCHS")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--precision", choices=("32", "bf16-mixed"), help="default: bf16-mixed on a GPU, 32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="use torch.compile: minutes per size")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="processes that decode images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    gpu = options.accelerator == "gpu" or (options.accelerator == "auto" and torch.cuda.is_available())
    options.accelerator = "gpu" if gpu else "cpu"
    options.batch_size = options.batch_size or (1000 if gpu else 128)
    options.precision = options.precision or ("bf16-mixed" if gpu else "32")
    options.sizes, options.name, options.val_size = sorted(options.sizes), options.backbone, options.val_sizes[-1]
    return options


def run(options: argparse.Namespace) -> None:
    """Load, train, evaluate, write."""
    print(*(f"{name} {version}" for name, version in package_versions().items()), sep=", ", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    last = options.output / LAST
    if last.exists():
        check_same_options(last, options)
    train, val = load_data(options)  # before CUDA is initialized, as processes are forked
    print(f"{len(train.labels):,} + {len(val.labels):,} images of {len(train.classes)} classes", flush=True)
    config = load_backbone_options(options.backbone)
    device = torch.device("cuda" if options.accelerator == "gpu" else "cpu")
    arguments = {**config.model_args, "drop_path_rate": options.drop_path}
    backbone, _ = build_backbone(replace(config, model_args=arguments, seed=options.seed))
    torch.manual_seed(options.seed)
    task = Pretraining(
        Classifier(backbone, len(train.classes)), train.to(device), val.to(device), options, options.output
    )
    stop = GracefulShutdown(None, None)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        max_epochs=-1,
        callbacks=[stop, EvaluateAndSave(last, options.checkpoint_minutes, stop)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(task, ckpt_path=last if last.exists() else None, weights_only=False)
    net = task.ema.module.to(device)
    weights = options.output / f"{options.name}.safetensors"
    write_weights(net.backbone, weights)
    with torch.no_grad():
        for parameter in net.backbone.parameters():  # evaluate the weights as written
            parameter.copy_(parameter.half())
    top1 = {side: accuracy(net, val.to(device), side, device) for side in options.val_sizes}
    _, identity = build_backbone(replace(config, weights=str(weights)))
    write_outputs(options, task.rows, top1, identity, train, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        run(parse_args(arguments))
    except UserError as error:
        print_errors(error, "pretrain.py")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
