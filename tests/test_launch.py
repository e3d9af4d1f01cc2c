"""The files in launch/: what accelerate, bash and YAML make of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from ports import free_port

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SBATCH = LAUNCH / "slurm" / "train.sbatch"
WHAT_STARTED = """
import os
from accelerate import Accelerator
accelerator = Accelerator()
line = f"{accelerator.process_index} {accelerator.num_processes} {accelerator.distributed_type.value}\\n"
os.write(1, line.encode())  # in one piece: print's lines of two processes mix
"""
FSDP_PLUGIN = """
from accelerate.utils import FullyShardedDataParallelPlugin
plugin = FullyShardedDataParallelPlugin()
print(plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading, plugin.min_num_params)
"""


def accelerate(*arguments, **env):
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    return subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return [line.split() for line in out.splitlines()]


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_the_file(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision in ("no", "bf16")
    assert config.num_processes >= config.num_machines
    assert path.read_text().startswith("#")


def test_cpu_starts_two_processes_that_know_each_other(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WHAT_STARTED)
    started = accelerate(
        "--config_file", LAUNCH / "cpu.yaml", "--main_process_port", free_port(), script, ACCELERATE_USE_CPU="true"
    )
    assert sorted(lines(started)) == [["0", "2", "MULTI_CPU"], ["1", "2", "MULTI_CPU"]]


@pytest.mark.slow
def test_nodes_starts_a_process_on_each_of_two_machines(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WHAT_STARTED)
    where = ["--main_process_ip", "localhost", "--main_process_port", free_port(), "--num_processes", "2"]
    more = ["--mixed_precision", "no", script]
    machines = [
        accelerate("--config_file", LAUNCH / "nodes.yaml", "--machine_rank", rank, *where, *more, ACCELERATE_USE_CPU="true")
        for rank in "01"
    ]
    assert [line for machine in machines for line in lines(machine)] == [["0", "2", "MULTI_CPU"], ["1", "2", "MULTI_CPU"]]


def test_fsdp2_asks_for_what_it_says(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FSDP_PLUGIN)
    alone = ["--num_processes", "1", "--main_process_port", free_port(), script]
    assert lines(accelerate("--config_file", LAUNCH / "fsdp2.yaml", *alone)) == [["2", "True", "False", "1000000"]]


def test_kubernetes_starts_what_accelerate_understands():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes" / "job.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["command"] + container["args"]]
    assert words[:2] == ["accelerate", "launch"]
    asked = launch_command_parser().parse_args(words[2:])
    assert int(asked.num_machines) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(asked.num_processes) == int(asked.num_machines) * container["resources"]["limits"]["nvidia.com/gpu"]
    assert (ROOT / asked.config_file).is_file()
    assert asked.main_process_ip == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert spec["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert asked.module
    assert [asked.training_script, asked.training_script_args[0]] == ["mtrain", "train"]
    assert int(container["env"][0]["value"]) < spec["terminationGracePeriodSeconds"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in spec["volumes"]}


def test_sbatch_is_correct_bash():
    subprocess.run(["bash", "-n", SBATCH], check=True)


# What the processes do before they end; whether the job goes back into the queue.
CASES = {
    "preempted": ("touch run/preempted", True),
    "preempted-in-a-split": ("mkdir run/split-1; touch run/split-1/preempted", True),
    "failed": ("true", False),
    "cancelled": ("touch run/preempted; kill -TERM $BATCH", False),
}


@pytest.mark.parametrize("case", CASES)
def test_sbatch_requeues_what_was_preempted_and_nothing_else(tmp_path, case):
    """With stand-ins for the programs; test_slurm.py has the real ones."""
    in_step, requeued = CASES[case]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "preempted").touch()  # of the attempt before
    stand_ins(tmp_path, in_step)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_CPUS_PER_TASK": "3",
    }
    batch = f"export BATCH=$$; source {SBATCH}"
    command = ["bash", "-c", batch, "train.sbatch", "some config.yaml", "run", "--train.steps", "4"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 138, done.stderr
    assert (tmp_path / "ranks").read_text() == "1 1 2 -m mtrain train some config.yaml --run_dir run --train.steps 4\n"
    seen = set((tmp_path / "env").read_text().splitlines())
    settings = {"ACCELERATE_MIXED_PRECISION=bf16", "FSDP_VERSION=2"}
    assert seen >= {"MASTER_ADDR=first", "MASTER_PORT=20007", "OMP_NUM_THREADS=3", *settings}
    assert (tmp_path / "scontrol-calls").read_text() == "show hostnames first,second\n" + "requeue 7\n" * requeued


def stand_ins(folder, in_step):
    """Programs that write down how they were called; `srun` starts the second of two processes."""
    programs = {
        "accelerate": "echo a note; printf 'ACCELERATE_MIXED_PRECISION=bf16\\nHOME=x\\nFSDP_VERSION=2\\n'",
        "scontrol": "echo $* >> scontrol-calls; if [[ $1 == show ]]; then echo first; echo second; fi",
        "srun": 'env > env; while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NTASKS=2 exec "$@"',
        "python": f"echo $RANK $LOCAL_RANK $WORLD_SIZE $* > ranks; {in_step}; exit 138",
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)


def test_sbatch_ends_where_accelerate_refuses_the_file(tmp_path):
    stand_ins(tmp_path, "true")
    (tmp_path / "accelerate").write_text(f'#!/bin/bash\nshift; exec {sys.executable} -m accelerate.commands.launch "$@"\n')
    (tmp_path / "bad.yaml").write_text("distributed_type: MULTI_GPU\nnum_procs: 2\n")
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ACCELERATE_CONFIG": "bad.yaml"}
    command = ["bash", str(SBATCH), "config.yaml", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "num_procs" in done.stderr
    assert not (tmp_path / "ranks").exists()
