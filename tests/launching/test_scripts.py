"""The scripts and the manifest, as far as they can be checked without Slurm and Kubernetes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_zebra.launching import with_torchrun
from megatron_zebra.launching.command import split

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), ROOT / "launch/slurm/train.sbatch"])
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_reads_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run([SHELLCHECK, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "launch/kubernetes/job.yaml").read_text()))


def test_the_manifest_fits_the_schema_of_kubernetes() -> None:
    import kubernetes_validate

    for document in documents():
        kubernetes_validate.validate(document, "1.33", strict=True)


def test_a_misspelt_manifest_does_not() -> None:
    import kubernetes_validate

    job = documents()[1]
    job["spec"]["completionmode"] = job["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError, match="completionmode"):
        kubernetes_validate.validate(job, "1.33", strict=True)


def test_the_manifest_agrees_with_itself() -> None:
    """The words are those that launch/torchrun.sh takes, and names and numbers that occur twice are equal."""
    service, job = documents()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    options, training = split(pod["containers"][0]["args"])
    found, others = with_torchrun.parser().parse_known_args(options)
    assert others == []
    assert training[0].startswith("--config=launch/recipes/")
    assert (ROOT / training[0].removeprefix("--config=")).is_file()
    assert int(found.nnodes) == spec["completions"] == spec["parallelism"]
    assert found.nproc_per_node == pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    host, port = found.rdzv_endpoint.split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


class Slurm:
    """srun and scontrol in bash: each node's task is a process, its signals srun's. The launcher on each node is a fake too."""

    def __init__(self, folder: Path, node: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "root/launch").mkdir(parents=True)
        self.write("root/launch/torchrun.sh", node)
        self.write(
            "bin/scontrol", f'if [ "$1" = show ]; then echo n1; echo n2; else echo "$@" >> {folder}/scontrol; fi'
        )
        # srun hands SIGUSR1 on and ends with the highest exit code; SIGTERM would kill the tasks.
        self.write(
            "bin/srun",
            """while [[ $1 == --* ]]; do shift; done
            pids=""; for node in 0 1; do SLURM_NODEID=$node "$@" & pids="$pids $!"; done
            trap 'kill -USR1 $pids' USR1
            most=0; for pid in $pids; do
                while :; do wait $pid; code=$?; kill -0 $pid 2>/dev/null || break; done
                wait $pid; code=$?; [ $code -gt $most ] && most=$code
            done; exit $most""",
        )
        self.environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "ZEBRA_ROOT": f"{folder}/root"}
        self.environment |= {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        self.environment |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_SUBMIT_DIR": str(folder)}

    def write(self, name: str, text: str) -> None:
        file = self.folder / name
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)

    def start(self, *words: str) -> subprocess.Popen[str]:
        # Slurm runs a copy from its spool.
        shutil.copy(ROOT / "launch/slurm/train.sbatch", self.folder / "slurm_script")
        command = ["bash", str(self.folder / "slurm_script"), *words]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def test_slurm_starts_every_node_with_the_same_words(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, f'echo "$@" > {tmp_path}/words.$SLURM_NODEID')
    job = slurm.start("--max-restarts", "3", "--config", "my.yaml", "--data.train", "[a b]")
    assert job.wait(20) == 0
    words = [(tmp_path / f"words.{node}").read_text() for node in (0, 1)]
    meet = f"--rdzv-endpoint n1:{20000 + 4711} --rdzv-id 4711-0"
    expected = f"--nnodes 2 --nproc-per-node 8 {meet} --max-restarts 3 --config my.yaml --data.train [a b]\n"
    assert words == [expected, expected]
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (2, False)])
def test_slurm_requeues_what_was_saved_before_the_time_was_up(tmp_path: Path, code: int, requeued: bool) -> None:
    slurm = Slurm(
        tmp_path,
        f"trap 'sleep 0.3; exit {code}' USR1; touch {tmp_path}/up.$SLURM_NODEID; while :; do sleep 0.05; done",
    )
    job = slurm.start("--config", "my.yaml")
    until = time.monotonic() + 20
    while not all((tmp_path / f"up.{node}").exists() for node in (0, 1)) and time.monotonic() < until:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == code
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"


def test_slurm_away_from_the_checkout(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "true")
    slurm.environment["ZEBRA_ROOT"] = str(tmp_path)
    job = slurm.start("--config", "my.yaml")
    assert job.wait(20) == 2
    assert job.stdout is not None
    assert job.stdout.read() == f"error: {tmp_path} is not the checkout; submit from there, or set ZEBRA_ROOT\n"


def test_without_slurm(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "true")
    slurm.environment = {name: value for name, value in slurm.environment.items() if not name.startswith("SLURM_")}
    job = slurm.start("--config", "my.yaml")
    assert job.wait(20) == 2
    assert job.stdout is not None
    (line,) = job.stdout.read().splitlines()
    assert line.startswith("error: this is no job of Slurm; submit it: sbatch")
