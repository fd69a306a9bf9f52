"""A link of a chosen rate and latency on loopback: a proxy in a process of its own, in front of a server."""

import argparse
import asyncio
import contextlib
import socket
import subprocess
import sys
from types import TracebackType

CHUNK_BYTES = 16384
QUEUED_BYTES = 1 << 17
"""What waits in the link at most, and in the kernel on each of its ends: a router's buffer, not a disk's."""


class ShapedLink:
    """Runs the proxy while it is entered.

    Args:
        address: Where the server listens.
        bits_per_s: Rate of each direction, shared by all connections.
        latency_s: Round trip; half of it in each direction.
        port: Where it listens; 0 = wherever there is room.

    Attributes:
        address: Where agents connect to.
    """

    def __init__(self, address: str, *, bits_per_s: float, latency_s: float, port: int = 0) -> None:
        command = [sys.executable, __file__, address, str(bits_per_s), str(latency_s), str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()

    def __enter__(self) -> "ShapedLink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Way:
    """One direction: bytes leave one after the other at the rate, and arrive half a round trip later."""

    def __init__(self, bytes_per_s: float, delay_s: float) -> None:
        self.bytes_per_s, self.delay_s = bytes_per_s, delay_s
        self.free_at_s = 0.0

    async def carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Forward a connection's bytes until it ends."""
        loop, room = asyncio.get_running_loop(), asyncio.Semaphore(QUEUED_BYTES // CHUNK_BYTES)
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.create_task(self._deliver(queue, target, room))
        with contextlib.suppress(OSError):
            while chunk := await source.read(CHUNK_BYTES):
                await room.acquire()
                self.free_at_s = max(self.free_at_s, loop.time()) + len(chunk) / self.bytes_per_s
                queue.put_nowait((self.free_at_s + self.delay_s, chunk))
        queue.put_nowait((0.0, b""))
        await delivering
        target.close()

    async def _deliver(
        self, queue: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter, room: asyncio.Semaphore
    ) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while True:
                due_s, chunk = await queue.get()
                if not chunk:
                    return
                if (wait_s := due_s - loop.time()) > 0:
                    await asyncio.sleep(wait_s)
                target.write(chunk)
                await target.drain()
                room.release()


async def serve(address: str, bits_per_s: float, latency_s: float, listen: int) -> None:
    """Listen, print where, and forward."""
    host, _, port = address.rpartition(":")
    up, down = (Way(bits_per_s / 8, latency_s / 2) for _ in range(2))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            end = socket.socket(proto=socket.IPPROTO_TCP)  # else no bytes leave at once
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUED_BYTES)
            end.setblocking(False)
            await asyncio.get_running_loop().sock_connect(end, (host, int(port)))
            from_server, to_server = await asyncio.open_connection(sock=end)
        except OSError:
            writer.close()
            return
        await asyncio.gather(up.carry(reader, to_server), down.carry(from_server, writer))

    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUED_BYTES)
    listener.bind(("127.0.0.1", listen))
    server = await asyncio.start_server(connected, sock=listener)
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("bits_per_s", type=float)
    parser.add_argument("latency_s", type=float)
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    asyncio.run(serve(options.address, options.bits_per_s, options.latency_s, options.port))
