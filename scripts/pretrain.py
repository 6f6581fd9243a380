"""Pre-train a backbone on labeled images and write its weights for `backbone.weights=FILE`.

    python scripts/pretrain.py --data DATA --output FOLDER [--epochs 100 | --minutes 60] [--backbone swin_nano]
    python scripts/pretrain.py --data train_0.zip train_1.zip val.zip --output FOLDER --minutes 4

DATA is in ImageFolder's layout, `train/CLASS/IMAGE` and `val/CLASS/IMAGE`: folders, or zip files that hold them.
All images are read once and kept as one tensor on the device, so it suits data sets of small images; batches are then
drawn and augmented there: random resized crops at several sizes, flips, color jitter, MixUp and CutMix. Trains with
AdamW, label smoothing and a cosine schedule, and evaluates a moving average of the weights (EMA). With `--minutes` the
schedule is one of time and ends with it, however fast the machine is.

Stopped or killed, the same command goes on after the last whole epoch. Writes the backbone in float16
(`NAME.safetensors`), what was measured (`metrics.json`) and a card (`README.md`).
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import time
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from PIL import Image, ImageOps
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from e3va_cli.backbones import build_backbone
from e3va_cli.backbones.weights import fingerprint
from e3va_cli.composition import CONFIG_MODULE, plain
from e3va_cli.config import register_schemas
from e3va_cli.errors import UserError, print_mistakes
from e3va_cli.files import replacing, write_json
from e3va_cli.machine import device_name, versions
from e3va_cli.training.optimizer import build_optimizer

SPLITS = ("train", "val")
IMAGES = (".webp", ".jpg", ".jpeg", ".png", ".bmp")
CHUNK = 512  # images that a process decodes at once


@dataclass(frozen=True)
class Recipe:
    """How to train; see `--help`."""

    epochs: int
    minutes: float | None
    batch_size: int
    sizes: tuple[int, ...]
    lr: float
    weight_decay: float
    warmup: float  # part of the run
    smoothing: float
    mix: float  # probability of MixUp or CutMix
    crop_area: tuple[float, float] = (0.35, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: float = 0.4
    ema: float = 0.998


@dataclass(frozen=True)
class Split:
    """Images of one size, uint8 (N, 3, H, W), and the index of the class of each."""

    images: Tensor
    labels: Tensor


def listed(sources: Iterable[Path]) -> dict[str, list[tuple[Path, str | None, str]]]:
    """Return file, entry (None outside a zip) and class of all images, by split.

    Raises:
        UserError: a source that cannot be read, or a split without images.
    """
    found: dict[str, list[tuple[Path, str | None, str]]] = {split: [] for split in SPLITS}
    for source in sources:
        if source.is_dir():
            names = [(str(path.relative_to(source)), path, None) for path in source.rglob("*")]
        else:
            try:
                with zipfile.ZipFile(source) as archive:
                    names = [(name, source, name) for name in archive.namelist()]
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"--data {source}: neither a folder nor a zip file ({error})") from None
        for name, path, entry in sorted(names):
            parts = Path(name).parts
            if len(parts) >= 3 and parts[-3] in SPLITS and parts[-1].lower().endswith(IMAGES):
                found[parts[-3]].append((path, entry, parts[-2]))
    if empty := [split for split, images in found.items() if not images]:
        raise UserError(f"--data: no images {empty[0]}/CLASS/IMAGE in {', '.join(map(str, sources))}")
    return found


def decoded(images: Sequence[tuple[Path, str | None, str]], size: int) -> Tensor:
    """Decode images to uint8 (N, 3, size, size): the short side resized to `size`, the middle cut out."""
    archives: dict[Path, zipfile.ZipFile] = {}
    pixels = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for index, (path, entry, _) in enumerate(images):
        if entry is None:
            content = path.read_bytes()
        else:
            if path not in archives:
                archives[path] = zipfile.ZipFile(path)
            content = archives[path].read(entry)
        with Image.open(io.BytesIO(content)) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
            pixels[index] = v2.functional.pil_to_tensor(fitted)
    return pixels


def read(sources: Iterable[Path], size: int, workers: int) -> tuple[dict[str, Split], list[str]]:
    """Read both splits into memory; returns them and the names of the classes."""
    found = listed(sources)
    classes = sorted({name for *_, name in found["train"]})
    if unknown := sorted({name for *_, name in found["val"]} - set(classes)):
        raise UserError(f"--data: val/ has classes that train/ lacks, such as {unknown[0]}")
    splits = {}
    with ProcessPoolExecutor(workers) as pool:
        for split, images in found.items():
            chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
            pixels = torch.cat(list(pool.map(partial(decoded, size=size), chunks)))
            splits[split] = Split(pixels, torch.tensor([classes.index(name) for *_, name in images]))
            print(f"{split}: {len(images):,} images of {len(classes)} classes", flush=True)
    return splits, classes


def augmented(images: Tensor, size: int, recipe: Recipe) -> Tensor:
    """Crop, flip and color each image at random: uint8 (B, 3, H, W) to float in [0, 1] (B, 3, size, size).

    The crop is torchvision's RandomResizedCrop, the color its ColorJitter without hue, for a batch at once.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, device=device)

    area, ratio = uniform(*recipe.crop_area), uniform(*map(math.log, recipe.crop_ratio)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0] = width * (1 - 2 * torch.randint(2, (count,), device=device))
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * uniform(-1, 1)
    theta[:, 1, 2] = (1 - height) * uniform(-1, 1)
    grid = affine_grid(theta, [count, 3, size, size], align_corners=False)
    crops = grid_sample(images / 255, grid, padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = (
        uniform(1 - recipe.jitter, 1 + recipe.jitter).view(count, 1, 1, 1) for _ in range(3)
    )
    crops = (crops * brightness).clamp(0, 1)
    gray = v2.functional.rgb_to_grayscale(crops)
    crops = gray.mean(dim=(2, 3), keepdim=True).lerp(crops, contrast).clamp(0, 1)
    return v2.functional.rgb_to_grayscale(crops).expand_as(crops).lerp(crops, saturation).clamp(0, 1)


class Classifier(nn.Module):
    """A backbone with a norm, a mean over the feature map and a linear classifier, as timm's Swin has them."""

    def __init__(self, backbone: str, num_classes: int) -> None:
        super().__init__()
        register_schemas()
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            config = plain(compose("train", overrides=[f"backbone={backbone}"]))["backbone"]
        self.name, self.model_name = config["name"], config["timm_name"]
        self.backbone, _ = build_backbone(**{**config, "pretrained": False, "weights": None})
        width = self.backbone.widths[-1]
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        for values in ("mean", "std"):
            value = torch.tensor(getattr(self.backbone, values)).view(3, 1, 1)
            self.register_buffer(values, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of images in [0, 1], (B, 3, H, W)."""
        features = self.backbone((images - self.mean) / self.std)[-1]  # B, H/32, W/32, C
        return self.linear(self.norm(features).mean(dim=(1, 2)))


class Pretraining(L.LightningModule):
    """Train a classifier on batches of indices into images that are on the device."""

    def __init__(self, model: Classifier, splits: dict[str, Split], recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.ema = ModelEmaV3(model, decay=recipe.ema, use_warmup=True)
        for name, split in splits.items():
            self.register_buffer(f"{name}_images", split.images, persistent=False)
            self.register_buffer(f"{name}_labels", split.labels, persistent=False)
        classes = model.linear.out_features
        self.mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=classes), v2.CutMix(num_classes=classes)])
        self.spent_s = 0.0  # before this start
        self.started = 0.0
        self.top1: dict[int, float] = {}  # percent, by image size, of the last evaluation

    def progress(self) -> float:
        """Return how much of the run is done, from 0 to 1."""
        if self.recipe.minutes is not None:
            return min(1.0, (self.spent_s + time.monotonic() - self.started) / (60 * self.recipe.minutes))
        return min(1.0, self.global_step / max(1, int(self.trainer.estimated_stepping_batches)))

    def lr_factor(self, _: int) -> float:
        """Return the learning rate's factor: a linear warm-up, then half a cosine."""
        done, warmup = self.progress() if self.started else 0.0, self.recipe.warmup
        if done < warmup:
            return 0.01 + 0.99 * done / warmup
        return 0.01 + 0.99 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2

    def configure_optimizers(self) -> Any:
        """AdamW; vectors and position biases are not decayed."""
        recipe = self.recipe
        optimizer = build_optimizer(self.model, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.999))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def on_train_epoch_start(self) -> None:
        """Draw what is random in an epoch from its number, so that a resumed run repeats it."""
        torch.manual_seed(1 + self.current_epoch)

    def training_step(self, indices: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of a batch of augmented images."""
        size = self.recipe.sizes[int(torch.randint(len(self.recipe.sizes), ()))]
        with torch.autocast(self.device.type, enabled=False):  # positions need float32
            images, labels = augmented(self.train_images[indices], size, self.recipe), self.train_labels[indices]
        if float(torch.rand(())) < self.recipe.mix:
            images, labels = self.mix(images, labels)
        loss = cross_entropy(self.model(images).float(), labels, label_smoothing=self.recipe.smoothing)
        if batch_idx % 10 == 0:
            self.log("loss", loss, prog_bar=True)
        return loss

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clip to a norm of 1; Lightning's own clipping refuses the fused optimizer that a GPU has."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Average the weights; stop where the time is over."""
        self.ema.update(self.model, step=self.global_step)
        if self.recipe.minutes is not None and self.progress() >= 1:
            self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        """Say how it goes."""
        epochs = self.current_epoch + 1
        print(f"epoch {epochs}: loss {float(self.trainer.callback_metrics['loss']):.3f}, {self.progress():.1%} done")

    @torch.no_grad()
    def evaluate(self) -> dict[int, float]:
        """Return the top-1 accuracy of the averaged weights in percent, by image size, in float32."""
        model = self.ema.module.eval()
        for size in self.recipe.sizes:
            correct = 0
            for images, labels in zip(self.val_images.split(500), self.val_labels.split(500), strict=True):
                resized = interpolate(images / 255, size=(size, size), mode="bilinear", align_corners=False)
                correct += int((model(resized).argmax(1) == labels).sum())
            self.top1[size] = 100 * correct / len(self.val_labels)
        return self.top1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the time that was spent."""
        checkpoint["spent_s"] = self.spent_s + time.monotonic() - self.started

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the time that was spent."""
        self.spent_s = checkpoint["spent_s"]


def train_indices(count: int, batch_size: int) -> DataLoader[Any]:
    """Batches of indices, in a new order each epoch."""
    return DataLoader(range(count), batch_size=min(batch_size, count), shuffle=True, drop_last=True)  # type: ignore[arg-type]


def write_weights(task: Pretraining, folder: Path, about: dict[str, Any]) -> None:
    """Write the averaged weights of the backbone, what was measured, and the card."""
    backbone = task.ema.module.backbone
    name = task.model.name
    state = {key: value.half().cpu().contiguous() for key, value in backbone.model.named_parameters()}
    with torch.no_grad():
        for key, parameter in backbone.model.named_parameters():
            parameter.copy_(state[key])  # measured as they are written
    accuracy = {f"top1_pct_at_{size}": round(value, 2) for size, value in task.evaluate().items()}
    content = {**about, "accuracy": accuracy, "fingerprint": fingerprint(backbone.model)}
    with replacing(folder / f"{name}.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_json(folder / "metrics.json", content)
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(card(name, content))


def card(name: str, content: dict[str, Any]) -> str:
    """Return the model card, Markdown."""
    rows = {**content["accuracy"], "fingerprint (SHA-256)": f"`{content['fingerprint']}`"}
    recipe = ", ".join(f"{key} {value}" for key, value in content["recipe"].items())
    made_with = ", ".join(f"{key} {value}" for key, value in content["versions"].items())
    return "\n".join(
        [
            f"# {name}",
            "",
            f"Weights of `backbone={name}` ({content['architecture']}), pre-trained by supervised classification.",
            "",
            f"- Data: {content['data']}; {content['train_images']:,} training images, {content['classes']} classes.",
            f"- Accuracy on {content['val_images']:,} validation images, averaged weights, in percent:",
            *(f"  - {key}: {value}" for key, value in rows.items()),
            f"- Recipe: {recipe}.",
            f"- Made by `{content['command']}` on {content['device']}, {content['date']}: {content['epochs']} epochs "
            f"in {content['minutes']:.1f} minutes ({made_with}).",
            "",
        ]
    )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="folders or zip files")
    parser.add_argument("--about-data", default="", help="what the data is and under which terms, for the card")
    parser.add_argument("--output", type=Path, required=True, help="folder; one that has a checkpoint is gone on with")
    parser.add_argument("--backbone", default="swin_nano", help="as in conf/backbone/ (default: swin_nano)")
    parser.add_argument("--epochs", type=int, default=100, help="default: 100; with --minutes, at most")
    parser.add_argument("--minutes", type=float, help="of training; the schedule is one of time")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--stored-size", type=int, default=64, help="pixels, that images are kept at (default: 64)")
    parser.add_argument("--sizes", default="64,96,128", help="pixels, one of which is drawn for each batch")
    parser.add_argument("--lr", type=float, default=2e-3, help="at a batch of 512; scaled to others linearly")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=float, default=0.05, help="part of the run (default: 0.05)")
    parser.add_argument("--smoothing", type=float, default=0.1, help="of labels (default: 0.1)")
    parser.add_argument("--mix", type=float, default=0.5, help="probability of MixUp or CutMix (default: 0.5)")
    parser.add_argument("--precision", default="bf16-mixed" if torch.cuda.is_available() else "32")
    parser.add_argument("--compile", action="store_true", help="compile the network: slow to start, then faster")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode images")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> Pretraining:
    """Train, evaluate and write the files."""
    L.seed_everything(0, verbose=False)
    splits, classes = read(given.data, given.stored_size, given.workers)
    sizes = tuple(map(int, given.sizes.split(",")))
    lr = given.lr * given.batch_size / 512
    recipe = Recipe(
        epochs=given.epochs,
        minutes=given.minutes,
        batch_size=given.batch_size,
        sizes=sizes,
        lr=lr,
        weight_decay=given.weight_decay,
        warmup=given.warmup,
        smoothing=given.smoothing,
        mix=given.mix,
    )
    task = Pretraining(Classifier(given.backbone, len(classes)), splits, recipe)
    if given.compile:
        task.model.compile()
    checkpoint = given.output / "last.ckpt"
    trainer = L.Trainer(
        default_root_dir=given.output,
        accelerator="auto",
        devices=1,
        precision=given.precision,
        min_epochs=0,
        max_epochs=given.epochs,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        logger=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(given.output, save_last=True, save_top_k=0, every_n_epochs=1, save_on_train_epoch_end=True),
            TQDMProgressBar(refresh_rate=20),
        ],
    )
    loader = train_indices(len(splits["train"].labels), given.batch_size)
    trainer.fit(task, loader, ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=False)
    about = {
        "backbone": task.model.name,
        "architecture": task.model.model_name,
        "data": given.about_data or ", ".join(path.name for path in given.data),
        "train_images": len(splits["train"].labels),
        "val_images": len(splits["val"].labels),
        "classes": len(classes),
        "recipe": vars(recipe),
        "epochs": trainer.current_epoch,
        "minutes": (task.spent_s + time.monotonic() - task.started) / 60,
        "command": " ".join(["python", "scripts/pretrain.py", *sys.argv[1:]]),
        "device": device_name(task.device),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions(),
    }
    task.to("cuda" if torch.cuda.is_available() else "cpu")
    write_weights(task, given.output, about)
    for size, value in task.top1.items():
        print(f"top-1 at {size} pixels: {value:.2f} %")
    print(f"Weights: {given.output / (task.model.name + '.safetensors')}")
    return task


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    try:
        run(parsed(arguments))
    except UserError as error:
        print_mistakes(error, "pretrain.py")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
