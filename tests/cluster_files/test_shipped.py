"""The deployment files in cluster/ pass the checks that `make cluster-check` makes, and every check can fail."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import yaml

from tools import cluster_check
from tools.cluster_checks.text import PLACEHOLDERS, ROOT, VARIANTS

CLUSTER = ROOT / "cluster"
FILES = ["Dockerfile", "aws.yaml", "gcp.yaml", "kuberay-cluster.yaml", "kuberay-job.yaml", "compose.yaml", "slurm.sh"]
FILLED_IN = {
    "REPLACE_ME_REGISTRY": "registry.example.org/team",
    "REPLACE_ME_AMI": "ami-0123456789abcdef0",
    "REPLACE_ME_SECURITY_GROUP": "sg-0123456789abcdef0",
    "REPLACE_ME_SPOT_LABEL": "cloud.google.com/gke-spot",
    "REPLACE_ME_SPOT_VALUE": '"true"',
}


@functools.cache
def shipped(name: str) -> str:
    """A file as a user has filled it in."""
    text = (CLUSTER / name).read_text()
    return re.sub(r"REPLACE_ME_\w+", lambda found: FILLED_IN.get(found[0], "mine"), text)


def problems(text: str, name: str) -> list[str]:
    return list(cluster_check.problems(text, name))


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_file_has_no_problem_once_it_is_filled_in(name: str) -> None:
    assert problems(shipped(name), name) == []


@pytest.mark.parametrize("name", FILES)
def test_what_has_to_be_filled_in_is_told_with_the_command_that_finds_it(name: str) -> None:
    text = (CLUSTER / name).read_text()
    named = set(re.findall(r"REPLACE_ME_\w+", text)) - {"REPLACE_ME"}
    assert {p.split()[0] for p in problems(text, name)} == named <= set(PLACEHOLDERS)


def test_all_files_of_the_folder_are_checked() -> None:
    assert {p.name for p in CLUSTER.iterdir() if p.is_file()} == {*FILES, "README.md"}


# ---- each check can fail -----------------------------------------------------------------------------------------

BREAKS: list[tuple[str, str, str, str]] = [  # file, text, what replaces it, what the problem says
    # any file
    ("aws.yaml", "# A cluster on", "x: 0.0.0.0/0 # A cluster on", "lets in the whole internet"),
    ("aws.yaml", "--env RAY_AUTH_MODE=token", "--env RAY_AUTH_TOKEN=abc", "holds a secret's value"),
    ("aws.yaml", "us-west-2a", "AKIAABCDEFGHIJKLMNOP", "holds an access key"),
    ("slurm.sh", "set -euo pipefail", "x=0123456789abcdef0123456789abcdef0", "holds a hexadecimal token"),
    ("gcp.yaml", "distributed.spot_notice", "distributed.spot_notices", "python -m pipeline.distributed.spot_notices: no such module"),
    ("slurm.sh", "-m pipeline.train", "-m pipelin.train", "python -m pipelin.train: no such module"),
    ("gcp.yaml", "docs/guides/clusters.md", "docs/guides/cluster.md", "docs/guides/cluster.md: no such file"),
    ("kuberay-job.yaml", "baseline/sop_bninception", "baseline/sop_bninceptio", "did you mean the preset 'baseline/sop_bninception'"),
    ("kuberay-job.yaml", "runtime.gpus_per_worker", "runtime.gpus", "runtime.gpus"),
    # ray up
    ("aws.yaml", "max_workers: 12", "max_worker: 12", "Additional properties are not allowed ('max_worker'"),
    ("aws.yaml", "CPU: 6, mining: 1", "CPU: 6, mining: 0.5", "0.5 is not of type 'integer'"),
    ("aws.yaml", "head_node_type: head", "head_node_type: heads", "Ray refuses the file"),
    ("aws.yaml", "cache_stopped_nodes", "cache_stoped_nodes", "provider.cache_stoped_nodes: unknown to Ray; did you mean 'cache_stopped_nodes'?"),
    ("aws.yaml", "InstanceMarketOptions", "InstanceMarketOption", "InstanceMarketOption: unknown to EC2; did you mean 'InstanceMarketOptions'?"),
    ("aws.yaml", "InstanceMarketOptions", "InstanceMarketOption", "gpu_spot: the label ray.io/market-type has to say whether it is a spot node"),
    ("aws.yaml", "g6.2xlarge", "g6.2xlage", "gpu_spot.node_config.InstanceType 'g6.2xlage': unknown to EC2; did you mean 'g6.2xlarge'?"),
    ("aws.yaml", "VolumeSize: 200", "VolumeSize: big", "Ebs.VolumeSize: expected integer, got 'big'"),
    ("aws.yaml", "HttpTokens: required", "HttpTokens: require", "HttpTokens 'require': unknown to EC2"),
    ("aws.yaml", "      SecurityGroupIds: [sg-0123456789abcdef0]", "     ", "head.node_config.SecurityGroupIds is missing"),
    ("aws.yaml", "      ImageId: ami-0123456789abcdef0\n", "", "head.node_config.ImageId is missing"),
    ("aws.yaml", "--env RAY_AUTH_MODE=token", "--init", "RAY_AUTH_MODE is not token"),
    ("aws.yaml", "/home/raydml/token: cluster/token", "/home/raydml/other: cluster/token", "RAY_AUTH_TOKEN_PATH: expected a file below"),
    ("aws.yaml", "RAY_JOB_STOP_WAIT_TIME_S=120", "RAY_JOB_STOP_WAIT_TIME_S=3", "RAY_JOB_STOP_WAIT_TIME_S of the head is 3"),
    ("aws.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "dashboard-host 0.0.0.0: expected 127.0.0.1"),
    ("aws.yaml", "--cloud aws", "--cloud gcp", "spot nodes without a watcher"),
    ("aws.yaml", "raydml:0.1.0-cpu", "raydml:latest", "raydml:latest: expected"),
    ("aws.yaml", "raydml:0.1.0-cuda", "raydml:0.1.0-cpu", "gpu_spot: image registry.example.org/team/raydml:0.1.0-cpu: expected the variant cuda"),
    ("aws.yaml", "raydml:0.1.0-cpu", "ours:latest", "ours:latest: expected a tag with a version"),
    ("aws.yaml", "type: aws", "type: azure", "provider.type 'azure': expected one of aws, gcp"),
    ("gcp.yaml", "availability_zone", "availabilty_zone", "provider.availabilty_zone: unknown to Ray"),
    ("gcp.yaml", "provisioningModel: SPOT", "provisioningModel: SPOTS", "provisioningModel 'SPOTS': unknown to Compute Engine; did you mean 'SPOT'?"),
    ("gcp.yaml", "automaticRestart: false", "automaticRestart: no way", "automaticRestart: expected boolean"),
    ("gcp.yaml", "instanceTerminationAction", "instanceTerminateAction", "instanceTerminateAction: unknown to Compute Engine"),
    ("gcp.yaml", "diskSizeGb: 200", "diskSizeGB: 200", "diskSizeGB: unknown to Compute Engine; did you mean 'diskSizeGb'?"),
    ("gcp.yaml", "subnetworks/raydml", "subnetworks/default", "networkInterfaces: expected a subnetwork of your own"),
    ("gcp.yaml", "sourceImage:", "licenses: [a] #", "none has an initializeParams.sourceImage"),
    # Kubernetes
    ("kuberay-cluster.yaml", "idleTimeoutSeconds: 300", "idleTimeoutSecond: 300", "'idleTimeoutSecond' was unexpected"),
    ("kuberay-cluster.yaml", "version: v2", "version: v3", "'v3' is not one of"),
    ("kuberay-cluster.yaml", "authOptions: {mode: token}", "authOptions: {mode: disabled}", "authOptions.mode is not token"),
    ("kuberay-cluster.yaml", "rayVersion: 2.60.0", "rayVersion: 2.59.0", "Ray 2.59.0: expected <2.61,>=2.60"),
    ("kuberay-cluster.yaml", "apiVersion: ray.io/v1\n", "apiVersion: ray.io/v1alpha1\n", "apiVersion ray.io/v1alpha1"),
    ("kuberay-cluster.yaml", "runAsNonRoot: true", "runAsNonRot: true", "runAsNonRot"),
    ("kuberay-cluster.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "securityContext.runAsNonRoot is not true"),
    ("kuberay-cluster.yaml", "allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true", "allowPrivilegeEscalation is not false"),
    ("kuberay-cluster.yaml", "restartPolicy: Never", "restartPolicy: Always", "restartPolicy Always: expected Never"),
    ("kuberay-cluster.yaml", "dashboard-host: 127.0.0.1", "dashboard-host: 0.0.0.0", "dashboard-host 0.0.0.0"),
    ("kuberay-cluster.yaml", "{dashboard-host: 127.0.0.1}", "{}", "dashboard-host 0.0.0.0"),
    ("kuberay-cluster.yaml", "serviceType: ClusterIP", "serviceType: LoadBalancer", "offered outside Kubernetes"),
    ("kuberay-cluster.yaml", "NetworkPolicy", "NetworkPolic", "no NetworkPolicy"),
    ("kuberay-cluster.yaml", "policyTypes:", "policyType:", "policyType"),
    ("kuberay-cluster.yaml", "replicas: 0", "replicas: 9", "replicas 9 is not between"),
    ("kuberay-cluster.yaml", "enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false", "idle GPU pods would stay"),
    ("kuberay-cluster.yaml", "terminationGracePeriodSeconds: 120", "terminationGracePeriodSeconds: 60", "terminationGracePeriodSeconds 60: expected 110"),
    ("kuberay-cluster.yaml", "preStop", "postStart", "spot pods without a preStop hook"),
    ("kuberay-cluster.yaml", "raydml:0.1.0-cuda", "raydml:0.1.0-cpu", "gpu-spot: image registry.example.org/team/raydml:0.1.0-cpu: expected the variant cuda"),
    ("kuberay-cluster.yaml", "labels: {ray.io/market-type: on-demand}", "labels: {a: b}", "expected the label ray.io/market-type: on-demand"),
    ("kuberay-cluster.yaml", "{name: RAY_JOB_STOP_WAIT_TIME_S, ", "{name: WANDB_API_KEY, ", "the variable WANDB_API_KEY holds a secret's value"),
    ("kuberay-cluster.yaml", 'value: "120"', 'value: "3"', "RAY_JOB_STOP_WAIT_TIME_S of the head is 3"),
    ("kuberay-job.yaml", "shutdownAfterJobFinishes: true", "suspend: false", "its GPUs, would stay after the run"),
    ("kuberay-job.yaml", "  ttlSecondsAfterFinished: 300\n", "", "ttlSecondsAfterFinished is missing"),
    ("kuberay-job.yaml", "NetworkPolicy", "NetworkPolic", "dashboard-host 0.0.0.0"),
    # compose
    ("compose.yaml", "shm_size: 2gb", "shm_sizes: 2gb", "'shm_sizes' was unexpected"),
    ("compose.yaml", "127.0.0.1:8265:8265", "8265:8265", "port 8265:8265 is open to other machines"),
    ("compose.yaml", "motoserver/moto:5.2.5", "motoserver/moto:latest", "motoserver/moto:latest: expected a tag with a version"),
    ("compose.yaml", "RAY_AUTH_MODE: token", "RAY_AUTH_MODE: disabled", "head: RAY_AUTH_MODE is not token"),
    ("compose.yaml", "/run/secrets/ray_token", "/tmp/ray_token", "RAY_AUTH_TOKEN_PATH: expected a file below /run/secrets"),
    ("compose.yaml", 'RAY_JOB_STOP_WAIT_TIME_S: "120"', 'X: "1"', "RAY_JOB_STOP_WAIT_TIME_S of the head is None"),
    ("compose.yaml", "init: true", "privileged: true", "network_mode host and privileged are not expected"),
    ("compose.yaml", "user: ${RAYDML_USER:-1000:1000}", "user: root", "user root: expected an ordinary user"),
    ("compose.yaml", "${S3_SECRET_ACCESS_KEY:-any}", "letmein", "holds a secret's value"),
    # Slurm
    ("slurm.sh", "#SBATCH --exclusive\n", "", "--exclusive is missing"),
    ("slurm.sh", "export RAY_AUTH_MODE=token ", "export ", "RAY_AUTH_MODE=token is missing"),
    ("slurm.sh", "WAIT_TIMEOUT=300", "WAIT_TIMEOUT=30", "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"),
    ("slurm.sh", 'if [ ! -s "$RAYDML_RESULT" ]; then', "if false; then", "the status of the run is not checked"),
    ("slurm.sh", "umask 077", "umask 022", "umask 077 is missing"),
    ("slurm.sh", '--dashboard-host=127.0.0.1', "--dashboard-host=0.0.0.0", "dashboard-host 0.0.0.0"),
    ("slurm.sh", '"$RAYDML_HEAD"', "$RAYDML_HEAD", "shellcheck: "),
    ("slurm.sh", "\nfi\n", "\n", "syntax error"),
    # Dockerfile
    ("Dockerfile", "USER 1000:1000", "USER raydml", "USER raydml: expected an ordinary user by number"),
    ("Dockerfile", "USER 1000:1000\n", "", "USER root: expected an ordinary user"),
    ("Dockerfile", "RAY_AUTH_MODE=token ", "", "RAY_AUTH_MODE=token is missing"),
    ("Dockerfile", "rsync ", "", "rsync is not installed"),
    ("Dockerfile", "AS torch-cuda", "AS torch-gpu", "no stage torch-cuda"),
    ("Dockerfile", "RAY_VERSION=2.60.0", "RAY_VERSION=2.54.0", "Ray 2.54.0: expected"),
    ("Dockerfile", "COPY methods methods", "COPY docs docs", "COPY docs: not in the build context"),
    ("Dockerfile", "rm -rf /var/lib/apt/lists/*", "true", "hadolint: -:"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "says"), BREAKS, ids=lambda value: value[:40])
def test_a_mistake_is_found(name: str, old: str, new: str, says: str) -> None:
    text = shipped(name)
    assert old in text
    found = problems(text.replace(old, new), name)
    assert any(says in problem for problem in found), found


def test_a_head_on_a_spot_node_is_refused() -> None:
    config = yaml.safe_load(shipped("aws.yaml"))
    config["head_node_type"] = "gpu_spot"
    assert any("the head is a spot node" in problem for problem in problems(yaml.safe_dump(config), "x.yaml"))


def test_comments_are_not_checked_and_secrets_are_not_shown() -> None:
    text = shipped("compose.yaml")
    assert problems(f"# REPLACE_ME_AMI lets in 0.0.0.0/0\n{text}", "compose.yaml") == []
    (found,) = problems(text.replace("${S3_SECRET_ACCESS_KEY:-any}", "letmein"), "compose.yaml")
    assert "letmein" not in found and "line 16" in found


# ---- the command, and agreement between files --------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, missing, other = tmp_path / "mine.yaml", tmp_path / "missing.yaml", tmp_path / "other.yaml"
    mine.write_text(shipped("kuberay-cluster.yaml"))
    assert cluster_check.main([str(mine)]) == 0
    assert capsys.readouterr().out == f"{mine}: no problem found\n"
    assert cluster_check.main([str(mine), str(CLUSTER / "aws.yaml")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("REPLACE_ME_AMI has to be replaced" in line and "aws ec2 describe-images" in line for line in lines) == 1
    assert cluster_check.main([str(missing)]) == 2
    other.write_text("a: 1\n")
    assert cluster_check.main([str(other)]) == 2
    assert "expected a file for `ray up`" in capsys.readouterr().err
    other.write_text("a: [\n")
    assert cluster_check.main([str(other)]) == 2
    assert "is not YAML" in capsys.readouterr().err


@pytest.mark.parametrize("ignore", [".gitignore", ".rayignore", ".dockerignore"])
def test_the_token_is_neither_committed_nor_uploaded_nor_in_an_image(ignore: str) -> None:
    lines = (ROOT / ignore).read_text().splitlines()
    if ignore == ".dockerignore":
        assert lines[0] == "*" and not any("cluster" in line for line in lines)
    else:
        assert "/cluster/token/" in lines


def test_variants_of_the_image_are_those_of_the_dockerfile() -> None:
    assert set(re.findall(r"AS torch-(\w+)", shipped("Dockerfile"))) == set(VARIANTS)
    assert set(re.findall(r"VARIANT=(\w+)", shipped("Dockerfile"))) == set(VARIANTS)


def test_ray_is_never_started_open_in_the_documentation() -> None:
    """`ray start --head` starts without authentication where it finds no token."""
    blocks = [
        b
        for page in (ROOT / "docs").rglob("*.md")
        for b in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    starting = [block for block in blocks if "ray start --head" in block]
    assert starting and all("RAY_AUTH_MODE=token" in block.split("ray start --head")[0] for block in starting)


def test_images_of_a_users_own_are_accepted() -> None:
    assert problems(re.sub(r"raydml:0\.1\.0-\w+", "ours:7", shipped("aws.yaml")), "aws.yaml") == []
    assert problems(re.sub(r"raydml:0\.1\.0-\w+", "ours:7", shipped("kuberay-job.yaml")), "x.yaml") == []
