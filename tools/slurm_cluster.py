"""A real SLURM on this machine: one controller and as many node daemons as wanted, for tries and tests of ``slurm/``.

    python tools/slurm_cluster.py up /tmp/slurm --nodes 2        then: source /tmp/slurm/env.sh; sinfo
    python tools/slurm_cluster.py kill-node /tmp/slurm n2        as if its power had failed
    python tools/slurm_cluster.py down /tmp/slurm

Wants Linux and root (not more than a container's root), and Debian's packages slurm-wlm and munge, which it installs
where apt can. Debian builds slurmd with --enable-multiple-slurmd, so that many nodes run on one machine, each a daemon
with a port of its own on 127.0.0.1. Nothing in /etc is read or changed; nothing outside the machine can reach the
daemons. The nodes claim whatever cores and GPUs they are told to: a node's GPU is a device file without a driver, which
SLURM hands out and torch does not see.
"""

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

PACKAGES = ("slurm-wlm", "munge")
NVIDIA_MAJOR = 195
"""Major number of an NVIDIA character device. SLURM sets CUDA_VISIBLE_DEVICES for devices only, not for plain files."""

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL")
"""States that a job does not leave by itself, once SLURM has cleaned up after it."""

CONFIG = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired: 120 s unless told otherwise.
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
# Listen on 127.0.0.1, not on every address.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
# No systemd and no cgroups needed.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
PriorityType=priority/basic
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
# A node that does not answer is down after this; clusters have 300.
SlurmdTimeout={node_timeout}
KillWait={kill_wait}
MinJobAge=3600
MessageTimeout=10
# Take the nodes' sizes from this file, whatever the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] \
CPUs={cpus} RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmError(RuntimeError):
    """The cluster cannot be made, or a command of SLURM failed."""


def why_not() -> str:
    """Why a cluster cannot be made here; empty if it can."""
    if sys.platform != "linux":
        return "SLURM runs on Linux only"
    if os.geteuid() != 0:
        return "SLURM's daemons need root to start jobs"
    missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name, path=_path()) is None]
    if missing and shutil.which("apt-get") is None:
        return f"{', '.join(missing)} not installed, and no apt-get to install {' and '.join(PACKAGES)}"
    return ""


def install() -> None:
    """Install Debian's packages unless their daemons are there.

    Raises:
        SlurmError: apt could not.
    """
    if all(shutil.which(name, path=_path()) for name in ("slurmctld", "slurmd", "munged")):
        return
    environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    # Without the recommended packages 9 are installed, else 43, among them a database.
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *command], env=environ, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise SlurmError(f"apt-get {' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


class SlurmCluster:
    """One cluster, whose files are all in ``folder``.

    Args:
        folder: its path must be short (a socket is in it) and passable for all users; ``None`` makes one under /tmp.
        nodes: they are called n1, n2, ...
        cpus, gpus: what each node claims to have.
        node_timeout: seconds after which a node that does not answer is down.
        kill_wait: seconds between a job's SIGTERM and its SIGKILL.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        nodes: int = 2,
        cpus: int = 8,
        gpus: int = 8,
        node_timeout: int = 10,
        kill_wait: int = 5,
    ) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.nodes, self.cpus, self.gpus = nodes, cpus, gpus
        self.node_timeout, self.kill_wait = node_timeout, kill_wait
        self.config = self.folder / "etc" / "slurm.conf"
        self.environ = {"SLURM_CONF": str(self.config)}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------------------------------------ start and stop

    def start(self, timeout: float = 60) -> None:
        """Write the configuration, start the daemons, and wait until all nodes are idle.

        Raises:
            SlurmError: a daemon did not start; its log is in ``folder/log``.
        """
        for name in ("etc", "run", "log", "state", "spool", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name).chmod(0o755)
        self.folder.chmod(0o755)  # munged wants its socket where every user can reach it
        self._write_config()
        run = self.folder / "run"
        self._daemon(
            "munged",
            f"--key-file={self.folder}/etc/munge.key",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={self.folder}/state/munged.seed",
        )
        # -c: a clean state. Else nodes come back drained if they were drained when the cluster was stopped.
        self._daemon("slurmctld", "-c", "-f", str(self.config))
        for name in self.node_names:
            self.start_node(name)
        self._wait_until_idle(timeout)

    def start_node(self, name: str) -> None:
        """Start a node's daemon, also again after :meth:`kill_node`."""
        self._daemon("slurmd", "-N", name, "-f", str(self.config))

    def stop(self) -> None:
        """Cancel all jobs and end the daemons, and only those: by their process ids."""
        if (self.folder / "run" / "slurmctld.pid").exists():
            subprocess.run(
                [_which("scancel"), "--quiet", "--user=root"],
                env=os.environ | self.environ,
                timeout=30,
                capture_output=True,
            )
            self._wait_until_empty()
        daemons = [pid for file in sorted(self.folder.glob("run/*.pid")) if (pid := _daemon_pid(file))]
        for pid in daemons:
            _signal(pid, signal.SIGTERM)
        deadline = time.monotonic() + 15
        while any(map(_alive, daemons)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in [*daemons, *self._processes()]:
            _signal(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill_node(self, name: str) -> None:
        """Kill a node's daemon and everything that jobs run on it at once, as a power failure does."""
        daemon = _daemon_pid(self.folder / "run" / f"slurmd.{name}.pid")
        assert daemon is not None, f"{name} is not running"
        for pid in [daemon, *self._processes(name)]:
            _signal(pid, signal.SIGKILL)

    @property
    def node_names(self) -> list[str]:
        return [f"n{number + 1}" for number in range(self.nodes)]

    # ------------------------------------------------------------------------------------------ commands

    def run(
        self, *command: str, cwd: Path | None = None, environ: Mapping[str, str] | None = None, timeout: float = 60
    ) -> str:
        """Output of a command (``sbatch``, ``scontrol``, ..., a script that calls them) on this cluster.

        Args:
            environ: what is added to the environment.

        Raises:
            SlurmError: it failed; says why.
        """
        done = self.try_run(*command, cwd=cwd, environ=environ, timeout=timeout)
        if done.returncode:
            raise SlurmError(f"{shlex.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def try_run(
        self, *command: str, cwd: Path | None = None, environ: Mapping[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """As :meth:`run`, whatever the exit code."""
        return subprocess.run(
            [_which(command[0]), *command[1:]],
            cwd=cwd,
            env=os.environ | self.environ | (environ or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, Restarts, NodeList, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job_id: str, timeout: float) -> dict[str, str]:
        """Poll a job until it is over. (``sbatch --wait`` asks at growing intervals and is late by up to 25 s.)

        Raises:
            TimeoutError: it is not.
        """
        deadline = time.monotonic() + timeout
        while (job := self.job(job_id))["JobState"] not in OVER:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is {job['JobState']} ({job['Reason']}) after {timeout:.0f} s")
            time.sleep(0.3)
        return job

    def hostnames(self, node_list: str) -> list[str]:
        """The nodes of SLURM's short form ``n[1-2,4]``."""
        return self.run("scontrol", "show", "hostnames", node_list).split()

    # ------------------------------------------------------------------------------------------ inside

    def _write_config(self) -> None:
        port = _free_ports(self.nodes + 1)
        etc = self.folder / "etc"
        self.config.write_text(
            CONFIG.format(
                folder=self.folder,
                host=socket.gethostname().split(".")[0],
                port=port,
                first_port=port + 1,
                last_port=port + self.nodes,
                nodes=self.nodes,
                cpus=self.cpus,
                gpus=self.gpus,
                node_timeout=self.node_timeout,
                kill_wait=self.kill_wait,
            )
        )
        for number in range(self.gpus):
            self._make_device(self.folder / "dev" / f"nvidia{number}", number)
        (etc / "gres.conf").write_text(f"Name=gpu File={self.folder}/dev/nvidia[0-{self.gpus - 1}]\n")
        (etc / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = etc / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        (self.folder / "env.sh").write_text(f"export SLURM_CONF={shlex.quote(str(self.config))}\n")

    def _make_device(self, path: Path, number: int) -> None:
        path.unlink(missing_ok=True)
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(NVIDIA_MAJOR, number))
        except PermissionError:  # A container without CAP_MKNOD: SLURM counts plain files as GPUs, too.
            path.touch()

    def _daemon(self, *command: str) -> None:
        # Daemons go to the background themselves. Into a file, as a pipe would stay open for as long as they live.
        output = self.folder / "log" / "start.log"
        with output.open("a") as log:
            code = subprocess.run([_which(command[0]), *command[1:]], stdout=log, stderr=log, timeout=60).returncode
        if code:
            raise SlurmError(f"{shlex.join(command)} ended with {code}: {output.read_text()[-2000:]}")

    def _wait_until_idle(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        states: list[str] = []
        while time.monotonic() < deadline:
            # Just `idle`: `sinfo --states=idle` also lists drained nodes and such as have not registered (idle*).
            states = self.try_run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split()
            if states == ["idle"] * self.nodes:
                return
            time.sleep(0.1)
        logs = (self.folder / "log" / "slurmctld.log").read_text()[-2000:]
        raise SlurmError(f"nodes are {states} after {timeout:.0f} s, wanted {self.nodes} idle; {logs}")

    def _wait_until_empty(self) -> None:
        deadline = time.monotonic() + self.kill_wait + 20
        while time.monotonic() < deadline and self.try_run("squeue", "--noheader").stdout.strip():
            time.sleep(0.2)

    def _processes(self, node: str | None = None) -> list[int]:
        """Processes of jobs on a node (or on all), and the slurmstepd above each."""
        marks = {f"SLURM_CONF={self.config}".encode()}
        tasks = [pid for pid, environ in _environments() if marks <= environ and _on_node(environ, node)]
        above = {parent for pid in tasks if (parent := _parent(pid)) and _name(parent).startswith("slurmstepd")}
        return [*tasks, *above]


def _on_node(environ: set[bytes], node: str | None) -> bool:
    if node is None:
        return any(entry.startswith(b"SLURMD_NODENAME=") for entry in environ)
    return f"SLURMD_NODENAME={node}".encode() in environ


def _environments() -> Iterator[tuple[int, set[bytes]]]:
    """Process id and environment of every process that can be read."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield int(folder.name), set((folder / "environ").read_bytes().split(b"\0"))
        except OSError:  # It has ended meanwhile.
            continue


def _parent(pid: int) -> int | None:
    try:
        # The second field is the name in parentheses, which may hold anything; the fourth is the parent.
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _daemon_pid(file: Path) -> int | None:
    """Of a pid file, if the process is still the daemon that wrote it."""
    try:
        pid = int(file.read_text())
    except (OSError, ValueError):
        return None
    return pid if _name(pid).startswith(file.name.split(".")[0]) else None


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _free_ports(count: int) -> int:
    """First of ``count`` ports in a row that nobody listens on, below those that the kernel gives to clients."""
    for first in range(29100 + os.getpid() % 2000, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise SlurmError(f"no {count} free ports in a row between 29100 and 32000")


def _path() -> str:
    return (
        os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    )  # Debian puts daemons there, also for root not always on PATH


def _which(name: str) -> str:
    found = shutil.which(name, path=_path())
    if found is None:
        raise SlurmError(f"{name} is not installed; as root: apt-get install --no-install-recommends slurm-wlm munge")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster")
    up.add_argument("folder", type=Path, help="for its files; DIR/env.sh is to be sourced")
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--cpus", type=int, default=8, help="that each node claims to have")
    up.add_argument("--gpus", type=int, default=8, help="that each node claims to have")
    down = commands.add_parser("down", help="stop it and delete its folder")
    down.add_argument("folder", type=Path)
    kill = commands.add_parser("kill-node", help="kill a node's daemon and all that runs on it")
    kill.add_argument("folder", type=Path)
    kill.add_argument("name")
    given = parser.parse_args(arguments)
    if reason := why_not():
        print(f"error: slurm: {reason}", file=sys.stderr)
        return 2
    if given.command == "up":
        install()
        SlurmCluster(given.folder.absolute(), nodes=given.nodes, cpus=given.cpus, gpus=given.gpus).start()
        print(f"{given.nodes} nodes are idle; now: source {given.folder}/env.sh; sinfo")
    elif given.command == "down":
        SlurmCluster(given.folder.absolute()).stop()
    else:
        SlurmCluster(given.folder.absolute()).kill_node(given.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
