"""`e3va evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from e3va_cli.commands.console import as_list, console, print_passes
from e3va_cli.commands.data_loading import shared_memory_note
from e3va_cli.commands.error_handling import evaluation_oom_message, friendly_errors
from e3va_cli.commands.image_grids import draw_predictions
from e3va_cli.commands.run_summary import hide_lightning_hints, print_results, print_warnings
from e3va_cli.config.run_config import EvaluateConfig
from e3va_cli.errors import UserError
from e3va_cli.evaluation import Results
from e3va_cli.evaluation.detection_limit import detection_limit_warning
from e3va_cli.inference.evaluation import EvalSpec, Evaluation, build_evaluation, group_by_image_size, read_eval_specs
from e3va_cli.inference.loaded_adapter import LoadedAdapter
from e3va_cli.inference.shared_backbone import group_by_input
from e3va_cli.runs.folder import METRICS, PREDICTIONS_PLOT
from e3va_cli.utils.files import make_subfolder, write_json


def run(config: EvaluateConfig, *others: EvaluateConfig, folder: Path) -> Results:
    """Evaluate checkpoints on validation images, and return the results of each by name.

    Args:
        config: of the first checkpoint.
        others: of further checkpoints.
        folder: for the outputs.
    """
    hide_lightning_hints()
    if config.trainer.limit_val_batches == 0:
        raise UserError("trainer.limit_val_batches=0: nothing to measure; give a number of batches, or null for all")
    paths = as_list(config.checkpoint)
    with friendly_errors(folder, evaluation_oom_message):
        return measure(read_eval_specs(paths, [config, *others]), folder)


def measure(specs: list[EvalSpec], folder: Path) -> Results:
    """Evaluate adapters, those of one image size together, and print the results."""
    files: dict[str, dict[str, str]] = {}
    results: Results = {one.name: None for one in specs}  # in this order
    limits: list[str | None] = []
    for group in group_by_image_size(specs):
        evaluation = build_evaluation(group, folder)
        trainer = evaluation.run.trainer
        if trainer.is_global_zero and len(specs) > 1:
            print_passes(group_by_input(evaluation.adapters))
        if trainer.is_global_zero:
            print_warnings([shared_memory_note(group[0].config, evaluates=True)])
        trainer.validate(evaluation.run.lightning_module, evaluation.run.data, verbose=False)
        if trainer.is_global_zero:
            results |= evaluation.results
            places = {one.name: folder if len(specs) == 1 else folder / one.name for one in evaluation.adapters}
            files |= {one.name: save(evaluation, one, places[one.name]) for one in evaluation.adapters}
            limits += [detection_limit_warning(evaluation.run.val, one.config.head) for one in evaluation.adapters]
    if trainer.is_global_zero:
        report(results, files, folder, limits)
    return results


def save(evaluation: Evaluation, adapter: LoadedAdapter, folder: Path) -> dict[str, str]:
    """Write the files of one adapter's evaluation, and return a description of each by file name."""
    make_subfolder(folder)
    evaluator, val = evaluation.evaluators[adapter.name], evaluation.run.val
    write_json(folder / METRICS, evaluation.results[adapter.name])  # of one alone, over what Lightning's callback wrote
    files = {METRICS: "all of these results", **evaluator.save(folder)}
    model = adapter.model.to(evaluation.run.trainer.strategy.root_device)  # from which Lightning has moved it
    if draw_predictions(model, val, evaluator.num_images, adapter.config.num_visualizations, folder / PREDICTIONS_PLOT):
        files[PREDICTIONS_PLOT] = "validation images with predictions"
    return files


def report(results: Results, files: dict[str, dict[str, str]], folder: Path, notes: Sequence[str | None] = ()) -> None:
    """Print results, notes and outputs; write the results of several checkpoints to one file."""
    if len(results) == 1:
        (name,) = results
        print_results(results[name])
        lines = files[name]
    else:
        print_results(side_by_side(results))
        write_json(folder / METRICS, results)
        lines = {METRICS: "all of these results", **{f"{name}/": ", ".join(files[name]) for name in results}}
    print_warnings(notes)
    console.print(f"\nEvaluation: {folder}", markup=False)
    for name, what in lines.items():
        console.print(f"  {name:<22} {what}", markup=False)


def side_by_side(results: Results) -> Results:
    """Return the results of several checkpoints as rows of one table."""
    rows: Results = {}
    for name, of_one in results.items():
        rows |= {name: of_one} if "per_class" in of_one else {f"{name}, {kind}": of_one[kind] for kind in of_one}
    return rows
