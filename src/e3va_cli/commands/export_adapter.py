"""`e3va export-adapter`."""

from __future__ import annotations

from pathlib import Path

from e3va_cli.commands.console import console
from e3va_cli.commands.run_summary import PLACEHOLDER, needed_to_evaluate, print_command
from e3va_cli.config.run_config import ExportAdapterConfig, RunConfig
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_checkpoint import build_trained_meta_model, read_checkpoint_or_adapter
from e3va_cli.export.adapter_folder import check_output_folder, write_adapter
from e3va_cli.export.config_builder import build_adapter_config
from e3va_cli.runs.folder import ADAPTER_CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_checkpoint
from e3va_cli.utils.environment import MIB
from e3va_cli.utils.text import pluralize

WHAT = {
    ADAPTER_WEIGHTS: "the trained weights",
    ADAPTER_CONFIG: "backbone, method, head, classes, results",
    ADAPTER_CARD: "model card",
}


def run(config: ExportAdapterConfig) -> None:
    """Export a run's adapter and print the files."""
    if not config.output:
        raise UserError("output: the name of a folder is needed")
    folder = Path(config.output)
    run_folder, _ = find_checkpoint(config.checkpoint, "checkpoint")
    check_output_folder(folder)
    checkpoint = read_checkpoint_or_adapter(config.checkpoint, "checkpoint")
    adapter_config = build_adapter_config(checkpoint, build_trained_meta_model(checkpoint), run_folder)
    write_adapter(folder, checkpoint.state_dict, adapter_config, config.precision)
    print_summary(folder, adapter_config["parameters"], checkpoint.config)


def print_summary(folder: Path, counts: dict[str, int], config: RunConfig) -> None:
    """Print files with sizes, number of weights, and the next commands."""
    console.print(f"Adapter: {folder} (MiB: 2^20 bytes)", markup=False)
    for name, what in WHAT.items():
        size = (folder / name).stat().st_size
        text = f"{size / MIB:,.2f} MiB" if size >= MIB / 100 else f"{size:,} bytes"
        console.print(f"  {name:<26} {text:>12}  {what}")
    console.print(
        f"{pluralize(counts['stored'], 'number')}: {counts['stored_on_backbone']:,} on the backbone, "
        f"{counts['stored_neck_and_head']:,} in neck and head"
    )
    console.print(f"\nNext ({PLACEHOLDER}):")
    print_command("evaluate", {"checkpoint": str(folder), **needed_to_evaluate(config)})
    print_command("predict", {"checkpoint": str(folder), "input": "IMAGES"})
