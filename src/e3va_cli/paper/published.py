"""The paper's results (arXiv 2306.09729), from the tables of V-PETL Bench (README, lines 461-496).

Batch size, precision and GPU of the memory columns are not published, so only savings against full fine-tuning are
compared.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMORY_SAVED_PCT = 62.2  # of E3VA against full fine-tuning, mean of the two settings
TIME_SAVED_PCT = 26.2  # of training time
TRAINABLE_PCT = 1.5  # of the backbone's parameters, at most
CARD_MIB = 11 * 1024  # of a GTX 1080 Ti, on which Swin-L Cascade Mask R-CNN trains


@dataclass(frozen=True)
class PublishedSetting:
    """A setting of the paper's memory tables.

    Attributes:
        experiment: our `experiment=`.
        backbone, head: our names.
        title: printed name.
        image_size: maximum height and width, in pixels.
        methods: trainable backbone parameters in millions and memory in MB, by method.
    """

    experiment: str
    backbone: str
    head: str
    title: str
    image_size: tuple[int, int]
    methods: dict[str, tuple[float, float]]

    def saved_pct(self, method: str) -> float | None:
        """Return the memory saved against full fine-tuning in percent, None for an unpublished method."""
        if method not in self.methods:
            return None
        return 100 * (1 - self.methods[method][1] / self.methods["full"][1])


COCO = PublishedSetting(
    experiment="coco_cascade_swin_b",
    backbone="swin_b",
    head="cascade_mask_rcnn",
    title="COCO, Cascade Mask R-CNN, Swin-B",
    image_size=(800, 1333),
    methods={
        "full": (86.75, 17061),
        "frozen": (0.0, 7137),
        "bitfit": (0.20, 13657),
        "ln_tune": (0.06, 12831),
        "partial_1": (12.60, 7301),
        "adapter": (3.11, 12557),
        "lora": (3.03, 11975),
        "adaptformer": (3.11, 13186),
        "lorand": (1.20, 13598),
        "e3va": (1.20, 7639),
    },
)
VOC = PublishedSetting(
    experiment="voc_retinanet_swin_l",
    backbone="swin_l",
    head="retinanet",
    title="Pascal VOC, RetinaNet, Swin-L",
    image_size=(600, 1000),
    methods={
        "full": (198.58, 15679),
        "frozen": (0.0, 3967),
        "bitfit": (0.30, 10861),
        "ln_tune": (0.09, 10123),
        "partial_1": (28.34, 3943),
        "adapter": (4.66, 10793),
        "lora": (4.57, 10127),
        "adaptformer": (4.66, 11036),
        "lorand": (1.31, 11572),
        "e3va": (1.79, 4819),
    },
)
SETTINGS = (COCO, VOC)
ACCURACY: dict[str, dict[str, dict[str, float]]] = {  # percent, by experiment, metric and method
    "coco_cascade_swin_b": {
        "box_AP": {
            "full": 51.9,
            "frozen": 43.5,
            "bitfit": 47.9,
            "ln_tune": 48.0,
            "partial_1": 49.2,
            "adapter": 50.9,
            "lora": 51.2,
            "adaptformer": 51.4,
            "lorand": 51.0,
            "e3va": 50.5,
        },
        "mask_AP": {
            "full": 45.0,
            "frozen": 38.6,
            "bitfit": 41.9,
            "ln_tune": 41.4,
            "partial_1": 42.8,
            "adapter": 43.8,
            "lora": 44.3,
            "adaptformer": 44.5,
            "lorand": 43.9,
            "e3va": 43.8,
        },
    },
    "voc_retinanet_swin_l": {
        "box_AP50": {  # printed as AP
            "full": 83.5,
            "frozen": 83.6,
            "bitfit": 85.7,
            "ln_tune": 85.8,
            "partial_1": 85.4,
            "adapter": 87.1,
            "lora": 87.5,
            "adaptformer": 87.3,
            "lorand": 86.8,
            "e3va": 86.5,
        },
    },
    "ade20k_upernet_swin_l": {
        "mIoU": {
            "full": 52.10,
            "frozen": 46.84,
            "bitfit": 48.37,
            "ln_tune": 47.98,
            "partial_1": 47.44,
            "adapter": 50.78,
            "lora": 50.34,
            "adaptformer": 50.83,
            "lorand": 50.76,
            "e3va": 49.64,
        },
    },
}
EXPERIMENTS = (*ACCURACY, "coco_cascade_swin_l")  # of conf/experiment/, with the paper's settings


def published_setting(backbone: str) -> PublishedSetting | None:
    """Return the published setting with this backbone."""
    return next((s for s in SETTINGS if s.backbone == backbone), None)
