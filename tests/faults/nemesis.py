"""What is done to the cluster and to the workers: each fault can be injected and healed, and says what it did."""

import contextlib
import threading
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from random import Random
from typing import Any, ClassVar

import grpc
from etcd3 import etcdrpc

from faults.cluster import GROUPS, NAMES, Admin, Cluster, Member
from faults.fleet import Fleet, Worker
from faults.tape import Tape
from servers import eventually

Pairs = list[tuple[str, str]]


@dataclass
class Scene:
    """Where a fault takes place."""

    cluster: Cluster
    fleet: Fleet
    tape: Tape
    random: Random

    @property
    def lease_ttl(self) -> float:
        """The workers' TTL."""
        return self.fleet.lease_ttl or 3.0

    def some_member(self) -> Member:
        """Choose one."""
        return self.random.choice(self.cluster.members)


class Fault:
    """One fault. A subclass says what it needs, how it is done and how it is undone."""

    name: ClassVar[str]
    needs: ClassVar[dict[str, Any]] = {}
    """The options that the cluster must have been started with."""
    proxies: ClassVar[bool] = False
    """Whether it needs links that are proxies."""
    excludes: ClassVar[frozenset[str]] = frozenset()
    """The faults that it can't share a cluster with."""
    hold: ClassVar[tuple[float, float]] = (2.5, 5.0)
    """For how many seconds it lasts, at least and at most."""
    heals_last: ClassVar[bool] = False
    """Whether it is undone after all that was done with it: it needs members that answer."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.aftermath = ""
        """What was seen when it was undone."""

    def inject(self) -> str:
        """Do it, and say what was done."""
        raise NotImplementedError

    def heal(self) -> None:
        """Undo it."""

    @property
    def links(self) -> Any:
        """The links of the cluster."""
        return self.scene.cluster.links


class KillMember(Fault):
    """One member ends by SIGKILL, and starts again on its data."""

    name = "kill-member"

    def choose(self) -> Member:
        """Choose the member."""
        return self.scene.some_member()

    def inject(self) -> str:
        self.member = self.choose()
        self.member.kill()
        return f"killed {self.member.name}"

    def heal(self) -> None:
        self.member.restart()


class KillLeader(KillMember):
    """The leader ends by SIGKILL."""

    name = "kill-leader"

    def choose(self) -> Member:
        return self.scene.cluster.leader()


class StopLeader(Fault):
    """The leader is stopped for longer than a lease lives, and goes on as if nothing had been."""

    name = "stop-leader"
    hold = (4.5, 6.0)

    def inject(self) -> str:
        self.member = self.scene.cluster.leader()
        self.member.pause()
        return f"stopped {self.member.name}, which led"

    def heal(self) -> None:
        self.member.resume()


def both_ways(one: list[str], other: list[str]) -> Pairs:
    """Give all ways between two sides."""
    return list(product(one, other)) + list(product(other, one))


class Partition(Fault):
    """One member on one side, two on the other; the workers on either side, or both groups on the same."""

    name = "partition"
    hold = (4.0, 6.0)

    def inject(self) -> str:
        random = self.scene.random
        alone = self.scene.cluster.leader() if random.random() < 0.7 else self.scene.some_member()
        others = [name for name in NAMES if name != alone.name]
        with_it = random.choice(([], ["A"], ["B"], ["A"], ["B"], ["A", "B"]))
        self.pairs = both_ways([alone.name, *with_it], [*others, *(group for group in GROUPS if group not in with_it)])
        self.links.cut(self.pairs)
        return f"cut off {alone.name} with the workers of {' and '.join(with_it) or 'no group'}"

    def heal(self) -> None:
        self.links.mend(self.pairs)


class OneWay(Fault):
    """Bytes pass one way only: among members, or between workers and a member."""

    name = "one-way"

    def inject(self) -> str:
        random = self.scene.random
        leader = self.scene.cluster.leader().name
        if random.random() < 0.5:
            others = [name for name in NAMES if name != leader]
            self.pairs = list(product([leader], others) if random.random() < 0.5 else product(others, [leader]))
        else:
            name = random.choice(NAMES)
            self.pairs = [(name, group) if random.random() < 0.7 else (group, name) for group in GROUPS]
        self.links.cut(self.pairs)
        return "cut " + ", ".join(f"{one} to {other}" for one, other in self.pairs)

    def heal(self) -> None:
        self.links.mend(self.pairs)


class LoseReplies(Fault):
    """Now and then a connection is reset instead of giving a member's answer to a worker."""

    name = "lose-replies"
    proxies = True

    def inject(self) -> str:
        self.pairs = list(product(NAMES, GROUPS))
        chance = self.scene.random.choice((0.01, 0.03, 0.1))
        self.links.lose(self.pairs, chance)
        return f"reset connections instead of {chance:.0%} of what members send to workers"

    def heal(self) -> None:
        self.links.mend(self.pairs)


class Delay(Fault):
    """Everything takes longer."""

    name = "delay"
    proxies = True

    def inject(self) -> str:
        random = self.scene.random
        seconds = random.choice((0.05, 0.2, 0.6))
        self.pairs = both_ways(list(GROUPS), list(NAMES))
        if random.random() < 0.5 and seconds < 0.5:
            self.pairs += list(permutations(NAMES, 2))
        self.links.delay(self.pairs, seconds)
        return f"{seconds * 1000:.0f} ms more on {len(self.pairs)} ways"

    def heal(self) -> None:
        self.links.mend(self.pairs)


class SlowBytes(Fault):
    """Bytes trickle."""

    name = "slow-bytes"
    proxies = True

    def inject(self) -> str:
        random = self.scene.random
        groups = random.choice((["A"], ["B"], ["A", "B"]))
        self.pairs = both_ways(groups, list(NAMES))
        rate = random.choice((400, 2000, 8000))
        self.links.slow(self.pairs, rate)
        return f"{rate} bytes a second for {' and '.join(groups)}"

    def heal(self) -> None:
        self.links.mend(self.pairs)


class HalfOpen(Fault):
    """A member's end of the connections is gone, and the other end is not told: nothing heals that but giving up."""

    name = "half-open"
    proxies = True
    hold = (0.5, 1.0)

    def inject(self) -> str:
        random = self.scene.random
        leader = self.scene.cluster.leader().name
        pairs = list(product(GROUPS, NAMES)) if random.random() < 0.5 else list(product(GROUPS, [leader]))
        if random.random() < 0.3:
            pairs += [(other, leader) for other in NAMES if other != leader]
        met = sum(self.links.half_open(*pair) for pair in pairs)
        return f"left {met} connections half open"


class Repeated(Fault):
    """A fault that is done again and again until it is healed."""

    every: ClassVar[float] = 0.3

    def inject(self) -> str:
        self._healed = threading.Event()
        self.times = 0
        said = self.begin()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._thread.start()
        return said

    def _repeat(self) -> None:
        while not self._healed.is_set():
            with contextlib.suppress(grpc.RpcError):
                self.once()
                self.times += 1
            self._healed.wait(self.every)

    def begin(self) -> str:
        """Prepare it, and say what will be done."""
        raise NotImplementedError

    def once(self) -> None:
        """Do it once."""
        raise NotImplementedError

    def heal(self) -> None:
        self._healed.set()
        self._thread.join(30)


class Compaction(Repeated):
    """The past is compacted all the time."""

    name = "compaction"

    def begin(self) -> str:
        return "compacted again and again"

    def once(self) -> None:
        request = etcdrpc.CompactionRequest(revision=self.scene.tape.safe, physical=True)
        self.scene.some_member().admin.call(etcdrpc.KVStub, "Compact", request)


class Defragmentation(Repeated):
    """Members are defragmented one after the other: each answers nothing meanwhile."""

    name = "defragmentation"

    def begin(self) -> str:
        return "defragmented one member after the other"

    def once(self) -> None:
        defragment(self.scene.some_member())


def defragment(member: Member) -> None:
    """Give a member's free space back."""
    member.admin.call(etcdrpc.MaintenanceStub, "Defragment", etcdrpc.DefragmentRequest(), timeout=20)


class NoSpace(Fault):
    """The space quota is reached: etcd takes no writes until space is freed and the alarm disarmed."""

    name = "no-space"
    excludes = frozenset({"disk-full"})  # to defragment takes more room than the small disk has
    needs: ClassVar[dict[str, Any]] = {"quota": 24 << 20}
    hold = (3.0, 5.0)
    heals_last = True

    def inject(self) -> str:
        filler = b"x" * (1 << 20)
        for number in range(200):
            request = etcdrpc.PutRequest(key=f"/filler/{number}".encode(), value=filler)
            try:
                self.scene.cluster.anyone(partial(Admin.call, stub=etcdrpc.KVStub, method="Put", request=request), 1)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    return f"filled the quota with {number} MiB"
                raise
        raise AssertionError("the quota was not reached")

    def heal(self) -> None:
        cluster, tape = self.scene.cluster, self.scene.tape
        gone = etcdrpc.DeleteRangeRequest(key=b"/filler/", range_end=b"/filler0")
        revision = cluster.anyone(lambda admin: admin.call(etcdrpc.KVStub, "DeleteRange", gone)).header.revision
        # what the workers wrote since is told soon; the filler itself is in no watch
        compact = etcdrpc.CompactionRequest(revision=max(tape.safe, revision - 1), physical=True)
        cluster.anyone(lambda admin: admin.call(etcdrpc.KVStub, "Compact", compact, timeout=10))
        cluster.whole()
        for member in cluster.members:
            defragment(member)
        for alarm in cluster.anyone(lambda admin: admin.call(etcdrpc.MaintenanceStub, "Alarm", _alarms(0))).alarms:
            disarm = _alarms(2, member=alarm.memberID, alarm=alarm.alarm)
            cluster.anyone(partial(Admin.call, stub=etcdrpc.MaintenanceStub, method="Alarm", request=disarm))


def _alarms(action: int, *, member: int = 0, alarm: int = 0) -> Any:
    return etcdrpc.AlarmRequest(action=action, memberID=member, alarm=alarm)


class DiskFull(Fault):
    """One member's disk is full: it ends, or goes on as a follower that falls behind."""

    name = "disk-full"
    excludes = frozenset({"no-space"})
    needs: ClassVar[dict[str, Any]] = {"small_disk": "m1"}
    hold = (4.0, 6.0)
    heals_last = True

    def inject(self) -> str:
        self.member = self.scene.cluster.member("m1")
        self.filler = self.scene.cluster.folder / "disk" / "filler"
        written = 0
        with contextlib.suppress(OSError), self.filler.open("wb", buffering=0) as file:
            while True:
                written += file.write(b"x" * 65536)
        return f"filled the disk of {self.member.name} with {written >> 10} KiB"

    def heal(self) -> None:
        self.aftermath = ", which it outlived" if self.member.runs else ", of which it ended"
        self.filler.unlink()
        eventually(self._is_back, 30, interval=0.2)

    def _is_back(self) -> bool:
        """Ask the member; one that ended, be it only now, is started again."""
        if not self.member.runs:
            self.member.restart()
        return self.member.admin.serves()


class WorkerKill(Fault):
    """Workers end by SIGKILL and others take their place."""

    name = "worker-kill"
    hold = (1.0, 3.0)

    def inject(self) -> str:
        fleet = self.scene.fleet
        self.killed = self.scene.random.sample(fleet.alive, self.scene.random.randint(1, 2))
        for worker in self.killed:
            worker.kill()
        return f"killed {', '.join(worker.name for worker in self.killed)}"

    def heal(self) -> None:
        for worker in self.killed:
            self.scene.fleet.replace(worker)


class WorkerStop(Fault):
    """Workers are stopped for longer than their leases live, and go on as if nothing had been."""

    name = "worker-stop"
    hold = (4.5, 6.0)

    def inject(self) -> str:
        fleet = self.scene.fleet
        self.stopped: list[Worker] = self.scene.random.sample(fleet.alive, self.scene.random.randint(1, 2))
        for worker in self.stopped:
            worker.pause()
        return f"stopped {', '.join(worker.name for worker in self.stopped)}"

    def heal(self) -> None:
        for worker in self.stopped:
            worker.resume()
