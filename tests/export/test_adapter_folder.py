import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from e3va_cli.config.overrides import overrides_of_config
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_checkpoint import (
    build_trained_backbone,
    build_trained_meta_model,
    build_trained_model,
    check_backbone,
    load_trained_weights,
    read_checkpoint_or_adapter,
)
from e3va_cli.export.adapter_config import config_digest, read_config
from e3va_cli.export.adapter_folder import CONFIG_DIGEST_KEY, write_adapter
from e3va_cli.export.config_builder import build_adapter_config, read_metrics
from e3va_cli.models.backbones import build_backbone
from e3va_cli.models.model import build_model
from e3va_cli.training.checkpoints import trainable_state_dict
from tests.export.crafted_runs import SEGMENTER, SMALL, craft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {
    "e3va": SMALL,
    "lora": [*SMALL, "adapter=lora", "adapter.rank=4"],
    "full": [*SMALL, "adapter=full"],
    "frozen": ["head=retinanet", "head.fpn_channels=32", "adapter=frozen"],
    "upernet": SEGMENTER,
    "cascade": [
        "head=cascade_mask_rcnn",
        "head.fpn_channels=32",
        "head.box.conv_channels=[32]",
        "head.box.hidden=32",
        "head.mask.channels=[16]",
        "head.rpn.pre_nms_test=20",
        "head.rpn.post_nms_test=10",
    ],
}


def export(run: Path, folder: Path, precision: str = "fp32") -> Path:
    trained = read_checkpoint_or_adapter(str(run), "checkpoint")
    write_adapter(
        folder, trained.state_dict, build_adapter_config(trained, build_trained_meta_model(trained), run), precision
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return craft(tmp_path_factory.mktemp("runs") / "run", *SMALL)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("adapters") / "adapter")


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of the exported adapter to damage."""
    return Path(shutil.copytree(exported, tmp_path / "adapter"))


def edit(folder, change):
    """Edit the configuration by hand."""
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    (folder / CONFIG).write_text(json.dumps(content))


def forge(folder, change, tensors=None):
    """Edit the configuration and weights, and update all checksums."""
    import hashlib

    content = json.loads((folder / CONFIG).read_text())
    change(content)
    with safe_open(folder / WEIGHTS, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()} | (tensors or {})  # noqa: SIM118
        marks = {**file.metadata(), CONFIG_DIGEST_KEY: config_digest(content)}
    save_file({k: v for k, v in state.items() if v is not None}, folder / WEIGHTS, metadata=marks)
    data = (folder / WEIGHTS).read_bytes()
    content["weights"].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    (folder / CONFIG).write_text(json.dumps(content))


def refusal(folder) -> str:
    with pytest.raises(UserError) as refused:
        read_checkpoint_or_adapter(str(folder), "checkpoint")
    (line,) = refused.value.messages
    assert "\n" not in line
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    run = craft(tmp_path / "run", *KINDS[kind])
    folder = export(run, tmp_path / "made")
    moved = folder.rename(tmp_path / "moved")
    assert sorted(p.name for p in moved.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    shutil.move(run, tmp_path / "gone")
    before, after = (
        read_checkpoint_or_adapter(str(tmp_path / "gone"), "checkpoint"),
        read_checkpoint_or_adapter(str(moved), "checkpoint"),
    )
    checkpoint = torch.load(tmp_path / "gone" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {f"model.{name}" for name in after.state_dict} == set(checkpoint)
    for name, value in after.state_dict.items():
        assert torch.equal(value, checkpoint[f"model.{name}"]), name
    backbone_names = [name for name in after.state_dict if name.startswith("extractor.backbone.")]
    assert bool(backbone_names) == (kind == "full"), "the frozen backbone is never written"
    models = [build_trained_model(t, *build_trained_backbone(t)) for t in (before, after)]
    images = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    (one,), (other,) = (model.predict(images, [(96, 96)]) for model in models)
    for key, value in vars(one).items():
        assert torch.equal(value, vars(other)[key]) if isinstance(value, torch.Tensor) else value == vars(other)[key]


def test_half_precision_is_half_the_size_and_close(run, exported, tmp_path):
    half = export(run, tmp_path / "half", "fp16")
    sizes = [(path / WEIGHTS).stat().st_size for path in (half, exported)]
    assert 0.49 < sizes[0] / sizes[1] < 0.51
    one, other = (
        read_checkpoint_or_adapter(str(exported), "checkpoint"),
        read_checkpoint_or_adapter(str(half), "checkpoint"),
    )
    for name, value in one.state_dict.items():
        assert other.state_dict[name].dtype == torch.float16
        torch.testing.assert_close(other.state_dict[name].float(), value, rtol=2**-10, atol=1e-6)
    model = build_model(other.config, num_classes=5)
    load_trained_weights(model, other)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_beyond_half_precision_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"fp16: w has values out of the range"):
        write_adapter(tmp_path / "a", {"w": torch.tensor([1e5])}, {}, "fp16")
    assert not list(tmp_path.iterdir())


def test_whole_numbers_stay_whole(run, tmp_path):
    trained = read_checkpoint_or_adapter(str(run), "checkpoint")
    state = {"count": torch.tensor([70000, 3]), "w": torch.tensor([0.5])}
    write_adapter(tmp_path / "a", state, build_adapter_config(trained, build_trained_meta_model(trained), run), "fp16")
    with safe_open(tmp_path / "a" / WEIGHTS, "pt") as file:
        assert torch.equal(file.get_tensor("count"), state["count"]) and file.get_tensor("w").dtype == torch.float16


def test_nothing_is_a_pickle_or_an_archive(exported):
    for path in exported.iterdir():
        start = path.read_bytes()[:16]
        assert not start.startswith((b"PK", b"\x80")), path
    header = (exported / WEIGHTS).read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + length])["__metadata__"]["format"] == "e3va-adapter"


def test_reading_never_unpickles(exported, monkeypatch):
    def never(*args, **options):
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.load", never)
    monkeypatch.setattr("pickle.loads", never)
    monkeypatch.setattr("pickle.Unpickler", never)
    monkeypatch.setattr("torch.load", never)
    assert read_checkpoint_or_adapter(str(exported), "checkpoint").state_dict


def test_content_of_the_configuration(exported, run):
    content = read_config(exported)
    about = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["e3va"]
    for key in ("backbone", "adapter", "head", "classes", "category_ids"):
        assert content[key] == about[key], key
    assert content["category_ids"] == [10, 20, 30, 40, 50]
    assert content["image_size"]["val_short_side"] == 96 and content["image_size"]["max_size"] == 128
    assert content["normalisation"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert content["parameters"]["stored"] == sum(
        v.numel() for v in read_checkpoint_or_adapter(str(run), "checkpoint").state_dict.values()
    )
    assert content["parameters"]["stored_on_backbone"] == content["parameters"]["trainable_backbone_params"]


def test_the_adapter_of_swin_b_is_the_papers(config, tmp_path):
    options = config("backbone=swin_b", "head=mask_rcnn_nano")
    state = trainable_state_dict(build_model(options, num_classes=5))
    run = tmp_path / "run"
    trained = read_checkpoint_or_adapter(str(craft(run, *SMALL)), "checkpoint")
    write_adapter(tmp_path / "a", state, build_adapter_config(trained, build_trained_meta_model(trained), run), "fp32")
    with safe_open(tmp_path / "a" / WEIGHTS, "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert sum(size for name, size in sizes.items() if name.startswith("extractor.")) == 1_195_008


def test_content_of_the_model_card(exported):
    text = (exported / "README.md").read_text()
    for words in (
        "swin_nano",
        "e3va evaluate checkpoint=adapter",
        "load_adapter('adapter')",
        "10 circle",
        "## License",
    ):
        assert words in text
    assert read_config(exported)["backbone"]["fingerprint"] in text


def test_paths_of_the_training_machine_are_not_in_the_model_card(tmp_path):
    run = craft(tmp_path / "run", *SEGMENTER)
    root, start = "dataset.root=/home/someone/x", "init_from='/home/z/first/checkpoints/best.ckpt'"
    overrides = [root, "hydra.run.dir=/home/y", start, "seed=3"]
    (run / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    folder = export(run, tmp_path / "a")
    text = (folder / "README.md").read_text()
    assert "/home" not in text and "init_from=first seed=3" in text
    assert read_config(folder)["overrides"] == [root, start, "seed=3"]


def test_an_existing_folder_is_left_alone(run, tmp_path):
    (tmp_path / "a").mkdir()
    export(run, tmp_path / "a")  # an empty one is taken
    before = (tmp_path / "a" / CONFIG).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        export(run, tmp_path / "a")
    assert (tmp_path / "a" / CONFIG).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "no temporary folder stays"


def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch):
    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr("e3va_cli.export.adapter_folder.build_model_card", fails)
    with pytest.raises(UserError, match="disk full"):
        export(run, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_cut_file(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])
    assert WEIGHTS in refusal(folder) and "bytes instead of" in refusal(folder)
    (folder / WEIGHTS).write_bytes(data[:-100] + bytes(100))
    assert "checksum" in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert f"{WEIGHTS} is missing" in refusal(folder)


def test_another_file_in_place_of_it(folder):
    def pickled(content):
        torch.save({"a": torch.zeros(2)}, folder / "x")
        data = (folder / "x").read_bytes()
        (folder / WEIGHTS).write_bytes(data)
        import hashlib

        content["weights"].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    edit(folder, pickled)
    assert "not a safetensors file" in refusal(folder)


def test_no_configuration(folder):
    (folder / CONFIG).write_text("{")
    assert "not valid JSON" in refusal(folder)
    (folder / CONFIG).write_text('{"format": NaN}')
    assert "not valid JSON" in refusal(folder)
    (folder / CONFIG).write_text("[" * 100_000)
    assert "not valid JSON" in refusal(folder)
    (folder / CONFIG).write_text("[1]")
    assert "not an exported adapter" in refusal(folder)
    (folder / CONFIG).unlink()
    assert f"{CONFIG} is missing" in refusal(folder)


def test_an_edit_by_hand(folder):
    edit(folder, lambda c: c["classes"].__setitem__(0, "disc"))
    assert "changed after the export" in refusal(folder)


def setter(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        if value is None:
            del content[keys[-1]]
        else:
            content[keys[-1]] = value

    return change


def both(*keys, value):
    """Edit a part that stands twice."""

    def change(content):
        setter(*keys, value=value)(content)
        setter("config", *keys, value=value)(content)

    return change


FORGED = {
    "format_version 2": setter("format_version", value=2),
    "classes is missing": setter("classes", value=None),
    "more is unknown": setter("more", value=1),
    "classes[0] has the wrong type (int)": setter("classes", value=[1, 2, 3, 4, 5]),
    "category_ids must have one unique number": setter("category_ids", value=[1, 1, 2, 3, 4]),
    "backbone.fingerprint is not a SHA-256": setter("backbone", "fingerprint", value="x"),
    "normalisation.mean must have 3 numbers": setter("normalisation", "mean", value=[0.5]),
    "normalisation differs from that of": setter("normalisation", "mean", value=[0.5, 0.5, 0.5]),
    "precision is not one of": setter("weights", "precision", value="int4"),
    "adapter and config.adapter differ": setter("adapter", "rank", value=8),
    "weights with a wrong shape or dtype": both("adapter", "rank", value=8),
    "missing weights": both("head", "mask", "channels", value=[64, 64, 64]),
    "unexpected weights": both("head", "mask", "channels", value=[64]),
    "no model can be built from its configuration (TypeError": both("adapter", "rank", value=None),
    "config.head.box.nms_iou is missing": both("head", "box", "nms_iou", value=None),
    "config.dataset.max_size is missing": setter("config", "dataset", "max_size", value=None),
    "config.adapter: ": both("adapter", "rank", value="many"),
    "config.adapter has values of the wrong type": both("adapter", "rank", value="16"),
    "config.adapter.rank=-1: must be above 0": both("adapter", "rank", value=-1),
    "no such head": both("head", "name", value="detr"),
    "no such adapter": both("adapter", value={"name": "magic"}),
    "config.head: Key 'x'": both("head", "x", value=1),
    "config.seed has the wrong type": setter("config", "seed", value="0"),
    "config.trainer has the wrong type (list)": setter("config", "trainer", value=[1]),
    "config.extra is unknown": setter("config", "extra", value=1),
    "config.dataset.metric has an interpolation": setter("config", "dataset", "metric", value="${oc.env:HOME}"),
    "invalid architecture name": both("backbone", "timm_name", value="hf-hub:someone/something"),
    "model_args.checkpoint_path: must be a number": setter(
        "config", "backbone", "model_args", value={"checkpoint_path": "x"}
    ),
    "model_args.pretrained_cfg: must be a number": setter(
        "config", "backbone", "model_args", value={"pretrained_cfg": {"file": "x"}}
    ),
    "no model can be built from its configuration ": setter(
        "config", "backbone", "model_args", value={"num_heads": [0, 2, 4, 8]}
    ),
}


@pytest.mark.parametrize("says", FORGED)
def test_a_forged_configuration(folder, says):
    forge(folder, FORGED[says])
    assert says.strip() in refusal(folder)


def test_forged_weights(folder):
    forge(folder, lambda c: None, {"extractor.backbone.model.patch_embed.proj.bias": torch.zeros(32)})
    assert "unexpected weights: extractor.backbone" in refusal(folder)


def test_weights_of_another_kind(folder):
    forge(folder, lambda c: None, {"extractor.norms.0.weight": torch.zeros(32, dtype=torch.int64)})
    assert "weights with a wrong shape or dtype: extractor.norms.0.weight" in refusal(folder)


def test_forging_itself_is_accepted(folder):
    forge(folder, lambda c: c["versions"].update(timm="0"))
    assert read_checkpoint_or_adapter(str(folder), "checkpoint").metadata["classes"][0] == "circle"


def test_an_option_newer_than_the_run(folder):
    """One that the method can do without, as `activations`, which changes nothing but memory, or one of training."""

    def change(content):
        both("adapter", "activations", value=None)(content)
        del content["config"]["data"]["num_workers"]

    forge(folder, change)
    about = read_checkpoint_or_adapter(str(folder), "checkpoint").metadata
    assert "activations" not in about["adapter"]
    keys = {word.partition("=")[0] for word in overrides_of_config(about["config"])}
    assert keys >= {"adapter.rank", "data.batch_size", "trainer.limit_val_batches"}
    assert not keys & {"adapter.activations", "data.num_workers"}


def test_what_could_not_be_read_is_not_made(run, tmp_path):
    trained = read_checkpoint_or_adapter(str(run), "checkpoint")
    adapter_config = build_adapter_config(trained, build_trained_meta_model(trained), run)
    with pytest.raises(UserError, match="could not be read again"):
        write_adapter(tmp_path / "a", trained.state_dict, {**adapter_config, "classes": []}, "fp32")
    assert not list(tmp_path.iterdir())


def test_another_backbone_and_other_weights(exported):
    trained = read_checkpoint_or_adapter(str(exported), "checkpoint")
    own = trained.config.backbone
    with pytest.raises(UserError, match="trained on other weights of swin_nano"):
        check_backbone(trained, build_backbone(replace(own, seed=1))[1])
    with pytest.raises(UserError, match="trained on the backbone swin_nano, not on"):
        other = replace(own, name="other", timm_name="swin_small_patch4_window7_224")
        check_backbone(trained, build_backbone(other)[1])


def test_moved_weights_take_the_place_of_fetched_ones(exported, tmp_path):
    trained = read_checkpoint_or_adapter(str(exported), "checkpoint")
    trained.metadata["config"]["backbone"]["pretrained"] = True
    with pytest.raises(UserError, match="no such file"):
        build_trained_backbone(trained, weights=str(tmp_path / "none.pth"))


def test_results_are_those_of_the_state(tmp_path):
    assert read_metrics(tmp_path, 4) is None
    last = {"box": {"AP": 0.5, "AP50": 0.7, "per_class": {"a": 0.5}}}
    (tmp_path / "metrics.json").write_text(json.dumps(last))
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,loss,val/box_AP,val/box_AP50\n0,3,1.0,0.25,0.5\n0,5,1.0,,\n1,7,1.0,0.5,0.7\n"
    )
    assert read_metrics(tmp_path, 8) == last
    assert read_metrics(tmp_path, 4) == {"box": {"AP": 0.25, "AP50": 0.5}}
    assert read_metrics(tmp_path, 6) is None
    (tmp_path / "metrics.csv").write_text("epoch,step,val/mIoU\n0,3,0.25\n1,4,0.5\n")  # an epoch of one step
    assert read_metrics(tmp_path, 4) == {"mIoU": 0.25}
