import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from e3va_cli.config.run_config import to_dict
from e3va_cli.errors import UserError
from tests.components import build_backbone
from tests.conftest import NANO


@pytest.fixture
def donor():
    """A backbone with weights of seed 1."""
    backbone, identity = build_backbone(**NANO, pretrained=False, weights=None, seed=1)
    return backbone.model, identity


def load(path):
    return build_backbone(**NANO, pretrained=False, weights=str(path), seed=0)


def authors_layout(state):
    """The Swin authors' layout: `downsample` at the end of a stage, with buffers and a classifier."""
    state = {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k): v
        for k, v in state.items()
    }
    buffers = {"layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49), "norm.weight": torch.ones(256)}
    return {"model": {**state, **buffers, "head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}}


@pytest.mark.parametrize("layout", ["timm.safetensors", "timm.pth", "authors.pth"])
def test_weights_are_equal_in_every_layout(donor, tmp_path, layout):
    model, identity = donor
    path = tmp_path / layout
    state = dict(model.state_dict())
    if layout == "timm.safetensors":
        save_file(state, path)
    else:
        torch.save(authors_layout(state) if layout == "authors.pth" else state, path)
    loaded, theirs = load(path)
    assert theirs.fingerprint == identity.fingerprint
    assert theirs.weights == "file"
    torch.testing.assert_close(loaded.model.state_dict(), model.state_dict())


def test_packaged_weights_have_the_fingerprint_of_their_card(config):
    backbone, identity = build_backbone(**to_dict(config("backbone.pretrained=true").backbone))
    card = (Path(__file__).parents[3] / "weights/swin_nano/README.md").read_text()
    assert f"`{identity.fingerprint}`" in card and identity.weights == "pretrained"
    assert backbone.model.patch_embed.proj.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["nothing", "../conf", "/etc/passwd"])
def test_packaged_weights_are_named_not_found_by_path(config, name):
    options = {**to_dict(config("backbone.pretrained=true").backbone), "packaged_weights": name}
    with pytest.raises(UserError, match="packaged_weights"):
        build_backbone(**options)


def test_random_weights_depend_on_the_seed(donor):
    _, identity = donor
    again, _ = donor[1], None
    torch.manual_seed(123)
    _, repeated = build_backbone(**NANO, pretrained=False, weights=None, seed=1)
    _, other = build_backbone(**NANO, pretrained=False, weights=None, seed=2)
    assert repeated == identity == again
    assert other.fingerprint != identity.fingerprint


def test_error_lists_mismatches(donor, tmp_path):
    state = dict(donor[0].state_dict())
    state["layers.0.blocks.0.norm1.weight"] = torch.ones(48)
    del state["patch_embed.proj.bias"]
    state["extra.weight"] = torch.ones(1)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UserError) as error:
        load(tmp_path / "odd.pth")
    message = str(error.value)
    assert "1 missing: patch_embed.proj.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "layers.0.blocks.0.norm1.weight (48,) instead of (32,)" in message
    assert "\n" not in message


class Malicious:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_bytes(b"not weights"), "cannot be read"),
        (lambda p: torch.save(Malicious(), p), "cannot be read"),
        (lambda p: torch.save([1, 2], p), "contains no state_dict"),
        (lambda p: torch.save({1: torch.ones(1)}, p), "contains no state_dict"),
        (lambda p: torch.save({"model": {"a": torch.ones(1), "b": "text"}}, p), "contains no state_dict"),
        (lambda p: p.mkdir(), "no such file"),
        (os.mkfifo, "no such file"),
    ],
)
def test_error_of_invalid_files_is_one_line(tmp_path, capsys, write, says):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(UserError, match=says) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to_sparse(),
        lambda t: t.to(torch.int64),
        lambda t: t.to(torch.complex64),
        lambda t: t.to("meta"),
    ],
)
def test_error_of_tensors_that_are_not_dense_floats(donor, tmp_path, change):
    name = "patch_embed.proj.bias"
    torch.save({**donor[0].state_dict(), name: change(donor[0].state_dict()[name])}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=rf"1 with another type: {name}|contains no state_dict") as error:
        load(tmp_path / "odd.pth")
    assert "\n" not in str(error.value)


def test_error_of_truncated_safetensors_file(donor, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(dict(donor[0].state_dict()), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a safetensors file"):
        load(path)


def test_error_without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    swin_t = {**NANO, "timm_name": "swin_tiny_patch4_window7_224.ms_in1k", "model_args": {}}
    with pytest.raises(UserError, match=r"could not download.*backbone\.weights=FILE"):
        build_backbone(**swin_t, pretrained=True, weights=None, seed=0)
