"""launch/slurm/train.sbatch on a Slurm of two nodes, which this file starts on this machine and stops again.

It needs the programs of Slurm and munge (Debian: slurm-wlm, munge) and root, and installs nothing.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest
import yaml

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
STEPS = 60
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
LIMIT = 240  # seconds for anything that is waited for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm and munge are not installed: no {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd runs jobs as root only"),
]

# A requeued job waits for cred_expire, 120 s by default and 5 s at least, before it starts again.
CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
FirstJobId={controller}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=1
NodeName={host}-second NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs=1
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=2
"""

# Waits in its forward pass in training, so that a signal finds the run at work.
TRUNK = """
import os, time
from torch import nn

class Slow(nn.Sequential):
    def __init__(self, in_features):
        super().__init__(nn.Linear(in_features, 8), nn.ReLU())
        self.out_features = 8

    def forward(self, x):
        if self.training:
            time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
        return super().forward(x)
"""


class Slurm:
    """Commands to a cluster, and what becomes of its jobs."""

    def __init__(self, conf):
        self.env = os.environ | {
            "SLURM_CONF": str(conf),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "ACCELERATE_CONFIG": str(ROOT / "launch" / "cpu.yaml"),
            "ACCELERATE_USE_CPU": "true",
        }

    def __call__(self, *command, cwd=None, **env):
        return subprocess.run(
            command, cwd=cwd, env=self.env | env, check=True, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    def submit(self, folder, run):
        """train.sbatch with two processes on two nodes without GPUs; the steps take a while."""
        size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none", "--time=30"]
        return self("sbatch", "--parsable", *size, SBATCH, "config.yaml", run, cwd=folder, STEP_SECONDS="0.2")

    def state(self, job):
        about = dict(word.split("=", 1) for word in self("scontrol", "show", "job", "-o", job).split() if "=" in word)
        return about["JobState"], int(about["Restarts"])

    def wait(self, job):
        """The state in which a job ended, and how often it was requeued."""
        until(lambda: self.state(job)[0] in ENDED, f"job {job} ends")
        return self.state(job)

    def wait_for_steps(self, job, run):
        until(lambda: len(losses(run)) >= 5 or self.state(job)[0] in ENDED, f"job {job} makes steps")
        assert self.state(job)[0] == "RUNNING", (run.parent / f"mtrain-{job}.log").read_text()


def until(done, what):
    end = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < end, f"not in {LIMIT} s: {what}"
        time.sleep(0.5)


def losses(run):
    """Of metrics.jsonl: step and loss of each line of training, as far as it is written."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@contextmanager
def stopping(command, env, log):
    """A program that runs meanwhile."""
    with log.open("w") as out, subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    with ExitStack() as ports:
        opened = [ports.enter_context(socket.socket()) for _ in range(3)]
        for one in opened:
            one.bind(("localhost", 0))
        controller, first, second = (one.getsockname()[1] for one in opened)
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=host, controller=controller, first=first, second=second))
    cluster = Slurm(conf)
    munge = [f"--{name}={folder}/munge.{end}" for name, end in (("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"))]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as stack:

        def start(name, *command):
            return stack.enter_context(stopping(command, cluster.env, folder / f"{name}.out"))

        def idle():
            found = subprocess.run(["sinfo", "-h", "-p", "low", "-o", "%D %t"], env=cluster.env, capture_output=True, text=True)
            return found.stdout.split() == ["2", "idle"]

        start("munged", "munged", "--foreground", "--force", *munge)
        until((folder / "munge.socket").exists, "munged starts")
        start("slurmctld", "slurmctld", "-D", "-c")
        start("first", "slurmd", "-D", "-N", host)
        start("second", "slurmd", "-D", "-N", f"{host}-second")
        until(idle, f"two nodes are idle; see {folder}")
        yield cluster
        cluster("scancel", "--user=root")
        until(idle, "the jobs are gone")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with a problem, and its run by two processes under torchrun that nothing disturbs."""
    folder = tmp_path_factory.mktemp("problem")
    rng = np.random.default_rng(0)
    x_NF = rng.normal(size=(400, 4))
    task_N = rng.integers(5, size=len(x_NF))
    columns = {f"x{i}": x_NF[:, i] for i in range(4)}
    labels = {"task": [f"t{t}" for t in task_N], "y": x_NF @ rng.normal(size=4) + task_N}
    pacsv.write_csv(pa.table(columns | labels), folder / "table.csv")
    (folder / "slow.py").write_text(TRUNK)
    config = {
        "data": {"path": "table.csv", "layout": "routed", "task": "task", "label": "y"},
        "inputs": {"x*": "Numeric"},
        "split": {"by": "within_task"},
        "model": {"trunk": "slow.Slow"},
        "train": {"steps": STEPS, "global_batch": 16, "lr": 0.01, "log_every": 1, "eval_every": 2.0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "mtrain", "train", "config.yaml", "--run_dir", "undisturbed"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return folder / "undisturbed"


def assert_same_curve(run, undisturbed):
    found, wanted = np.array(losses(run)), np.array(losses(undisturbed))
    assert found[:, 0].tolist() == wanted[:, 0].tolist() == list(range(1, STEPS + 1))
    np.testing.assert_allclose(found[:, 1], wanted[:, 1], rtol=1e-6)


def test_a_job_that_is_signalled_requeues_itself_and_ends_on_the_undisturbed_curve(slurm, undisturbed):
    run = undisturbed.parent / "signalled"
    job = slurm.submit(run.parent, run.name)
    slurm.wait_for_steps(job, run)
    slurm("scancel", "--signal=USR1", job)  # as Slurm does 5 minutes before the job's time ends
    until(lambda: slurm.state(job)[1] == 1, "the job is requeued")
    assert (run / "preempted").is_file()
    assert 0 < len(losses(run)) < STEPS
    assert slurm.wait(job) == ("COMPLETED", 1)
    assert not (run / "preempted").exists()
    assert_same_curve(run, undisturbed)


def test_a_job_that_a_more_urgent_one_pushes_out_comes_back_and_ends_on_the_undisturbed_curve(slurm, undisturbed):
    run = undisturbed.parent / "pushed-out"
    job = slurm.submit(run.parent, run.name)
    slurm.wait_for_steps(job, run)
    urgent = slurm("sbatch", "--parsable", "--partition=high", "--nodes=2", "--wrap=sleep 2", cwd=run.parent)
    assert slurm.wait(urgent) == ("COMPLETED", 0)
    assert slurm.wait(job) == ("COMPLETED", 1)
    assert_same_curve(run, undisturbed)


def test_a_job_that_its_user_cancels_stays_cancelled_with_a_checkpoint(slurm, undisturbed):
    run = undisturbed.parent / "cancelled"
    job = slurm.submit(run.parent, run.name)
    slurm.wait_for_steps(job, run)
    slurm("scancel", job)
    assert slurm.wait(job) == ("CANCELLED", 0)
    until((run / "preempted").is_file, "the run is saved")
    again = slurm.submit(run.parent, run.name)
    assert slurm.wait(again) == ("COMPLETED", 0)
    assert_same_curve(run, undisturbed)
