"""launch/render_jobset.py: what the manifests say, whether Kubernetes and JobSet would take them, and what is refused."""

import importlib.util
import pathlib
import sys
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"
KUBERNETES = "1.35"

_spec = importlib.util.spec_from_file_location("render_jobset", LAUNCH / "render_jobset.py")
assert _spec is not None and _spec.loader is not None
render_jobset = importlib.util.module_from_spec(_spec)
sys.modules["render_jobset"] = render_jobset
_spec.loader.exec_module(render_jobset)

COMMON = ["--name=run-a", "--image=registry.example/gptjax:1"]
BUCKET = [*COMMON, "--workdir=gs://bucket/runs/a"]
TPU = [*BUCKET, "--topology=v5p:4x4x8"]
GPU = [*COMMON, "--workdir=/mnt/runs/a", "--volume=runs:/mnt/runs", "--gpu=h100", "--gpus-per-node=8", "--nodes=4"]
COMMAND = ["--", "gptjax", "train", "--config=configs/gpt2_124m.py"]

# The fields of jobset.x-k8s.io/v1alpha2 and their types, after the definitions in the API's swagger.json; a list stands for its
# items. What Kubernetes itself defines is left to its own schema.
REPLICATED_JOB = {"name": str, "groupName": str, "replicas": int, "template": dict, "dependsOn": [{"name": str, "status": str}]}
RULE = {
    "name": str,
    "action": str,
    "onJobFailureReasons": [str],
    "onJobFailureMessagePatterns": [str],
    "targetReplicatedJobs": [str],
}
JOBSET: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str, "labels": dict, "annotations": dict},
    "spec": {
        "replicatedJobs": [REPLICATED_JOB],
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "successPolicy": {"operator": str, "targetReplicatedJobs": [str]},
        "failurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": [RULE]},
        "startupPolicy": {"startupPolicyOrder": str},
        "suspend": bool,
        "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int},
        "managedBy": str,
        "ttlSecondsAfterFinished": int,
        "volumeClaimPolicies": [dict],
    },
}


def departures(value: Any, allowed: Any, where: str = "") -> list[str]:
    """Where `value` is not of the shape `allowed`."""
    if isinstance(allowed, type):
        return [] if type(value) is allowed else [f"{where} is {value!r}"]
    if isinstance(allowed, list):
        if not isinstance(value, list):
            return [f"{where} is {value!r}"]
        return [wrong for number, item in enumerate(value) for wrong in departures(item, allowed[0], f"{where}[{number}]")]
    if not isinstance(value, dict):
        return [f"{where} is {value!r}"]
    unknown = [f"{where}.{key} is unknown" for key in value if key not in allowed]
    return unknown + [
        wrong for key in value if key in allowed for wrong in departures(value[key], allowed[key], f"{where}.{key}")
    ]


def rendered(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert render_jobset.main(arguments) == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


def job_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return job_of(manifest)["template"]["spec"]["containers"][0]


ALL_OPTIONS = [
    *[
        "--namespace=research",
        "--service-account=trainer",
        "--label=kueue.x-k8s.io/queue-name=team",
        "--env=GPTJAX_STUCK_SECONDS=600",
    ],
    *["--node-selector=cloud.google.com/gke-spot=true", "--max-restarts=3", "--grace-seconds=60", "--volume=data:/data"],
]


@pytest.mark.parametrize("extra", [[], ALL_OPTIONS], ids=["few", "all"])
@pytest.mark.parametrize("arguments", [TPU, [*BUCKET, "--topology=v5e:2x2"], GPU], ids=["tpu", "one-host", "gpu"])
def test_schemas_accept(capsys, arguments, extra):
    """JobSet's fields by the table above; the Job inside by Kubernetes' own schema, strictly: an unknown field is an error."""
    manifest = rendered(capsys, *arguments, *extra, *COMMAND)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert departures(manifest, JOBSET) == []
    [replicated] = manifest["spec"]["replicatedJobs"]
    assert "template" in replicated and "name" in replicated
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is absent (extra: test)")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}} | replicated["template"]
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job | {"spec": job["spec"] | {"backoffLimit": "none"}}, KUBERNETES, strict=True)


def test_template_is_yaml():
    """It reads as YAML before anything is filled in, so that an editor can check it."""
    assert (
        departures(
            yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text()),
            {"apiVersion": str, "kind": str, "metadata": dict, "spec": dict},
        )
        == []
    )


def test_tpu_slices(capsys):
    manifest = rendered(capsys, *TPU, "--num-slices=2", *COMMAND)
    [replicated] = manifest["spec"]["replicatedJobs"]
    job, pod, container = job_of(manifest), job_of(manifest)["template"]["spec"], container_of(manifest)
    assert replicated["replicas"] == 2
    assert job["completions"] == job["parallelism"] == 32  # 4 * 4 * 8 = 128 chips, four a machine
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
    }
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    whose = {"name": "GPTJAX_JOB", "value": manifest["metadata"]["name"]}
    assert container["env"] == [whose, {"name": "GPTJAX_DISTRIBUTED", "value": "auto"}]
    assert manifest["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert container["command"] == [*COMMAND[1:], "--workdir=/gcs/runs/a"]
    assert container["volumeMounts"] == [{"name": "bucket", "mountPath": "/gcs"}]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_gpu_nodes(capsys):
    manifest = rendered(capsys, *GPU, *COMMAND)
    container = container_of(manifest)
    env = {entry["name"]: entry for entry in container["env"]}
    # The first pod's host name: JobSet, replicated job, number of the job, number of the pod, and the JobSet's own service.
    assert env["GPTJAX_COORDINATOR"]["value"] == f"run-a-{manifest['spec']['replicatedJobs'][0]['name']}-0-0.run-a:8476"
    assert env["GPTJAX_NUM_PROCESSES"]["value"] == "4"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["GPTJAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == index
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert job_of(manifest)["completions"] == 4
    assert job_of(manifest)["template"]["spec"]["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["command"][-1] == "--workdir=/mnt/runs/a"
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/mnt/runs", "/dev/shm"}


@pytest.mark.parametrize("arguments", [TPU, GPU], ids=["tpu", "gpu"])
def test_restarts_but_not_after_a_mistake(capsys, arguments):
    manifest = rendered(capsys, *arguments, "--max-restarts=7", "--grace-seconds=90", *COMMAND)
    job, pod = job_of(manifest), job_of(manifest)["template"]["spec"]
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]
    [rule] = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"], rule["onExitCodes"]["values"]) == ("FailJob", "In", [2])
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    # Kubernetes takes a podFailurePolicy with this restartPolicy only, and the pods must fail their job at once.
    assert (pod["restartPolicy"], job["backoffLimit"], pod["terminationGracePeriodSeconds"]) == ("Never", 0, 90)


# GKE's table of TPU machines: topology, hosts, chips a host, accelerator.
SLICES = [
    ("v4:2x2x1", 1, 4, "tpu-v4-podslice"),
    ("v4:8x8x8", 128, 4, "tpu-v4-podslice"),
    ("v5p:2x2x1", 1, 4, "tpu-v5p-slice"),
    ("v5p:2x2x4", 4, 4, "tpu-v5p-slice"),
    ("v5p:16x16x24", 1536, 4, "tpu-v5p-slice"),
    ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice"),
    ("v5e:2x2", 1, 4, "tpu-v5-lite-podslice"),
    ("v5e:2x4", 2, 4, "tpu-v5-lite-podslice"),
    ("v5e:16x16", 64, 4, "tpu-v5-lite-podslice"),
    ("v6e:1x1", 1, 1, "tpu-v6e-slice"),
    ("v6e:4x8", 8, 4, "tpu-v6e-slice"),
    ("tpu7x:1x1x1", 1, 1, "tpu7x"),
    ("tpu7x:4x4x4", 16, 4, "tpu7x"),
]


@pytest.mark.parametrize(("topology", "hosts", "chips", "accelerator"), SLICES)
def test_machines_of_a_slice(capsys, topology, hosts, chips, accelerator):
    manifest = rendered(capsys, *BUCKET, f"--topology={topology}", *COMMAND)
    assert job_of(manifest)["completions"] == hosts
    assert container_of(manifest)["resources"]["limits"] == {"google.com/tpu": chips}
    assert job_of(manifest)["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    joins = any(entry["name"] == "GPTJAX_DISTRIBUTED" for entry in container_of(manifest)["env"])
    assert joins == (hosts > 1)  # one process needs nobody


def test_slice_on_one_machine_of_eight(capsys):
    manifest = rendered(capsys, *BUCKET, "--topology=v6e:2x4", "--chips-per-host=8", *COMMAND)
    assert job_of(manifest)["completions"] == 1
    assert container_of(manifest)["resources"]["limits"] == {"google.com/tpu": 8}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*BUCKET, "--topology=tpu7:4x4x4"], "the nearest is 'tpu7x'"),
        ([*BUCKET, "--topology=v5p:4x4"], "3 sides"),
        ([*BUCKET, "--topology=v5e:4x4x4"], "2 sides"),
        ([*BUCKET, "--topology=v5p"], "3 sides"),
        ([*BUCKET, "--topology=v5p:4x4x6"], "no slice 4x4x6"),
        ([*BUCKET, "--topology=v5p:8x4x4"], "no slice 8x4x4"),
        ([*BUCKET, "--topology=v5e:8x4"], "no slice 8x4"),
        ([*BUCKET, "--topology=v4:16x16x20"], "at most 4096"),
        ([*BUCKET, "--topology=v5e:2x4", "--chips-per-host=2"], "has 4 or 8 chips"),
        ([*BUCKET, "--topology=v5p:4x4x4", "--chips-per-host=8"], "has 4 chips"),
        ([*BUCKET, "--topology=v5e:2x2", "--num-slices=2"], "is one machine"),
        ([*BUCKET, "--topology=v5e:4x4", "--nodes=2"], "--nodes for GPUs"),
        ([*BUCKET, "--num-slices=2"], "needs --topology"),
        ([*BUCKET], "neither --topology"),
        ([*BUCKET, "--gpu=h1000", "--gpus-per-node=8"], "the nearest is 'h100'"),
        ([*BUCKET, "--gpu=gb200", "--gpus-per-node=8"], "at most 4"),
        ([*TPU, "--name=Run"], "small letters"),
        ([*TPU, "--name=1run"], "beginning with a letter"),
        ([*TPU, "--name=" + "a" * 47], "room for 46"),
        ([*TPU, "--workdir=/mnt/a"], "a pod's own disk"),
        ([*TPU, "--volume=c:/mnt/a", "--workdir=/mnt/a/../b"], "a pod's own disk"),
        ([*TPU, "--workdir=gs://bucket"], "gs://BUCKET/FOLDER"),
        ([*TPU, "--volume=c"], "CLAIM:/PATH"),
        ([*TPU, "--volume=c:/a", "--volume=d:/a"], "two volumes are mounted at /a"),
        ([*TPU, "--env=A"], "NAME=VALUE"),
        ([*TPU, "--env=GPTJAX_DISTRIBUTED=no"], "set already"),
        ([*TPU, "--label=a b=c"], "a Kubernetes label"),
        ([*TPU, "--image=a b"], "a container image"),
        ([*TPU, "--namespace=A"], "--namespace=A"),
        ([*TPU, "--max-restarts=-1"], "whole number"),
        ([*TPU, "--topolgy=v5p"], "--topolgy"),
    ],
)
def test_refuses_in_one_sentence(capsys, arguments, said):
    assert render_jobset.main([*arguments, *COMMAND]) == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert answer.err.count("\n") == 1
    assert said in answer.err


@pytest.mark.parametrize(
    ("command", "said"),
    [([], "the command is missing"), (["--", "gptjax", "--workdir=b"], "--workdir of its own"), (["--", "a\nb"], "printed")],
)
def test_refuses_commands(capsys, command, said):
    assert render_jobset.main([*TPU, *command]) == 2
    assert said in capsys.readouterr().err


def test_longest_name_fits(capsys):
    """A pod's name is the JobSet's, the job's, two numbers, and a dash and five letters: 63 characters at most."""
    rendered(capsys, *TPU, "--name=" + "a" * 46, *COMMAND)
    assert len("a" * 46 + "-slice-0-31" + "-abcde") == 63


awkward = st.sampled_from(["$", "$$", "$(A)", "$$(A)", "(", ")", " ", "'", '"', "\\", ": ", " #", "- ", "é", "yes", "0x1"])
printable = st.text(st.characters(exclude_categories=["C", "Z"]))
word = st.lists(awkward | printable, min_size=1, max_size=6).map("".join)


@hypothesis.given(words=st.lists(word, min_size=1, max_size=4))
@hypothesis.settings(max_examples=60)
def test_words_survive_yaml_and_kubernetes(words):
    """What the process gets is what was typed: YAML's quoting, and $(NAME) and $$ in a command, which Kubernetes would expand."""
    fields = {"command": [render_jobset.literal(word) for word in words]}
    loaded = yaml.safe_load(render_jobset.render(fields, "spec:\n  command: ${command}"))["spec"]["command"]
    assert [expanded(word) for word in loaded] == words


def expanded(text: str) -> str:
    """Kubernetes' rule for commands: $$ is one dollar, $(NAME) a variable; here every variable exists and is wrong."""
    out, position = "", 0
    while position < len(text):
        if text.startswith("$$", position):
            out, position = out + "$", position + 2
        elif text.startswith("$(", position) and ")" in text[position:]:
            out, position = out + "EXPANDED", text.index(")", position) + 1
        else:
            out, position = out + text[position], position + 1
    return out


def test_apply_dry_run_prints_what_kubectl_gets(capsys):
    assert render_jobset.main([*TPU, "--apply", "--dry-run", *COMMAND]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("# kubectl apply --filename=-")
    assert render_jobset.main([*TPU, *COMMAND]) == 0
    assert capsys.readouterr().out.splitlines() == rest


def test_apply_gives_kubectl_the_manifest(capfd, tmp_path, monkeypatch):
    (tmp_path / "kubectl").write_text('#!/bin/sh\necho "$@"\ncat\nexit 3\n')
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert render_jobset.main([*TPU, "--apply", *COMMAND]) == 3
    first, rest = capfd.readouterr().out.split("\n", 1)
    assert first == "apply --filename=-"
    assert yaml.safe_load(rest)["metadata"]["name"] == "run-a"
