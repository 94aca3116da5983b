#!/usr/bin/env python3
"""A plain QMP client, of the standard library alone: a full backup and two incremental ones of one disk, by qmpbackup's
order of commands. Its targets are empty images that it makes itself and lays on each other.

usage: qmp-chain.py CONTROL DISK FOLDER NBD-URI
"""
import json
import socket
import subprocess
import sys


class Qmp:
    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.file = self.sock.makefile("r", encoding="utf-8", newline="\r\n")
        self.events = []
        greeting = self.receive()
        assert greeting["QMP"]["version"]["qemu"]["major"] >= 7, greeting
        self.command("qmp_capabilities")

    def receive(self):
        return json.loads(self.file.readline())

    def command(self, execute, /, **arguments):
        request = {"execute": execute, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self.sock.sendall(json.dumps(request).encode())
        while True:
            answer = self.receive()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise SystemExit(f"{execute}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def wait_for(self, event, job):
        while True:
            for found in self.events:
                if found["event"] == event and found["data"].get("device") == job:
                    self.events.remove(found)
                    return found["data"]
            self.events.append(self.receive())


def run(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main(control, disk, folder, uri):
    qmp = Qmp(control)
    assert qmp.command("query-status")["status"] == "running"
    qmp.command("query-name")
    (block,) = qmp.command("query-block")
    size = block["inserted"]["image"]["virtual-size"]
    below = None
    for level in ("full", "inc1", "inc2"):
        target = f"{folder}/{level}.qcow2"
        run("qemu-img", "create", "-f", "qcow2", target, str(size))
        place = {"driver": "file", "filename": target}
        qmp.command("blockdev-add", driver="qcow2", node_name=level, file=place)
        job = {"device": disk, "target": level, "job-id": f"job-{level}", "buffer-size": 8 << 20}
        if below is None:
            new = {"node": disk, "name": "chain", "persistent": True}
            actions = [
                {"type": "block-dirty-bitmap-add", "data": new},
                {"type": "blockdev-backup", "data": {**job, "sync": "full"}},
            ]
        else:
            run("qemu-io", "-f", "raw", "-c", f"write -P {len(level)} 3M 64k", "-c", "write -z 5M 64k", uri)
            actions = [{"type": "blockdev-backup", "data": {**job, "sync": "incremental", "bitmap": "chain"}}]
        qmp.command("transaction", actions=actions)
        end = qmp.wait_for("BLOCK_JOB_COMPLETED", f"job-{level}")
        assert "error" not in end, end
        while qmp.command("query-block-jobs"):
            pass
        qmp.command("blockdev-del", node_name=level)
        if below is not None:
            run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", target)
        below = target
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, target)
    run("qemu-img", "convert", "-O", "raw", below, f"{folder}/restored.raw")
    qmp.command("block-dirty-bitmap-remove", node=disk, name="chain")
    print("restored")


main(*sys.argv[1:])
