"""The cluster on AWS: Ray's own check, EC2's own parameters, who gets in, and the notice of a spot machine's end."""

import copy
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME
from ray.scripts.scripts import drain_node, start

from nucleus.config.settings import read_recipe, recipe_path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "infra" / "ray" / "aws.yaml").read_text()
CLUSTER = yaml.safe_load(TEXT)
TYPES: dict[str, dict[str, Any]] = CLUSTER["available_node_types"]
HEAD, GPU = TYPES["head"], TYPES["gpu"]
POLICY = json.loads((ROOT / "infra" / "aws" / "autoscaler-policy.json").read_text())["Statement"]
NOTICE = ROOT / "infra" / "ray" / "spot-notice.sh"


def ec2() -> Any:
    return boto3.client("ec2", region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")


def test_ray_takes_it() -> None:
    config = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(config)
    assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []
    assert config["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.parametrize(("key", "value"), [("idle_timeout", 5), ("max_workers", "four"), ("head_node_type", "cpu")])
def test_ray_finds_mistakes(key: str, value: object) -> None:
    with pytest.raises(Exception, match=r"idle_timeout|four|head_node_type"):
        validate_config(prepare_config({**copy.deepcopy(CLUSTER), key: value}))


@pytest.mark.parametrize("name", TYPES)
def test_ec2_knows_every_setting(name: str) -> None:
    node = {key: value for key, value in TYPES[name]["node_config"].items() if key != "SubnetIds"}  # Ray's own word
    shape = ec2().meta.service_model.operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**node, "MinCount": 1, "MaxCount": 1}, shape)
    assert not report.has_errors(), report.generate_report()
    assert ParamValidator().validate({**node, "SecurityGroups_": [], "MinCount": 1, "MaxCount": 1}, shape).has_errors()


@pytest.mark.parametrize("name", TYPES)
def test_the_world_is_shut_out(name: str) -> None:
    node = TYPES[name]["node_config"]
    assert node["SecurityGroupIds"] == ["SECURITY_GROUP"]  # or Ray makes one that is open
    assert node["SubnetIds"] == ["SUBNET"]
    assert "security_group" not in CLUSTER["provider"]
    assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert all(disk["Ebs"]["Encrypted"] and disk["Ebs"]["VolumeType"] == "gp3" for disk in node["BlockDeviceMappings"])


def test_no_rule_for_everybody() -> None:
    assert "0.0.0.0" not in TEXT
    opened = re.findall(r"authorize-security-group-ingress .*(?:--cidr|--source-group) (\S+)", TEXT)
    assert opened == ["$group", "YOUR_ADDRESS/32"]


def test_head_is_not_spot_and_workers_are() -> None:
    assert "InstanceMarketOptions" not in HEAD["node_config"]
    assert GPU["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert (GPU["min_workers"], GPU["max_workers"]) == (0, CLUSTER["max_workers"])
    assert HEAD["resources"] == {"CPU": 0}
    assert CLUSTER["provider"]["cache_stopped_nodes"] is False


def test_the_gpu_recipe_fits() -> None:
    recipe = read_recipe(recipe_path("dsb2018-gpu"), ())
    assert GPU["resources"]["GPU"] == recipe.gpus_per_worker
    assert GPU["resources"]["CPU"] >= recipe.cpus_per_worker
    assert GPU["max_workers"] >= recipe.workers.most


def test_a_token_is_asked_for_and_in_no_file() -> None:
    options = dict(
        option.removeprefix("--env=").split("=", 1) for option in CLUSTER["docker"]["run_options"] if "env" in option
    )
    assert options["RAY_AUTH_MODE"] == "token"
    assert CLUSTER["file_mounts"][options["RAY_AUTH_TOKEN_PATH"]] == "~/.ray/auth_token"
    assert not [name for name in options if name.endswith(("_KEY", "_TOKEN", "_SECRET"))]


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_knows_the_start_commands(kind: str) -> None:
    (line,) = [words for words in CLUSTER[f"{kind}_start_ray_commands"] if words.startswith("ray start")]
    parsed = start.make_context("start", line.split()[2:]).params
    assert parsed["head"] == (kind == "head")
    if kind == "head":
        assert parsed["dashboard_host"] == "127.0.0.1"
        assert (parsed["num_cpus"], parsed["num_gpus"]) == (0, 0)


def test_rights_to_start_machines_are_few() -> None:
    actions = [a for s in POLICY for a in (s["Action"] if isinstance(s["Action"], list) else [s["Action"]])]
    known = set(ec2().meta.service_model.operation_names)
    assert {action.removeprefix("ec2:") for action in actions if action.startswith("ec2:")} <= known
    assert not [action for action in actions if "*" in action]
    for statement in POLICY:
        if statement["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in statement["Action"])
    ending = [s for s in POLICY if "ec2:TerminateInstances" in s["Action"]]
    name = CLUSTER["cluster_name"]
    assert [s["Condition"] for s in ending] == [{"StringEquals": {f"ec2:ResourceTag/{TAG_RAY_CLUSTER_NAME}": name}}]
    (passing,) = [s for s in POLICY if s["Action"] == "iam:PassRole"]
    assert passing["Resource"].endswith(f"role/{GPU['node_config']['IamInstanceProfile']['Name']}")


class Metadata(BaseHTTPRequestHandler):
    """AWS's metadata service, which asks for a session and has a notice from the third question on."""

    questions = 0

    def do_PUT(self) -> None:
        self._answer(200 if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else 400, "session")

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != "session":
            self._answer(401, "")
            return
        type(self).questions += 1
        self._answer(200 if self.questions > 2 else 404, '{"action": "terminate"}')

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def metadata() -> Iterator[str]:
    Metadata.questions = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_spot_notice_drains_the_node(tmp_path: Path) -> None:
    (line,) = [words for words in CLUSTER["worker_start_ray_commands"] if "spot-notice" in words]
    assert "sh ~/spot-notice.sh $RAY_HEAD_IP:6379" in line
    assert CLUSTER["file_mounts"]["/home/nucleus/spot-notice.sh"] == str(NOTICE.relative_to(ROOT))
    ray = tmp_path / "ray"
    # Refused the first time: it asks again.
    ray.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/called\nmkdir {tmp_path}/once || exit 0\nexit 1\n')
    ray.chmod(0o755)
    with metadata() as address:
        done = subprocess.run(
            ["sh", NOTICE, "10.0.0.1:6379", address, "0.05"],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Metadata.questions == 4
    name, *arguments = (tmp_path / "called").read_text().splitlines()
    assert name == "drain-node"
    params = drain_node.make_context(name, arguments).params
    assert (params["address"], params["reason"]) == ("10.0.0.1:6379", "DRAIN_NODE_REASON_PREEMPTION")
    assert params["deadline_remaining_seconds"] < 120
