#!/usr/bin/env python3
"""Reads a disk out of an unencrypted cowcatcher repository without cowcatcher (docs/repository.md has the format).

    read-repository.py REPO                       lists the backups
    read-repository.py REPO GROUP TIME DISK OUT   writes the disk of a backup to the file OUT, holes as holes

Needs Python 3.8 and, for compressed chunks, the program zstd."""
import glob, hashlib, json, os, struct, subprocess, sys, zlib


PATCH = b"cwpatch1\0"


def fail(text):
    sys.exit("read-repository: " + text)


def config(repo):
    text, check = open(os.path.join(repo, "config")).read().split("\n")[:2]
    if check != "sha256 " + hashlib.sha256(text.encode()).hexdigest():
        fail("config is damaged")
    value = json.loads(text)
    if value["encryption"] != "none":
        fail("the repository is encrypted")
    return value


def metadata(repo, repository_id, name):
    data = open(os.path.join(repo, name), "rb").read()
    header, body, check = data[:32], data[32:-32], data[-32:]
    place = repository_id.encode() + b"\0" + name.encode() + b"\0"
    if header[:9] != b"cwmeta_1\0" or hashlib.sha256(place + header + body).digest() != check:
        fail(name + " is damaged")
    return zlib.decompress(body)


def chunk(repo, chunk_id, kind=b"cwchunk1\0"):
    name = chunk_id.hex()
    salt = b"cowcatcher patch" if kind == PATCH else b""
    # A name with a number behind it is as good as one without.
    for path in sorted(glob.glob(os.path.join(repo, "chunks", name[:2], name + "*"))):
        data = open(path, "rb").read()
        if data[:9] != kind:
            continue
        method, length, stored = struct.unpack_from("<B3xII", data, 32)
        content = data[48:48 + stored]
        if method == 1:
            content = subprocess.run(["zstd", "-dcq"], input=content, stdout=subprocess.PIPE).stdout
        if len(content) == length and hashlib.sha256(salt + content).digest() == chunk_id:
            return content
    fail("chunk " + name + " is missing or damaged")


def patched(repo, patch_id, base_id, block_bytes):
    patch = chunk(repo, patch_id, PATCH)
    content = bytearray(chunk(repo, base_id))
    if patch[:32] != base_id or struct.unpack_from("<I", patch, 32)[0] != len(content):
        fail("a patch is one of another chunk")
    data = patch[48:]
    for block in range(64):
        if patch[40 + block // 8] >> block % 8 & 1:
            start = block * block_bytes
            length = min(block_bytes, len(content) - start)
            content[start:start + length], data = data[:length], data[length:]
    return content


def restore(repo, group, time, disk, out):
    repository_id = config(repo)["id"]
    folder = "groups/%s/%s/" % (group, time)
    manifest = json.loads(metadata(repo, repository_id, folder + "manifest"))
    index = metadata(repo, repository_id, folder + disk + ".index")
    expected = [entry["index_sha256"] for entry in manifest["disks"] if entry["name"] == disk]
    if expected != [hashlib.sha256(index).hexdigest()]:
        fail("the index is not the one of its manifest")
    magic, size, chunk_bytes, count = struct.unpack_from("<8sQII", index)
    start, patches = (24, 0) if magic == b"cwindex1" else (32, struct.unpack_from("<I", index, 24)[0])
    table = start + 32 * count
    if magic not in (b"cwindex1", b"cwindex2") or len(index) != table + 80 * patches:
        fail("the index is damaged")
    bases = {}
    for at in range(table, len(index), 80):
        bases[struct.unpack_from("<I", index, at)[0]] = index[at + 16:at + 48]
    with open(out, "wb") as file:
        file.truncate(size)
        for number in range(count):
            chunk_id = index[start + 32 * number:start + 32 * number + 32]
            if any(chunk_id):
                file.seek(number * chunk_bytes)
                if number in bases:
                    file.write(patched(repo, chunk_id, bases[number], chunk_bytes // 64))
                else:
                    file.write(chunk(repo, chunk_id))


if len(sys.argv) == 2:
    for path in sorted(glob.glob(os.path.join(sys.argv[1], "groups", "*", "*", "*.index"))):
        group, time, disk = path.split(os.sep)[-3:]
        if os.path.exists(os.path.join(os.path.dirname(path), "manifest")):
            print(group, time, disk[:-6])
elif len(sys.argv) == 6:
    restore(*sys.argv[1:])
else:
    fail("give REPO, or REPO GROUP TIME DISK OUT")
