"""`python -m pipeline.export RUN --to FOLDER --format onnx`: a trained model for other programs.

    python -m pipeline.export emoji --to out                                a folder that `raydml.load` reads, without the run
    python -m pipeline.export emoji --to out --format onnx --preprocessing  uint8 images of any size in, embeddings out
    python -m pipeline.export emoji --to out --format onnx --int8           and a network of int8 weights, with what it costs
    python -m pipeline.export emoji --to out --format torch_export          a program of torch.export
    python -m pipeline.export emoji --to out --format timm                  the backbone, for timm.create_model
    python -m pipeline.export emoji --to out --push-to-hub OWNER/NAME       and on the Hugging Face Hub, with the token HF_TOKEN

Every format is compared with the trained model, and nothing is written if it computes something else.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.errors import RunError, UserError, fail

PROG = "python -m pipeline.export"
FORMATS = ("safetensors", "onnx", "torch_export", "timm")


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run by name, folder or s3:// URI, an exported folder, or hf://OWNER/NAME"
    )
    parser.add_argument("--to", required=True, metavar="FOLDER", help="an empty or new folder, local or s3://")
    parser.add_argument("--format", choices=FORMATS, default="safetensors", help="(default: safetensors)")
    parser.add_argument(
        "--checkpoint", help="of a run: best, last, or a step (default: the run's evaluation.checkpoint)"
    )
    parser.add_argument(
        "--preprocessing",
        action="store_true",
        help="with onnx and torch_export: resize and centre crop inside the network, which then takes uint8 images of any size",
    )
    parser.add_argument(
        "--image-size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="with --preprocessing: the size of all images, for runtimes without free axes (default: any)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="with onnx: a second network with int8 weights (dynamic quantisation), measured on the test images beside the first",
    )
    parser.add_argument("--data", metavar="DATASET", help="with --int8: another dataset whose test images are measured")
    parser.add_argument(
        "--licence", "--license", default="unknown", metavar="ID", help="of the model card, such as mit or cc-by-nc-4.0"
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the folder to the Hugging Face Hub as well, with the token HF_TOKEN",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push-to-hub: a repository that is made is private"
    )
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 written, 2 bad input or a network that cannot be exported, 130 interrupted."""
    options = build_parser(prog).parse_args(arguments)
    try:
        _export(options)
    except (UserError, RunError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _export(options: argparse.Namespace) -> None:
    from pipeline.storage import Folder  # here and below: after the arguments, which need none of it

    if options.private and not options.push_to_hub:
        raise UserError("--private goes with --push-to-hub")
    target = Folder(options.to)
    if target.names():  # before PyTorch is loaded
        raise UserError(f"{target} is not empty: choose another folder, or remove it")
    from pipeline.exporting.export_model import ExportOptions, export_model
    from pipeline.inference.load_model import load_model
    from pipeline.runs.run_folder import DATASET

    model = load_model(options.run, options.checkpoint, "cpu")
    source = Folder(model.source) if not model.source.startswith("hf://") else None
    record = source.read_json(DATASET) if source is not None and source.exists(DATASET) else {}
    if options.checkpoint not in (None, model.settings.evaluation.checkpoint):
        model.figures = {}  # they are of the checkpoint that the run reports
    asked = ExportOptions(
        format=options.format,
        preprocessing=options.preprocessing,
        image_size=tuple(options.image_size) if options.image_size else None,
        int8=options.int8,
        data=options.data,
        trained_on=record.get("dataset"),
        licence=options.licence,
        repository=options.push_to_hub,
        private=options.private,
    )
    export_model(model, target, asked, lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
