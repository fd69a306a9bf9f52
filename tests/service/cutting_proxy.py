"""A TCP proxy that cuts its connections when it is told to, or after so many bytes."""

import contextlib
import socket
import threading


class CuttingProxy:
    """Forwards bytes between its own port and a server's.

    Args:
        address: Where the server listens.
        cut_after_bytes: Cut each connection once so many bytes went to the server, as often as `cuts` allows.
        cuts: How often to cut.

    Attributes:
        cuts_left: Cuts still to come.
        sent: What went to the server, a connection each.
    """

    def __init__(self, address: str, *, cut_after_bytes: int = 0, cuts: int = 0) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._cut_after_bytes = cut_after_bytes
        self.cuts_left = cuts
        self.sent: list[bytearray] = []
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Cut every connection now."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        """Cut everything, take no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts: only then is the port free
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                with self._lock:
                    self._pairs.append((client, server))
                threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_upward: bool) -> None:
        forwarded = 0
        sent = bytearray()
        if is_upward:
            with self._lock:
                self.sent.append(sent)
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sent += data if is_upward else b""
                target.sendall(data)
                forwarded += len(data)
                if is_upward and forwarded > self._cut_after_bytes and self._take_cut():
                    break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _take_cut(self) -> bool:
        with self._lock:
            if self.cuts_left == 0:
                return False
            self.cuts_left -= 1
            return True
