"""The words after `e3va`. Torch is imported only when a command runs."""

from __future__ import annotations

import sys

from e3va_cli.utils.output import robust_output

COMMANDS = {
    "train": "Train a detector or segmenter on a frozen backbone.",
    "evaluate": "Measure a trained run or adapter on its own or other data.",
    "predict": "Run inference on images and save predictions.",
    "export-adapter": "Export adapter weights (a few MB).",
    "export": "Export the model to ONNX or torch.export.",
    "check-data": "Report every problem of a data set at once.",
    "benchmark-memory": "Plan or measure memory and time of tuning methods, and check the paper's claims.",
}
RENAMED = {"export-onnx": "export"}  # old names of commands

HELP = """e3va: fine-tune large frozen vision backbones for detection and segmentation with little memory.

Usage: e3va COMMAND [KEY=VALUE ...] [Hydra's options]

Commands:
{commands}

Options are Hydra overrides; `e3va COMMAND --help` lists them, `--cfg job` prints the resulting configuration,
`-m` runs one job for each value of a list. With no argument, `e3va train` trains the smallest backbone on
generated shapes, on any machine, in minutes.

Examples:
  e3va train
  e3va train dataset=coco dataset.root=DATA backbone=swin_t backbone.pretrained=true
  e3va check-data dataset=coco dataset.root=DATA
  e3va evaluate checkpoint=runs/RUN
  e3va predict checkpoint=runs/RUN input=IMAGES
  e3va export-adapter checkpoint=runs/RUN output=ADAPTER
  e3va export checkpoint=ADAPTER image_size=[512,512] output=model.onnx
"""


def help_text() -> str:
    """Return the text of `e3va --help`."""
    return HELP.format(commands="\n".join(f"  {name:<18} {text}" for name, text in COMMANDS.items()))


@robust_output()
def main() -> None:
    """Entry point of the `e3va` command."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
    elif words[0] in ("-V", "--version", "version"):
        from importlib.metadata import version

        print(f"e3va {version('e3va-cli')}")
    elif words[0] in COMMANDS:
        try:
            from e3va_cli.commands.app import run

            run(words[0])
        except KeyboardInterrupt:
            print("e3va: stopped by Ctrl-C", file=sys.stderr)
            sys.exit(130)  # a shell's code for it
    elif words[0] in RENAMED:
        print(f"e3va: error: {words[0]} is now called {RENAMED[words[0]]}", file=sys.stderr)
        sys.exit(2)
    else:
        from difflib import get_close_matches

        near = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean `e3va {near[0]}`?" if near else f"one of: {', '.join(COMMANDS)}"
        print(f"e3va: error: no command {words[0]!r}; {hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
