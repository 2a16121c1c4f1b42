"""The links before the members: what passes, what is held back, in which direction, and who hears of an end."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from typing import TYPE_CHECKING

import pytest

from faults.links import Links
from servers import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

DIALLER = b"GET /raft HTTP/1.1\r\nHost: x\r\nX-Server-From: 1f\r\n\r\n"


class Echo(socketserver.BaseRequestHandler):
    """Gives back what it is given."""

    def handle(self) -> None:
        ended.clear()
        try:
            while data := self.request.recv(4096):
                self.request.sendall(data)
        except OSError:
            pass
        ended.set()


class Server(socketserver.ThreadingTCPServer):
    """One thread a connection, none of them waited for."""

    daemon_threads = True
    block_on_close = False


ended = threading.Event()


@pytest.fixture
def upstream() -> Iterator[tuple[str, int]]:
    with Server(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield "127.0.0.1", server.server_address[1]
        server.shutdown()


@pytest.fixture
def links() -> Iterator[Links]:
    with Links() as made:
        yield made


def dial(links: Links, upstream: tuple[str, int], client: str | None = "A") -> socket.socket:
    port = links.listen("m0", upstream, client=client)
    dialled = socket.create_connection(("127.0.0.1", port), timeout=5)
    dialled.settimeout(0.3)
    return dialled


def answered(dialled: socket.socket, said: bytes = b"hello") -> bool:
    dialled.sendall(said)
    return comes(dialled, said)


def comes(dialled: socket.socket, said: bytes) -> bool:
    heard = b""
    try:
        while len(heard) < len(said):
            part = dialled.recv(4096)
            if not part:
                break
            heard += part
    except TimeoutError:
        return False
    return heard == said


@pytest.mark.parametrize("pair", [("A", "m0"), ("m0", "A")])
def test_a_cut_holds_back_one_direction_until_it_is_mended(
    links: Links, upstream: tuple[str, int], pair: tuple[str, str]
) -> None:
    with dial(links, upstream) as dialled:
        assert answered(dialled)
        links.cut([pair])
        assert not answered(dialled)
        links.mend([pair])
        assert comes(dialled, b"hello")
        assert answered(dialled)


def test_other_pairs_are_not_cut(links: Links, upstream: tuple[str, int]) -> None:
    with dial(links, upstream) as dialled:
        links.cut([("B", "m0"), ("A", "m1"), ("m1", "m0")])
        assert answered(dialled)


def test_members_are_known_by_what_they_say(links: Links, upstream: tuple[str, int]) -> None:
    links.members["1f"] = "m1"
    with dial(links, upstream, None) as one, dial(links, upstream, None) as other:
        assert answered(one, DIALLER)
        assert answered(other, DIALLER.replace(b"1f", b"2f"))
        links.cut([("m1", "m0")])
        assert not answered(one)
        assert answered(other)


def test_a_half_open_connection_is_told_to_the_server_alone(links: Links, upstream: tuple[str, int]) -> None:
    with dial(links, upstream) as dialled:
        assert answered(dialled)
        assert links.half_open("A", "m0") == 1
        assert ended.wait(5)
        assert not answered(dialled)


def test_a_reset_is_told_to_both(links: Links, upstream: tuple[str, int]) -> None:
    with dial(links, upstream) as dialled:
        assert answered(dialled)
        assert links.reset("A", "m0") == 1
        assert ended.wait(5)
        with pytest.raises(ConnectionResetError):
            eventually(lambda: answered(dialled))


def test_bytes_are_delayed_and_slowed(links: Links, upstream: tuple[str, int]) -> None:
    with dial(links, upstream) as dialled:
        dialled.settimeout(5)
        links.delay([("A", "m0")], 0.3)
        began = time.monotonic()
        assert answered(dialled)
        assert 0.3 <= time.monotonic() - began < 2
        links.mend()
        links.slow([("m0", "A")], 1000)
        began = time.monotonic()
        assert answered(dialled, b"x" * 500)
        assert 0.4 <= time.monotonic() - began < 3


def test_a_lost_reply_ends_its_connection(links: Links, upstream: tuple[str, int]) -> None:
    with dial(links, upstream) as dialled:
        links.lose([("m0", "A")], 1.0)
        dialled.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            dialled.recv(10)


def test_refused(links: Links, upstream: tuple[str, int]) -> None:
    port = links.listen("m0", upstream, client="A")
    links.refuse("A", "m0", on=True)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    links.refuse("A", "m0", on=False)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as dialled:
        assert answered(dialled)


def test_a_link_that_leads_elsewhere(links: Links, upstream: tuple[str, int]) -> None:
    port = links.listen("m0", ("127.0.0.1", 1), client="A")
    assert links.retarget("A", "m0", upstream) == ("127.0.0.1", 1)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as dialled:
        assert answered(dialled)
