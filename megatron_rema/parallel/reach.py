"""Words between ranks that have no process group yet: by way of the launcher's store, and straight from one rank to another.

A collective among ranks that cannot reach each other hangs and names nobody. Here every wait has an end, and says whom it waited for.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

PAYLOAD_BYTES = 16 * 1024  # above any packet size: a network that drops large packets alone is found too
RETRY_S = 0.05


def meet(store: dist.Store, rank: int, world: int, *, wait_s: float) -> dist.Store:
    """A part of ``store`` to which no earlier start of these workers wrote: a launcher that starts workers again hands out the same store,
    and with it the addresses of the dead.

    Rank 0 names the round; whoever reads an old name is not in that round's list, and reads again. Raises ValueError naming the ranks that
    did not come within ``wait_s``.
    """
    own, table = secrets.token_hex(8), dist.PrefixStore("meet", store)
    give_up = time.monotonic() + 2 * wait_s
    if rank == 0:
        table.set(f"{own}/0", own)
        table.set("round", own)
        keys = [f"{own}/{other}" for other in range(world)]
        absent = set(_absent(table, keys, wait_s))
        tokens = {other: table.get(key).decode() for other, key in enumerate(keys) if other not in absent}
        table.set(f"{own}/met", json.dumps(tokens))
    while True:
        _expect(not _absent(table, ["round"], max(give_up - time.monotonic(), RETRY_S)), wait_s)
        name = table.get("round").decode()
        table.set(f"{name}/{rank}", own)
        if not _absent(table, [f"{name}/met"], RETRY_S):
            tokens = json.loads(table.get(f"{name}/met"))
            if tokens.get(str(rank)) == own:
                _all_came([other for other in range(world) if str(other) not in tokens], wait_s)
                return dist.PrefixStore(name, store)
            time.sleep(RETRY_S)
        _expect(time.monotonic() < give_up, wait_s)


def launchers_store(store: dist.Store, rank: int) -> dist.Store:
    """A store that does not live in a rank: the meeting place of torchrun where MEGATRON_REMA_MEETING (HOST:PORT) names it, as
    launch/multi_node.sh does, because rank 0's own process hosts the other one there; else ``store``, which torchrun hosts.

    In it, a part of this start's own. Ranks have met before; ``store`` is then this start's too.
    """
    meeting = os.environ.get("MEGATRON_REMA_MEETING")
    if meeting is None:
        return store
    if rank == 0:
        store.set("launchers_store", secrets.token_hex(8))
    host, _, port = meeting.rpartition(":")
    outside = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=60))
    return dist.PrefixStore(f"megatron_rema/{store.get('launchers_store').decode()}", outside)


class Mailbox:
    """Each rank's word to all, by way of rank 0: 2 N messages, not N squared."""

    def __init__(self, store: dist.Store, rank: int, world: int, wait_s: float) -> None:
        self._store, self._rank, self._world, self._wait_s = store, rank, world, wait_s

    def exchange(self, name: str, value: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's ``value``, in rank order. Raises ValueError naming the ranks that said nothing within ``wait_s``."""
        store, keys = self._store, [f"{name}/{rank}" for rank in range(self._world)]
        store.set(f"{name}/{self._rank}", json.dumps(value))
        if self._rank == 0:
            silent = _absent(store, keys, self._wait_s)
            store.set(
                name, json.dumps({"silent": silent, "values": [] if silent else [json.loads(text) for text in store.multi_get(keys)]})
            )
        _expect(not _absent(store, [name], 2 * self._wait_s), self._wait_s)
        told = json.loads(store.get(name))
        _all_came(told["silent"], self._wait_s)
        return told["values"]


def _absent(store: dist.Store, keys: list[str], wait_s: float) -> list[int]:
    """The places of those keys that nobody has written within ``wait_s``."""
    try:
        store.wait(keys, timedelta(seconds=wait_s))
    except RuntimeError:  # DistStoreError among them: time ran out
        return [place for place, key in enumerate(keys) if not store.check([key])]
    return []


def _expect(has_answered: bool, wait_s: float) -> None:
    if not has_answered:
        raise ValueError(f"rank 0 did not answer within {2 * wait_s:g} s; look at its output and its host.")


def _all_came(silent: list[int], wait_s: float) -> None:
    if silent:
        raise ValueError(
            f"ranks {', '.join(map(str, silent))} did not report within {wait_s:g} s (trainer.preflight.wait_s); they hang or died before "
            "their first collective: look at their output and their hosts."
        )


def is_first(store: dist.Store, name: str, *, wait_s: float) -> bool:
    """Whether nobody asked before under this ``name``. True too where the store does not answer within ``wait_s``: it may be gone."""
    answers: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError):  # DistNetworkError among them: the store is gone
            answers.append(store.add(name, 1))

    asking = threading.Thread(target=ask, daemon=True)  # a store behind a cut link answers never
    asking.start()
    asking.join(wait_s)
    return not answers or answers[0] == 1


def gloo_address() -> str:
    """Where gloo of this process listens: the interface that GLOO_SOCKET_IFNAME names, else what the host's name resolves to, else the
    loopback. Raises ValueError for an interface that is not there."""
    interfaces = psutil.net_if_addrs()
    named = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if named:
        addresses = [a.address for a in interfaces.get(named, ()) if a.family in (socket.AF_INET, socket.AF_INET6)]
        if not addresses:
            raise ValueError(f"GLOO_SOCKET_IFNAME is {named}, which has no address here; interfaces are {', '.join(sorted(interfaces))}")
        return addresses[0]
    try:
        candidates = [row[4][0] for row in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    except socket.gaierror:
        candidates = []
    for candidate in candidates:
        try:
            with socket.socket(_family(candidate), socket.SOCK_STREAM) as trial:
                trial.bind((candidate, 0))
        except OSError:  # a name that resolves to somebody else's address
            continue
        return candidate
    return "127.0.0.1"


def greet(address: str, port: int, token: str, timeout_s: float) -> tuple[float, float, float] | str:
    """(offset of its clock in seconds, error of that, seconds of the whole exchange), or why the rank that owns ``token`` could not be
    reached there."""
    begin = time.monotonic()
    try:
        with socket.create_connection((address, port), timeout=timeout_s) as connection:
            sent = time.time()
            connection.sendall(token.encode().ljust(PAYLOAD_BYTES))
            answer = _read(connection, 8)
            received = time.time()
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        return error.strerror or str(error)
    if len(answer) < 8:
        return "another process answered there"
    return struct.unpack("d", answer)[0] - (sent + received) / 2, (received - sent) / 2, time.monotonic() - begin


@contextmanager
def listener() -> Iterator[tuple[str, int, str, str]]:
    """(address, port, token, fault) of this rank, which answers whoever sends the token with its time."""
    token = secrets.token_hex(16)
    try:
        address = gloo_address()
    except ValueError as error:
        yield "", 0, token, str(error)
        return

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(60)
            if _read(self.request, PAYLOAD_BYTES).strip() == token.encode():
                self.request.sendall(struct.pack("d", time.time()))

    class Server(socketserver.ThreadingTCPServer):
        address_family = _family(address)
        daemon_threads = True
        block_on_close = False
        request_queue_size = 1024

        def handle_error(self, request: object, client_address: object) -> None:
            """A peer that went away is reported by that peer."""

    with Server((address, 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield address, server.server_address[1], token, ""
        finally:
            server.shutdown()
            thread.join()


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (part := connection.recv(count - len(data))):
        data += part
    return data


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
