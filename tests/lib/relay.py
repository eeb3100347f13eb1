"""A program that adds latency and loss to the link of a simulated node (netns.py). It does not need the kernel's `netem`.

Usage: relay.py NODE HUB PORT. NODE and HUB are network namespaces: that of the node, and that of the bridge. PORT is the
name of the node's network device in HUB. The program forwards frames between the two namespaces. Each line of its standard
input sets latency (ms) and loss probability of frames that the node sends. Frames to the node are forwarded at once. The
program ends when its input ends.
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

_TUNSETIFF, _TUNSETOFFLOAD, _CLONE_NEWNET = 0x400454CA, 0x400454D0, 0x40000000
# A header before each frame lets the kernel pass many TCP packets as one frame (TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6). Without
# it a relay carries 250 Mbit/s.
_TAP, _LARGE_FRAMES = 0x5002, 0b111


def enter(space: str) -> None:
    """Move this thread into the network namespace `space`. OSError: it does not exist, or this process may not do it."""
    descriptor = os.open(f"/run/netns/{space}", os.O_RDONLY)
    failed = ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET)
    os.close(descriptor)
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), space)


def open_tap(space: str, name: str) -> int:
    """Create the tap device `name` in the network namespace `space`; return its file descriptor.

    The device exists as long as the descriptor is open. Its frames are read and written through the descriptor.
    """
    enter(space)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    ioctl(tap, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _TAP))
    ioctl(tap, _TUNSETOFFLOAD, _LARGE_FRAMES)
    return tap


def relay(node: str, hub: str, port: str) -> None:
    """Forward frames between device eth0 in the namespace `node` and device `port` in `hub`, until standard input ends."""
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
    """Read the frames that wait at the tap device with the descriptor `tap`; return at most 64 of them."""
    held = []
    with suppress(OSError):  # none is left, or the device is down
        for _ in itertools.repeat(None, 64):
            held.append(os.read(tap, 70_000))
    return held


def send(tap: int, frame: bytes) -> None:
    """Write a frame to the tap device with the descriptor `tap`. The frame is lost if the device is down."""
    with suppress(OSError):
        os.write(tap, frame)


if __name__ == "__main__":
    relay(*sys.argv[1:])
