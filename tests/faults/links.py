"""TCP links between workers and members, and among members, that can be cut, delayed, slowed and broken, per direction.

A link passes bytes and knows nothing of what they mean, but for one thing: a connection between members names its
dialler in the header that raft's HTTP requests carry, so that a link from one member to one other can be cut alone.
"""

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Self, TypeVar

from stepclaim.embedded import free_ports

T = TypeVar("T")

_CHUNK = 1 << 16
_QUEUE = 64
_DIALLER = re.compile(rb"\r\nX-Server-From: ([0-9a-f]+)\r\n", re.IGNORECASE)
_ABRUPT = struct.pack("ii", 1, 0)


@dataclass
class Way:
    """What becomes of the bytes that one party sends to another."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    delay: float = 0.0
    rate: float = 0.0
    """Bytes a second; 0 is no limit."""
    lose: float = 0.0
    """How likely a chunk's connection is reset instead of passing it on."""

    def clear(self) -> None:
        """Let all pass again; what was held back goes on, as lost packets that are sent again."""
        self.delay = self.rate = self.lose = 0.0
        self.open.set()


class _Connection:
    """One dialled connection, and the one to the server that belongs to it."""

    def __init__(self, links: "Links", client: str | None, server: str) -> None:
        self._links = links
        self.client, self.server = client, server
        self.dialler = ""
        self._writers: list[asyncio.StreamWriter] = []
        self.half_open = False

    @property
    def source(self) -> str:
        """Who dialled; empty as long as a member has not said so."""
        return self.client or self._links.members.get(self.dialler, "")

    async def run(self, client: tuple[asyncio.StreamReader, asyncio.StreamWriter], upstream: tuple[str, int]) -> None:
        """Pass bytes both ways until either end closes."""
        self._writers.append(client[1])
        server = await asyncio.open_connection(*upstream)
        self._writers.append(server[1])
        pumps = [
            asyncio.create_task(self._pump(client[0], server[1], to_server=True)),
            asyncio.create_task(self._pump(server[0], client[1], to_server=False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if self.half_open:  # the dialler goes on to believe in it
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                with contextlib.suppress(OSError):
                    while await client[0].read(_CHUNK):
                        pass
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _way(self, *, to_server: bool) -> Way:
        source = self.source
        return self._links.way(source, self.server) if to_server else self._links.way(self.server, source)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_server: bool) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUE)
        sender = asyncio.create_task(self._send(queue, writer, to_server=to_server))
        try:
            data = b"-"
            while data:
                try:
                    data = await reader.read(_CHUNK)
                except OSError:
                    data = b""
                if self.half_open:
                    return
                if to_server and not self.client and not self.dialler:
                    found = _DIALLER.search(data)
                    if found is not None:
                        self.dialler = found[1].decode()
                due = asyncio.get_running_loop().time() + self._way(to_server=to_server).delay
                while queue.full() and not sender.done():
                    await asyncio.wait({sender}, timeout=0.01)
                if sender.done():
                    return
                queue.put_nowait((due, data))
            await sender
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send(
        self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, *, to_server: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            way = self._way(to_server=to_server)
            await way.open.wait()  # an end is held back, too: in a partition nobody hears of it
            if not data or self.half_open:
                return
            if way.lose and self._links.random.random() < way.lose:
                self.abort()
                return
            try:
                while way.rate and data:
                    part, data = data[:64], data[64:]
                    writer.write(part)
                    await asyncio.sleep(len(part) / way.rate)
                writer.write(data)
                await writer.drain()
            except OSError:
                return

    def abort(self, *, server_only: bool = False) -> None:
        """Reset both connections, or the server's alone: then the dialler hears nothing of it."""
        self.half_open = server_only
        for writer in self._writers[1:] if server_only else self._writers:
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABRUPT)
            writer.transport.abort()

    def close(self) -> None:
        """Close both connections."""
        for writer in self._writers:
            writer.close()


@dataclass
class _Listener:
    client: str | None
    server: str
    upstream: tuple[str, int]
    port: int
    serving: asyncio.Server | None = None


class Links:
    """A context manager around all links of a cluster, served by one thread. Its methods may be called from any."""

    def __init__(self, *, host: str = "127.0.0.1", seed: int = 0) -> None:
        """Choose the address that links listen at."""
        self.host = host
        self.random = Random(seed)  # noqa: S311  # which chunk is lost, nothing secret
        self.members: dict[str, str] = {}
        """The names of members by the ids that they call themselves by."""
        self._ways: defaultdict[tuple[str, str], Way] = defaultdict(self._new_way)
        self._listeners: list[_Listener] = []
        self._connections: set[_Connection] = set()

    @staticmethod
    def _new_way() -> Way:
        way = Way()
        way.open.set()
        return way

    def __enter__(self) -> Self:
        """Start the thread."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all connections and the thread."""
        self._do(self._shut)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def listen(self, server: str, upstream: tuple[str, int], *, client: str | None) -> int:
        """Open a port that leads to a server, and return it. `client` is None where members dial: they say who."""
        listener = _Listener(client, server, upstream, free_ports(1)[0])

        async def listen() -> None:
            await self._listen(listener)
            self._listeners.append(listener)

        self._do(listen)
        return listener.port

    def retarget(self, client: str, server: str, upstream: tuple[str, int]) -> tuple[str, int]:
        """Let a client's link lead elsewhere, reset what goes the old way, and return where that was."""
        (found,) = (each for each in self._listeners if (each.client, each.server) == (client, server))
        before, found.upstream = found.upstream, upstream
        self.reset(client, server)
        return before

    def way(self, source: str, target: str) -> Way:
        """Give the way from one party to another."""
        return self._ways[source, target]

    def cut(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Hold back all bytes that go from the first to the second of each pair. Connections stand."""
        self._on_ways(pairs, lambda way: way.open.clear())

    def delay(self, pairs: Iterable[tuple[str, str]], seconds: float) -> None:
        """Let bytes take so much longer."""
        self._on_ways(pairs, lambda way: setattr(way, "delay", seconds))

    def slow(self, pairs: Iterable[tuple[str, str]], rate: float) -> None:
        """Pass so many bytes a second and connection, a few at a time."""
        self._on_ways(pairs, lambda way: setattr(way, "rate", rate))

    def lose(self, pairs: Iterable[tuple[str, str]], probability: float) -> None:
        """Reset the connection instead of passing on a chunk, so often: what it answered is lost."""
        self._on_ways(pairs, lambda way: setattr(way, "lose", probability))

    def mend(self, pairs: Iterable[tuple[str, str]] | None = None) -> None:
        """Undo all of that, on some ways or on all."""
        self._on_ways(list(self._ways) if pairs is None else pairs, Way.clear)

    def half_open(self, source: str, server: str) -> int:
        """Reset the server's end of all connections between the two that stand; the dialler's end stays open."""
        return self._on_connections(source, server, lambda each: each.abort(server_only=True))

    def reset(self, source: str, server: str) -> int:
        """Reset all connections between the two that stand, and tell how many they were."""
        return self._on_connections(source, server, _Connection.abort)

    def refuse(self, client: str, server: str, *, on: bool) -> None:
        """Refuse a client's new connections to a server, or take them again."""

        async def turn() -> None:
            for each in self._listeners:
                if (each.client, each.server) != (client, server):
                    continue
                if on and each.serving is not None:
                    each.serving.close()
                    each.serving = None
                elif not on and each.serving is None:
                    await self._listen(each)

        self._do(turn)

    def _on_ways(self, pairs: Iterable[tuple[str, str]], change: Callable[[Way], None]) -> None:
        async def turn() -> None:
            for pair in pairs:
                change(self._ways[pair])

        self._do(turn)

    def _on_connections(self, source: str, server: str, do: Callable[[_Connection], None]) -> int:
        async def turn() -> int:
            met = [each for each in self._connections if (each.source, each.server) == (source, server)]
            for each in met:
                do(each)
            return len(met)

        return self._do(turn)

    def _do(self, work: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _listen(self, listener: _Listener) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = _Connection(self, listener.client, listener.server)
            self._connections.add(connection)
            try:
                await connection.run((reader, writer), listener.upstream)
            except (OSError, asyncio.CancelledError):
                pass  # the member is down, or all is over: the dialler sees its connection close
            finally:
                connection.close()
                writer.close()
                self._connections.discard(connection)

        listener.serving = await asyncio.start_server(serve, self.host, listener.port)

    async def _shut(self) -> None:
        for each in self._listeners:
            if each.serving is not None:
                each.serving.close()
        for connection in list(self._connections):
            connection.abort()
        me = asyncio.current_task()
        while others := [task for task in asyncio.all_tasks() if task is not me]:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close in the loop's next turn
