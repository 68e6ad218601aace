"""The ranks of a run end together: one that dies or fails stops the others, which MLX would leave waiting for ever.

A thread of each rank holds a connection to the rank before and the rank after it, as MLX's ring does. A connection that
closes without a goodbye ends the process, though its main thread may be deep inside an exchange of arrays; its own
connections close with it, so the end goes round the ring. A run of one rank has neither threads nor sockets.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import mlx.core as mx

from mlx_cpo_plugin.errors import StoppedError
from mlx_cpo_plugin.exchange import LostRankError, of_all_ranks

# Seconds for neighbours to meet, which all of them begin at the same time.
_MEETING = 20.0
# Seconds in which a rank may end by itself, in its own words, after another one has failed.
_GRACE = 2.0
# A machine that answers no more, for want of power or network, counts as dead after 20 + 4 * 10 seconds.
_SILENCE = {"TCP_KEEPIDLE": 20, "TCP_KEEPALIVE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
_SECRET_BYTES = 32
# What ranks say to each other when they end: this, or the number of the rank that was lost.
_DONE = -1
_WORD_BYTES = 4


# Held inside the outermost context.
_together = threading.Lock()


@contextmanager
def ranks_end_together() -> Iterator[None]:
    """End this process where another rank's ends before the context does; inside another such context: nothing more.

    Every rank has to enter it at the same point. The process ends with the sentence and the exit code of
    :class:`LostRankError`. An exception that leaves the context ends the other ranks, but for a stop, on which all of
    them have agreed.

    Raises:
        LostRankError: MLX noticed it, too, before the process had to be ended.
    """
    if mx.distributed.init().size() == 1 or not _together.acquire(blocking=False):
        yield
        return
    try:
        watch = _Watch()
        try:
            yield
        except StoppedError:
            watch.end(_DONE)
            raise
        except (RuntimeError, LostRankError) as error:  # perhaps MLX's, since a rank is lost
            lost = watch.lost_rank()
            watch.end(watch.rank if lost is None else lost)
            if lost is None:
                raise
            raise LostRankError(lost) from error
        except BaseException:
            watch.end(watch.rank)
            raise
        watch.end(_DONE)
    finally:
        _together.release()


class _Watch:
    """A thread that waits for what the two neighbours have to say."""

    def __init__(self) -> None:
        self.rank = mx.distributed.init().rank()
        self.over = threading.Event()
        self.noticed = threading.Event()
        self.lost: int | None = None
        self.neighbours = _meet_neighbours()
        self.thread = threading.Thread(target=self._listen, name="ranks", daemon=True)
        self.thread.start()

    def lost_rank(self) -> int | None:
        """Return the rank that is lost, if that shows within the grace."""
        self.noticed.wait(_GRACE)
        return self.lost

    def end(self, word: int) -> None:
        """Tell the neighbours, and watch no longer."""
        self.over.set()
        self._tell(word)
        for connection in self.neighbours:
            with suppress(OSError):  # it is gone already
                connection.shutdown(socket.SHUT_RDWR)  # which wakes the thread
        self.thread.join()
        for connection in self.neighbours:
            connection.close()

    def _tell(self, word: int) -> None:
        for connection in self.neighbours:
            with suppress(OSError):
                connection.sendall(word.to_bytes(_WORD_BYTES, "big", signed=True))

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection, neighbour in self.neighbours.items():
                selector.register(connection, selectors.EVENT_READ, neighbour)
            while selector.get_map():
                for key, _ in selector.select():
                    if self.over.is_set():
                        return
                    word = _received(key.fileobj, _WORD_BYTES)
                    lost = int.from_bytes(word, "big", signed=True) if len(word) == _WORD_BYTES else key.data
                    if lost != _DONE:
                        self.lost = lost
                        self.noticed.set()
                        if not self.over.wait(_GRACE):
                            self._end_process(lost)
                    selector.unregister(key.fileobj)

    def _end_process(self, lost: int) -> None:
        """End without the main thread, which may wait inside MLX for ever."""
        error = LostRankError(lost)
        os.write(2, f"\nerror: {error}\n".encode())
        self._tell(lost)
        # In a thread of its own, since whoever reads the output may have gone.
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1.0)
        os._exit(error.exit_code)


def _meet_neighbours() -> dict[socket.socket, int]:
    """Return a connection to the rank after and one to the rank before this one, with their numbers.

    Where any two ranks cannot meet there are none at all, and each rank says so.
    """
    world = mx.distributed.init()
    rank, size = world.rank(), world.size()
    after, before = (rank + 1) % size, (rank - 1) % size
    host, interface = _own_address(rank)
    connections: dict[socket.socket, int] = {}
    fault = "another rank has none"
    family = socket.AF_INET6 if ":" in interface else socket.AF_INET
    with socket.create_server((interface, 0), family=family) as server:
        server.settimeout(_MEETING)
        secret = secrets.token_hex(_SECRET_BYTES // 2)
        ranks = of_all_ranks([host, server.getsockname()[1], secret])
        try:
            to_next = socket.create_connection(ranks[after][:2], _MEETING)
            connections[to_next] = after
            to_next.sendall(ranks[after][2].encode())
            connections[_accepted(server, secret, answer=ranks[before][2])] = before
            if _received(to_next, _SECRET_BYTES) != secret.encode():
                raise ConnectionRefusedError("somebody else answers there")
        except OSError as error:
            fault = f"{ranks[after][0]}: {error}"
    if all(of_all_ranks(len(connections) == 2)):
        for connection in connections:
            _keep_alive(connection)
        return connections
    for connection in connections:
        connection.close()
    print(
        f"Warning: rank {rank} has no connection of its own to ranks {before} and {after} ({fault}); if a rank dies, "
        "the others wait for it until you stop them.",
        file=sys.stderr,
    )
    return {}


def _own_address(rank: int) -> tuple[str, str]:
    """Return where the rank before this one reaches it, and the interface on which to wait for that.

    With the ring backend it is the first address on which MLX itself waits, else this machine's name.
    """
    hostfile = os.environ.get("MLX_HOSTFILE")
    try:
        addresses = json.loads(Path(hostfile).read_text(encoding="utf-8"))[rank] if hostfile else []
        host = str(addresses[0]).rpartition(":")[0]
        return host, host
    except (OSError, ValueError, LookupError, TypeError):
        return socket.gethostname(), ""


def _accepted(server: socket.socket, secret: str, answer: str) -> socket.socket:
    """Return the first connection that knows ``secret``, after answering it.

    Raises:
        OSError: nobody came in time.
    """
    deadline = monotonic() + _MEETING
    while True:
        connection, _ = server.accept()
        connection.settimeout(max(0.1, deadline - monotonic()))
        with suppress(OSError):
            if _received(connection, _SECRET_BYTES) == secret.encode():
                connection.sendall(answer.encode())
                return connection
        connection.close()


def _received(connection: Any, size: int) -> bytes:
    """Return the next ``size`` bytes, or fewer if the connection ends before."""
    content = b""
    with suppress(OSError):
        while len(content) < size and (more := connection.recv(size - len(content))):
            content += more
    return content


def _keep_alive(connection: socket.socket) -> None:
    """Wait for words without end, but notice a machine that is gone without one."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _SILENCE.items():
        if hasattr(socket, name):  # each system has some of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
