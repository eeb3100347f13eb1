"""A program that carries the frames of a node's link with a delay and losses, for kernels without `netem`.

Usage: relay.py NODE HUB PORT; the first two are network namespaces. Each line of standard input is the delay in ms and the
share of lost frames among those that the node sends. Frames to the node pass at once. The relay ends with its input.
"""

import ctypes
import itertools
import os
import random
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress
from fcntl import ioctl

_TUNSETIFF, _TAP_WITHOUT_HEADER, _CLONE_NEWNET = 0x400454CA, 0x1002, 0x40000000


def enter(space: str) -> None:
    """Move this thread into a network namespace."""
    descriptor = os.open(f"/run/netns/{space}", os.O_RDONLY)
    failed = ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET)
    os.close(descriptor)
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), space)


def open_tap(space: str, name: str) -> int:
    """Create a tap device in a namespace, which exists as long as the returned descriptor is open."""
    enter(space)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    ioctl(tap, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _TAP_WITHOUT_HEADER))
    return tap


def relay(node: str, hub: str, port: str) -> None:
    """Carry frames between eth0 of the node and a port of the hub's bridge."""
    inner, outer = open_tap(node, "eth0"), open_tap(hub, port)
    print("ready", flush=True)
    waiting: deque[tuple[float, bytes]] = deque()
    delay, loss, draw = 0.0, 0.0, random.Random(0)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([inner, outer, 0], [], [], pause)
        if 0 in ready:
            if not (lines := os.read(0, 1000).splitlines()):
                return
            delay, loss = (float(word) for word in lines[-1].split())
        if outer in ready:
            for frame in frames(outer):
                send(inner, frame)
        if inner in ready:
            due = time.monotonic() + delay / 1e3
            waiting += [(due, frame) for frame in frames(inner) if draw.random() >= loss]
        while waiting and waiting[0][0] <= time.monotonic():
            send(outer, waiting.popleft()[1])


def frames(tap: int) -> list[bytes]:
    """Return the frames that the kernel holds for this end, at most 64."""
    held = []
    with suppress(OSError):  # none is left, or the device is down
        for _ in itertools.repeat(None, 64):
            held.append(os.read(tap, 65_536))
    return held


def send(tap: int, frame: bytes) -> None:
    """Hand a frame to the kernel, which loses it where the device is down."""
    with suppress(OSError):
        os.write(tap, frame)


if __name__ == "__main__":
    relay(*sys.argv[1:])
