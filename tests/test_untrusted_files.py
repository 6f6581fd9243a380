"""Checkpoints, weights, adapters and run folders of strangers: nothing in them is executed, wherever they are given."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from e3va_cli import cli, load_adapter
from e3va_cli.commands.saved_config import with_saved_config
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_checkpoint import build_trained_meta_model, read_checkpoint_or_adapter
from e3va_cli.export.adapter_folder import write_adapter
from e3va_cli.export.config_builder import build_adapter_config
from e3va_cli.models.backbones.weights import read_state_dict
from e3va_cli.training.checkpoints import read_checkpoint
from tests.export.crafted_runs import SMALL, craft

TOUCHED = "touched"


class Attack:
    """Unpickling it makes a file."""

    def __init__(self, folder: Path) -> None:
        self.file = str(folder / TOUCHED)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.file, "w")


def tarred(content: Attack, path: Path) -> None:
    """In the way of PyTorch before 0.1.10, which is still read."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


ATTACKS: dict[str, Callable[[Attack, Path], object]] = {
    "all of the file": torch.save,
    "a weight": lambda attack, path: torch.save({"state_dict": {"a": attack}, "e3va": {}}, path),
    "beside the weights": lambda attack, path: torch.save({"model": {"a": torch.ones(1)}, "model_ema": attack}, path),
    "a name": lambda attack, path: torch.save({"model": [(attack, torch.ones(1))]}, path),
    "before 1.6": lambda attack, path: torch.save(attack, path, _use_new_zipfile_serialization=False),
    "before 0.1.10": tarred,
    "a bare pickle": lambda attack, path: path.write_bytes(pickle.dumps(attack)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound run, and the adapter exported of it."""
    folder = tmp_path_factory.mktemp("made")
    run = craft(folder / "run", *SMALL)
    trained = read_checkpoint_or_adapter(str(run), "checkpoint")
    write_adapter(
        folder / "adapter",
        trained.state_dict,
        build_adapter_config(trained, build_trained_meta_model(trained), run),
        "fp32",
    )
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with copies of both to be spoilt, and a photo."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        call()
    (line,) = refused.value.messages
    assert line.isprintable()
    return line


@pytest.mark.parametrize("kind", ATTACKS)
def test_every_attack_would_work(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    ATTACKS[kind](Attack(tmp_path), path)
    with contextlib.suppress(Exception):  # it has happened by then
        torch.load(path, weights_only=False)
    assert (tmp_path / TOUCHED).exists()


@pytest.mark.parametrize("kind", ATTACKS)
def test_readers_refuse_each(kind: str, place: Path) -> None:
    checkpoint = place / "run/checkpoints/last.ckpt"
    ATTACKS[kind](Attack(place), checkpoint)
    line = refusal(lambda: read_checkpoint(checkpoint))
    assert str(checkpoint) in line and ("only tensors and plain values are loaded" in line or kind == "before 0.1.10")
    assert "last.ckpt" in refusal(lambda: read_checkpoint_or_adapter("run", "checkpoint"))
    for name in ("weights.pth", "weights.bin", "weights.pt", "weights.safetensors"):
        shutil.copy(checkpoint, place / name)
        assert name in refusal(lambda name=name: read_state_dict(place / name))
    shutil.copy(checkpoint, place / "adapter/adapter_model.safetensors")
    assert "adapter_model.safetensors" in refusal(lambda: load_adapter("adapter"))
    assert not (place / TOUCHED).exists()


COMMANDS = {
    "resume": ["train", "resume=run"],
    "evaluate": ["evaluate", "checkpoint=run"],
    "predict": ["predict", "checkpoint=run", "input=photo.png"],
    "export": ["export-adapter", "checkpoint=run", "output=new"],
    "onnx": ["export", "checkpoint=run", "output=new.onnx", "image_size=[64,64]"],
    "weights .pth": ["train", "backbone.weights=weights.pth", "dataset.train_images=2", "dataset.val_images=2"],
    "weights .bin": ["predict", "checkpoint=adapter", "input=photo.png", "backbone.weights=weights.bin"],
    "evaluate an adapter": ["evaluate", "checkpoint=adapter"],
    "predict of an adapter": ["predict", "checkpoint=adapter", "input=photo.png"],
}


def said(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `e3va WORDS` says where it refuses them, in this process: one line."""
    monkeypatch.setattr(sys, "argv", ["e3va", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    line = capsys.readouterr().err.strip()
    assert left.value.code == 2 and line.startswith("e3va: error: ") and len(line.splitlines()) == 1, line
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_it(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = ["run/checkpoints/last.ckpt", "weights.pth", "weights.bin"]
    if command.endswith("an adapter"):
        spoilt.append("adapter/adapter_model.safetensors")
    for name in spoilt:
        torch.save({"model": {"a": torch.ones(1)}, "model_ema": Attack(place)}, name)
    line = said(COMMANDS[command], monkeypatch, capsys)
    assert any(name in line for name in spoilt)
    assert not (place / TOUCHED).exists()


def test_an_adapter_that_is_whole_but_a_pickle(place: Path) -> None:
    """Its size and checksum are right, as one who knows the format would make them."""
    import hashlib

    weights, config = place / "adapter/adapter_model.safetensors", place / "adapter/adapter_config.json"
    torch.save(Attack(place), weights)
    content = json.loads(config.read_text())
    data = weights.read_bytes()
    content["weights"].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    config.write_text(json.dumps(content))
    assert "not a safetensors file" in refusal(lambda: load_adapter("adapter"))
    assert not (place / TOUCHED).exists()


# The words of a run: Hydra would instantiate what its own options name

WORDS = {
    "a callback": "+hydra.callbacks.evil={_target_:builtins.open,file:touched,mode:w}",
    "logging": "+hydra.job_logging={version:1,handlers:{f:{class:logging.FileHandler,filename:touched}}}",
    "a launcher": "hydra/launcher=evil",
    "a launcher's class": "hydra.launcher._target_=builtins.open",
    "a sweeper": "++hydra.sweeper._target_=builtins.open",
    "a folder of configurations": "hydra.searchpath=[file:///tmp]",
    "the environment": "+hydra.job.env_set.LD_PRELOAD=evil.so",
    "the current folder": "hydra.job.chdir=true",
    "where the run goes": "hydra.run.dir=/tmp/elsewhere",
    "taken away": "~hydra.job_logging",
}


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_run_decides_nothing_of_hydra(kind: str, command: str, place: Path) -> None:
    (place / "run/.hydra/overrides.yaml").write_text(json.dumps([WORDS[kind], "seed=3"]))
    words = with_saved_config(command, [f"{'resume' if command == 'train' else 'checkpoint'}=run"], "run")
    assert "seed=3" in words
    assert [word for word in words if "hydra" in word] == (["hydra.run.dir='run'"] if command == "train" else [])


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_a_run_with_a_callback_executes_nothing(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "run/.hydra/overrides.yaml").write_text(json.dumps([WORDS["a callback"], WORDS["logging"]]))
    (place / "run/checkpoints/last.ckpt").write_bytes(b"nothing")
    assert "not a readable checkpoint" in said(COMMANDS[command], monkeypatch, capsys)
    assert not (place / TOUCHED).exists()


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${oc.select:seed}", "${hydra:runtime.cwd}", "${now:%Y}"])
def test_a_run_looks_nothing_up(value: str, place: Path) -> None:
    (place / "run/.hydra/overrides.yaml").write_text(json.dumps([f"dataset.root={value}"]))
    line = refusal(lambda: with_saved_config("train", ["resume=run"], "run"))
    assert "looks a value up" in line and value in line and "give dataset.root=VALUE" in line
    assert with_saved_config("train", ["resume=run", "dataset.root=here"], "run")[-1] == "dataset.root=here"


def test_an_export_tells_nothing_of_the_machine(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    (place / "run/.hydra/overrides.yaml").write_text(json.dumps(["seed='${oc.env:SECRET}'"]))
    trained = read_checkpoint_or_adapter("run", "checkpoint")
    write_adapter(
        place / "new",
        trained.state_dict,
        build_adapter_config(trained, build_trained_meta_model(trained), place / "run"),
        "fp32",
    )
    assert not [file for file in (place / "new").iterdir() if b"hunter2" in file.read_bytes()]


NOT_AN_ARCHITECTURE = r"invalid architecture name|must be a number or a list of numbers|cannot be set"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_args", {"checkpoint_path": "weights.pth"}),
        ("model_args", {"pretrained_cfg": {"file": "weights.pth"}}),
        ("model_args", {"pretrained_cfg_overlay": {"file": "weights.pth"}}),
        ("model_args", {"norm_layer": "os.system"}),
        ("model_args", {"pretrained": True}),
        ("timm_name", "local-dir:weights.pth"),
        ("timm_name", "hf-hub:someone/something"),
    ],
)
def test_a_checkpoint_names_no_other_file(key: str, value: Any, place: Path) -> None:
    """timm would read what the options of an architecture can name."""
    path = place / "run/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content["e3va"]["config"]["backbone"][key] = value
    torch.save(content, path)
    torch.save(Attack(place), place / "weights.pth")
    with pytest.raises(UserError, match=NOT_AN_ARCHITECTURE):
        load_adapter("run")
    with pytest.raises(UserError, match=NOT_AN_ARCHITECTURE):
        build_trained_meta_model(read_checkpoint_or_adapter("run", "checkpoint"))
    assert not (place / TOUCHED).exists()


# Files that are not malicious but not what e3va writes either


def emptied(*keys: str) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = None

    return change


SHAPE = torch.ones(1, device="meta")
MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nothing": (lambda c: c.update(e3va=5), "not a checkpoint of e3va train"),
    "no weights": (emptied("state_dict"), "no state_dict of tensors"),
    "a weight without a name": (lambda c: c["state_dict"].update({1: torch.ones(1)}), "no state_dict of tensors"),
    "a sparse weight": (lambda c: c["state_dict"].update(a=torch.ones(1).to_sparse()), "no state_dict of tensors"),
    "a weight of no values": (lambda c: c["state_dict"].update(a=SHAPE), "no state_dict of tensors"),
    "no steps": (emptied("global_step"), "no global_step"),
    "no classes": (emptied("e3va", "classes"), "classes is not a list"),
    "classes of numbers": (lambda c: c["e3va"].update(classes=[1, 2, 3, 4, 5]), "classes[0] has the wrong type"),
    "a class that moves the cursor": (
        lambda c: c["e3va"]["classes"].insert(0, "\x1b[2J"),
        "'\\x1b[2J', which is not a printable name",
    ),
    "no configuration": (emptied("e3va", "config"), "config has the wrong type"),
    "no backbone": (emptied("e3va", "config", "backbone"), "config.backbone has the wrong type"),
    "no data set": (lambda c: c["e3va"]["config"].pop("dataset"), "config.dataset is missing"),
    "another head": (lambda c: c["e3va"]["config"]["head"].update(name="x"), "no such head"),
    "a look-up": (lambda c: c["e3va"]["config"]["dataset"].update(metric="${oc.env:HOME}"), "has an interpolation"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_checkpoint_of_another_form(kind: str, place: Path) -> None:
    path = place / "run/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    change, says = MALFORMED[kind]
    change(content)
    torch.save(content, path)
    line = refusal(lambda: read_checkpoint_or_adapter("run", "checkpoint"))
    assert str(path.relative_to(place)) in line and says in line


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    "content",
    ["[", "5", "a: b", "", "- [a, b]", "- 'a=1\n\n  b=2'", '["\\e[2Ja=1"]', "- !!python/name:os.system", LAUGHS],
)
def test_options_of_another_form(content: str, place: Path) -> None:
    (place / "run/.hydra/overrides.yaml").write_text(content)
    assert "overrides.yaml: " in refusal(lambda: with_saved_config("train", ["resume=run"], "run"))
