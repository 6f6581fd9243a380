"""Peak memory, step time and parameter counts of a run: logged, shown, and written to `resources.json`."""

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
from e3va_cli.training.steps import is_optimizer_step
from e3va_cli.utils.environment import MIB, DeviceEvent, device_name, package_versions, process_peak_rss_mib
from e3va_cli.utils.files import write_json

WARMUP = 5  # steps that are not counted
RECENT = 10_000  # steps whose times are kept: bounds what they take of memory and of each checkpoint


@dataclass
class StepTiming:
    """When the batches of a step were begun and done, on the device's clock.

    Attributes:
        batches: of each batch the moments when the one before was done, when it was on the device, and when it was
            done.
        images: in them, over all ranks.
    """

    batches: list[tuple[DeviceEvent, DeviceEvent, DeviceEvent]] = field(default_factory=list)
    images: int = 0

    @property
    def is_past(self) -> bool:
        """Whether all of it can be read without waiting."""
        return all(done.is_past for *_, done in self.batches)

    def seconds(self) -> tuple[float, float]:
        """Return the seconds of the step itself and of loading, for which the device had nothing to do."""
        steps = [done.seconds_since(begun) for _, begun, done in self.batches]
        loads = [begun.seconds_since(before) for before, begun, _ in self.batches]
        return sum(steps), sum(loads)


class Resources(L.Callback):
    """Measures each training step.

    A step is forward and backward of each of its batches and the optimizer, on the device's clock: on a GPU by CUDA
    events, which are read when the GPU has passed them, so that no step waits for it. Loading is timed apart. The
    first steps of each start are not counted. On CUDA peaks are reset with each logging window, and
    the run's peak is the largest window's, over all ranks. On a CPU only what is true there is reported: the process's
    peak resident memory. What is measured goes into checkpoints, so that a resumed run's file covers the whole run: the
    largest peaks, and the number and time of all steps that led to its state; medians are those of the last 10,000.

    Args:
        path: of `resources.json`.
        settings: what was run, for the file.
        window: steps between two lines of the log.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, window: int) -> None:
        self.path, self.settings, self.window = path, settings, window
        self.step_times: deque[float] = deque(maxlen=RECENT)
        self.load_times: deque[float] = deque(maxlen=RECENT)
        self.steps = self.images = 0
        self.measured_time = 0.0
        self.peak_allocated = self.peak_reserved = self.peak_rss = 0.0
        self.starts = 1
        self.seen = 0  # steps of this start
        self.rate = 0.0  # images per second, in the last step that was read
        self.shown_mib = 0.0
        self.done: DeviceEvent | None = None  # when the last batch was
        self.begun: DeviceEvent | None = None  # when the current one was
        self.step = StepTiming()
        self.unread: deque[StepTiming] = deque()

    def state_dict(self) -> dict[str, Any]:
        """What has been measured."""
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
        """Go on from what was measured since the run was first started."""
        self.step_times.extend(state_dict["step_times"].tolist())
        self.load_times.extend(state_dict["load_times"].tolist())
        self.steps, self.measured_time = state_dict["steps"], state_dict["measured_time"]
        self.peak_allocated, self.peak_reserved, self.peak_rss = state_dict["peaks"]
        self.images, self.starts = state_dict["images"], state_dict["starts"] + 1

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start with a clean peak."""
        self._restart_window(pl_module.device)
        self.done = DeviceEvent(pl_module.device)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The batch is loaded and on the device."""
        self.begun = DeviceEvent(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The batch is done, and at times the step with it."""
        assert self.begun is not None and self.done is not None
        before, self.done = self.done, DeviceEvent(pl_module.device)
        self.step.batches.append((before, self.begun, self.done))
        self.step.images += len(batch) * trainer.world_size
        memory = self._memory(pl_module.device)
        self.shown_mib = memory.pop("shown")
        if not is_optimizer_step(trainer):
            return
        self.unread.append(self.step)
        self.step = StepTiming()
        logs = trainer.global_step % self.window == 0
        latest = self._read(wait=logs)
        if logs:
            recent = list(self.step_times)[-self.window :] or [latest]
            logged = {f"resources/{name}": value for name, value in memory.items()}
            logged["resources/step_time_s"] = statistics.median(recent)
            logged["resources/images_per_second"] = self.rate
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=trainer.global_step - 1)
            self._restart_window(pl_module.device)

    def _read(self, *, wait: bool) -> float:
        """Count the steps that the device has done, or wait for all; returns the seconds of the last one."""
        latest = 0.0
        while self.unread and (wait or self.unread[0].is_past):
            step = self.unread.popleft()
            latest, loading = step.seconds()
            self.rate = step.images / max(1e-9, latest + loading)
            self.seen += 1
            if self.seen > WARMUP:
                self.steps += 1
                self.step_times.append(latest)
                self.load_times.append(loading)
                self.measured_time += latest + loading
                self.images += step.images
        return latest

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the training peak apart from the evaluation's."""
        self._memory(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Neither memory nor time of an evaluation counts as training's."""
        self._restart_window(pl_module.device)
        self.done = DeviceEvent(pl_module.device)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file, as the run may be killed before its end."""
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
    def _restart_window(device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
