import io

from rich.console import Console

from e3va_cli.commands import report


def test_no_name_is_cut_in_a_narrow_terminal(monkeypatch):
    console = Console(width=80, soft_wrap=True, file=io.StringIO())
    monkeypatch.setattr(report, "console", console)
    of_one = {"AP": 0.5, "AP50": 1.0, "per_class": {"a_rather_long_name_of_a_class": 0.5}}
    report.print_results({f"adapter_{number}, {kind}": of_one for number in range(4) for kind in ("box", "mask")})
    text = console.file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text and "100.0" in text
    edge = "\N{BOX DRAWINGS LIGHT VERTICAL}"
    names = [line.split(edge)[1].strip() for line in text.splitlines() if line.startswith(edge)]
    assert "a_rather_long_name_of_a_class" in "".join(names)
    assert max(map(len, text.splitlines())) <= 80
