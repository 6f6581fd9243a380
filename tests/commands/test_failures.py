"""What ends a run from outside it, as one line."""

import errno
from types import SimpleNamespace

import pytest
import torch
from hydra import initialize_config_module

from e3va_cli.commands import budget_gate, failures
from e3va_cli.composition import CONFIG_MODULE
from e3va_cli.errors import UserError
from e3va_cli.memory import benchmark
from e3va_cli.training.steps import Seen

MIB = 2**20
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails")


@pytest.fixture
def planned(monkeypatch):
    """Plans that cost nothing: 100 MiB, and 30 an image; half of it in 16 bits, a third if adapters are run again."""

    def plan(config, size, **_):
        an_image = 30 / (1 if size.precision == "32" else 2)
        an_image /= {"keep": 1, "compress": 1, "recompute": 3}[config["adapter"]["activations"]]
        return SimpleNamespace(peak=SimpleNamespace(total_bytes=MIB * (100 + an_image * size.batch_size)))

    monkeypatch.setattr(budget_gate, "plan", plan)
    monkeypatch.setattr(benchmark, "plan", plan)


@pytest.fixture
def ends(config, tmp_path):
    """The line that a run ends with that an error ended."""

    def ends(error, *words, validating=False):
        trainer = SimpleNamespace(global_step=1234, validating=validating)
        task = SimpleNamespace(seen=[Seen([7, 9], [(800, 1333), (640, 427)])], device=torch.device("cpu"))
        options = config(*words)
        with (
            initialize_config_module(CONFIG_MODULE, version_base="1.3"),
            pytest.raises(UserError) as refused,
            failures.in_one_line(options, tmp_path, trainer, task),
        ):
            raise error
        (message,) = refused.value.messages
        assert "\n" not in message
        return message

    return ends


def test_memory_names_the_place_the_plan_and_what_would_fit(ends, planned, monkeypatch):
    monkeypatch.setattr(failures, "available_mib", lambda device: 230.0)
    message = ends(NO_MEMORY, "data.batch_size=8")
    for words in (
        "step 1,234, with images of 800x1333, 640x427",
        "Tried to allocate 2.00 GiB.",
        "planned are 340 MiB at the largest image, 128x128, and 230 MiB",
        "data.batch_size=4 trainer.accumulate_grad_batches=2",
        "trainer.precision=bf16-mixed",
        "adapter.activations=recompute",
        "trainer.skip_oom=true",
    ):
        assert words in message
    assert "compress" not in message, "it would not fit"


def test_where_the_plan_fits_less_than_the_plan_is_offered(ends, planned, monkeypatch):
    monkeypatch.setattr(failures, "available_mib", lambda device: 50_000.0)
    message = ends(NO_MEMORY, "data.batch_size=8", "trainer.precision=bf16-mixed")
    assert "data.batch_size=6 " in message and "precision" not in message  # 100 + 6 x 15 <= 0.9 x 220


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_the_machine_s_own_memory(ends, planned, error):
    assert "memory did not suffice in step 1,234" in ends(error)


def test_equal_images_are_counted():
    assert failures.described([(64, 96), (64, 64), (64, 96)]) == "64x96 (2 of them), 64x64"


def test_memory_in_an_evaluation(ends):
    message = ends(NO_MEMORY, validating=True)
    assert "in the evaluation after step 1,234" in message and "data.val_batch_size=1" in message


def test_a_full_disk(ends, tmp_path):
    message = ends(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.csv")))
    assert "metrics.csv: cannot be written: No space left on device" in message


def test_a_loader_process_that_the_system_ended(ends):
    message = ends(RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), "data.num_workers=4")
    assert "data.num_workers=4" in message


def test_other_errors_stay_what_they_are(config, tmp_path):
    with pytest.raises(FileNotFoundError), failures.in_one_line(config(), tmp_path, None, None):
        raise FileNotFoundError(errno.ENOENT, "gone")
