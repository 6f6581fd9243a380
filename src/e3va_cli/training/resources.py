"""Peak memory, step time and parameter counts of a run: logged, and written to `resources.json`."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
import torch.distributed as dist

from e3va_cli.models.model import parameter_counts
from e3va_cli.training.lightning_private import is_optimizer_step
from e3va_cli.utils.environment import MIB, DeviceEvent, device_name, package_versions, process_peak_rss_mib
from e3va_cli.utils.files import write_json

WARMUP_STEPS = 5  # not measured
MAX_TIMES = 10_000  # steps whose times are kept, in memory and in each checkpoint


@dataclass
class StepTiming:
    """Times of the batches of a step, on the device's clock.

    Attributes:
        batches: of each batch, the end of the previous one, its start (when it is on the device) and its end.
        images: number of images in the batches of all ranks.
    """

    batches: list[tuple[DeviceEvent, DeviceEvent, DeviceEvent]] = field(default_factory=list)
    images: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether the device has finished the step, so that its times can be read without synchronization."""
        return all(end.query() for *_, end in self.batches)

    def seconds(self) -> tuple[float, float]:
        """Return the seconds of the step, and those for which the device waited for its batches to be loaded."""
        steps = [end.seconds_since(start) for _, start, end in self.batches]
        loads = [start.seconds_since(previous) for previous, start, _ in self.batches]
        return sum(steps), sum(loads)


class Resources(L.Callback):
    """Measures the memory and time of training steps.

    A step is the forward and backward pass of each of its batches and the optimizer's step, timed on the device's
    clock: on a GPU by CUDA events, read once the GPU has passed them, without synchronization. Loading is timed
    separately. The first `WARMUP_STEPS` of each start are not measured.

    On CUDA, peaks of memory are reset with each logging window, and the run's peak is the largest of all windows and
    ranks. On a CPU only the peak resident memory of the process is known. Measurements are saved in checkpoints, so
    that `resources.json` covers all starts of a resumed run. Medians are those of the last `MAX_TIMES` steps.

    Args:
        path: of `resources.json`.
        settings: configuration of the run, for the file.
        window: optimizer steps between two logged rows.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, window: int) -> None:
        self.path, self.settings, self.window = path, settings, window
        self.step_times: deque[float] = deque(maxlen=MAX_TIMES)
        self.load_times: deque[float] = deque(maxlen=MAX_TIMES)
        self.steps = self.images = 0
        self.measured_time = 0.0
        self.peak_allocated = self.peak_reserved = self.peak_rss = 0.0
        self.starts = 1
        self.steps_of_start = 0
        self.rate = 0.0  # images per second of the last step that was read
        self.shown_mib = 0.0
        self.previous_end: DeviceEvent | None = None  # of the last batch
        self.start: DeviceEvent | None = None  # of the current batch
        self.step = StepTiming()
        self.unread: deque[StepTiming] = deque()

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements of all steps so far."""
        self._read(wait=True)
        return {
            "step_times": torch.tensor(self.step_times),
            "load_times": torch.tensor(self.load_times),
            "steps": self.steps,
            "measured_time": self.measured_time,
            "images": self.images,
            "peaks": [self.peak_allocated, self.peak_reserved, max(self.peak_rss, process_peak_rss_mib())],
            "starts": self.starts,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the measurements of the resumed run."""
        self.step_times.extend(state_dict["step_times"].tolist())
        self.load_times.extend(state_dict["load_times"].tolist())
        self.steps, self.measured_time = state_dict["steps"], state_dict["measured_time"]
        self.peak_allocated, self.peak_reserved, self.peak_rss = state_dict["peaks"]
        self.images, self.starts = state_dict["images"], state_dict["starts"] + 1

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Reset the peak."""
        self._reset_peak(pl_module.device)
        self.previous_end = DeviceEvent(pl_module.device)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record the start of a batch, which is on the device now."""
        self.start = DeviceEvent(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the end of a batch, and log the measurements of a step if they are due."""
        assert self.start is not None and self.previous_end is not None
        previous, self.previous_end = self.previous_end, DeviceEvent(pl_module.device)
        self.step.batches.append((previous, self.start, self.previous_end))
        self.step.images += len(batch) * trainer.world_size
        memory = self._memory(pl_module.device)
        self.shown_mib = memory.pop("shown")
        if not is_optimizer_step(trainer):
            return
        self.unread.append(self.step)
        self.step = StepTiming()
        due = trainer.global_step % self.window == 0
        latest = self._read(wait=due)
        if due:
            recent = list(self.step_times)[-self.window :] or [latest]
            logged = {f"resources/{name}": value for name, value in memory.items()}
            logged["resources/step_time_s"] = statistics.median(recent)
            logged["resources/images_per_second"] = self.rate
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=trainer.global_step - 1)
            self._reset_peak(pl_module.device)

    def _read(self, *, wait: bool) -> float:
        """Add the steps that the device has finished, or wait for all; return the seconds of the last one."""
        latest = 0.0
        while self.unread and (wait or self.unread[0].is_complete):
            step = self.unread.popleft()
            latest, loading = step.seconds()
            self.rate = step.images / max(1e-9, latest + loading)
            self.steps_of_start += 1
            if self.steps_of_start > WARMUP_STEPS:
                self.steps += 1
                self.step_times.append(latest)
                self.load_times.append(loading)
                self.measured_time += latest + loading
                self.images += step.images
        return latest

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Read the peak of training before the evaluation starts."""
        self._memory(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Exclude the memory and time of the evaluation."""
        self._reset_peak(pl_module.device)
        self.previous_end = DeviceEvent(pl_module.device)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file after each epoch, as the run may be killed."""
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file."""
        self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: Any) -> None:
        device = pl_module.device
        self._read(wait=True)
        self._memory(device)
        cuda = device.type == "cuda"
        peaks = [self.peak_allocated, self.peak_reserved, max(self.peak_rss, process_peak_rss_mib())]
        if dist.is_available() and dist.is_initialized():
            gathered = torch.tensor(peaks, device=device)
            dist.all_reduce(gathered, dist.ReduceOp.MAX)
            peaks = gathered.tolist()
        if not trainer.is_global_zero:
            return
        write_json(
            self.path,
            {
                "device": device.type,
                "device_name": device_name(device),
                "devices": trainer.world_size,
                "starts": self.starts,
                "peak_memory_allocated_mib": peaks[0] if cuda else None,
                "peak_memory_reserved_mib": peaks[1] if cuda else None,
                "process_peak_rss_mib": peaks[2],
                "steps_measured": self.steps,
                "measured_time_s": self.measured_time,
                "step_time_s": statistics.median(self.step_times) if self.step_times else None,
                "load_time_s": statistics.median(self.load_times) if self.load_times else None,
                "images_per_second": self.images / self.measured_time if self.steps else None,
                **parameter_counts(pl_module.model),
                "versions": package_versions(),
                "settings": self.settings,
            },
        )

    def _memory(self, device: torch.device) -> dict[str, float]:
        """Return the peaks of the current window in MiB, and update those of the run."""
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
    def _reset_peak(device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
