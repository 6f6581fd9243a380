"""The command in a separate process, and the files it writes."""

import json

import pytest
from PIL import Image

from e3va_cli.commands import benchmark_memory
from e3va_cli.config.composition import load_config, validate_overrides
from e3va_cli.errors import UserError
from e3va_cli.memory.result import Result
from e3va_cli.paper.claims import compare_with_paper

SMALL = ["backbone=swin_nano", "head=mask_rcnn_nano", "image_size=[96,128]", "data.batch_size=1", "hydra.run.dir=out"]
METHOD_KEYS = {
    "method",
    "source",
    "trainable_params",
    "trainable_pct",
    "peak_memory_mib",
    "memory_saved_pct",
    "step_time_s",
    "time_saved_pct",
    "memory_by_kind_mib",
}


def test_estimated(e3va, tmp_path):
    options = [
        "measure=false",
        "methods=[full,e3va]",
        "budget=154MiB",
        "reserve_mib=0",
        "adapter.rank=4",
        "claims=true",
    ]
    done = e3va("benchmark-memory", *SMALL, *options)
    content = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert set(content) == {"settings", "methods", "claims"}
    assert [m["method"] for m in content["methods"]] == ["full", "e3va"]
    for method in content["methods"]:
        assert set(method) == METHOD_KEYS
        assert method["source"] == "planned" and method["step_time_s"] is None
        total = sum(method["memory_by_kind_mib"].values())
        assert abs(total - method["peak_memory_mib"]) < 0.01
    full, ours = content["methods"]
    assert full["memory_saved_pct"] == 0 < ours["memory_saved_pct"]
    assert all(set(c) == {"claim", "published", "found", "verdict", "source"} for c in content["claims"])
    assert {c["verdict"] for c in content["claims"]} == {"not measured"}  # the paper claims nothing of this backbone
    details = json.loads((tmp_path / "out" / "details.json").read_text())["methods"]
    assert details["e3va"]["largest_batch_size"] > details["full"]["largest_batch_size"] > 0
    assert Image.open(tmp_path / "out" / "memory.png").size == (1920, 1080)
    assert "adapter=e3va data.batch_size=" in done.stdout
    assert "without GPU" in done.stdout


def test_measured_on_the_cpu(e3va, tmp_path):
    options = ["measure=true", "trainer.accelerator=cpu", "methods=[e3va]", "warmup=0", "repeats=2"]
    e3va("benchmark-memory", *SMALL, *options)
    content = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    (ours,) = content["methods"]
    assert content["claims"] == []
    (details,) = json.loads((tmp_path / "out" / "details.json").read_text())["methods"].values()
    assert ours["source"] == "measured" and ours["step_time_s"] > 0
    assert abs(ours["peak_memory_mib"] / details["planned_peak_memory_mib"] - 1) < 0.05
    assert len(details["step_times_s"]) == 2
    assert details["regions"] == details["planned_regions"]


def test_print_results_of_a_method_that_did_not_fit(tmp_path, capsys):
    failed = Result("full", "measured", 1, 1.0, None, None, {}, {"error": "[/x] gave out", "operations_tflop": 1.0})
    benchmark_memory.print_results(
        load_config("benchmark_memory", ["backbone=swin_nano"], complete=False),
        None,
        [failed],
        compare_with_paper([], reserve_mib=0),
        None,
        tmp_path,
    )
    out = capsys.readouterr().out
    assert "full: [/x] gave out" in out and "memory.png" not in out, "no plot"


def test_claims_are_compared_when_asked_and_in_the_papers_experiments():
    compares = benchmark_memory.compares_with_paper
    assert compares(True, []) and compares(None, ["experiment=voc_retinanet_swin_l"])
    assert not compares(None, ["backbone=swin_b"]) and not compares(False, ["experiment=voc_retinanet_swin_l"])


def test_unknown_method(e3va):
    done = e3va("benchmark-memory", *SMALL, "methods=[full,loar]", expect=2)
    assert "did you mean lora" in done.stderr


def test_invalid_options_are_named_and_no_data_is_required():
    with pytest.raises(UserError) as refused:
        validate_overrides("benchmark_memory", ["measure=perhaps", "image_size=[5]", "dataset=coco"])
    assert [m.partition("=")[0] for m in refused.value.messages] == ["measure", "image_size"]
