"""A proxy between an S3 client and its server that does to the bytes what a bad day does.

    python tests/fault_proxy.py --to http://127.0.0.1:PORT [--port N] [--faults FILE] [--log FILE] [FAULT…]

Prints its own address once it listens, and dies with its parent. A FAULT is `KIND:name=value,…`; FILE is a JSON list of
objects with the same names (`fault` is the KIND), and counts anew whenever it is written while the proxy runs.

    503       the answer, instead of the server's
    reset     the connection is reset after every `bytes` of bodies, counted over all of them
    truncate  the body ends after `bytes`, and so does the connection; `lowered=1` lowers Content-Length as well
    stall     after `bytes` of the body nothing comes for `seconds` (without it: until the client goes away)
    flip      the byte at offset `bytes` of the body is another
    rate      `bytes` a second, over all connections together
    call      the shell runs `command`, once, after `bytes` of the first body that has so many; the body waits for it

Each may have `method` (503 and rate: any; else GET, since the client asks by HEAD before), `key` (a pattern of the name
in the bucket: `*/weights.bin`), `first` (so many requests) and `share` with `seed` (so many of them). A body is the
request's in PUT and POST, else the response's. Each request leaves a JSON line in the log when it ends: method, key,
query, range, status, bytes of body that went on, faults.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

BLOCK = 2**20
KINDS = ("503", "reset", "truncate", "stall", "flip", "rate", "call")
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>the fault proxy says so</Message></Error>"


class Over(Exception):
    """This pair of connections ends here."""


class Fault:
    def __init__(self, fault: str, **more: Any) -> None:
        self.kind, self.key = fault, more.pop("key", "*")
        self.method = more.pop("method", "*" if fault in ("503", "rate") else "GET")
        self.left = int(more.pop("first", 1 if fault == "call" else -1))
        self.share, self.random = float(more.pop("share", 1)), random.Random(int(more.pop("seed", 0)))
        self.bytes, self.seconds = int(more.pop("bytes", 0)), float(more.pop("seconds", 0)) or None
        self.lowered, self.command = bool(int(more.pop("lowered", 0))), more.pop("command", "")
        if fault not in KINDS or more or (fault in ("reset", "rate") and self.bytes < 1):
            raise ValueError(f"{fault} {more}: the kinds are {', '.join(KINDS)}; reset and rate have bytes")
        self.lock = threading.Lock()
        self.until = self.bytes  # of reset: bytes to the next one
        self.due = 0.0  # of rate: when the bytes given out so far have passed

    def hits(self, method: str, key: str) -> bool:
        with self.lock:
            if not self.left or not fnmatchcase(method, self.method) or not fnmatchcase(key, self.key):
                return False
            if self.random.random() >= self.share:
                return False
            # A call waits for the first body that is long enough.
            self.left -= self.kind != "call"
            return True

    def once(self) -> bool:
        with self.lock:
            self.left -= 1
            return self.left >= 0

    def room(self, want: int) -> tuple[int, bool]:
        """How many of ``want`` bytes go before the next reset, and whether it comes then."""
        with self.lock:
            self.until -= (now := min(want, self.until))
            cut = not self.until
            self.until = self.until or self.bytes
            return now, cut

    def pace(self, count: int) -> None:
        """Waits until the link has carried ``count`` more. Late sleepers are made up for, up to 50 ms."""
        with self.lock:
            self.due = max(self.due, time.monotonic() - 0.05) + count / self.bytes
            wait = self.due - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class Faults:
    def __init__(self, words: list[str], file: Path | None) -> None:
        self.fixed, self.file, self.lock = [self._word(word) for word in words], file, threading.Lock()
        self.read: list[Fault] = []
        self.seen: tuple[int, int] | None = None

    @staticmethod
    def _word(word: str) -> Fault:
        kind, _, rest = word.partition(":")
        return Fault(kind, **dict(pair.split("=", 1) for pair in rest.split(",") if pair))

    def now(self) -> list[Fault]:
        if self.file is None:
            return self.fixed
        with self.lock, contextlib.suppress(FileNotFoundError):
            found = self.file.stat()
            if self.seen != (found.st_mtime_ns, found.st_size):
                try:
                    self.read = [Fault(**item) for item in json.loads(self.file.read_text())]
                    self.seen = (found.st_mtime_ns, found.st_size)
                except (ValueError, TypeError) as error:  # half written: the old ones hold until it is whole
                    print(f"fault_proxy  {self.file}: {error}", file=sys.stderr)
        return self.fixed + self.read


class Wire:
    """A connection, with what was read of it beyond the last head."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.ahead = sock, b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def until(self, end: bytes) -> bytes:
        while (at := self.ahead.find(end)) < 0:
            more = self.sock.recv(65536)
            if not more:
                raise Over
            self.ahead += more
        found, self.ahead = self.ahead[: at + len(end)], self.ahead[at + len(end) :]
        return found

    def gone(self) -> bool:
        """Whether the other end has closed (or said something unasked, which no server does)."""
        return self.heard(0, select.POLLIN)

    def heard(self, seconds: float | None, what: int) -> bool:
        poll = select.poll()
        poll.register(self.sock, what)
        return bool(poll.poll(None if seconds is None else seconds * 1000))


def header(head: bytes, name: str) -> str:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name.encode():
            return value.strip().decode("latin-1")
    return ""


class Pair:
    """One client's connection and the one that it has to the server."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self.proxy, self.client, self.server = proxy, Wire(client), Wire(socket.create_connection(proxy.to))
        self.pipe = os.pipe()
        with contextlib.suppress(PermissionError):  # one user's pipes are bounded together; a small one only costs time
            fcntl.fcntl(self.pipe[0], fcntl.F_SETPIPE_SZ, BLOCK)

    def serve(self) -> None:
        try:
            while True:
                self.request(self.client.until(b"\r\n\r\n"))
        except (Over, OSError):
            pass
        finally:
            for end in self.pipe:
                os.close(end)
            self.client.sock.close()
            self.server.sock.close()

    def request(self, head: bytes) -> None:
        method, target, _ = head.split(b"\r\n")[0].decode("latin-1").split(" ", 2)
        path = urlsplit(target)
        key = unquote(path.path).lstrip("/").partition("/")[2]
        faults = [fault for fault in self.proxy.faults.now() if fault.hits(method, key)]
        line: dict[str, Any] = {"method": method, "key": key, "query": path.query, "range": header(head, "range")}
        line |= {"status": 0, "bytes": 0, "faults": [fault.kind for fault in faults]}
        try:
            if line["faults"].count("503"):
                self.refuse(head, line)
            else:
                self.exchange(method, head, faults, line)
        finally:
            self.proxy.note(line)

    def refuse(self, head: bytes, line: dict[str, Any]) -> None:
        body = SLOW_DOWN if line["method"] != "HEAD" else b""
        size = int(header(head, "content-length") or 0)
        # A body that nobody reads ends the connection; a small one is read, so that the client hears the answer.
        end = bool(header(head, "transfer-encoding") or header(head, "expect"))
        while size and not end:
            size -= len(self.client.ahead[:size]) or len(self.client.sock.recv(min(size, BLOCK))) or size
            self.client.ahead = b""
        more = "Connection: close\r\n" if end else ""
        answer = f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        self.client.sock.sendall(answer.encode() + body)
        line["status"] = 503
        if end:
            raise Over

    def exchange(self, method: str, head: bytes, faults: list[Fault], line: dict[str, Any]) -> None:
        if self.server.gone():
            self.server.sock.close()
            self.server = Wire(socket.create_connection(self.proxy.to))
        sends = method in ("PUT", "POST")
        rates = [fault for fault in faults if fault.kind == "rate"]
        self.server.sock.sendall(head)
        answer = self.server.until(b"\r\n\r\n") if header(head, "expect") else b" 100 "
        if answer.split(b" ")[1] == b"100":
            if answer != b" 100 ":
                self.client.sock.sendall(answer)
            # A server that refuses early closes its ear: what it said is passed on.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.body(head, self.client, self.server, faults if sends else rates, line)
            while (answer := self.server.until(b"\r\n\r\n")).split(b" ")[1] in (b"100", b"102", b"103"):
                self.client.sock.sendall(answer)
            end = False
        else:
            end = True
        line["status"] = status = int(answer.split(b" ")[1])
        shorter = None
        for fault in faults:
            size = int(header(answer, "content-length") or 0)
            if fault.kind == "truncate" and fault.lowered and not sends and method != "HEAD" and fault.bytes < size:
                old, new = (f"content-length: {n}\r\n".encode() for n in (size, fault.bytes))
                at = answer.lower().index(old)
                shorter, answer = answer, answer[:at] + new + answer[at + len(old) :]
        self.client.sock.sendall(answer)
        if method != "HEAD" and status not in (204, 304):
            self.body(answer, self.server, self.client, rates if sends else faults, line, response=True)
        if end or "close" in (header(head, "connection").lower(), header(answer, "connection").lower()):
            raise Over
        if shorter:  # the rest of the body is still on its way
            self.server.sock.close()
            self.server = Wire(socket.create_connection(self.proxy.to))

    def body(
        self, head: bytes, source: Wire, sink: Wire, faults: list[Fault], line: dict[str, Any], response: bool = False
    ) -> None:
        rates = [fault for fault in faults if fault.kind == "rate"]
        if header(head, "transfer-encoding").lower() == "chunked":
            while True:
                mark = source.until(b"\r\n")
                sink.sock.sendall(mark)
                size = int(mark.split(b";")[0], 16)
                if not size:  # trailers, up to the empty line
                    while (mark := source.until(b"\r\n")) != b"\r\n":
                        sink.sock.sendall(mark)
                    return sink.sock.sendall(mark)
                self.move(source, sink, size, rates, line)
                sink.sock.sendall(source.until(b"\r\n"))
        length = header(head, "content-length")
        if not length and not response:
            return None
        size, sent = int(length or sys.maxsize), 0
        marks = sorted((f for f in faults if f.kind in ("truncate", "stall", "flip", "call")), key=lambda f: f.bytes)
        resets = [fault for fault in faults if fault.kind == "reset"]
        while sent < size:
            if marks and marks[0].bytes == sent:
                sent += self.strike(marks.pop(0), source, sink)
                continue
            want, cut = min((marks[0].bytes if marks else size) - sent, size - sent, BLOCK), False
            for reset in resets:
                want, cut = reset.room(want)
            self.move(source, sink, want, rates, line)
            sent += want
            if cut:
                self.client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                raise Over
        return None

    def strike(self, fault: Fault, source: Wire, sink: Wire) -> int:
        """What happens at this place of the body; the bytes of it that this used up."""
        if fault.kind == "truncate":
            raise Over
        if fault.kind == "stall" and self.client.heard(fault.seconds, select.POLLRDHUP):  # an upload's bytes are no end
            raise Over
        if fault.kind == "call" and fault.once():
            subprocess.run(fault.command, shell=True, check=False, stdout=sys.stderr)
        if fault.kind == "flip":
            byte, source.ahead = source.ahead[:1] or source.sock.recv(1), source.ahead[1:]
            sink.sock.sendall(bytes(b ^ 1 for b in byte))
            return len(byte)
        return 0

    def move(self, source: Wire, sink: Wire, count: int, rates: list[Fault], line: dict[str, Any]) -> None:
        """``count`` bytes from one end to the other, in the kernel where they are not here already."""
        block = min([BLOCK, *(max(rate.bytes // 100, 1) for rate in rates)])
        while count:
            if piece := source.ahead[: min(count, block)]:
                source.ahead, got = source.ahead[len(piece) :], len(piece)
            else:
                got = os.splice(source.sock.fileno(), self.pipe[1], min(count, block))
            if not got:
                raise Over
            for rate in rates:
                rate.pace(got)
            left = got
            if piece:
                sink.sock.sendall(piece)
            else:
                while left:
                    left -= os.splice(self.pipe[0], sink.sock.fileno(), left)
            count -= got
            line["bytes"] += got


class Proxy:
    def __init__(self, to: str, faults: Faults, log: Path | None) -> None:
        address = urlsplit(to)
        self.to, self.faults = (address.hostname or "", address.port or 80), faults
        self.log, self.lock = log.open("a") if log else None, threading.Lock()

    def note(self, line: dict[str, Any]) -> None:
        if self.log:
            with self.lock:
                print(json.dumps(line), file=self.log, flush=True)

    def serve(self, listener: socket.socket) -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=self.pair, args=(client,), daemon=True).start()

    def pair(self, client: socket.socket) -> None:
        try:
            pair = Pair(self, client)
        except OSError:  # the server does not answer: neither do we
            client.close()
        else:
            pair.serve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, help="address of the server")
    parser.add_argument("--port", type=int, default=0, help="its own; 0: a free one")
    parser.add_argument("--faults", type=Path, help="a JSON list of faults; it may be written, or change, later")
    parser.add_argument("--log", type=Path, help="one JSON line a request")
    parser.add_argument("fault", nargs="*")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # four a connection
    proxy = Proxy(arguments.to, Faults(arguments.fault, arguments.faults), arguments.log)
    with socket.create_server(("127.0.0.1", arguments.port), backlog=512) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        proxy.serve(listener)


if __name__ == "__main__":
    main()
