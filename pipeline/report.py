"""`python -m pipeline.report RUN_FOLDER`: writes report.html of a finished run, one file that needs no network."""

from __future__ import annotations

import argparse
import sys

from pipeline.errors import RunError, UserError, fail
from pipeline.runs.run_folder import DATASET
from pipeline.storage import Folder

PROG = "python -m pipeline.report"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("run", metavar="RUN_FOLDER", help="folder or s3:// URI of a finished run")
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 written, 2 bad input."""
    run = Folder(build_parser(prog).parse_args(arguments).run)
    from pipeline.data.store import Store  # here, after the arguments: pyarrow and the page's readers
    from pipeline.runs.report_page import write_report

    try:
        if not run.exists(DATASET):
            raise UserError(f"{run} is not a run folder (no run.json): expected STORAGE/runs/NAME")
        record = run.read_json(DATASET)
        store = Store(Folder(record["dataset"]))
        if store.fingerprint != record["fingerprint"]:
            raise UserError(
                f"{store.folder} has fingerprint {store.fingerprint}, the run was trained on {record['fingerprint']}: "
                "restore that dataset"
            )
        write_report(run, store)
    except (UserError, RunError) as error:
        return fail(error, 2)
    print(f"report: {run}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
