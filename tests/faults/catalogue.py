"""All faults by name."""

from faults import nemesis, nemesis_access
from faults.nemesis import Fault

FAULTS: dict[str, type[Fault]] = {
    kind.name: kind
    for kind in (
        nemesis.KillMember,
        nemesis.KillLeader,
        nemesis.StopLeader,
        nemesis.Partition,
        nemesis.OneWay,
        nemesis.LoseReplies,
        nemesis.Delay,
        nemesis.SlowBytes,
        nemesis.HalfOpen,
        nemesis.Compaction,
        nemesis.Defragmentation,
        nemesis.NoSpace,
        nemesis.DiskFull,
        nemesis.WorkerKill,
        nemesis.WorkerStop,
        nemesis_access.DropReplies,
        nemesis_access.TokenExpiry,
        nemesis_access.CertificateExpiry,
    )
}
