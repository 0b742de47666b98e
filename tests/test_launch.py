"""Launch files cannot be run here, but they parse, and each flag they pass to scripts/pretrain.py is a field of a recipe."""

import pathlib
import re
import subprocess

import pytest
import yaml

import experiments
from sparse_lm.config import children
from sparse_lm.parallel.distributed import Distributed
from sparse_lm.recipe import Recipe

LAUNCH = pathlib.Path(__file__).parent.parent / "scripts" / "launch"
SHELL = sorted(LAUNCH.glob("*.sh"))
OWN_FLAGS = {"--run-dir", "--require-kernels", "--smoke", "--with"}


def known_flags() -> set[str]:
    """Every flag of scripts/pretrain.py, for the default recipe."""
    flags = set(OWN_FLAGS)
    for path, node in children(Recipe()):
        flags |= {f"--{path}.{name}".replace("--.", "--").replace("_", "-") for name in node.__dataclass_fields__}
    return flags


def flags_in(text: str) -> list[str]:
    """The flags that follow scripts/pretrain.py in shell text, comments included; continuation lines joined."""
    joined = text.replace("\\\n", " ")
    joined = re.sub(r'"\n(train="\$train)', " ", joined)
    found = []
    for line in joined.splitlines():
        if "scripts/pretrain.py" in line or "sbatch" in line or "tpu_vm.sh NAME" in line or "--distributed." in line:
            words = re.findall(
                r"--[a-z][\w.-]*\w",
                line.split("sbatch", 1)[-1] if "pretrain.py" not in line else line.split("pretrain.py", 1)[1],
            )
            found += words
    return found


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_parse_and_use_flags_that_exist(path: pathlib.Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    unknown = set(flags_in(text)) - known_flags() - {"--nodes", "--array"}
    assert not unknown, unknown
    assert "--distributed.cluster" in text and "75" in text
    cluster = re.search(r"--distributed\.cluster (\w+)", text)[1]
    assert cluster in str(Distributed.__dataclass_fields__["cluster"].type)
    for name in re.findall(r"[ \n](dense_1b|dense_\w+)\b", text):
        assert name in experiments.names(), name


def test_sbatch_lines_come_before_the_first_command() -> None:
    for path in SHELL:
        lines = path.read_text().splitlines()
        commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
        assert all(i < commands[0] for i, line in enumerate(lines) if line.startswith("#SBATCH")), path


def test_the_jobset_is_whole() -> None:
    job = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert job["kind"] == "JobSet" and job["apiVersion"].startswith("jobset.x-k8s.io/")
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 16 and spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    chips = 1
    for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    container = pod["containers"][0]
    assert chips == spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    command = container["command"]
    assert command[:2] == ["python", "scripts/pretrain.py"] and command[2] in experiments.names()
    assert {word for word in command if word.startswith("--")} <= known_flags()
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_flags_are_read_from_the_scripts() -> None:
    text = (LAUNCH / "slurm_multi_node.sh").read_text()
    assert {"--mesh.fsdp", "--run-dir", "--distributed.cluster"} <= set(flags_in(text))
