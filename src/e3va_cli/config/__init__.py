"""The typed schema of the configuration: the names and types that Hydra holds the YAML files of `conf/` to."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from e3va_cli.config import adapters, backbones, commands, datasets, heads, training
from e3va_cli.config.checks import NEEDED, problems

__all__ = ["NEEDED", "problems", "register_schemas"]

SCHEMAS: dict[str, dict[str, type]] = {
    "": {
        "train_schema": commands.TrainConfig,
        "evaluate_schema": commands.EvaluateConfig,
        "predict_schema": commands.PredictConfig,
        "export_adapter_schema": commands.ExportAdapterConfig,
        "export_onnx_schema": commands.ExportOnnxConfig,
        "check_data_schema": commands.CheckDataConfig,
        "benchmark_memory_schema": commands.BenchmarkMemoryConfig,
    },
    "backbone": {"swin_schema": backbones.BackboneConfig},
    "adapter": {
        "plain_schema": adapters.AdapterConfig,
        "e3va_schema": adapters.E3VAConfig,
        "adapter_schema": adapters.BottleneckConfig,
        "mona_schema": adapters.BottleneckConfig,
        "adaptformer_schema": adapters.AdaptFormerConfig,
        "lora_schema": adapters.LoRAConfig,
        "lorand_schema": adapters.LoRandConfig,
    },
    "head": {
        "mask_rcnn_schema": heads.MaskRCNNConfig,
        "cascade_mask_rcnn_schema": heads.CascadeMaskRCNNConfig,
        "retinanet_schema": heads.RetinaNetConfig,
        "upernet_schema": heads.UPerNetConfig,
    },
    "dataset": {
        "shapes_schema": datasets.ShapesConfig,
        "coco_schema": datasets.CocoConfig,
        "voc_schema": datasets.VocConfig,
        "ade20k_schema": datasets.Ade20kConfig,
    },
    "data": {"loader_schema": datasets.DataConfig},
    "optimizer": {"adamw_schema": training.OptimizerConfig},
    "schedule": {
        "multistep_schema": training.MultiStepConfig,
        "cosine_schema": training.CosineConfig,
        "poly_schema": training.PolyConfig,
    },
    "trainer": {"lightning_schema": training.TrainerConfig},
}


def register_schemas() -> None:
    """Tell Hydra the types that the YAML files are held to."""
    store = ConfigStore.instance()
    for group, nodes in SCHEMAS.items():
        for name, node in nodes.items():
            store.store(name=name, node=node, group=group or None)
