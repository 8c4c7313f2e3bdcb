"""Two hosts on one machine: network namespaces with addresses and host names of their own, joined by a pair of virtual interfaces.

Needs `ip` (iproute2), `unshare` and `hostname` (util-linux), and root. The run folder is shared, as the file system of a cluster is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.system.test_launch import BASE, ROOT

INTERFACE = "link0"  # in either namespace
PORT = 29500
NAMES = ("a", "b")


def call(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=20)


@dataclass
class Network:
    """The hosts' namespaces; ``prefix`` keeps those of two test runs apart."""

    prefix: str

    def namespace(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def address(self, name: str) -> str:
        return f"10.213.77.{1 + NAMES.index(name)}"

    def inside(self, name: str, *words: str) -> None:
        call("ip", "netns", "exec", self.namespace(name), *words)

    def link(self, state: str) -> None:
        """``down`` or ``up``: the cable, seen from both ends."""
        for name in NAMES:
            self.inside(name, "ip", "link", "set", INTERFACE, state)

    def shape(self, *rule: str) -> None:
        """A queueing rule of `tc` on both ends; none: as before."""
        for name in NAMES:
            if rule:
                self.inside(name, "tc", "qdisc", "replace", "dev", INTERFACE, "root", *rule)
            else:
                self.inside(name, "tc", "qdisc", "del", "dev", INTERFACE, "root")

    def processes(self, name: str) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.namespace(name)], capture_output=True, text=True, timeout=20, check=True)
        return [int(pid) for pid in listed.stdout.split()]

    def kill_all(self, name: str) -> None:
        """Every process of the host, at once."""
        while pids := self.processes(name):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)


@contextmanager
def network() -> Iterator[Network]:
    """Skips, saying why, where namespaces may not be made. Leaves nothing behind."""
    for tool in ("ip", "unshare", "hostname"):
        if shutil.which(tool) is None:
            pytest.skip(f"two hosts need `{tool}` (packages iproute2, util-linux, hostname), which is not here")
    hosts = Network(f"rema{os.getpid()}")
    try:
        try:
            for name in NAMES:
                call("ip", "netns", "add", hosts.namespace(name))
            peer = ["netns", hosts.namespace("b"), "name", INTERFACE]
            call("ip", "link", "add", INTERFACE, "netns", hosts.namespace("a"), "type", "veth", "peer", *peer)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for name in NAMES:
            hosts.inside(name, "ip", "link", "set", "lo", "up")
            hosts.inside(name, "ip", "address", "add", f"{hosts.address(name)}/24", "dev", INTERFACE)
        hosts.link("up")
        yield hosts
    finally:
        for name in NAMES:
            if Path(f"/run/netns/{hosts.namespace(name)}").exists():
                hosts.kill_all(name)
                subprocess.run(["ip", "netns", "del", hosts.namespace(name)], capture_output=True, timeout=20)


@dataclass
class Job:
    """One job on both hosts. Host a is its head, where the nodes meet."""

    hosts: Network
    folder: Path  # of the run
    logs: Path
    arguments: list[str]
    ranks: int  # of a host
    launchers: dict[str, subprocess.Popen] = field(default_factory=dict)
    starts: list[tuple[str, Path]] = field(default_factory=list)

    def start(self, name: str) -> None:
        hosts, log = self.hosts, self.logs / f"{len(self.starts)}_{name}.txt"
        variables = {
            "NNODES": "2",
            "HEAD": f"{hosts.address('a')}:{PORT}",
            "JOB_ID": "two-hosts",
            "NPROC": str(self.ranks),
            "MAX_RESTARTS": "20",
        }
        variables |= {"NODE_ADDR": hosts.address(name), "GLOO_SOCKET_IFNAME": INTERFACE}
        # `ip netns exec` gives the host mounts of its own; torchrun must be able to resolve its name
        known = self.logs / "etc_hosts"
        known.write_text("127.0.0.1 localhost\n" + "".join(f"{hosts.address(other)} host-{other}\n" for other in NAMES))
        script = f'hostname host-{name} && mount --bind {known} /etc/hosts && exec launch/multi_node.sh "$@"'
        command = ["ip", "netns", "exec", hosts.namespace(name), "unshare", "--uts", "sh", "-c", script, "sh", *self.arguments]
        with log.open("w") as out:
            self.launchers[name] = subprocess.Popen(
                command, cwd=ROOT, env={**BASE, **variables}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.starts.append((name, log))

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for _, log in self.starts)

    def said_by(self, name: str) -> str:
        return "\n".join(log.read_text(errors="replace") for by, log in self.starts if by == name)

    def rows(self) -> list[dict]:
        """Whole rows of the metrics so far."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def steps_said(self) -> int:
        return len(re.findall(r"^step +\d+ ", self.said(), re.M))

    def has_ended(self, name: str) -> bool:
        return self.launchers[name].poll() is not None

    def wait_for(self, is_true: Callable[[], bool], what: str, within_s: float, *, gives_up: bool = False) -> float:
        """Seconds until it was; fails the test with the ends of the logs. ``gives_up``: a launcher may end with an error meanwhile."""
        begin = time.monotonic()
        while not is_true():
            if time.monotonic() - begin > within_s or (any(launcher.poll() for launcher in self.launchers.values()) and not gives_up):
                ends = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for _, log in self.starts[-4:])
                pytest.fail(f"{what}: not within {within_s:g} s\n{ends}")
            time.sleep(0.02)
        return time.monotonic() - begin

    def start_what_failed(self) -> None:
        """As a scheduler does that starts the nodes of a job again one by one."""
        for name in NAMES:
            if self.launchers[name].poll():
                self.hosts.kill_all(name)
                self.start(name)

    def requeue(self) -> None:
        """As a scheduler does that starts all nodes again when one has failed."""
        for name in NAMES:
            self.hosts.kill_all(name)
            self.launchers[name].wait()
        for name in NAMES:
            self.start(name)
