#!/usr/bin/env python3
"""Fills in launch/gke_jobset.yaml for TPU slices or GPU nodes and prints it, for `kubectl apply -f -`.

    launch/render_jobset.py --name=llama-7b --image=REGISTRY/gptjax:1 --topology=v5p:4x4x4 --workdir=gs://bucket/runs/llama-7b \\
        -- gptjax train --config=configs/llama_small.py
    launch/render_jobset.py --name=gpt2 --image=REGISTRY/gptjax:1 --gpu=h100 --gpus-per-node=8 --nodes=4 \\
        --volume=CLAIM:/mnt/runs --workdir=/mnt/runs/gpt2 -- gptjax train --config=configs/gpt2_124m.py

Standard library only, so that it runs where gptjax is not installed. Exit status 2: a mistake in the arguments, in one sentence.
"""

import argparse
import dataclasses
import difflib
import json
import math
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

TEMPLATE = pathlib.Path(__file__).with_name("gke_jobset.yaml")
COORDINATOR_PORT = 8476
POD_SUFFIX = 6  # Kubernetes ends a pod's name with a dash and five letters


class Mistake(Exception):
    """What a person can mend, in one sentence."""


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A generation of TPU as GKE names it: its `cloud.google.com/gke-tpu-accelerator`, and the shapes of its slices in chips."""

    accelerator: str
    dimensions: int
    most_chips: int  # of one slice
    small: tuple[str, ...]  # slices below the regular ones
    one_host: tuple[str, ...]  # slices that one machine can hold whole, where that is more than four chips or fewer


# GKE, "Plan TPUs": ct4p-hightpu-4t, ct5p-hightpu-4t, ct5lp-hightpu-{1,4,8}t, ct6e-standard-{1,4,8}t, tpu7x-standard-{1,4}t.
# A machine has four chips; a slice of one chip is a machine of its own, and 2x4 comes as two machines or as one of eight.
SMALL_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TPUS = {
    "v4": Tpu("tpu-v4-podslice", 3, 4096, SMALL_3D, ()),
    "v5p": Tpu("tpu-v5p-slice", 3, 6144, SMALL_3D, ()),
    "v5e": Tpu("tpu-v5-lite-podslice", 2, 256, SLICES_2D, ("1x1", "2x4")),
    "v6e": Tpu("tpu-v6e-slice", 2, 256, SLICES_2D, ("1x1", "2x4")),
    "tpu7x": Tpu("tpu7x", 3, 9216, ("1x1x1", *SMALL_3D), ("1x1x1",)),
}
CHIPS_PER_HOST = 4

# `cloud.google.com/gke-accelerator`, and the most GPUs that a machine with it has.
GPUS = {
    "l4": ("nvidia-l4", 8),
    "a100": ("nvidia-tesla-a100", 16),
    "a100-80gb": ("nvidia-a100-80gb", 8),
    "h100": ("nvidia-h100-80gb", 8),
    "h100-mega": ("nvidia-h100-mega-80gb", 8),
    "h200": ("nvidia-h200-141gb", 8),
    "b200": ("nvidia-b200", 8),
    "gb200": ("nvidia-gb200", 4),
}


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What the pods ask for: `replicas` jobs (slices) of `hosts` pods with `per_host` of `resource` each."""

    job: str
    replicas: int
    hosts: int
    resource: str
    per_host: int
    node_selector: dict[str, str]


def nearest(name: str, names: Sequence[str]) -> str:
    """The one of `names` most like `name`."""
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]


def tpu_hardware(topology: str, num_slices: int, chips_per_host: int | None) -> Hardware:
    """The slices of `topology` (`v5p:4x4x4`). Raises `Mistake` for one that GKE does not have."""
    generation, colon, shape = topology.partition(":")
    if generation not in TPUS:
        raise Mistake(
            f"--topology={topology}: there is no TPU '{generation}'; the nearest is '{nearest(generation, list(TPUS))}'"
            f" (of {', '.join(TPUS)})."
        )
    tpu = TPUS[generation]
    example = "4x4x4" if tpu.dimensions == 3 else "4x4"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != tpu.dimensions:
        raise Mistake(f"--topology={topology}: a slice of {generation} has {tpu.dimensions} sides, as in {generation}:{example}.")
    sides = [int(side) for side in shape.split("x")]
    chips = math.prod(sides)
    regular = tpu.dimensions == 3 and all(side % 4 == 0 for side in sides) and sides == sorted(sides)
    if shape not in tpu.small and not regular:
        rule = ", or sides that are multiples of 4 and do not fall" if tpu.dimensions == 3 else ""
        raise Mistake(f"--topology={topology}: {generation} has no slice {shape}; it has {', '.join(tpu.small)}{rule}.")
    if chips > tpu.most_chips:
        raise Mistake(f"--topology={topology}: {chips} chips, but a slice of {generation} has at most {tpu.most_chips}.")
    # One-chip slices need no asking; a machine of eight does, since the same slice also comes as two machines of four.
    usual = min(chips, CHIPS_PER_HOST)
    allowed = sorted({usual, chips} if shape in tpu.one_host else {usual})
    per_host = usual if chips_per_host is None else chips_per_host
    if per_host not in allowed:
        raise Mistake(
            f"--chips-per-host={per_host}: a machine in a slice {generation}:{shape} has {' or '.join(map(str, allowed))} chips."
        )
    hosts = chips // per_host
    if num_slices > 1 and hosts == 1:
        raise Mistake(f"--num-slices={num_slices}: GKE joins slices of several machines only, and {topology} is one machine.")
    selector = {"cloud.google.com/gke-tpu-accelerator": tpu.accelerator, "cloud.google.com/gke-tpu-topology": shape}
    return Hardware("slice", num_slices, hosts, "google.com/tpu", per_host, selector)


def gpu_hardware(gpu: str | None, gpus_per_node: int, nodes: int) -> Hardware:
    """`nodes` nodes with `gpus_per_node` GPUs each; any NVIDIA GPU where `gpu` is None. Raises `Mistake` for an unknown one."""
    selector = {}
    if gpu is not None:
        if gpu not in GPUS:
            raise Mistake(
                f"--gpu={gpu}: there is no such GPU; the nearest is '{nearest(gpu, list(GPUS))}' (of {', '.join(GPUS)})."
            )
        label, most = GPUS[gpu]
        if gpus_per_node > most:
            raise Mistake(f"--gpus-per-node={gpus_per_node}: a machine with {gpu} has at most {most}.")
        selector["cloud.google.com/gke-accelerator"] = label
    return Hardware("node", 1, nodes, "nvidia.com/gpu", gpus_per_node, selector)


def environment(name: str, hardware: Hardware, extra: Sequence[str]) -> list[dict[str, Any]]:
    """Whose run it is, so that a restart on other machines may take its folder over, and how the processes find each other: one
    alone has nobody to find.
    """
    env: list[dict[str, Any]] = [{"name": "GPTJAX_JOB", "value": name}]
    if hardware.replicas * hardware.hosts > 1:
        if hardware.resource == "google.com/tpu":
            env.append({"name": "GPTJAX_DISTRIBUTED", "value": "auto"})  # GKE tells each TPU pod who it is, and JAX reads it
        else:
            index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
            env += [
                {"name": "GPTJAX_COORDINATOR", "value": f"{name}-{hardware.job}-0-0.{name}:{COORDINATOR_PORT}"},
                {"name": "GPTJAX_NUM_PROCESSES", "value": str(hardware.hosts)},
                {"name": "GPTJAX_PROCESS_ID", "valueFrom": index},
            ]
    for item in extra:
        key, equals, value = item.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise Mistake(f"--env={item}: it takes NAME=VALUE.")
        if any(key == entry["name"] for entry in env):
            raise Mistake(f"--env={item}: {key} is set already.")
        env.append({"name": key, "value": literal(value)})
    return env


def literal(text: str) -> str:
    """`text` as Kubernetes gives it back: in commands and values it reads $(NAME) as a variable and $$ as one dollar."""
    return text.replace("$", "$$")


def storage(workdir: str, volume: Sequence[str]) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """The run's folder inside the pods, the mounts, the volumes and the pods' annotations that bring it there."""
    mounts, volumes, annotations = [], [], {}
    folder = workdir
    if workdir.startswith("gs://"):
        bucket, _, path = workdir.removeprefix("gs://").partition("/")
        path = path.strip("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", bucket) or not path:
            raise Mistake(f"--workdir={workdir}: it takes gs://BUCKET/FOLDER.")
        folder = f"/gcs/{path}"
        mounts.append({"name": "bucket", "mountPath": "/gcs"})
        csi = {
            "driver": "gcsfuse.csi.storage.gke.io",
            "volumeAttributes": {"bucketName": bucket, "mountOptions": "implicit-dirs"},
        }
        volumes.append({"name": "bucket", "csi": csi})
        annotations["gke-gcsfuse/volumes"] = "true"
    for number, item in enumerate(volume):
        claim, _, path = item.partition(":")
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", claim) or not re.fullmatch(r"(/[^/:]+)+", path):
            raise Mistake(f"--volume={item}: it takes CLAIM:/PATH, a PersistentVolumeClaim and where it is mounted.")
        mounts.append({"name": f"volume-{number}", "mountPath": path})
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
    kept = [mount["mountPath"] for mount in mounts]
    twice = [path for path in [*kept, "/dev/shm"] if [*kept, "/dev/shm"].count(path) > 1]
    if twice:
        raise Mistake(f"two volumes are mounted at {twice[0]}.")
    if (
        not any(pathlib.PurePosixPath(folder).is_relative_to(path) for path in kept)
        or ".." in pathlib.PurePosixPath(folder).parts
    ):
        raise Mistake(
            f"--workdir={workdir}: a pod's own disk is lost when it restarts and seen by no other; give gs://BUCKET/FOLDER,"
            " or a folder under the path of a --volume=CLAIM:/PATH."
        )
    return folder, mounts, volumes, annotations


def labels(items: Sequence[str], option: str) -> dict[str, str]:
    """KEY=VALUE arguments as Kubernetes labels."""
    found = {}
    for item in items:
        key, _, value = item.partition("=")
        name = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
        if not re.fullmatch(rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{name}", key) or not re.fullmatch(f"({name})?", value):
            raise Mistake(f"{option}={item}: it takes KEY=VALUE, a Kubernetes label.")
        found[key] = value
    return found


def check_name(name: str, hardware: Hardware) -> None:
    """Raises `Mistake` where the name cannot be a host name, or makes one of more than 63 characters."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise Mistake(
            f"--name={name}: it takes small letters, digits and dashes, beginning with a letter and not ending with a dash."
        )
    pod = f"{name}-{hardware.job}-{hardware.replicas - 1}-{hardware.hosts - 1}"
    if len(pod) + POD_SUFFIX > 63:
        most = len(name) - (len(pod) + POD_SUFFIX - 63)
        raise Mistake(f"--name={name}: {len(name)} characters, but with a pod's number behind it there is room for {most}.")


def manifest(arguments: argparse.Namespace) -> dict[str, Any]:
    """The template's fields. Raises `Mistake`."""
    hardware = chosen_hardware(arguments)
    check_name(arguments.name, hardware)
    folder, mounts, volumes, pod_annotations = storage(arguments.workdir, arguments.volume)
    if any(word == "--workdir" or word.startswith("--workdir=") for word in arguments.command):
        raise Mistake("the command has a --workdir of its own; give it before the --, where it decides what is mounted.")
    command = [*arguments.command, f"--workdir={folder}"]
    several = hardware.hosts * hardware.replicas > 1
    gpu = hardware.resource == "nvidia.com/gpu"
    if gpu:  # NCCL's processes share memory through it, and a container's own has 64 MiB
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    # Keeps the pods of one slice in one node pool, where several pools have the same topology.
    one_pool = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    for option, value in (("--namespace", arguments.namespace), ("--service-account", arguments.service_account)):
        if value is not None and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", value):
            raise Mistake(f"{option}={value}: it takes small letters, digits and dashes.")
    if not re.fullmatch(r"[^\s\"'\\]+", arguments.image):
        raise Mistake(f"--image={arguments.image}: it takes a container image, such as REGISTRY/gptjax:1.")
    return {
        "name": arguments.name,
        "namespace": arguments.namespace,
        "labels": labels(arguments.label, "--label"),
        "annotations": one_pool if several and not gpu else {},
        "max_restarts": arguments.max_restarts,
        "job": hardware.job,
        "replicas": hardware.replicas,
        "hosts": hardware.hosts,
        "pod_annotations": pod_annotations,
        "grace_seconds": arguments.grace_seconds,
        "service_account": arguments.service_account,
        "node_selector": {**hardware.node_selector, **labels(arguments.node_selector, "--node-selector")},
        "tolerations": [{"key": hardware.resource, "operator": "Exists", "effect": "NoSchedule"}],
        "image": arguments.image,
        "command": [literal(word) for word in command],
        "env": environment(arguments.name, hardware, arguments.env),
        "ports": [{"containerPort": COORDINATOR_PORT}] if several and gpu else [],
        "limits": {hardware.resource: hardware.per_host},
        "volume_mounts": mounts,
        "volumes": volumes,
    }


def chosen_hardware(arguments: argparse.Namespace) -> Hardware:
    """TPU slices or GPU nodes. Raises `Mistake` where the options name both, or neither."""
    gpu_options = {"--gpu": arguments.gpu, "--gpus-per-node": arguments.gpus_per_node, "--nodes": arguments.nodes}
    tpu_options = {"--num-slices": arguments.num_slices, "--chips-per-host": arguments.chips_per_host}
    if arguments.topology is not None:
        given = [option for option, value in gpu_options.items() if value is not None]
        if given:
            raise Mistake(f"--topology={arguments.topology} asks for TPUs, and {given[0]} for GPUs.")
        return tpu_hardware(arguments.topology, arguments.num_slices or 1, arguments.chips_per_host)
    given = [option for option, value in tpu_options.items() if value is not None]
    if given:
        raise Mistake(f"{given[0]} is for TPUs and needs --topology, such as --topology=v5p:4x4x4.")
    if arguments.gpus_per_node is None:
        raise Mistake("there is neither --topology=v5p:4x4x4 (TPUs) nor --gpus-per-node=8 --nodes=4 (GPUs).")
    return gpu_hardware(arguments.gpu, arguments.gpus_per_node, arguments.nodes or 1)


def block(value: Any, indent: int) -> list[str]:
    """A dict or list as indented YAML lines. Strings are written as JSON writes them, which YAML reads alike."""
    pad = " " * indent
    lines = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        head = f"{key}:" if isinstance(value, dict) else "-"
        if not isinstance(item, dict | list):
            lines.append(f"{pad}{head} {json.dumps(item, ensure_ascii=False)}")
        elif isinstance(value, dict):
            lines += [f"{pad}{head}", *block(item, indent + 2)]
        else:
            first, *rest = block(item, indent + 2)
            lines += [f"{pad}- {first.lstrip()}", *rest]
    return lines


def render(fields: dict[str, Any], template: str) -> str:
    """`template` with its `KEY: ${field}` lines filled in; a line whose field is None or empty is left out, its heading too."""
    lines: list[str] = []
    comment = re.compile(r"^\s*#")
    for line in template.splitlines():
        found = re.fullmatch(r"(\s*)((?:- )?)(\w+): \$\{(\w+)\}", line)
        if found is None or comment.match(line):
            lines.append(line)
            continue
        pad, dash, key, field = found.groups()
        value = fields[field]
        if isinstance(value, dict | list):
            if value:
                lines += [f"{pad}{dash}{key}:", *block(value, len(pad) + len(dash) + 2)]
        elif value is not None:
            lines.append(f"{pad}{dash}{key}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(without_empty_headings(lines)) + "\n"


def without_empty_headings(lines: list[str]) -> list[str]:
    """`lines` less each `KEY:` that nothing indented further follows."""
    kept: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        depth, next_depth = (len(text) - len(text.lstrip()) for text in (line, following))
        if line.endswith(":") and not line.lstrip().startswith("#") and next_depth <= depth:
            continue
        kept.append(line)
    return kept


class Parser(argparse.ArgumentParser):
    """Says a mistake in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message}; --help lists the options.")


def at_least(least: int) -> Any:
    """An argparse type: whole numbers from `least`."""

    def number(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return int(text)

    return number


def parser() -> Parser:
    """The command line."""
    made = Parser(
        prog="render_jobset.py",
        usage="render_jobset.py OPTIONS -- COMMAND (without its --workdir)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--name", required=True, help="the JobSet's name")
    made.add_argument("--image", required=True, help="a container image with gptjax in it")
    made.add_argument("--workdir", required=True, help="gs://BUCKET/FOLDER, or a folder under a --volume; passed to the command")
    made.add_argument("--topology", metavar="TPU:SHAPE", help=f"TPU slices, such as v5p:4x4x4; of {', '.join(TPUS)}")
    made.add_argument(
        "--num-slices", type=at_least(1), metavar="N", help="slices, joined over the data centre's network (default 1)"
    )
    made.add_argument("--chips-per-host", type=at_least(1), metavar="N", help="8 for a 2x4 slice on one machine (default 4)")
    made.add_argument("--gpu", metavar="NAME", help=f"the nodes' GPU, of {', '.join(GPUS)} (default: any)")
    made.add_argument("--gpus-per-node", type=at_least(1), metavar="N", help="GPUs of each node")
    made.add_argument("--nodes", type=at_least(1), metavar="N", help="GPU nodes (default 1)")
    made.add_argument("--max-restarts", type=at_least(0), default=10, metavar="K", help="of the whole run (default 10)")
    made.add_argument("--grace-seconds", type=at_least(1), default=300, metavar="S", help="to save after SIGTERM (default 300)")
    made.add_argument("--volume", action="append", default=[], metavar="CLAIM:/PATH", help="mounts a PersistentVolumeClaim")
    made.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set in the run's environment")
    made.add_argument("--node-selector", action="append", default=[], metavar="KEY=VALUE", help="only nodes with this label")
    made.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="of the JobSet, such as a Kueue queue's")
    made.add_argument("--namespace")
    made.add_argument("--service-account", metavar="NAME", help="Kubernetes service account; a bucket needs one that may write")
    made.add_argument("--apply", action="store_true", help="hand the manifest to kubectl instead of printing it")
    made.add_argument("--dry-run", action="store_true", help="with --apply: only print what kubectl would get, and how")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the manifest, or applies it. Returns the exit status."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
        if not command and not {"-h", "--help"} & set(own):
            raise Mistake("the command is missing: render_jobset.py OPTIONS -- gptjax train --config=...")
        unreadable = [word for word in words if not word.isprintable()]
        if unreadable:
            raise Mistake(f"{unreadable[0]!r} has a character that cannot be printed.")
        arguments = parser().parse_args(own)
        arguments.command = command
        text = render(manifest(arguments), TEMPLATE.read_text(encoding="utf-8"))
    except Mistake as mistake:
        print(f"render_jobset.py: {mistake}", file=sys.stderr)
        return 2
    apply = ["kubectl", "apply", "--filename=-"]
    if not arguments.apply or arguments.dry_run:
        if arguments.apply:
            print(f"# {shlex.join(apply)}, with this as its standard input:")
        print(text, end="")
        return 0
    try:
        return subprocess.run(apply, input=text, text=True, check=False).returncode
    except FileNotFoundError:
        print("render_jobset.py: --apply needs kubectl, and there is none.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
