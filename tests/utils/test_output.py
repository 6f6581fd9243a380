"""Output that nobody reads, that has no room, or that lacks a character: it ends no command, and results are whole."""

import errno
import fcntl
import io
import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from e3va_cli.runs.folder import METRICS
from e3va_cli.utils.output import OutputStream, robust_output
from tests.conftest import QUICK

GONE, FULL = 141, 1  # exit codes: of a shell for SIGPIPE, and of output that was lost otherwise
SLOW = pytest.mark.slow
SMALL_PLAN = ["backbone=swin_nano", "head=mask_rcnn_nano", "image_size=[96,128]", "measure=false", "methods=[e3va]"]
COMMANDS = {  # words, and the files that are there at the end
    "check-data": (["dataset.train_images=2", "dataset.val_images=2", "hydra.run.dir=out"], ["train.png", "val.png"]),
    "export-adapter": (
        ["checkpoint=RUN", "output=out"],
        ["adapter_model.safetensors", "adapter_config.json", "README.md"],
    ),
    "predict": (["checkpoint=RUN", "input=photo.png", "output=out", "accelerator=cpu"], ["predictions.json"]),
    "train": ([*QUICK, "hydra.run.dir=out"], [METRICS, "metrics.csv", "predictions.png", "checkpoints/last.ckpt"]),
    "evaluate": (["checkpoint=RUN", "hydra.run.dir=out", "trainer.accelerator=cpu"], [METRICS, "detections.json"]),
    "benchmark-memory": ([*SMALL_PLAN, "hydra.run.dir=out"], ["benchmark.json", "details.json", "memory.png"]),
    "export": (["checkpoint=RUN", "image_size=[64,64]", "output=out/a.onnx"], ["a.onnx"]),
}
PLACES = [
    pytest.param(command, output, marks=[] if command in quick else [SLOW])
    for output, quick in (("gone", ("check-data", "predict")), ("closed", ("export-adapter",)), ("full", ()))
    for command in COMMANDS
]


@pytest.fixture
def work(e3va, short_run, tmp_path):
    """Run a command of the table above; what it said is given back once its files have been looked for."""

    def work(command, output, expect):
        Image.new("RGB", (64, 64), "gray").save(tmp_path / "photo.png")
        words, files = COMMANDS[command]
        done = e3va(command, *(word.replace("RUN", str(short_run)) for word in words), expect=expect, output=output)
        assert "Traceback" not in done.stderr
        assert all((tmp_path / "out" / file).is_file() for file in files)
        return done

    return work


@pytest.mark.parametrize(("command", "output"), PLACES)
def test_what_cannot_be_written_keeps_no_command_from_its_work(work, tmp_path, command, output):
    done = work(command, output, {"gone": GONE, "closed": 0, "full": FULL}[output])
    said = "standard output cannot be written: No space left on device" in done.stderr
    assert said == (output == "full") and "BrokenPipe" not in done.stderr
    for file in (tmp_path / "out").rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", [pytest.param(one, marks=[SLOW] * (one != "predict")) for one in COMMANDS])
def test_ascii_is_enough_for_each_command(work, command):
    assert work(command, "ascii", 0).stdout.isascii()


def test_class_names_of_other_scripts_are_escaped(e3va, write_coco, annotate, tmp_path):
    names = ["猫 – кот", "dog…"]  # noqa: RUF001 (a dash that ASCII lacks)
    categories = [{"id": 7, "name": names[0]}, {"id": 3, "name": names[1]}]
    folder, file = write_coco([annotate(1, [5, 5, 20, 20])], categories=categories)
    split = [f"dataset.{which}_{what}={path}" for which in ("train", "val") for what, path in
             (("images", folder.name), ("annotations", file.name))]  # fmt: skip
    words = ["dataset=coco", f"dataset.root={tmp_path}", *split, "hydra.run.dir=out"]
    done = e3va("check-data", *words, output="ascii")
    assert r"\u732b - \u043a\u043e\u0442" in done.stdout and "dog..." in done.stdout and "No problems." in done.stdout


def test_an_error_keeps_its_exit_code_where_output_is_gone(e3va):
    assert "no such run folder" in e3va("evaluate", "checkpoint=nowhere", expect=2, output="gone").stderr


def shell(line, **environment):
    """A line of a shell in which `E3VA` is the command."""
    command = f"{sys.executable} -m e3va_cli"
    words = ["bash", "-o", "pipefail", "-c", line.replace("E3VA", command)]
    return subprocess.run(words, capture_output=True, env={**os.environ, **environment}, timeout=100)


@pytest.mark.parametrize(
    ("line", "code"),
    [("(sleep 0.3; E3VA --help) | true", GONE), ("E3VA --help >&- 2>&- <&-", 0), ("E3VA --help > /dev/full", FULL)],
)
def test_in_a_real_shell(line, code):
    done = shell(line)
    assert done.returncode == code and b"Traceback" not in done.stderr


@SLOW
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_files_are_utf_8_under_any_locale(write_coco, annotate, tmp_path, environment):
    """By processes of their own, as Python takes its encodings from where it is started; each file names its own."""
    name = "猫 – кот"  # noqa: RUF001 (a dash that ASCII lacks)
    categories = [{"id": 7, "name": "hund"}, {"id": 3, "name": name}]
    write_coco([annotate(1, [5, 5, 20, 20])], categories=categories)
    options = "dataset.SPLIT_images=images dataset.SPLIT_annotations=instances.json"
    splits = " ".join(options.replace("SPLIT", split) for split in ("train", "val"))
    data = f"dataset=coco dataset.root=. {splits} dataset.train_short_sides=[64] dataset.val_short_side=64"
    rest = "data.num_workers=0 backbone=swin_nano trainer.accelerator=cpu trainer.max_steps=1 hydra.run.dir=run"
    strict = {**environment, "PYTHONWARNDEFAULTENCODING": "1", "OMP_NUM_THREADS": "1"}
    done = shell(
        f"cd {tmp_path} && E3VA train {data} {rest} && E3VA export-adapter checkpoint=run output=adapter && "
        "E3VA predict checkpoint=adapter input=images/a.png output=found score_threshold=0 accelerator=cpu",
        **strict,
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and not [
        line for line in done.stderr.splitlines() if b"EncodingWarning" in line and b"e3va_cli" in line
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert name in config["classes"] and name in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    found = json.loads((tmp_path / "found" / "predictions.json").read_text(encoding="utf-8"))
    assert name in found["adapters"]["adapter"]["classes"]


def stream(descriptor, encoding="utf-8"):
    """Standard output as a command has it, in this process."""
    return io.TextIOWrapper(io.BufferedWriter(OutputStream(descriptor)), encoding, "legible")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "é 猫…→ ┏━┃ \\udcff"),
        ("latin-1", "é \\u732b...-> +-| \\udcff"),
        ("ascii", "\\xe9 \\u732b...-> +-| \\udcff"),
    ],
)
def test_what_an_encoding_lacks(tmp_path, encoding, shown):
    with (tmp_path / "out").open("wb") as file, stream(file.fileno(), encoding) as text:
        text.write("é 猫…→ ┏━┃ \udcff")
    assert (tmp_path / "out").read_text(encoding=encoding) == shown


def test_a_terminal_that_has_closed():
    ours, theirs = pty.openpty()
    os.close(ours)
    text = stream(theirs)
    for _ in range(2):
        print("to nobody", file=text, flush=True)
    assert text.buffer.raw.lost.errno == errno.EIO
    os.close(theirs)


def test_a_pipe_that_does_not_block():
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETFL, os.O_NONBLOCK)
    length, got = 1 << 20, []

    def reads():
        while sum(map(len, got)) < length:
            got.append(os.read(read, 1 << 16))

    thread = threading.Thread(target=reads)
    thread.start()
    stream(write).write("x" * length)
    thread.join()
    assert b"".join(got) == b"x" * length


def test_streams_that_others_have_put_in_place_stay(monkeypatch):
    ours = io.StringIO()
    monkeypatch.setattr(sys, "stdout", ours)
    monkeypatch.setattr(sys, "stderr", ours)
    with robust_output():
        assert sys.stdout is ours


def test_a_file_is_never_opened_as_a_closed_standard_output(tmp_path):
    code = (
        "from e3va_cli.utils.output import robust_output\n"
        "with robust_output(), open('results', 'w', encoding='utf-8') as file:\n"
        "    print('said'); file.write('kept'); assert file.fileno() > 2, file.fileno()"
    )
    words = ["bash", "-c", '"$0" -c "$1" >&- 2>&- <&-', sys.executable, code]
    assert subprocess.run(words, cwd=tmp_path).returncode == 0
    assert Path(tmp_path, "results").read_text(encoding="utf-8") == "kept"
