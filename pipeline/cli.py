"""`raydml COMMAND ...`: every command by one name; `raydml COMMAND --help` shows its arguments.

`raydml train ...` is `python -m pipeline.train ...`, and so on. Completion of commands, options and names in bash or zsh:
eval "$(register-python-argcomplete raydml)"
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys

from pipeline.errors import did_you_mean

PROG = "raydml"
COMMANDS = {  # name: module, purpose
    "train": ("pipeline.train", "one run, from a dataset to a report"),
    "prepare": ("pipeline.prepare", "write a dataset as a store"),
    "tune": ("pipeline.tune", "a search over methods and hyper-parameters, and its answer"),
    "doctor": ("pipeline.doctor", "everything that a run needs, checked before anything is spent"),
    "watch": ("pipeline.watch", "a run or a sweep while it runs, from another shell or machine"),
    "stop": ("pipeline.stop", "ask a run or a sweep to save and to end, from any machine that sees its storage"),
    "evaluate": ("pipeline.evaluate", "exact retrieval metrics of a run or of arrays; embeddings of a run's images"),
    "export": ("pipeline.export", "a trained model for other programs: safetensors, ONNX, torch.export, timm, the Hub"),
    "search": ("pipeline.search", "an index of images: build, query, add, remove"),
    "serve": ("pipeline.serve", "an index as an HTTP service, and a page to drop an image on"),
    "report": ("pipeline.report", "write report.html of a finished run"),
    "explore": ("pipeline.explore", "a map of a split's images and the classes that fail; TensorBoard's projector"),
    "list": (
        "pipeline.show_list",
        "names of presets, runs, sweeps, sweep files, datasets, methods, losses, miners or backbones",
    ),
    "config": ("pipeline.show_config", "a recipe with all keys, values and meanings; the JSON Schema of recipes"),
    "compare": ("pipeline.compare", "settings, figures and protocols of several runs, side by side"),
}


def build_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<10}{purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [--help] [--version] COMMAND ...",
        description=__doc__,
        epilog=f"commands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below, before its arguments")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit status: that of the command; 2 for an unknown command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "_ARGCOMPLETE" in os.environ:
        complete()
    if arguments and arguments[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[arguments[0]][0])  # only this one: the others would cost time
        return int(module.main(arguments[1:], prog=f"{PROG} {arguments[0]}"))
    parser = build_parser()
    options, _ = parser.parse_known_args(arguments)
    if options.command is not None:
        parser.error(f"unknown command {options.command!r}: {did_you_mean(options.command, COMMANDS)}")
    parser.parse_args(arguments)  # tells unknown options
    if not options.version:
        parser.error(f"expected a command: {', '.join(COMMANDS)}")
    print(f"{PROG} {importlib.metadata.version('raydml')}")
    return 0


def complete() -> None:
    """Answers a shell that completes the command line of its environment, and ends the process."""
    import argcomplete

    parser = argparse.ArgumentParser(prog=PROG)
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers()
    line = os.environ.get("COMP_LINE", "").split()
    for name, (module, purpose) in COMMANDS.items():
        if name in line:
            whole = importlib.import_module(module).build_parser(f"{PROG} {name}")
            commands.add_parser(name, help=purpose, parents=[whole], add_help=False)
        else:  # its module would cost time
            commands.add_parser(name, help=purpose)
    argcomplete.autocomplete(parser)


if __name__ == "__main__":
    sys.exit(main())
