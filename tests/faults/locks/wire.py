"""The tests' proxy for protocols that answer in order: HTTP/1.1, Redis' and ZooKeeper's.

A call's reply is dropped whole, once the server has sent it: "cut" resets the client's connection then, "silence" lets
it stand and passes nothing on it any more, either way.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from typing import TYPE_CHECKING, ClassVar, Protocol

from proxy import EtcdProxy, _Connection

if TYPE_CHECKING:
    from proxy import Call, Fault

_Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Wire(Protocol):
    """How a protocol's messages are told apart, in both directions."""

    def size(self, data: bytes) -> int:
        """Say how long the first message is, 0 if it is not complete."""

    def name(self, request: bytes, number: int) -> str:
        """Name a connection's request for its reply to be dropped; empty if it has none of its own."""

    def is_reply(self, message: bytes, number: int) -> bool:
        """Tell a reply from what the server says by itself."""


class Http:
    """HTTP/1.1 with lengths, as etcd's gateway speaks it."""

    def size(self, data: bytes) -> int:
        """Add up head and body."""
        head, end, _ = data.partition(b"\r\n\r\n")
        if not end:
            return 0
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if length is None and re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
            return data.find(b"\r\n0\r\n\r\n") + 7 if b"\r\n0\r\n\r\n" in data else 0
        whole = len(head) + 4 + (int(length[1]) if length else 0)
        return whole if len(data) >= whole else 0

    def name(self, request: bytes, number: int) -> str:  # noqa: ARG002
        """Take the path's end."""
        return request.split(b" ", 2)[1].decode().removeprefix("/v3/").lstrip("/")

    def is_reply(self, message: bytes, number: int) -> bool:  # noqa: ARG002
        """Tell that it always is."""
        return True


class Resp:
    """Redis' protocol, versions 2 and 3."""

    def size(self, data: bytes) -> int:
        """Walk through the first value."""
        return self._end(data, 0)

    def _end(self, data: bytes, start: int) -> int:
        line = data.find(b"\r\n", start)
        if line < 0:
            return 0
        kind, end = data[start : start + 1], line + 2
        if kind in b"$=!" and (size := int(data[start + 1 : line])) >= 0:
            end += size + 2
        elif kind in b"*~>%|":
            parts = int(data[start + 1 : line]) * (2 if kind in b"%|" else 1)
            for _ in range(parts):
                end = self._end(data, end)
                if not end:
                    return 0
        return end if len(data) >= end else 0

    def name(self, request: bytes, number: int) -> str:  # noqa: ARG002
        """Take the command, with its second word where that is part of it."""
        words = [word.decode(errors="replace") for word in request.split(b"\r\n")[2::2]]
        return " ".join(words[: 2 if words[0] in {"CLIENT", "SCRIPT"} else 1])

    def is_reply(self, message: bytes, number: int) -> bool:  # noqa: ARG002
        """Tell it from a push."""
        return not message.startswith(b">")


class Jute:
    """ZooKeeper's: a length, then a number that the answer repeats; pings and watches have numbers below zero."""

    _NAMES: ClassVar = {
        -11: "close", 1: "create", 2: "delete", 3: "exists", 4: "getData", 5: "setData", 8: "getChildren",
        9: "sync", 12: "getChildren2", 14: "multi", 15: "create2",
    }  # fmt: skip

    def size(self, data: bytes) -> int:
        """Read the length."""
        whole = 4 + int.from_bytes(data[:4])
        return whole if len(data) >= max(4, whole) else 0

    def name(self, request: bytes, number: int) -> str:
        """Read the operation's number; a connection's first message opens the session and has none."""
        if number == 0:
            return "session"
        if int.from_bytes(request[4:8], signed=True) < 0:
            return ""
        code = int.from_bytes(request[8:12], signed=True)
        return self._NAMES.get(code, str(code))

    def is_reply(self, message: bytes, number: int) -> bool:
        """Read the number that it answers."""
        return number == 0 or int.from_bytes(message[4:8], signed=True) >= 0


class _InOrder(_Connection):
    """A client's connection and the one to the server, message by message."""

    def __init__(self, wire: Wire, proxy: EtcdProxy, client: _Ends, server: _Ends) -> None:
        super().__init__(proxy, client, server)
        self.wire, self.silent = wire, False
        self.owed: deque[tuple[Call, Fault | None]] = deque()

    async def _pump_client(self) -> None:
        number, unread = 0, b""
        while data := await self._from_client.read(1 << 16):
            if self.silent:
                continue
            unread += data
            while size := self.wire.size(unread):
                name = self.wire.name(unread[:size], number)
                number += 1
                if name:
                    stream = self._proxy.begin(name)
                    self.owed.append((stream.call, stream.fault))
                unread = unread[size:]
            self._to_server.write(data)
            await self._to_server.drain()

    async def _pump_server(self) -> None:
        number, unread = 0, b""
        with contextlib.suppress(OSError):
            while data := await self._from_server.read(1 << 16):
                unread += data
                while size := self.wire.size(unread):
                    message, unread = unread[:size], unread[size:]
                    self._answer(message, is_reply=self.wire.is_reply(message, number))
                    number += 1
        if self.silent:
            await asyncio.Event().wait()  # the client does not hear of this end
        self._to_client.close()

    def _answer(self, message: bytes, *, is_reply: bool) -> None:
        if is_reply:
            call, fault = self.owed.popleft()
            call.answered.set()
            if fault is not None:
                if fault.kind == "cut":
                    self.cut()
                self.silent = True
                fault.happened.set()
        if not self.silent and not self._to_client.is_closing():
            self._to_client.write(message)


class OrderedProxy(EtcdProxy):
    """`EtcdProxy` for such a protocol: a call's method is the name that its wire gives it."""

    def __init__(self, upstream_endpoint: str, wire: Wire) -> None:
        """Choose a free port before a server."""
        super().__init__(upstream_endpoint)
        self._wire = wire

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(OSError):
            connection = _InOrder(self._wire, self, (reader, writer), await asyncio.open_connection(*self._upstream))
            self._connections.add(connection)
            try:
                await connection.run()
            finally:
                self._connections.discard(connection)
        self._tasks.discard(task)
        writer.close()
