"""The config group `cluster`: where `fewstep submit` sends work, and what it asks for."""

from dataclasses import dataclass, field
from typing import Any

KINDS = ("slurm", "local", "debug")


@dataclass
class ClusterConfig:
    """A site, and what a job asks of it; none of it changes a result. `cluster=slurm|local|debug` are the choices.

    kind: "slurm"; "local", one process in the background of this machine; "debug", this process. partition, account,
    qos, constraint: as sbatch takes them, null leaves the site's default. time: minutes until the limit of a job; work
    that needs longer is saved, requeued and goes on. nodes: of a job that trains; any other takes one task of one
    node. gpus_per_node, cpus_per_node, mem_gb (null: the site's default): of a node. tasks_per_node: processes that
    train there; 0 is one per GPU, at least one. signal_seconds: how long before the limit a job is told to save.
    retries: how often a job whose process was killed is started again. parallel: elements of a job array that run at
    once. probe: before the first job in a folder, see that a node can read it. setup: shell lines before the job
    (modules, environment variables). srun_args: more arguments of srun, container arguments (`--container-image=...`)
    among them. sbatch: more options of sbatch by their long names. python: the command that starts python on a node;
    null is the one that submits.
    """

    kind: str = "local"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: int = 60
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int = 1
    mem_gb: float | None = None
    tasks_per_node: int = 0
    signal_seconds: int = 120
    retries: int = 3
    parallel: int = 256
    probe: bool = True
    setup: list[str] = field(default_factory=list)
    srun_args: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)
    python: str | None = None

    @property
    def tasks(self) -> int:
        """Processes of a node that train."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


def problem(cluster: ClusterConfig) -> str | None:
    """What is wrong with it, in a line that names the key; None if nothing is."""
    if cluster.kind not in KINDS:
        return f"cluster.kind={cluster.kind}: must be one of {', '.join(KINDS)}"
    for key in ("time", "nodes", "cpus_per_node", "parallel"):
        if getattr(cluster, key) < 1:
            return f"cluster.{key}={getattr(cluster, key)}: must be 1 or more"
    for key in ("gpus_per_node", "tasks_per_node", "signal_seconds", "retries"):
        if getattr(cluster, key) < 0:
            return f"cluster.{key}={getattr(cluster, key)}: must be 0 or more"
    if cluster.mem_gb is not None and cluster.mem_gb <= 0:
        return f"cluster.mem_gb={cluster.mem_gb}: must be more than 0, or null"
    if cluster.cpus_per_node < cluster.tasks:
        return f"cluster.cpus_per_node={cluster.cpus_per_node}: must be at least the {cluster.tasks} tasks of a node"
    if cluster.signal_seconds >= 60 * cluster.time:
        return f"cluster.signal_seconds={cluster.signal_seconds}: must be less than the {cluster.time} minutes of time"
    if cluster.kind != "slurm" and cluster.nodes > 1:
        return f"cluster.nodes={cluster.nodes}: cluster={cluster.kind} has one node; use cluster=slurm"
    if cluster.kind != "slurm" and cluster.setup:
        return f"cluster.setup={cluster.setup}: cluster={cluster.kind} runs no shell; set it up before `fewstep submit`"
    return None
