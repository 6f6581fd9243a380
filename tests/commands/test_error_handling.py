"""What ends a command from outside it, as one line."""

import errno
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import initialize_config_module

from e3va_cli.commands import error_handling, evaluate, predict
from e3va_cli.config.composition import CONFIG_MODULE
from e3va_cli.data.images import reading
from e3va_cli.errors import UserError
from e3va_cli.memory import benchmark
from e3va_cli.training.lightning_module import BatchRecord
from e3va_cli.training.run import build_run
from tests.training.small import SMALL

MIB = 2**20
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails")


@pytest.fixture
def estimated(monkeypatch):
    """Estimates of 100 MiB, and 30 per image; half of that in 16 bits, a third with recompute."""

    def estimate(config, size, **_):
        an_image = 30 / (1 if size.precision == "32" else 2)
        an_image /= {"keep": 1, "compress": 1, "recompute": 3}[config.adapter.activations]
        return SimpleNamespace(peak=SimpleNamespace(total_bytes=MIB * (100 + an_image * size.batch_size)))

    monkeypatch.setattr(benchmark, "estimate_memory", estimate)


@pytest.fixture
def ends(config, tmp_path):
    """The line that a run ends with that an error ended."""

    def ends(error, *words):
        trainer = SimpleNamespace(global_step=1234, strategy=SimpleNamespace(root_device=torch.device("cpu")))
        task = SimpleNamespace(batch_records=[BatchRecord([7, 9], [(800, 1333), (640, 427)])], evaluating=False)
        oom_message = partial(error_handling.training_oom_message, config(*words), trainer, task)
        with (
            initialize_config_module(CONFIG_MODULE, version_base="1.3"),
            pytest.raises(UserError) as refused,
            error_handling.friendly_errors(tmp_path, oom_message),
        ):
            raise error
        (message,) = refused.value.messages
        assert "\n" not in message
        return message

    return ends


def test_memory_names_the_place_the_plan_and_what_would_fit(ends, estimated, monkeypatch):
    monkeypatch.setattr(error_handling, "available_mib", lambda device: 230.0)
    message = ends(NO_MEMORY, "data.batch_size=8")
    for words in (
        "step 1,234, with images of 800x1333, 640x427",
        "Tried to allocate 2.00 GiB.",
        "estimate 340 MiB at the largest image, 128x128; 230 MiB",
        "data.batch_size=4 trainer.accumulate_grad_batches=2",
        "trainer.precision=bf16-mixed",
        "adapter.activations=recompute",
        "trainer.skip_oom=true",
    ):
        assert words in message
    assert "compress" not in message, "it would not fit"


def test_where_the_plan_fits_less_than_the_plan_is_offered(ends, estimated, monkeypatch):
    monkeypatch.setattr(error_handling, "available_mib", lambda device: 50_000.0)
    message = ends(NO_MEMORY, "data.batch_size=8", "trainer.precision=bf16-mixed")
    assert "data.batch_size=6 " in message and "precision" not in message  # 100 + 6 x 15 <= 0.9 x 220


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_the_machine_s_own_memory(ends, estimated, error):
    assert "out of memory in step 1,234" in ends(error)


def test_equal_images_are_counted():
    assert error_handling.describe_sizes([(64, 96), (64, 64), (64, 96)]) == "64x96 (2 of them), 64x64"


@pytest.mark.parametrize(
    ("method", "call", "says"),
    [
        ("losses", 1, "in step 0, with images of 64x64 (2 of them)"),
        ("predict", 1, "in the evaluation after step 4, with images of 64x64 (2 of them)"),
        ("losses", 5, "in step 4, with images of 64x64 (2 of them)"),
    ],
)
def test_where_lightning_says_that_memory_did_not_suffice(config, estimated, tmp_path, monkeypatch, method, call, says):
    """The trainer has torn everything down by then: the model has left its device, and no stage is running."""
    options = config(*SMALL, "trainer.max_epochs=2")
    run = build_run(options, tmp_path)
    device, asked = torch.device("meta"), []
    monkeypatch.setattr(error_handling, "available_mib", lambda place: asked.append(place) or 230.0)
    whole, calls = getattr(run.model, method), []

    def narrow(*args):
        calls.append(args)
        if len(calls) == call:
            monkeypatch.setattr(type(run.trainer.strategy), "root_device", device)
            raise NO_MEMORY
        return whole(*args)

    monkeypatch.setattr(run.model, method, narrow)
    with (
        initialize_config_module(CONFIG_MODULE, version_base="1.3"),
        pytest.raises(UserError) as refused,
        error_handling.friendly_errors(
            tmp_path, partial(error_handling.training_oom_message, options, run.trainer, run.lightning_module)
        ),
    ):
        run.trainer.fit(run.lightning_module, run.data)
    assert says in str(refused.value) and ("data.val_batch_size=1" in str(refused.value)) == (method == "predict")
    assert asked == ([] if method == "predict" else [device])


def test_memory_in_the_commands_that_only_look(config, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise NO_MEMORY

    monkeypatch.setattr(evaluate, "read_eval_specs", fail)
    with pytest.raises(UserError, match=r"in the evaluation .*2\.00 GiB.*data\.val_batch_size=1"):
        evaluate.run(config("checkpoint=x", command="evaluate"), folder=Path())
    monkeypatch.setattr(predict, "load_adapters", fail)
    (tmp_path / "a.png").touch()
    words = ["checkpoint=x", f"input={tmp_path}/a.png"]
    with pytest.raises(UserError, match=r"out of memory .*2\.00 GiB.*batch_size=1"):
        predict.run(config(*words, command="predict"))


def test_a_full_disk(ends, tmp_path):
    message = ends(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.csv")))
    assert "metrics.csv: cannot be written: No space left on device" in message


def test_a_loader_process_that_the_system_ended(ends):
    assert "data.num_workers" in ends(RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "))


@pytest.mark.parametrize("kind", ["MemoryError", "_ArrayMemoryError"])
def test_memory_in_a_loader_process(ends, kind):
    line = ends(RuntimeError(f"Caught {kind} in DataLoader worker process 0.\nOriginal Traceback ..."))
    assert "while loading images" in line and "data.num_workers" in line and "trainer.skip_oom" not in line


def test_memory_where_this_process_loads(ends, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("Unable to allocate 6.7 GiB")

    monkeypatch.setattr(reading.Image, "open", fail)
    (tmp_path / "a.png").touch()
    with pytest.raises(MemoryError) as caught:
        reading.read_raw(tmp_path / "a.png")
    assert "while loading images" in ends(caught.value)


def test_other_errors_stay_what_they_are(tmp_path):
    with (
        pytest.raises(FileNotFoundError),
        error_handling.friendly_errors(tmp_path, error_handling.evaluation_oom_message),
    ):
        raise FileNotFoundError(errno.ENOENT, "gone")
