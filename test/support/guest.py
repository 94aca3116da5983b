"""Guests for the integration tests, over libnbd. One command a line on standard input, one answer a line on
standard output.

  guest.py model SEED URI...      random overlapping writes, trims and write-zeroes over all connections, to one
                                  disk, beside a model of it in memory
  guest.py sequence SEED URI...   increasing numbers, each written after the acknowledgement of the one before,
                                  the connections (to one disk or to several) in turn
  guest.py paced SEED URI...      as a sequence, but all over the disk, and with a few milliseconds between two writes:
                                  a guest that leaves the processors to the others

  run            goes on until the next command; answers nothing
  pause          answers "paused OPERATIONS LONGEST_MS"
  dump FILE      (model) writes the model to FILE; answers "dumped"
  verify         (model) reads the disk and compares; answers "same" or "differs at OFFSET"
  count          answers "count OPERATIONS", those acknowledged, without stopping
  quit
"""

import os
import random
import select
import struct
import sys
import time

import nbd

CONNECTIONS = [nbd.NBD() for _ in sys.argv[3:]]
for connection, uri in zip(CONNECTIONS, sys.argv[3:]):
    connection.connect_uri(uri)
SIZE = CONNECTIONS[0].get_size()
RANDOM = random.Random(int(sys.argv[2]))
SEQUENCE_BLOCKS = 64


def answer(text):
    print(text, flush=True)


class Model:
    waited = None

    def __init__(self):
        self.content = bytearray(CONNECTIONS[0].pread(SIZE, 0))
        self.operations = 0

    def operation(self):
        kind = RANDOM.choices(["write", "zero", "trim"], [8, 1, 1])[0]
        length = RANDOM.choice([1, 7, 512, 4096, 5000, 16384, 65536, 70000, 200000])
        length = min(RANDOM.randint(1, length) if RANDOM.random() < 0.5 else length, SIZE)
        offset = RANDOM.randint(0, SIZE - length)
        if RANDOM.random() < 0.4:
            offset -= offset % 4096
        return kind, offset, length

    def step(self):
        """A batch of operations that do not overlap each other, all in flight at once."""
        batch = []
        for _ in range(RANDOM.randint(1, 8)):
            kind, offset, length = self.operation()
            if all(offset + length <= o or offset >= o + n for _, o, n, _, _, _ in batch):
                batch.append(self.send(kind, offset, length))
        for _, _, _, _, connection, cookie in batch:
            while not connection.aio_command_completed(cookie):
                connection.poll(-1)
        for kind, offset, length, data, connection, _ in batch:
            self.apply(kind, offset, length, data, connection)
        self.operations += len(batch)

    def send(self, kind, offset, length):
        connection = RANDOM.choice(CONNECTIONS)
        data = RANDOM.randbytes(length) if kind == "write" else bytes(length)
        if kind == "write":
            cookie = connection.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset)
        elif kind == "zero":
            flags = RANDOM.choice([0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA])
            cookie = connection.aio_zero(length, offset, flags=flags)
        else:
            cookie = connection.aio_trim(length, offset)
        return kind, offset, length, data, connection, cookie

    def apply(self, kind, offset, length, data, connection):
        if kind == "trim":
            # What a trimmed byte reads as is the server's choice, of two.
            old = self.content[offset : offset + length]
            data = connection.pread(length, offset)
            if any(byte != 0 and byte != before for byte, before in zip(data, old)):
                raise SystemExit("a trimmed range reads as neither zeroes nor what it was")
        self.content[offset : offset + length] = data

    def command(self, words):
        if words[0] == "dump":
            with open(words[1], "wb") as file:
                file.write(self.content)
            answer("dumped")
        elif words[0] == "verify":
            for connection in CONNECTIONS:
                connection.flush()
            found = CONNECTIONS[-1].pread(SIZE, 0)
            if found == self.content:
                answer("same")
            else:
                answer("differs at %d" % next(i for i in range(SIZE) if found[i] != self.content[i]))


class Sequence:
    # Of the last write alone, in seconds; None: the whole step was one.
    waited = None

    def __init__(self):
        self.operations = 0

    def step(self):
        number = self.operations + 1
        place = number % (SEQUENCE_BLOCKS * len(CONNECTIONS))
        which = place % len(CONNECTIONS)
        stride = SIZE // SEQUENCE_BLOCKS
        block = (place // len(CONNECTIONS) * 37) % SEQUENCE_BLOCKS
        offset = block * stride + which * (stride // len(CONNECTIONS))
        CONNECTIONS[which].pwrite(struct.pack("<Q", number) * 64, offset)
        self.operations = number

    def command(self, words):
        raise SystemExit("a sequence knows no " + words[0])


class Paced(Sequence):
    PAUSE_SECONDS = 0.004
    BLOCK = 4096

    def step(self):
        time.sleep(self.PAUSE_SECONDS)
        number = self.operations + 1
        # A stride without a common factor meets each block once before any comes again.
        block = number * 1021 % (SIZE // self.BLOCK)
        begin = time.monotonic()
        CONNECTIONS[number % len(CONNECTIONS)].pwrite(struct.pack("<Q", number) * 512, block * self.BLOCK)
        self.waited = time.monotonic() - begin
        self.operations = number


class Commands:
    """Lines of standard input, with nothing hidden in a buffer from the question whether there is one."""

    def __init__(self):
        self.text = b""

    def waiting(self):
        return b"\n" in self.text or bool(select.select([0], [], [], 0)[0])

    def next(self):
        while b"\n" not in self.text:
            more = os.read(0, 4096)
            if not more:
                return ["quit"]
            self.text += more
        line, self.text = self.text.split(b"\n", 1)
        return line.decode().split()


commands = Commands()
guest = {"model": Model, "sequence": Sequence, "paced": Paced}[sys.argv[1]]()
running = False
longest = 0.0
answer("ready %d" % SIZE)
while True:
    if running and not commands.waiting():
        begin = time.monotonic()
        guest.step()
        longest = max(longest, guest.waited or time.monotonic() - begin)
        continue
    words = commands.next()
    if words[0] == "quit":
        break
    if words[0] == "run":
        running = True
    elif words[0] == "pause":
        running = False
        answer("paused %d %.1f" % (guest.operations, longest * 1000))
    elif words[0] == "count":
        answer("count %d" % guest.operations)
    else:
        guest.command(words)
