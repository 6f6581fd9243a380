import numpy as np
import pytest
from pycocotools import mask as coco_mask

from e3va_cli.data.formats.coco_segmentation import decode_counts, validate_rle


def encode(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def runs_of(mask: np.ndarray) -> list[int]:
    """The definition: lengths of equal pixels down the columns, the first run being of zeros."""
    pixels = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], pixels, [1 - pixels[-1]]])))
    return np.diff(np.concatenate([[0], edges])).tolist()


@pytest.mark.parametrize("density", [0.001, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (300, 500)])
def test_decode_counts_equals_the_definition(size: tuple[int, int], density: float) -> None:
    for seed in range(5):
        mask = (np.random.default_rng(seed).random(size) < density).astype(np.uint8)
        assert decode_counts(encode(mask)["counts"]).tolist() == runs_of(mask)
        assert validate_rle(encode(mask), *size) is None


def test_long_runs_need_many_characters() -> None:
    mask = np.zeros((3000, 4000), np.uint8)
    mask[:, 2000:] = 1
    mask[5, 17] = 1
    assert decode_counts(encode(mask)["counts"]).tolist() == runs_of(mask)


@pytest.mark.parametrize(
    "counts",
    [
        "",
        "04",
        "d0P",  # 20 zeros, and a run without an end
        "zzzz",
        "\x01",
        "ä",
        "P",
        "o" * 40 + "0",
        None,
        7,
        [],
        [3, 4],
        [21],
        [-1, 21],
        [1.5, 18.5],
        ["20"],
        [[20]],
        [[1], 2],
        [True],
        [2**63, 1],
    ],
)
def test_malformed_rle(counts: object) -> None:
    assert validate_rle({"size": [4, 5], "counts": counts}, 4, 5) == "malformed RLE"


def test_unterminated_run() -> None:
    assert validate_rle({"size": [1, 1], "counts": "1"}, 1, 1) is None
    assert validate_rle({"size": [1, 1], "counts": "1P"}, 1, 1) == "malformed RLE"


def test_size() -> None:
    assert validate_rle({"size": [4, 5], "counts": "d0"}, 4, 5) is None
    assert validate_rle({"size": [4, 5], "counts": [20]}, 4, 5) is None
    assert validate_rle({"size": [5, 4], "counts": [20]}, 4, 5) == "RLE of another size than the image"
    assert validate_rle({"size": [4.0, 5.0], "counts": [20]}, 4, 5) == "malformed RLE"
    assert validate_rle({"counts": [20]}, 4, 5) == "malformed RLE"
