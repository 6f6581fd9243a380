"""The paper's claims, compared with made-up results."""

from io import StringIO

import pytest
from rich.console import Console

from e3va_cli.commands import console
from e3va_cli.commands.memory_tables import print_claims_table
from e3va_cli.memory.result import Result, benchmark_json
from e3va_cli.paper.claims import BenchmarkRun, compare_with_paper
from e3va_cli.paper.published import COCO, VOC


def result(method, peak, time=None, pct=1.0, source="planned"):
    return Result(method, source, 1000, pct, peak, time, {"weights": 1.0})


def verdicts(*runs):
    return [claim.verdict for claim in compare_with_paper(list(runs), reserve_mib=1024)]


def coco(saved, **options):
    results = [result("full", 100.0, **options), result("e3va", 100.0 - saved, **options)]
    return BenchmarkRun("swin_b", "mask_rcnn", (800, 1333), results)


def voc(saved):
    return BenchmarkRun(
        "swin_l", "mask_rcnn", (600, 1000), [result("full", 200.0), result("e3va", 2 * (100.0 - saved))]
    )


def test_published_savings_average_to_the_abstracts():
    assert (COCO.saved_pct("e3va") + VOC.saved_pct("e3va")) / 2 == pytest.approx(62.2, abs=0.1)


def test_memory_claims_hold_or_do_not():
    assert verdicts(coco(60), voc(70))[:3] == ["holds", "holds", "holds"]
    assert verdicts(coco(55), voc(70))[:3] == ["does not hold", "holds", "holds"]
    assert verdicts(coco(56), voc(60))[:3] == ["holds", "does not hold", "does not hold"]
    assert verdicts(coco(60))[:3] == ["holds", "not measured", "not measured"]


def test_other_images_or_backbones_are_not_compared():
    small = BenchmarkRun("swin_b", "mask_rcnn", (512, 512), coco(10).results)
    other = BenchmarkRun("swin_nano", "mask_rcnn", (800, 1333), coco(10).results)
    assert verdicts(small)[:3] == verdicts(other)[:3] == ["not measured"] * 3
    assert set(verdicts(other)) == {"not measured"}


def test_only_measured_time_is_compared():
    def timed(seconds):
        return BenchmarkRun(
            "swin_b", "x", (512, 512), [result("full", 1.0, time=1.0), result("e3va", 1.0, time=seconds)]
        )

    assert verdicts(timed(0.73))[3] == "holds"
    assert verdicts(timed(0.75))[3] == "does not hold"
    assert verdicts(coco(60))[3] == "not measured"


def test_parameters():
    assert verdicts(coco(60, pct=1.4))[4] == "holds"
    assert verdicts(coco(60, pct=1.6))[4] == "does not hold"


def test_the_reserve_counts_on_the_card():
    def large(mib):
        return BenchmarkRun("swin_l", "mask_rcnn", (800, 1333), [result("e3va", mib)])

    assert verdicts(large(11264.0 - 1024))[5] == "holds"
    assert verdicts(large(11264.0 - 1023))[5] == "does not hold"
    assert verdicts(BenchmarkRun("swin_l", "retinanet", (800, 1333), [result("e3va", 1.0)]))[5] == "not measured"


def test_the_file_has_null_where_nothing_was_measured():
    out_of_memory = result("full", None)
    content = benchmark_json(
        {}, [out_of_memory, result("e3va", 10.0)], [claim.entry() for claim in compare_with_paper([], reserve_mib=0)]
    )
    assert [m["peak_memory_mib"] for m in content["methods"]] == [None, 10.0]
    assert [m["memory_saved_pct"] for m in content["methods"]] == [None, None]
    assert {c["verdict"] for c in content["claims"]} == {"not measured"}
    assert {c["found"] for c in content["claims"]} == {c["source"] for c in content["claims"]} == {None}


def test_claims_have_their_source(monkeypatch):
    claims = compare_with_paper([coco(60, source="measured"), voc(70)], reserve_mib=0)
    assert [claim.source for claim in claims] == ["measured", "planned", "measured and planned", None, "planned", None]
    shown = Console(width=100, file=StringIO())
    monkeypatch.setattr(console, "console", shown)
    print_claims_table(claims)
    assert " both " in shown.file.getvalue() and " measured " in shown.file.getvalue()
