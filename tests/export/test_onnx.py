from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.functional import interpolate

from e3va_cli.commands import export
from e3va_cli.config.composition import validate_overrides
from e3va_cli.errors import UserError
from e3va_cli.export import onnx as deployment
from e3va_cli.export.adapter_checkpoint import build_trained_backbone, build_trained_model, read_checkpoint_or_adapter
from e3va_cli.export.onnx import Format, ParityError, check_export_options, export_model
from tests.export.crafted_runs import CLASSES, SEGMENTER, SMALL, craft

HEIGHT, WIDTH = 96, 128
SIZES = [(96, 128), (80, 128), (96, 101)]  # of the images, the last two of which are padded
TOLERANCE = 1e-4
FEW_BLOCKS = "backbone.model_args.depths=[2,1,1,1]"  # exporters take a second for each; the second one's windows shift
REPOSITORY = str(Path(deployment.__file__).parents[3]).encode()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of a detector and a segmenter."""
    root = tmp_path_factory.mktemp("runs")
    craft(root / "detector", *SMALL, FEW_BLOCKS)
    craft(root / "segmenter", *SEGMENTER, FEW_BLOCKS, seed=2)
    return root


def load(run):
    trained = read_checkpoint_or_adapter(str(run), "checkpoint")
    return build_trained_model(trained, *build_trained_backbone(trained))


@pytest.fixture
def images():
    """Smooth uint8 images of SIZES, padded with zeros as a batch is, and as a file takes them: with the mean colour."""
    smooth = 255 * interpolate(torch.rand(len(SIZES), 3, 5, 7), (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)
    batch = torch.zeros(len(SIZES), 3, HEIGHT, WIDTH, dtype=torch.uint8)
    padded = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1).repeat(len(SIZES), 1, HEIGHT, WIDTH)
    for index, (h, w) in enumerate(SIZES):
        batch[index, :, :h, :w] = smooth[index, :, :h, :w].byte()
        padded[index, :, :h, :w] = batch[index, :, :h, :w]
    return batch, padded


@torch.no_grad()
def reference(model, batch):
    """What the model's own prediction looks at: a segmenter's scores, or a detector's pyramid before its RPN."""
    if "semantic" in model.head.target_types:
        return [torch.stack([found.scores for found in model.predict(batch, SIZES)])]
    seen = []
    hook = model.head.neck.register_forward_hook(lambda *call: seen.extend(call[-1].values()))
    model.predict(batch, SIZES)
    hook.remove()
    return seen


def differences(found, expected):
    assert [tuple(one.shape) for one in found] == [tuple(one.shape) for one in expected]
    return [float((torch.as_tensor(one) - other).abs().max()) for one, other in zip(found, expected, strict=True)]


@pytest.mark.parametrize("name", ["detector", pytest.param("segmenter", marks=pytest.mark.slow)])
def test_onnx_computes_what_prediction_uses(runs, images, tmp_path, name):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = load(runs / name), tmp_path / "model.onnx"
    batch, padded = images
    exported = export_model(model, path, (HEIGHT, WIDTH), tolerance=TOLERANCE, metadata={"classes": ["a"]})
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"], "one file, weights included"
    assert 0 < exported.max_difference < TOLERANCE < exported.max_magnitude
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", ["batch", 3, HEIGHT, WIDTH])
    names = [output.name for output in session.get_outputs()]
    assert (
        names
        == list(exported.outputs)
        == (["scores"] if name == "segmenter" else [f"pyramid_{level}" for level in range(5)])
    )
    expected = reference(model, batch)
    assert max(differences(session.run(None, {"images": padded.numpy()}), expected)) < TOLERANCE
    alone = [output[1:2] for output in expected]
    assert max(differences(session.run(None, {"images": padded[1:2].numpy()}), alone)) < TOLERANCE
    about = json.loads(session.get_modelmeta().custom_metadata_map["e3va"])
    assert about == {"classes": ["a"], "outputs": names}
    assert REPOSITORY not in path.read_bytes()
    for adapters in model.extractor.adapters:
        for adapter in adapters:
            torch.nn.init.zeros_(adapter.up.B)
    assert min(differences(reference(model, batch), expected)) > 100 * TOLERANCE, "the adapters count"


def test_program_by_the_command(runs, images, e3va, tmp_path):
    out = e3va("export", f"checkpoint={runs}/detector", f"image_size=[{HEIGHT},{WIDTH}]", "output=a b.pt2").stdout
    assert [p.name for p in tmp_path.iterdir()] == ["a b.pt2"], "nothing else is left"
    assert f"(batch, 3, {HEIGHT}, {WIDTH})" in out and "pyramid_4  float32 (batch, 64, 2, 2)" in out
    model = load(runs / "detector")
    batch, padded = images
    about = {"e3va": ""}
    program = torch.export.load(tmp_path / "a b.pt2", extra_files=about)
    with torch.no_grad():
        assert max(differences(program.module()(padded), reference(model, batch))) < TOLERANCE
    meaning = json.loads(about["e3va"])
    assert meaning["classes"] == CLASSES[5] and meaning["category_ids"] == [10, 20, 30, 40, 50]
    assert meaning["padding"] == pytest.approx([123.675, 116.28, 103.53])
    kept = sum(p.numel() for part in (model.extractor, model.head.neck) for p in part.parameters())
    assert sum(p.numel() for p in program.state_dict.values()) == kept, "nothing of the rest of the detector"
    assert REPOSITORY not in (tmp_path / "a b.pt2").read_bytes()


def wrong(model, by):
    """A format whose files compute what PyTorch computes, and `by` more in the last value of the last output."""

    def run(images):
        outputs = deployment.ExportModule(model)(images)
        outputs[-1].view(-1)[-1] += by
        return outputs

    return Format((), lambda *arguments: arguments[-1].write_bytes(b"x"), lambda path: run)


@pytest.mark.slow
@pytest.mark.parametrize("by", [0.01, float("nan")])
def test_a_file_that_computes_something_else_is_not_kept(runs, monkeypatch, tmp_path, by):
    model, path = load(runs / "segmenter"), tmp_path / "model.pt2"
    monkeypatch.setitem(deployment.FORMATS, ".pt2", wrong(model, by))
    with pytest.raises(ParityError, match=r"not written: its outputs differ from PyTorch's by up to (0\.01|nan)"):
        export_model(model, path, (HEIGHT, WIDTH), tolerance=0.001, metadata={})
    assert not list(tmp_path.iterdir())
    if by == by:
        exported = export_model(model, path, (HEIGHT, WIDTH), tolerance=0.02, metadata={})
        assert exported.max_difference == pytest.approx(by, rel=1e-3) and path.read_bytes() == b"x"


def test_the_command_then_exits_with_1(runs, config, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(deployment.FORMATS, ".pt2", wrong(load(runs / "segmenter"), 0.01))
    words = [f"checkpoint={runs}/segmenter", f"output={tmp_path}/model.pt2", f"image_size=[{HEIGHT},{WIDTH}]"]
    with pytest.raises(SystemExit) as left:
        export.run(config(*words, command="export"))
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("e3va: error: ") and "tolerance=0.001" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(monkeypatch, package):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    with pytest.raises(UserError) as refused:
        check_export_options(Path("model.onnx"), [HEIGHT, WIDTH])
    (line,) = str(refused.value).splitlines()
    assert package in line and "pip install '.[onnx]'" in line
    check_export_options(Path("model.pt2"), [HEIGHT, WIDTH])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["output=model.pt2"], r"image_size: required; set it to \[height,width\]"),
        (["output=model.pt2", "image_size=[100,128]"], r"image_size=\[100, 128\]: must be multiples of 32"),
        (
            ["output=model.pt", "image_size=[96,128]"],
            r"output=model\.pt: unknown format; use a name that ends in \.onnx or \.pt2",
        ),
        (["output=old.pt2", "image_size=[96,128]"], r"output=old\.pt2: exists already"),
        (["output=null", "image_size=[96,128]"], "output: the name of a file is needed"),
    ],
)
def test_refused_before_anything_is_read(config, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    Path("old.pt2").write_text("x")
    with pytest.raises(UserError, match=f"^{says}"):
        export.run(OmegaConf.create(config("checkpoint=nowhere", *words, command="export")))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.pt2", "x")]


def test_more_than_an_onnx_file_can_hold(runs, monkeypatch, tmp_path):
    message = pytest.importorskip("google.protobuf.message")
    model, path = load(runs / "detector"), tmp_path / "model.onnx"

    class Program:
        """What the exporter gives of a model whose masks of windows, or whose weights, take more than 2 GiB."""

        model = type("Model", (), {"graph": (), "metadata_props": {}})

        @property
        def model_proto(self):
            raise message.EncodeError("Failed to serialize proto")

    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: Program())
    with pytest.raises(UserError, match=r"exceeds 2 GiB, .* export to \.pt2") as refused:
        export_model(model, path, (HEIGHT, WIDTH), tolerance=TOLERANCE, metadata={})
    assert len(refused.value.messages) == 1
    monkeypatch.setattr(torch.onnx, "export", None)
    monkeypatch.setattr(deployment, "MAX_ONNX_BYTES", 10**6)
    with pytest.raises(UserError, match="exceeds 2 GiB"):  # before the export, which takes long
        export_model(model, path, (HEIGHT, WIDTH), tolerance=TOLERANCE, metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tolerance", ["-0.1", "nan"])
def test_a_tolerance_below_0_is_refused(tolerance):
    with pytest.raises(UserError, match=rf"tolerance={tolerance}: must be 0 or above"):
        validate_overrides("export", ["checkpoint=x", "image_size=[96,128]", f"tolerance={tolerance}"])
