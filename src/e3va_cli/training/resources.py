"""Peak memory, step time and parameter counts of a run: logged, shown, and written to `resources.json`."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
import torch.distributed as dist

from e3va_cli.adapters import FeatureExtractor
from e3va_cli.files import write_json
from e3va_cli.training.steps import ends_step

MIB = 2**20
PACKAGES = ("e3va-cli", "torch", "torchvision", "timm", "lightning", "hydra-core")


def process_peak_rss_mib() -> float:
    """Most physical memory that this process ever held, in MiB (2^20 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (MIB if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Of Python and the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} ({torch.get_num_threads()} threads)"


def parameter_counts(extractor: FeatureExtractor, head: torch.nn.Module) -> dict[str, int | float]:
    """Trainable parameters of the tuned backbone and of everything.

    The backbone's are counted as the published tables do: adapters, output norms and what of the network itself is
    trained, without neck and head; the percentage is of the backbone's own parameters.
    """

    def count(module: torch.nn.Module, *, trainable: bool) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)

    tuned, backbone = count(extractor, trainable=True), count(extractor.backbone, trainable=False)
    return {
        "trainable_backbone_params": tuned,
        "backbone_params": backbone,
        "trainable_backbone_pct": 100 * tuned / backbone,
        "trainable_params": tuned + count(head, trainable=True),
        "total_params": count(extractor, trainable=False) + count(head, trainable=False),
    }


class Resources(L.Callback):
    """Measures each training step.

    A step is forward, backward and optimizer, synchronised with the device; loading is timed apart. The first
    `warmup` steps are not counted. On CUDA peaks are reset with each logging window, and the run's peak is the largest
    window's, over all ranks. On a CPU only what is true there is reported: the process's peak resident memory.
    What is measured goes into checkpoints, so that a resumed run's file covers the whole run: the largest peaks, and
    the times of all steps that led to its state.

    Args:
        path: of `resources.json`.
        settings: what was run, for the file.
        window: steps between two lines of the log.
        warmup: steps left out of the times.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, window: int, warmup: int = 5) -> None:
        self.path, self.settings, self.window, self.warmup = path, settings, window, warmup
        self.step_times: list[float] = []
        self.load_times: list[float] = []
        self.images = 0
        self.peak_allocated = self.peak_reserved = self.peak_rss = 0.0
        self.sessions = 1
        self.seen = 0
        self.started = self.ended = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What has been measured."""
        return {
            "step_times": torch.tensor(self.step_times),
            "load_times": torch.tensor(self.load_times),
            "images": self.images,
            "peaks": [self.peak_allocated, self.peak_reserved, max(self.peak_rss, process_peak_rss_mib())],
            "sessions": self.sessions,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what the sessions before have measured."""
        self.step_times, self.load_times = state_dict["step_times"].tolist(), state_dict["load_times"].tolist()
        self.peak_allocated, self.peak_reserved, self.peak_rss = state_dict["peaks"]
        self.images, self.sessions = state_dict["images"], state_dict["sessions"] + 1

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start with a clean peak."""
        self._restart_window(pl_module.device)
        self.ended = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The batch is loaded and on the device."""
        self._synchronise(pl_module.device)
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is done."""
        self._synchronise(pl_module.device)
        now = time.perf_counter()
        self.seen += 1
        if self.seen > self.warmup:
            self.step_times.append(now - self.started)
            self.load_times.append(self.started - self.ended)
            self.images += len(batch) * trainer.world_size
        rate = len(batch) * trainer.world_size / max(1e-9, now - self.ended)
        self.ended = now
        memory = self._memory(pl_module.device)
        pl_module.log("img/s", rate, prog_bar=True, logger=False, batch_size=len(batch))
        pl_module.log("MiB", memory["shown"], prog_bar=True, logger=False, batch_size=len(batch))
        if trainer.global_step % self.window == 0 and ends_step(trainer):
            recent = self.step_times[-self.window :] or [now - self.started]
            logged = {f"resources/{name}": value for name, value in memory.items() if name != "shown"}
            logged["resources/step_time_s"] = statistics.median(recent)
            logged["resources/images_per_second"] = rate
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=trainer.global_step - 1)
            self._restart_window(pl_module.device)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the training peak apart from the evaluation's."""
        self._memory(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Neither memory nor time of an evaluation counts as training's."""
        self._restart_window(pl_module.device)
        self.ended = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file, as the run may be killed before its end."""
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file."""
        self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: Any) -> None:
        device = pl_module.device
        self._memory(device)
        cuda = device.type == "cuda"
        peaks = [self.peak_allocated, self.peak_reserved, max(self.peak_rss, process_peak_rss_mib())]
        if dist.is_available() and dist.is_initialized():
            gathered = torch.tensor(peaks, device=device)
            dist.all_reduce(gathered, dist.ReduceOp.MAX)
            peaks = gathered.tolist()
        if not trainer.is_global_zero:
            return
        total = sum(self.step_times) + sum(self.load_times)
        write_json(
            self.path,
            {
                "device": device.type,
                "device_name": device_name(device),
                "devices": trainer.world_size,
                "sessions": self.sessions,
                "peak_memory_allocated_mib": peaks[0] if cuda else None,
                "peak_memory_reserved_mib": peaks[1] if cuda else None,
                "process_peak_rss_mib": peaks[2],
                "steps_measured": len(self.step_times),
                "measured_time_s": total,
                "step_time_s": statistics.median(self.step_times) if self.step_times else None,
                "load_time_s": statistics.median(self.load_times) if self.load_times else None,
                "images_per_second": self.images / total if total else None,
                **parameter_counts(pl_module.model.extractor, pl_module.model.head),
                "versions": versions(),
                "settings": self.settings,
            },
        )

    def _memory(self, device: torch.device) -> dict[str, float]:
        """Peaks of the current window in MiB, which also count towards the run's."""
        if device.type != "cuda":
            rss = process_peak_rss_mib()
            return {"shown": rss, "process_peak_rss_mib": rss}
        allocated = torch.cuda.max_memory_allocated(device) / MIB
        reserved = torch.cuda.max_memory_reserved(device) / MIB
        self.peak_allocated = max(self.peak_allocated, allocated)
        self.peak_reserved = max(self.peak_reserved, reserved)
        return {
            "shown": allocated,
            "peak_memory_allocated_mib": allocated,
            "peak_memory_reserved_mib": reserved,
        }

    @staticmethod
    def _synchronise(device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    @staticmethod
    def _restart_window(device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
