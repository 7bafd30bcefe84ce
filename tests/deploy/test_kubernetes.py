"""The chart renders what Kubernetes takes, refuses what it does not know, and the plain manifests are the chart's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lora_serve.config import ServeConfig

helm_python = pytest.importorskip("helm_python", reason="there is no Helm for this machine")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "lora-serve"
VERSIONS = ("1.27", "1.37")  # the oldest that the chart takes, and the newest
ALL: dict[str, Any] = {"serviceMonitor": {"enabled": True}, "inferencePool": {"enabled": True}}
EVERYTHING: dict[str, Any] = ALL | {
    "nameOverride": "loras",
    "imagePullSecrets": [{"name": "registry"}],
    "options": {"model": "org/model", "adapter_slots": 8, "revision": "main"},
    "persistence": {"storageClass": "fast", "size": "5Gi"},
    "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "16Gi"}},
    "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
    "extraVolumes": [{"name": "models", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "models", "mountPath": "/models"}],
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "x"},
    "nodeSelector": {"gpu": "yes"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "runtimeClassName": "nvidia",
    "priorityClassName": "high",
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "insecure": True,
    "keys": {"secret": ""},
}
SHARED: dict[str, Any] = {"replicas": 3, "sharedStore": {"claim": "adapters"}}


def strict(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has all of these properties and no other."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


TEXT, LABELS = {"type": "string", "minLength": 1}, {"type": "object", "additionalProperties": {"type": "string"}}
NUMBER = {"type": "integer", "minimum": 1, "maximum": 65535}
SELECTOR = strict(matchLabels=LABELS)
ENDPOINT = strict(port=TEXT, path=TEXT, interval={"pattern": "^[0-9]+(ms|s|m|h)$"}, authorization={"type": "object"})
KINDS = {  # what the resources that others define may have, of what the chart uses
    "ServiceMonitor": strict(
        selector=SELECTOR, endpoints={"type": "array", "items": ENDPOINT | {"required": ["port", "path", "interval"]}}
    ),
    "InferencePool": strict(
        selector=SELECTOR,
        targetPorts={"type": "array", "items": strict(number=NUMBER), "minItems": 1},
        endpointPickerRef=strict(
            name=TEXT, port=strict(number=NUMBER), failureMode={"enum": ["FailOpen", "FailClose"]}
        ),
    ),
}


def render(**values: Any) -> dict[str, dict[str, Any]]:
    """Rendered resources by kind and name."""
    texts = helm_python.Chart.load(CHART).render(values, name="lora-serve", namespace="default")
    found = [each for name, text in texts.items() if name.endswith(".yaml") for each in yaml.safe_load_all(text)]
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in found if each}


def pod(resources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (deployment,) = [each for each in resources.values() if each["kind"] == "Deployment"]
    return deployment["spec"]["template"]["spec"]


def served_options(resources: dict[str, dict[str, Any]]) -> ServeConfig:
    """The options as the server would take them."""
    (text,) = [each["data"]["serve.yaml"] for each in resources.values() if "serve.yaml" in each.get("data", {})]
    return ServeConfig.model_validate(yaml.safe_load(text.replace("/opt/demo/adapters", str(ROOT / "adapters"))))


def test_the_chart_is_clean() -> None:
    report = helm_python.lint(CHART, strict=True)
    assert report["errors"] == []
    assert [each for each in report["messages"] if each["severity"] > 1] == []


@pytest.mark.parametrize("values", [{}, ALL, EVERYTHING, SHARED], ids=["defaults", "all", "everything", "shared"])
def test_every_field_is_one_that_kubernetes_knows(values: dict[str, Any]) -> None:
    for resource in render(**values).values():
        if resource["kind"] in KINDS:
            jsonschema.validate(resource["spec"], KINDS[resource["kind"]])
        else:
            for version in VERSIONS:
                kubernetes_validate.validate(resource, version, strict=True)


def test_the_validation_finds_a_wrong_field() -> None:
    resources = render()
    pod(resources)["containers"][0]["livenessProbe"]["period"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(resources["Deployment/lora-serve"], VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 2}, "replica"),
        ({"drain": {"seconds": 3}}, "seconds"),
        ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"options": {"served_model_name": "x", "model": ""}}, "model"),
        ({"options": {"port": 3}}, "options"),
        ({"replicas": 2}, "a store has one server"),
        ({"keys": {"secret": ""}}, "insecure: true"),
        ({"sharedStore": {"url": "gs://bucket"}}, "url"),
        ({"sharedStore": {"url": "s3://bucket", "claim": "adapters"}}, "not both"),
        ({"options": {"model": "m", "shared_store": "s3://bucket"}}, "shared_store"),
    ],
)
def test_mistakes_in_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    def install() -> None:
        chart = helm_python.Chart.load(CHART)
        chart.validate_schema(values)
        chart.render(values, name="lora-serve", namespace="default")

    with pytest.raises(helm_python.HelmError, match=message):
        install()


def test_the_options_are_the_servers() -> None:
    config = served_options(render())
    assert (config.model, config.served_model_name, config.port) == ("/opt/demo/model", "demo", 8000)
    assert config.api_key_file == Path("/etc/lora-serve/keys/keys.yaml")
    changed = served_options(render(**EVERYTHING, port=9000))
    assert (changed.model, changed.adapter_slots, changed.port, changed.insecure) == ("org/model", 8, 9000, True)
    assert (changed.served_model_name, changed.adapters) == (None, None)  # nothing is left of the demo


def test_a_pod_has_time_for_its_delay_and_drain_and_five_seconds_more() -> None:
    resources = render(drain={"timeout": 100, "delay": 7})
    assert pod(resources)["terminationGracePeriodSeconds"] >= 100 + 7 + 5
    assert served_options(resources).drain_timeout == 100
    assert pod(resources)["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]


def test_a_change_of_options_makes_new_pods_and_others_do_not() -> None:
    def template(**values: Any) -> Any:
        return render(**values)["Deployment/lora-serve"]["spec"]["template"]

    assert template() == template(service={"port": 81})
    assert template() != template(options={"model": "another"})


def test_pods_are_confined() -> None:
    (container,) = pod(render())["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(render())["securityContext"]["runAsNonRoot"] is True
    assert pod(render())["automountServiceAccountToken"] is False


def test_an_uninstall_keeps_the_store_and_without_persistence_there_may_be_replicas() -> None:
    claim = render()["PersistentVolumeClaim/lora-serve-data"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    several = render(replicas=3, persistence={"enabled": False})
    assert several["Deployment/lora-serve"]["spec"]["replicas"] == 3
    assert not any(name.startswith("PersistentVolumeClaim") for name in several)


def test_replicas_that_share_a_store_have_copies_and_no_claim_of_their_own() -> None:
    bucket = {"replicas": 3, "sharedStore": {"url": "s3://bucket/adapters"}}
    for values, url in ((SHARED, "file:///shared"), (bucket, "s3://bucket/adapters")):
        resources = render(**values)
        assert served_options(resources).shared_store == url
        assert not any(name.startswith("PersistentVolumeClaim") for name in resources)
        spec = resources["Deployment/lora-serve"]["spec"]
        assert (spec["replicas"], "strategy" in spec) == (3, False)
        volumes = {each["name"]: each for each in pod(resources)["volumes"]}
        assert volumes["data"]["emptyDir"] == {}
    mounts = {each["name"]: each["mountPath"] for each in pod(render(**SHARED))["containers"][0]["volumeMounts"]}
    assert mounts["shared"] == "/shared"
    (shared,) = [each for each in pod(render(**SHARED))["volumes"] if each["name"] == "shared"]
    assert shared["persistentVolumeClaim"] == {"claimName": "adapters"}
    assert "shared" not in {each["name"] for each in pod(render(**bucket))["volumes"]}


def test_the_endpoint_picker_uses_the_plugins_that_it_has() -> None:
    resources = render(**ALL)
    text = resources["ConfigMap/lora-serve-endpoint-picker"]["data"]["endpoint-picker.yaml"]
    config = yaml.safe_load(text)
    plugins = [each["type"] for each in config["plugins"]]
    (profile,) = config["schedulingProfiles"]
    assert [each["pluginRef"] for each in profile["plugins"]] == plugins
    assert "lora-affinity-scorer" in plugins
    pool = resources["InferencePool/lora-serve"]["spec"]
    labels = resources["Deployment/lora-serve"]["spec"]["template"]["metadata"]["labels"]
    assert pool["selector"]["matchLabels"].items() <= labels.items()
    assert pool["targetPorts"] == [{"number": 8000}]


def test_the_plain_manifests_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEPLOY))
    sys.modules.pop("render", None)
    from render import manifests

    for name, text in manifests().items():
        assert (DEPLOY / "kubernetes" / name).read_text() == text, "run python deploy/render.py"
