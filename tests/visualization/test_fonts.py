import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from e3va_cli.visualization import fonts
from e3va_cli.visualization.confusion_matrix import plot_confusion_matrix
from e3va_cli.visualization.drawing import draw_detections
from e3va_cli.visualization.fonts import (
    DEJAVU,
    NAMELESS,
    TextLine,
    families_for,
    fit_text,
    fonts_for,
    legible_names,
    plot_labels,
)
from e3va_cli.visualization.precision_recall import PrecisionRecall, plot_precision_recall
from e3va_cli.visualization.segmentation import draw_segmentation

STIX = DEJAVU.with_name("STIXGeneral.ttf")  # which comes with matplotlib, as DejaVu does
NAMES = ["猫", "قطة سوداء", "कुत्ता", "🚗", "x" * 300, "", "a\nb\x07", "[red]", "$a$ $b$", "_b_", "e\u0301", "👩\u200d💻"]


def only_in(path):
    """A letter or symbol that a font has and DejaVu has not."""
    letters = fonts._characters(path) - fonts._characters(DEJAVU)
    return min(letter for letter in letters if unicodedata.category(letter) in ("Ll", "Lu", "So", "Sm"))


@pytest.fixture
def installed(monkeypatch):
    """Makes the fonts of the machine be those given."""

    def install(*paths):
        monkeypatch.setattr(fonts, "_installed", lambda: paths)
        monkeypatch.setattr(fonts, "_reported", set())
        fonts.fonts_for.cache_clear()
        fonts._legible_names.cache_clear()

    install()
    yield install
    monkeypatch.undo()
    fonts.fonts_for.cache_clear()
    fonts._legible_names.cache_clear()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("猫 cat", r"\u732b cat"),
        ("🚗 car", "(automobile) car"),
        ("قطة", "قطة"),
        ("e\u0301t\u00e9", "été"),
        ("a\nb\x07", "a b"),
        ("\u202eabc\u200b", "abc"),
        ("❤\ufe0f", "❤"),
        ("[red]", "[red]"),
        (" \t", NAMELESS),
        ("", NAMELESS),
    ],
)
def test_names_are_shown_as_the_fonts_allow(installed, name, shown):
    assert legible_names([name]) == [shown]


def test_characters_without_a_font_are_logged_once(installed, caplog):
    legible_names(["猫", "狗", "cat"])
    legible_names(["猫"])
    [message] = caplog.messages
    assert "狗 猫" in message and "fonts-noto-cjk" in message
    legible_names(["dog", "قطة"])
    assert len(caplog.messages) == 1


def test_an_installed_font_is_found(installed, caplog):
    letter = only_in(STIX)
    assert fonts_for(letter) == [DEJAVU]
    installed(Path("/no/such.ttf"), STIX)
    assert fonts_for(f"a{letter}") == [DEJAVU, STIX]
    assert legible_names([letter]) == [letter] and not caplog.messages
    assert families_for([letter, "a"]) == ["DejaVu Sans", "STIXGeneral"]


def rendered(line):
    canvas = Image.new("RGB", (300, 60))
    line.draw(ImageDraw.Draw(canvas), (10, 40), (255, 255, 255))
    return np.array(canvas)


def test_each_part_is_drawn_in_a_font_that_has_it(installed):
    installed(STIX)
    letter = only_in(STIX)
    drawn = rendered(TextLine(f"ა{letter}", 24))  # Georgian, which STIX has not
    expected = Image.new("RGB", (300, 60))
    draw, first = ImageDraw.Draw(expected), ImageFont.truetype(DEJAVU, 24)
    draw.text((10, 40), "ა", font=first, anchor="ls")
    after = 10 + first.getlength("ა")
    draw.text((after, 40), letter, font=ImageFont.truetype(STIX, 24), anchor="ls")
    assert drawn.any() and (drawn == np.array(expected)).all()


def test_a_line_is_inside_its_box(installed):
    line = TextLine("Ägypten, 猫", 24)
    rows, columns = rendered(line)[..., 0].nonzero()
    left, top, right, bottom = line.box
    assert 10 + left <= columns.min() <= columns.max() <= 10 + right
    assert 40 + top <= rows.min() <= rows.max() <= 40 + bottom


def test_long_names_are_truncated_but_not_their_scores(installed):
    line = fit_text("x" * 300, 20, 200, " 0.97")
    (text, _), *others = line.runs
    assert not others and text.endswith("xx... 0.97") and 150 < line.length <= 200


def test_names_in_any_script_are_drawn_without_warnings(installed, tmp_path, caplog):
    count = len(NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        boxes = torch.tensor([[5.0, 5, 60, 60]]).repeat(count, 1)
        image = torch.zeros(3, 100, 100, dtype=torch.uint8)
        labels = torch.arange(1, count + 1)
        assert draw_detections(image, boxes, labels, NAMES, scores=torch.ones(count)).any()
        assert draw_segmentation(image, labels.repeat_interleave(100)[None].repeat(100, 1)[:, ::12], NAMES).any()
        plot_confusion_matrix(np.eye(count, dtype=np.int64), NAMES, tmp_path / "confusion.png")
        curves = PrecisionRecall(NAMES, np.ones((count, 101)), [1.0] * count)
        plot_precision_recall({"box": curves, "mask": curves}, tmp_path / "curves.png")
    assert len(caplog.messages) == 1


def test_labels_are_no_mathematics_and_hide_no_line(installed):
    labels, families = plot_labels(["$a$", "_b_", "x" * 300])
    assert labels == [r"\$a\$", " _b_", "x" * 23 + "…"]
    assert families == ["DejaVu Sans"]
