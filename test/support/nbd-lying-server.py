# An NBD server in a process of its own, for a client that blocks its thread. It answers each batch of reads in the
# way that its first argument names, on the Unix socket that its second argument names. The disk: byte i is i * 7 % 251.
import os, select, socket, struct, sys

MODE, PATH = sys.argv[1:3]
SIZE = 4 << 20
CHUNK, SIMPLE, OPTION = 0x668E33EF, 0x67446698, 0x0003E889045565A9
NONE, DATA, HOLE, ERROR = 0, 1, 2, 0x8001


def disk(offset, length):
    return bytes(i * 7 % 251 for i in range(offset, offset + length))


def chunk(cookie, kind, done, payload):
    return struct.pack(">IHHQI", CHUNK, 1 if done else 0, kind, cookie, len(payload)) + payload


def data(cookie, offset, length, done=True):
    return chunk(cookie, DATA, done, struct.pack(">Q", offset) + disk(offset, length))


def answer(cookie, offset, length):
    half = length // 2
    if MODE == "pieces":
        empty = chunk(cookie, HOLE, False, struct.pack(">QI", offset + half, length - half))
        return data(cookie, offset, half, False) + empty + chunk(cookie, NONE, True, b"")
    if MODE == "simple":
        return struct.pack(">IIQ", SIMPLE, 0, cookie) + disk(offset, length)
    if MODE == "simple-error":
        return struct.pack(">IIQ", SIMPLE, 5, cookie)
    if MODE == "simple-unasked":
        return struct.pack(">IIQ", SIMPLE, 0, cookie) + disk(offset, length)
    if MODE == "error":
        return chunk(cookie, ERROR, True, struct.pack(">IH", 5, 3) + b"bad")
    if MODE == "other-cookie":
        return data(cookie ^ (1 << 40), offset, length)
    if MODE == "index":
        return data(cookie + 15, offset, length)
    if MODE == "twice":
        return data(cookie, offset, length) + data(cookie, offset, length)
    if MODE == "elsewhere":
        return data(cookie, offset + 512, length)
    if MODE == "descending":
        return data(cookie, offset + half, length - half, False) + data(cookie, offset, half)
    if MODE == "short":
        return data(cookie, offset, half)
    if MODE == "long":
        return data(cookie, offset, length + 1)
    if MODE == "long-hole":
        return chunk(cookie, HOLE, True, struct.pack(">QI", offset, length + 1))
    if MODE == "empty":
        return chunk(cookie, DATA, True, struct.pack(">Q", offset))
    if MODE == "huge":
        return struct.pack(">IHHQI", CHUNK, 1, DATA, cookie, 0xFFFFFFFF) + struct.pack(">Q", offset)
    if MODE == "magic":
        return b"\0" * 64
    if MODE == "unknown":
        return chunk(cookie, 77, False, b"12345678")
    if MODE == "none-first":
        return chunk(cookie, NONE, False, b"") + data(cookie, offset, length)
    if MODE == "cut":
        return data(cookie, offset, length)[: length // 3]
    return data(cookie, offset, length)


def receive(peer, count):
    got = b""
    while len(got) < count:
        part = peer.recv(count - len(got))
        if not part:
            sys.exit(0)
        got += part
    return got


def handshake(peer):
    peer.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
    receive(peer, 4)
    while True:
        _, option, length = struct.unpack(">QII", receive(peer, 16))
        receive(peer, length)
        reply = lambda kind, payload=b"": peer.sendall(struct.pack(">QIII", OPTION, option, kind, len(payload)) + payload)
        if option == 7:
            reply(3, struct.pack(">HQH", 0, SIZE, 0x101))
            reply(1)
            return
        reply(0x80000001 if MODE in ("simple", "simple-error") else 1)


listener = socket.socket(socket.AF_UNIX)
listener.bind(PATH)
listener.listen(1)
print("ready", flush=True)
peer, _ = listener.accept()


def late_error(peer, requests):
    """Fails one request, answers the others later, and says whether the client had waited for them."""
    first, *others = [r for r in requests if r[2] == 0]
    message = b"no"
    payload = struct.pack(">IH", 5, len(message)) + message
    peer.sendall(chunk(first[3], 0x8001, True, payload))
    is_early = bool(select.select([peer], [], [], 0.2)[0])
    for _, _, _, cookie, offset, length in others:
        peer.sendall(answer(cookie, offset, length))
    goodbye = receive(peer, 28)
    print("early" if is_early else "late", struct.unpack(">IHHQQI", goodbye)[2], flush=True)
    sys.exit(0)


def serve(peer):
    handshake(peer)
    while True:
        requests = [receive(peer, 28)]
        peer.setblocking(False)
        try:
            while True:
                requests.append(peer.recv(28))
        except BlockingIOError:
            pass
        peer.setblocking(True)
        if MODE == "late-error":
            late_error(peer, [struct.unpack(">IHHQQI", r) for r in requests])
        if MODE == "silent":
            receive(peer, 1 << 30)
        # The last one is answered first.
        for _, _, command, cookie, offset, length in [struct.unpack(">IHHQQI", r) for r in reversed(requests) if len(r) == 28]:
            if command == 2:
                sys.exit(0)
            peer.sendall(answer(cookie, offset, length))
        if MODE == "cut":
            sys.exit(0)


try:
    serve(peer)
except (BrokenPipeError, ConnectionResetError):
    pass
