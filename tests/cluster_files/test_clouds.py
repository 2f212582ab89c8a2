"""What Ray asks the clouds for with the shipped files, by Ray's own code against a simulated EC2 (moto) and Compute Engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest
import yaml

from tests.cluster_files.test_shipped import shipped

REGION = "us-west-2"


@pytest.fixture
def ec2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A simulated account, with what the guide makes in it: a security group and two instance profiles."""
    from ray.autoscaler._private.aws import config, utils

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair that it makes
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "simulated")
    with moto.mock_aws():
        for cached in (utils.resource_cache, utils.client_cache, config._get_subnets_or_die):
            cached.cache_clear()
        iam = boto3.client("iam")
        for profile in ("raydml-head", "raydml-worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        yield boto3.client("ec2", REGION)
    for cached in (utils.resource_cache, utils.client_cache, config._get_subnets_or_die):
        cached.cache_clear()


def prepared(ec2: Any) -> dict[str, Any]:
    """The shipped file, filled in with ids of the simulated account."""
    from ray.autoscaler._private.util import prepare_config

    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="mine", Description="ours", VpcId=vpc)["GroupId"]
    text = shipped("aws.yaml").replace("sg-0123456789abcdef0", group)
    text = text.replace("ami-0123456789abcdef0", ec2.describe_images()["Images"][0]["ImageId"])
    return dict(prepare_config(yaml.safe_load(text)))


def open_to_the_world(ec2: Any) -> list[str]:
    """Names of groups that let in any address."""
    groups = ec2.describe_security_groups()["SecurityGroups"]
    return [
        g["GroupName"]
        for g in groups
        for rule in g["IpPermissions"]
        for r in rule["IpRanges"]
        if r["CidrIp"] == "0.0.0.0/0"
    ]


def test_no_port_is_opened_to_the_world(ec2: Any) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws

    config = bootstrap_aws(prepared(ec2))
    assert open_to_the_world(ec2) == []
    groups = {tuple(node["node_config"]["SecurityGroupIds"]) for node in config["available_node_types"].values()}
    assert len(groups) == 1


def test_without_security_group_ids_ray_opens_port_22(ec2: Any) -> None:
    """Why the check asks for SecurityGroupIds: rules of provider.security_group are added to Ray's own, not put in their place."""
    from ray.autoscaler._private.aws.config import bootstrap_aws

    config = prepared(ec2)
    for node in config["available_node_types"].values():
        del node["node_config"]["SecurityGroupIds"]
    own = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "203.0.113.7/32"}]}
    config["provider"]["security_group"] = {"GroupName": "own", "IpPermissions": [own]}
    bootstrap_aws(config)
    assert open_to_the_world(ec2) == ["own"]


def test_gpu_nodes_are_spot_instances_with_imdsv2_and_encrypted_disks(
    ec2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = bootstrap_aws(prepared(ec2))
    asked: list[dict[str, Any]] = []
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    launch = provider.ec2_fail_fast.create_instances
    monkeypatch.setattr(
        provider.ec2_fail_fast, "create_instances", lambda **given: asked.append(given) or launch(**given)
    )
    for name, node in config["available_node_types"].items():
        provider.create_node(copy.deepcopy(node["node_config"]), {"ray-user-node-type": name}, 1)
    assert [given.get("InstanceMarketOptions", {}).get("MarketType") for given in asked] == [None, None, "spot"]
    assert [given["IamInstanceProfile"]["Name"] for given in asked] == ["raydml-head", "raydml-worker", "raydml-worker"]
    for given in asked:
        assert given["MetadataOptions"]["HttpTokens"] == "required"
        assert given["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
    instances = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    assert sorted(i["InstanceType"] for i in instances) == ["g6.2xlarge", "m7i.2xlarge", "m7i.4xlarge"]


def test_google_is_asked_for_a_spot_machine_in_the_own_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.auth.credentials import AnonymousCredentials
    from googleapiclient.discovery import build
    from googleapiclient.http import HttpMockSequence
    from ray.autoscaler._private.gcp.config import _configure_subnet
    from ray.autoscaler._private.gcp.node import GCPCompute
    from ray.autoscaler._private.util import prepare_config

    config = _configure_subnet(prepare_config(yaml.safe_load(shipped("gcp.yaml"))), None)  # asks nobody for a network
    kinds = config["available_node_types"]
    cloud = HttpMockSequence([({"status": "200"}, '{"name": "launch"}')] * len(kinds))
    monkeypatch.setattr(GCPCompute, "get_new_authorized_http", lambda self, http: cloud)
    compute = build("compute", "v1", credentials=AnonymousCredentials())
    provider = GCPCompute(compute, "mine", config["provider"]["availability_zone"], config["cluster_name"])
    for name, node in kinds.items():
        labels = {"ray-node-name": f"ray-raydml-{name}", "ray-user-node-type": name}
        provider.create_instance(node["node_config"], labels, wait_for_operation=False)
    asked = [json.loads(body) for _, _, body, _ in cloud.request_sequence]
    assert [given.get("scheduling", {}).get("provisioningModel") for given in asked] == [None, None, "SPOT"]
    assert {given["networkInterfaces"][0]["subnetwork"].rsplit("/", 1)[-1] for given in asked} == {"raydml"}
    assert [given["machineType"].rsplit("/", 1)[-1] for given in asked] == [
        "n2-standard-8",
        "n2-standard-16",
        "g2-standard-8",
    ]
