"""The RayJob: Kubernetes' and KubeRay's schemas, and what the run on it must and may."""

import copy
import json
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

import nucleus
from nucleus.cli.main import cli
from nucleus.config.settings import read_recipe, recipe_path

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.34"
DOCUMENTS = list(yaml.safe_load_all((ROOT / "infra" / "kuberay" / "rayjob.yaml").read_text()))
ACCOUNT, NETWORK, JOB = DOCUMENTS
CLUSTER = JOB["spec"]["rayClusterSpec"]
WORKERS = CLUSTER["workerGroupSpecs"][0]
TEMPLATES = {
    "submitter": JOB["spec"]["submitterPodTemplate"],
    "head": CLUSTER["headGroupSpec"]["template"],
    "worker": WORKERS["template"],
}
SCHEMA = jsonschema.Draft202012Validator(json.loads(Path(__file__).with_name("rayjob.schema.json").read_text()))


def container(name: str) -> dict[str, Any]:
    (only,) = TEMPLATES[name]["spec"]["containers"]
    return dict(only)


def check_pod(template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}}
    kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES, strict=True)


def test_kinds() -> None:
    assert [document["kind"] for document in DOCUMENTS] == ["ServiceAccount", "NetworkPolicy", "RayJob"]


@pytest.mark.parametrize("document", [ACCOUNT, NETWORK], ids=["account", "network"])
def test_kubernetes_schema(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_pods_by_kubernetes_schema(name: str) -> None:
    check_pod(TEMPLATES[name])
    wrong = copy.deepcopy(TEMPLATES[name])
    wrong["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalatoin"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(wrong)


def test_autoscaler_by_kubernetes_schema() -> None:
    options = CLUSTER["autoscalerOptions"]
    parts = {name: options[name] for name in ("resources", "securityContext")}
    check_pod({"metadata": {}, "spec": {"containers": [{"name": "autoscaler", **parts}]}})


def test_rayjob_schema() -> None:
    SCHEMA.validate(JOB)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (["spec"], "entryPoint", "nucleus"),
        (["spec"], "submissionMode", "K8sJob"),
        (["spec"], "activeDeadlineSeconds", 0),
        (["spec", "rayClusterSpec"], "auth", {}),
        (["spec", "rayClusterSpec", "authOptions"], "mode", "tokens"),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0], "minReplica", 0),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"], "num-cpus", 0),
    ],
)
def test_rayjob_schema_finds(path: list[str | int], key: str, value: object) -> None:
    wrong: Any = copy.deepcopy(JOB)
    inner = wrong
    for step in path:
        inner = inner[step]
    inner[key] = value
    assert not SCHEMA.is_valid(wrong)


def test_ray_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"ray[data,default,serve,train]=={CLUSTER['rayVersion']}" in project["optional-dependencies"]["training"]


def test_a_token_is_asked_for() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_security(name: str) -> None:
    pod = TEMPLATES[name]["spec"]["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] == 1000  # the image's
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(name)["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    # The head's autoscaler asks Kubernetes for pods; nobody else speaks to it.
    assert TEMPLATES[name]["spec"]["automountServiceAccountToken"] is (name == "head")


@pytest.mark.parametrize("name", TEMPLATES)
def test_secrets_by_reference(name: str) -> None:
    for variable in container(name).get("env", []):
        secret = any(word in variable["name"] for word in ("KEY", "TOKEN", "SECRET", "PASSWORD"))
        assert ("valueFrom" in variable) == secret
    names = {source for entry in container(name).get("envFrom", []) for source in entry}
    assert names == (set() if name == "submitter" else {"configMapRef", "secretRef"})


@pytest.mark.parametrize("name", TEMPLATES)
def test_resources(name: str) -> None:
    resources = container(name)["resources"]
    assert set(resources["requests"]) == set(resources["limits"]) >= {"cpu", "memory"}
    assert ("nvidia.com/gpu" in resources["limits"]) == (name == "worker")


def test_entry_point_is_a_run_that_fits() -> None:
    program, name, *arguments = shlex.split(JOB["spec"]["entrypoint"])
    command = cli.get_command(click.Context(cli), name)
    assert program == "nucleus"
    assert command is not None
    params = command.make_context(name, arguments).params
    read = read_recipe(recipe_path(params["recipe"]), params["settings"])
    assert (WORKERS["minReplicas"], WORKERS["maxReplicas"]) == (0, read.workers.most)
    assert read.workers.elastic
    limits = container("worker")["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == read.gpus_per_worker
    assert int(limits["cpu"]) == read.cpus_per_worker
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert nucleus.__file__  # which the image holds: nothing is uploaded
    assert "runtimeEnvYAML" not in JOB["spec"]


def test_all_goes_when_the_run_has_ended() -> None:
    assert JOB["spec"]["shutdownAfterJobFinishes"] is True
    assert JOB["spec"]["ttlSecondsAfterFinished"] > 0
    assert JOB["spec"]["backoffLimit"] == 0
    assert CLUSTER["enableInTreeAutoscaling"] is True


def test_only_the_run_reaches_the_run() -> None:
    selector = NETWORK["spec"]["podSelector"]["matchLabels"]
    assert all(template["metadata"]["labels"] == selector for template in TEMPLATES.values())
    inner, operator = NETWORK["spec"]["ingress"]
    assert inner == {"from": [{"podSelector": {"matchLabels": selector}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]


def pre_stop() -> str:
    shell, option, line = container("worker")["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, option) == ("/bin/sh", "-c")
    return str(line)


@pytest.mark.parametrize("accepted", [True, False])
def test_pre_stop_drains_and_waits(accepted: bool, tmp_path: Path) -> None:
    """The line as it stands, with programs that note how they were called; Ray's own parser reads the arguments."""
    for program in ("ray", "sleep"):
        script = tmp_path / program
        status = 0 if accepted or program == "sleep" else 1
        script.write_text(f'#!/bin/sh\nprintf "%s\\n" "{program}" "$@" >> {tmp_path}/called\nexit {status}\n')
        script.chmod(0o755)
    line = pre_stop().replace("/opt/nucleus/bin", str(tmp_path))
    subprocess.run(["/bin/sh", "-c", line], env={"PATH": "/usr/bin:/bin"}, check=False)
    called = (tmp_path / "called").read_text().splitlines()
    assert called[:2] == ["ray", "drain-node"]
    assert ("sleep" in called) == accepted
    from ray.scripts.scripts import drain_node

    end = called.index("sleep") if accepted else len(called)
    params = drain_node.make_context("drain-node", called[2:end]).params
    assert params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert params["node_id"] is None  # this node
    grace = TEMPLATES["worker"]["spec"]["terminationGracePeriodSeconds"]
    assert 60 <= params["deadline_remaining_seconds"] < grace
    if accepted:
        assert params["deadline_remaining_seconds"] <= int(called[-1]) < grace


SERVICE_ACCOUNT, SERVICE_NETWORK, SERVICE = yaml.safe_load_all(
    (ROOT / "infra" / "kuberay" / "rayservice.yaml").read_text()
)
SERVING = SERVICE["spec"]["rayClusterConfig"]
SERVING_TEMPLATES = {
    "head": SERVING["headGroupSpec"]["template"],
    "worker": SERVING["workerGroupSpecs"][0]["template"],
}
SERVE = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])


def service_schema() -> jsonschema.Draft202012Validator:
    """The spec of ray.io/v1 RayService in KubeRay 1.5, from its published API; its cluster is that of RayJob."""
    cluster = SCHEMA.schema["properties"]["spec"]["properties"]["rayClusterSpec"]
    strategy = {"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}
    spec = {
        "serveConfigV2": {"type": "string"},
        "rayClusterConfig": cluster,
        "upgradeStrategy": {"type": "object", "additionalProperties": False, "properties": {"type": strategy}},
        "excludeHeadPodFromServeSvc": {"type": "boolean"},
        "rayClusterDeletionDelaySeconds": {"type": "integer", "minimum": 0},
        "serveService": {"type": "object"},
        "suspend": {"type": "boolean"},
    }
    whole = {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": {"type": "object"},
        "spec": {"type": "object", "additionalProperties": False, "properties": spec, "required": ["rayClusterConfig"]},
    }
    schema = {"type": "object", "additionalProperties": False, "properties": whole, "required": [*whole]}
    return jsonschema.Draft202012Validator(schema)


def test_rayservice_schema() -> None:
    service_schema().validate(SERVICE)
    for wrong in ({"serveConfig": ""}, {"upgradeStrategy": {"type": "Recreate"}}, {"serveConfigV2": {}}):
        assert not service_schema().is_valid({**SERVICE, "spec": {**SERVICE["spec"], **wrong}})
    for document in (SERVICE_ACCOUNT, SERVICE_NETWORK):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for template in SERVING_TEMPLATES.values():
        check_pod(template)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Serve's schema has fields as Pydantic 1 had them
def test_the_service_is_one_that_ray_serve_and_the_builder_take() -> None:
    """Ray Serve's own schema of the configuration; the arguments of the application; and that its parts fit."""
    from ray.serve.schema import ServeDeploySchema

    from job.serving import ServingArguments, build

    ServeDeploySchema.model_validate(SERVE)
    (application,) = SERVE["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    arguments = ServingArguments.model_validate(application["args"])
    group, pod = SERVING["workerGroupSpecs"][0], SERVING_TEMPLATES["worker"]["spec"]
    assert arguments.most <= group["maxReplicas"] * int(pod["containers"][0]["resources"]["limits"]["cpu"])
    assert arguments.cpus == int(pod["containers"][0]["resources"]["limits"]["cpu"])
    assert pod["terminationGracePeriodSeconds"] > arguments.max_seconds
    assert SERVING["rayVersion"] == CLUSTER["rayVersion"]


def test_proxies_ask_again_for_what_a_lost_replica_was_computing() -> None:
    from job.replica_loss import PROXY_CALLBACK, proxy_middlewares

    assert list(PROXY_CALLBACK.values()) == [f"{proxy_middlewares.__module__}.{proxy_middlewares.__name__}"]
    for template in SERVING_TEMPLATES.values():
        variables = {each["name"]: each["value"] for each in template["spec"]["containers"][0]["env"]}
        assert variables.items() >= PROXY_CALLBACK.items()


def test_the_service_has_a_token_on_each_machine() -> None:
    """It is a secret that is mounted where the application reads it; Ray asks for its own."""
    (application,) = SERVE["applications"]
    assert SERVING["authOptions"] == {"mode": "token"}
    for name, template in SERVING_TEMPLATES.items():
        spec = template["spec"]
        (secret,) = [volume for volume in spec["volumes"] if "secret" in volume]
        (mount,) = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == secret["name"]]
        assert application["args"]["token_file"] == f"{mount['mountPath']}/token"
        assert mount["readOnly"] is True
        assert spec["automountServiceAccountToken"] is (name == "head")
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
