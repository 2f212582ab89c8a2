"""Checks of any deployment file's text: what has to be filled in, open addresses, secrets, and names of things of this tree."""

from __future__ import annotations

import importlib.util
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from pipeline.errors import close_names

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VARIANTS = ("cpu", "cuda")  # stages torch-cpu and torch-cuda of cluster/Dockerfile
STOP_WAIT_S = 60  # a checkpoint of a large network to object storage

AMI = (
    "aws ec2 describe-images --owners amazon --region REGION --filters "
    "'Name=name,Values=Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04) *' "
    "--query 'sort_by(Images, &CreationDate)[-1].ImageId' --output text"
)
PLACEHOLDERS = {  # what each stands for, and the command that finds it
    "REPLACE_ME_REGISTRY": "the registry that holds your image: docker build -f cluster/Dockerfile -t REGISTRY/raydml:VERSION-cpu . && docker push REGISTRY/raydml:VERSION-cpu",
    "REPLACE_ME_AMI": f"a machine image with NVIDIA's driver and Docker: {AMI}",
    "REPLACE_ME_SECURITY_GROUP": "a security group that lets in your own addresses only: aws ec2 create-security-group (docs/guides/clusters.md)",
    "REPLACE_ME_PROJECT": "your project: gcloud config get-value project",
    "REPLACE_ME_IMAGE_FAMILY": "an Ubuntu image with NVIDIA's driver and Docker: gcloud compute images list --project deeplearning-platform-release --no-standard-images --format 'value(family)'",
    "REPLACE_ME_SPOT_LABEL": "the label of spot nodes, eks.amazonaws.com/capacityType or cloud.google.com/gke-spot: kubectl get nodes --show-labels",
    "REPLACE_ME_SPOT_VALUE": 'its value, SPOT or "true": kubectl get nodes --show-labels',
    "REPLACE_ME_OPERATOR_NAMESPACE": "where the KubeRay operator runs: kubectl get pods --all-namespaces -l app.kubernetes.io/name=kuberay-operator",
    "REPLACE_ME_BUCKET": "your bucket: aws s3 ls",
}
SECRET_NAME = r"[A-Za-z0-9_]*(?:TOKEN|SECRET|SECRET_ACCESS_KEY|PASSWORD|API_KEY)"
SECRETS = {
    rf"(?<![\w/{{]){SECRET_NAME}['\"]?\s*[:=]\s*['\"]?(?![$'\"\s{{\[]|$)[^\s,}}]+": "a secret's value",
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b": "an access key",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----": "a private key",
    r"\b[0-9a-f]{32,}\b": "a hexadecimal token",
}
OPEN = re.compile(r"0\.0\.0\.0/0|::/0")


def without_comments(text: str) -> str:
    """The text without comments of YAML, shell or Dockerfile; `#` within a word or a quoted string stays."""
    return re.sub(r"(?m)(^|(?<=\s))#(?!SBATCH)[^\n'\"]*$", "", text)


def placeholders(text: str) -> Iterator[str]:
    """Lines for what has to be filled in."""
    for name in dict.fromkeys(re.findall(r"REPLACE_ME_\w+", without_comments(text))):
        yield f"{name} has to be replaced by {PLACEHOLDERS.get(name, 'a value of your own')}"


def open_addresses(text: str) -> Iterator[str]:
    for found in dict.fromkeys(OPEN.findall(without_comments(text))):
        yield f"{found} lets in the whole internet: expected a range of your own, such as 203.0.113.7/32"


def secrets(text: str) -> Iterator[str]:
    """Lines for literal secrets; the secrets themselves are not shown."""
    for number, line in enumerate(without_comments(text).splitlines(), 1):
        for pattern, what in SECRETS.items():
            if re.search(pattern, line):
                yield f"line {number} holds {what}: expected a file or a variable, named here, that brings it"
                break


def modules(text: str) -> Iterator[str]:
    """Lines for `python -m` of modules of this program that do not exist; those of other packages are the user's."""
    for name in dict.fromkeys(re.findall(r"-m[,\s]+([a-z_][\w.]*)", without_comments(text))):
        if close_names(name.split(".")[0], ["pipeline"]) and _missing(name):
            yield f"python -m {name}: no such module here"


def _missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True


def recipes(text: str) -> Iterator[str]:
    """Lines for presets that do not exist and settings that no recipe takes, behind `-m pipeline.train`."""
    from pipeline.errors import UserError
    from pipeline.recipes import load_config

    joined = re.sub(r"\n\s+(?=--)", " ", without_comments(text))  # a folded text of YAML
    for words in re.findall(r"-m pipeline\.train ([^\n'\"$]+)", joined):
        recipe, *rest = words.split()
        settings = [value for flag, value in itertools.pairwise(rest) if flag == "--set"]
        if recipe.endswith(".yaml"):
            continue
        try:
            load_config(recipe, settings)
        except UserError as error:
            yield f"python -m pipeline.train {recipe}: {error}"


def paths(text: str) -> Iterator[str]:
    """Lines for files of this tree that are named and do not exist; `cluster/token` is the user's."""
    for path in dict.fromkeys(re.findall(r"(?<![\w/.-])((?:cluster|docs|pipeline|tools)/[\w./-]*\w)", text)):
        if not path.startswith("cluster/token") and not (ROOT / path).exists():
            yield f"{path}: no such file here"


def image(name: Any, gpu: bool = False) -> Iterator[str]:
    """Lines for an image without a version, or one named raydml that cluster/Dockerfile does not make.

    Args:
        name: With registry and tag.
        gpu: Whether it is for a node with GPUs.
    """
    last = str(name).rsplit("/", 1)[-1]
    made = [f"raydml:{PROJECT['version']}-{variant}" for variant in VARIANTS]
    if not last.startswith("raydml:"):  # an image of the user's own
        if last.endswith(":latest") or not re.search(r":.|@sha256:", last):
            yield f"image {name}: expected a tag with a version, so that all nodes have the same one"
    elif last not in made:
        yield f"image {name}: expected .../{' or .../'.join(made)}, which cluster/Dockerfile makes"
    elif gpu and not last.endswith("-cuda"):
        yield f"image {name}: expected the variant cuda on nodes with GPUs"


def ray_version(version: Any) -> Iterator[str]:
    wanted = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray")
    if not wanted.specifier.contains(str(version)):
        yield f"Ray {version}: expected {wanted.specifier}, as in pyproject.toml"


def stop_wait(seconds: Any) -> Iterator[str]:
    """Lines for a head that kills a stopped job before it has saved a checkpoint."""
    if seconds is None or not str(seconds).isdigit() or int(seconds) < STOP_WAIT_S:
        yield f"RAY_JOB_STOP_WAIT_TIME_S of the head is {seconds}: expected {STOP_WAIT_S} or more, for a last checkpoint after `ray job stop`"


def dashboard(host: Any) -> Iterator[str]:
    if host not in ("127.0.0.1", "localhost", None):
        yield f"dashboard-host {host}: expected 127.0.0.1; reach it through ssh"


def every(text: str) -> Iterator[str]:
    """All checks of a text."""
    for check in (placeholders, open_addresses, secrets, modules, recipes, paths):
        yield from check(text)
