"""A proxy before etcd that reads gRPC's calls off the wire and can lose replies, delay requests and cut connections.

It passes bytes on as they are. Two things change on a connection once a fault touched it: a stream's frames are kept
back, and header blocks are written without compression from then on, because HPACK's state would miss the lost ones.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeVar

from hpack import Decoder

from stepclaim.embedded import free_ports

T = TypeVar("T")
Kind = Literal["cut", "silence", "hold"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _WINDOW_UPDATE, _CONTINUATION = 0x0, 0x1, 0x3, 0x8, 0x9
_END_STREAM, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x4, 0x8, 0x20
_MOST = 16384  # bytes that every HTTP/2 end takes in one frame
_STREAMING = frozenset({"LeaseKeepAlive", "Watch", "Snapshot", "Observe"})


@dataclass(frozen=True)
class Call:
    """One RPC as the wire showed it; `requests` holds its messages so far (one, unless it is a stream)."""

    method: str
    path: str
    requests: list[bytes] = field(default_factory=list)
    answered: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    """etcd's reply is complete, whether or not the client was given it."""

    @property
    def request(self) -> bytes:
        """The first message, for `etcd3.etcdrpc`'s classes to parse."""
        return self.requests[0]


@dataclass
class Fault:
    """A fault that was ordered; `happened` is set once it did, and `call` is then the call that it met."""

    method: str
    nth: int
    kind: Kind
    happened: threading.Event = field(default_factory=threading.Event)
    call: Call | None = None


class _Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes
    raw: bytes

    @property
    def content(self) -> bytes:
        """The payload without padding and priority."""
        start = end = 0
        if self.flags & _PADDED:
            start, end = 1, self.payload[0]
        if self.kind == _HEADERS and self.flags & _PRIORITY:
            start += 5
        return self.payload[start : len(self.payload) - end]


@dataclass
class _Stream:
    call: Call
    fault: Fault | None
    held: list[bytes] | None
    unread: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> None:
        self.unread += data
        while len(self.unread) >= 5 and len(self.unread) >= (size := 5 + int.from_bytes(self.unread[1:5])):
            self.call.requests.append(bytes(self.unread[5:size]))
            del self.unread[:size]


class _Headers:
    """Header compression of one direction: always read, and written anew once a block was kept from the receiver."""

    def __init__(self) -> None:
        self.rewrite = False
        self._decoder = Decoder()
        self._decoder.max_allowed_table_size = 1 << 20  # what the receiver allows is between the two ends

    def read(self, frame: _Frame) -> list[tuple[bytes, bytes]]:
        return [(bytes(pair[0]), bytes(pair[1])) for pair in self._decoder.decode(frame.content, raw=True)]

    def write(self, frame: _Frame, headers: list[tuple[bytes, bytes]]) -> bytes:
        if not self.rewrite:
            return frame.raw
        block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers)
        first, *rest = (block[start : start + _MOST] for start in range(0, len(block), _MOST))
        parts = [(_HEADERS, frame.flags & _END_STREAM, first), *((_CONTINUATION, 0, part) for part in rest)]
        parts[-1] = (parts[-1][0], parts[-1][1] | _END_HEADERS, parts[-1][2])
        return b"".join(_frame(kind, flags, frame.stream, part) for kind, flags, part in parts)


def _text(text: bytes) -> bytes:
    """Encode as HPACK does without compression: the length with seven bits at first, then the bytes."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, length = len(text) - 127, b"\x7f"
    while rest > 127:
        length += bytes([rest % 128 + 128])
        rest //= 128
    return length + bytes([rest]) + text


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


async def _read_frame(reader: asyncio.StreamReader) -> _Frame:
    """Read a frame; a HEADERS frame comes with its CONTINUATION frames, as one."""
    head = await reader.readexactly(9)
    payload = await reader.readexactly(int.from_bytes(head[:3]))
    frame = _Frame(head[3], head[4], int.from_bytes(head[5:]) & 0x7FFFFFFF, payload, head + payload)
    if frame.kind != _HEADERS or frame.flags & _END_HEADERS:
        return frame
    block, raw = frame.content, frame.raw
    flags = frame.flags & ~(_PADDED | _PRIORITY)
    while not flags & _END_HEADERS:
        more = await _read_frame(reader)
        assert more.kind == _CONTINUATION, more
        block, raw, flags = block + more.payload, raw + more.raw, flags | more.flags & _END_HEADERS
    return frame._replace(flags=flags, payload=block, raw=raw)


class _Connection:
    """One client's connection and the one to etcd that belongs to it."""

    def __init__(
        self,
        proxy: "EtcdProxy",
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._requests, self._replies = _Headers(), _Headers()
        self._streams: dict[int, _Stream] = {}
        self._client_gone = False

    async def run(self) -> None:
        """Pass frames both ways until either end closes; etcd's side stays while it is owed a held request."""
        server = asyncio.create_task(self._pump_server())
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._pump_client()
            self._client_gone = True
            if not self._owed():
                server.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await server
        finally:
            server.cancel()
            self._to_client.close()
            self._to_server.close()

    def cut(self) -> None:
        """Reset the client's connection: not an orderly end, but as when a host vanishes."""
        sock = self._to_client.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._to_client.transport.abort()

    def let_go(self) -> list[Call]:
        """Send etcd what is held and return those calls."""
        gone = [stream for stream in self._streams.values() if stream.held is not None]
        for stream in gone:
            for raw in stream.held or ():
                self._to_server.write(raw)
            stream.held = None
        return [stream.call for stream in gone]

    def _owed(self) -> bool:
        return any(s.fault is not None and s.fault.kind == "hold" for s in self._streams.values())

    async def _pump_client(self) -> None:
        self._to_server.write(await self._from_client.readexactly(len(_PREFACE)))
        while True:
            try:
                frame = await _read_frame(self._from_client)
            finally:
                await self._proxy.open_way()
            self._to_server.write(self._request(frame))
            await self._to_server.drain()

    async def _pump_server(self) -> None:
        try:
            while not self._client_gone or self._owed():
                frame = await _read_frame(self._from_server)
                await self._proxy.open_way()
                data = self._reply(frame)
                if not self._to_client.is_closing():
                    self._to_client.write(data)
                    with contextlib.suppress(OSError):
                        await self._to_client.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._to_client.close()

    def _request(self, frame: _Frame) -> bytes:
        """Return what of a client's frame goes on to etcd now."""
        stream = self._streams.get(frame.stream)
        if frame.kind == _HEADERS:
            headers = self._requests.read(frame)
            path = dict(headers).get(b":path")
            if stream is None and path is not None:
                stream = self._streams[frame.stream] = self._proxy.begin(path.decode())
                if stream.held is not None:
                    # etcd learns of the call at once (streams must open in order) but gets no message; without the
                    # client's deadline, or it would give up by itself.
                    self._requests.rewrite = True
                    headers = [pair for pair in headers if pair[0] != b"grpc-timeout"]
            return self._requests.write(frame, headers)
        if stream is not None:
            if frame.kind == _DATA:
                stream.feed(frame.content)
            if stream.held is not None and frame.kind in {_DATA, _RST_STREAM}:
                if frame.kind == _DATA:
                    stream.held.append(frame.raw)
                if frame.flags & _END_STREAM and frame.kind == _DATA and stream.fault is not None:
                    stream.fault.happened.set()
                return b""  # the client's giving up is never told
            if frame.kind == _RST_STREAM and not self._owed():
                del self._streams[frame.stream]
        return frame.raw

    def _reply(self, frame: _Frame) -> bytes:
        """Return what of etcd's frame goes on to the client, and do what a fault wants after it."""
        data, stream = frame.raw, self._streams.get(frame.stream)
        if frame.kind == _HEADERS:
            headers = self._replies.read(frame)
            data = self._replies.write(frame, headers)
        if stream is None:
            return data
        fault = stream.fault
        ended = frame.kind == _RST_STREAM or (frame.kind in {_HEADERS, _DATA} and bool(frame.flags & _END_STREAM))
        answered = ended or (frame.kind == _DATA and stream.call.method in _STREAMING)
        if fault is not None and fault.kind != "hold":
            data = b""
            self._replies.rewrite |= frame.kind == _HEADERS
            if frame.kind == _DATA and frame.payload:  # the client can't give back a window that it never saw used
                self._to_server.write(_frame(_WINDOW_UPDATE, 0, 0, len(frame.payload).to_bytes(4)))
        if answered:
            stream.call.answered.set()
            if fault is not None and fault.kind != "hold":
                if fault.kind == "cut":
                    self.cut()
                fault.happened.set()
        if ended:
            del self._streams[frame.stream]
        return data


class EtcdProxy:
    """A context manager; clients dial `.endpoint` instead of etcd. Every method may be called from any thread."""

    def __init__(self, upstream_endpoint: str) -> None:
        """Choose a free port before `upstream_endpoint` ("host:port", no TLS)."""
        host, _, port = upstream_endpoint.rpartition(":")
        self._upstream = host, int(port)
        self._port = free_ports(1)[0]
        self.endpoint = f"127.0.0.1:{self._port}"
        self.calls: list[Call] = []
        self._faults: list[Fault] = []
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._way = asyncio.Event()
        self._way.set()

    def __enter__(self) -> Self:
        """Start to listen."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="etcd-proxy", daemon=True)
        self._thread.start()
        self._do(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cut all connections and end the thread."""
        self._do(self._shut)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def count(self, method: str | None = None) -> int:
        """Return how many calls, of one method or of all, were seen since the last `reset_calls()`."""
        return sum(method in (None, call.method) for call in list(self.calls))

    def reset_calls(self) -> None:
        """Forget the calls seen so far."""
        self.calls.clear()

    def drop_reply(self, method: str, nth: int = 1, how: Literal["cut", "silence"] = "cut") -> Fault:
        """Let the nth call of `method` from now on be done by etcd, and keep its reply from the client.

        "cut" resets the client's connection once etcd has answered; "silence" keeps only that stream's frames back.
        For a streaming method the reply is the stream's first message.
        """
        return self._order(Fault(method, nth, how))

    def hold_request(self, method: str, nth: int = 1) -> Fault:
        """Keep the nth call of `method` from now on away from etcd until `let_go()`, even when its client has given up.

        Other calls pass, on the same connection too.
        """
        return self._order(Fault(method, nth, "hold"))

    def let_go(self, timeout: float = 10.0) -> None:
        """Give etcd the held requests and wait until it has answered them; TimeoutError if it does not in time."""

        async def send() -> list[Call]:
            return [call for connection in list(self._connections) for call in connection.let_go()]

        for call in self._do(send):
            if not call.answered.wait(timeout):
                raise TimeoutError(f"etcd did not answer the held {call.method} within {timeout} s")

    def cut_all(self) -> None:
        """Reset every client's connection. Held requests stay held."""

        async def cut() -> None:
            for connection in list(self._connections):
                connection.cut()

        self._do(cut)

    def blackhole(self, on: bool) -> None:
        """While on, accept connections and forward nothing in either direction; what waited goes on afterwards."""

        async def turn() -> None:
            (self._way.clear if on else self._way.set)()

        self._do(turn)

    def refuse(self, on: bool) -> None:
        """While on, refuse new connections; those that stand stay (see `cut_all`)."""
        self._do(self._deafen if on else self._listen)

    def _order(self, fault: Fault) -> Fault:
        async def order() -> Fault:
            self._faults.append(fault)
            return fault

        return self._do(order)

    def _do(self, work: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def open_way(self) -> None:
        """Wait while the proxy is a black hole."""
        await self._way.wait()

    def begin(self, path: str) -> _Stream:
        """Record a call that begins, and say which fault is meant for it."""
        call = Call(path.rpartition("/")[2], path)
        self.calls.append(call)
        met = None
        for fault in [fault for fault in self._faults if fault.method == call.method]:
            fault.nth -= 1
            if fault.nth == 0 and met is None:
                met = fault
                met.call = call
        self._faults = [fault for fault in self._faults if fault.nth > 0]
        return _Stream(call, met, [] if met is not None and met.kind == "hold" else None)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)

    async def _deafen(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _shut(self) -> None:
        await self._deafen()
        self._way.set()
        for connection in self._connections:
            connection.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the transports close in the loop's next turn

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            upstream = await asyncio.open_connection(*self._upstream)
            connection = _Connection(self, (reader, writer), upstream)
            self._connections.add(connection)
            try:
                await connection.run()
            finally:
                self._connections.discard(connection)
        except OSError:
            pass  # etcd is down: the client sees its connection close
        finally:
            self._tasks.discard(task)
            writer.close()
