"""`python -m tools.cluster_check FILE ...` (`make cluster-check FILE=...`): checks deployment files without a cloud.

Kinds are told by their content: files for `ray up`, Kubernetes files with a RayCluster or RayJob, compose files, Slurm scripts,
the Dockerfile. Every problem is a line; the exit status is 1 if there is one, 2 if a file cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from pipeline.errors import UserError, fail, joined_lines
from tools.cluster_checks import containers, kubernetes, ray_up, text


def problems(given: str, name: str) -> Iterator[str]:
    """Problems of a file.

    Args:
        given: Its text.
        name: Its name, by which scripts and Dockerfiles are told.

    Raises:
        UserError: It is of no kind that is known, or not YAML.
    """
    yield from text.every(given)
    if "Dockerfile" in Path(name).name:
        yield from containers.dockerfile(given)
        return
    if name.endswith(".sh"):
        yield from containers.slurm(given)
        return
    try:
        documents = [document for document in yaml.safe_load_all(given) if isinstance(document, dict)]
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {joined_lines(error)}") from error
    if any("apiVersion" in document for document in documents):
        yield from kubernetes.problems(documents)
    elif documents and "cluster_name" in documents[0]:
        yield from ray_up.problems(documents[0])
    elif documents and "services" in documents[0]:
        yield from containers.compose(documents[0])
    else:
        raise UserError(
            f"{name}: expected a file for `ray up` (cluster_name), Kubernetes (apiVersion) or compose (services), a Slurm script (.sh) "
            "or a Dockerfile"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.cluster_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    options = parser.parse_args(arguments)
    status = 0
    for name in options.files:
        try:
            found = list(dict.fromkeys(problems(Path(name).read_text(encoding="utf-8"), name)))
        except (UserError, OSError) as error:
            return fail(error, 2)
        print("\n".join(f"{name}: {problem}" for problem in found) or f"{name}: no problem found")
        status = max(status, int(bool(found)))
    return status


if __name__ == "__main__":
    sys.exit(main())
