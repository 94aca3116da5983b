import { describe, expect, it } from "vitest";
import {
  MAX_BACKING_NAME_BYTES,
  MAX_OPTION_DEPTH,
  type BackingLayer,
  hasProtocol,
  resolveBacking,
} from "../../../src/image/backing-name.js";
import { parseNbdUri } from "../../../src/nbd/wire/uri.js";

const OVERLAY = "/images/top.qcow2";
const ELSEWHERE = "/somewhere/else";

const resolve = (name: string, format: string | null = null, processFolder = ELSEWHERE): BackingLayer =>
  resolveBacking(OVERLAY, name, format, processFolder);

const file = (path: string, format?: "raw" | "qcow2"): BackingLayer => ({ kind: "file", path, format });
const nbd = (uri: string, format?: "raw" | "qcow2"): BackingLayer => ({ kind: "nbd", uri, format });
const json = (options: unknown): string => `json:${JSON.stringify(options)}`;

const FILE = { driver: "file", filename: "/base" };
const UNIX = { driver: "nbd", server: { type: "unix", path: "/s" }, export: "disk" };
const UNIX_URI = "nbd+unix:///disk?socket=/s";

/** `below` levels of "file" above a file. */
function nested(below: number): object {
  let options: object = FILE;
  for (let level = 0; level < below; level++) options = { driver: "raw", file: options };
  return options;
}

describe("a backing file name", () => {
  it.each<[name: string, format: string | null, layer: BackingLayer]>([
    ["base.raw", null, file("/images/base.raw")],
    ["../base.raw", "raw", file("/images/../base.raw", "raw")],
    ["/base.raw", "qcow2", file("/base.raw", "qcow2")],
    ["./a:b.raw", "", file("/images/a:b.raw")],
    ["/a:b", "file", file("/a:b", "raw")],
    ["/dev/sdz", "host_device", file("/dev/sdz", "raw")],
    ["file:/base", "raw", file("/base", "raw")],
    ["host_device:/dev/sdz", "raw", file("/dev/sdz", "raw")],
    ["nbd:unix:/s", "raw", nbd("nbd+unix:///?socket=/s", "raw")],
    ["nbd:unix:/s:exportname=disk", "nbd", nbd(UNIX_URI, "raw")],
    ["nbd:unix:/a:b:exportname=c:exportname=d", null, nbd("nbd+unix:///c%3Aexportname%3Dd?socket=/a%3Ab")],
    ["nbd:example.org:10810:exportname=a b", "raw", nbd("nbd://example.org:10810/a%20b", "raw")],
    ["nbd:[::1]:10809", "raw", nbd("nbd://[::1]/", "raw")],
    ["nbd://example.org/disk", "raw", nbd("nbd://example.org/disk", "raw")],
    ["nbd+tcp://example.org:1/disk", null, nbd("nbd://example.org:1/disk")],
    ["nbd+unix:///disk?socket=/s", "raw", nbd(UNIX_URI, "raw")],
    ["nbd+unix:////disk?socket=/s", "raw", nbd("nbd+unix:////disk?socket=/s", "raw")],
    // What an export cannot be read as is for the one who opens it to say.
    ["nbd://example.org/disk", "qcow2", nbd("nbd://example.org/disk", "qcow2")],
  ])("%s with format %s", (name, format, layer) => {
    expect(resolve(name, format)).toEqual(layer);
    if (layer.kind === "nbd") expect(() => parseNbdUri(layer.uri)).not.toThrow();
  });

  it.each<[options: unknown, format: string | null, layer: BackingLayer]>([
    [{ driver: "raw", file: FILE }, null, file("/base", "raw")],
    [{ driver: "qcow2", file: FILE }, "qcow2", file("/base", "qcow2")],
    [{ driver: "qcow2", file: { driver: "host_device", filename: "/dev/z" } }, null, file("/dev/z", "qcow2")],
    [{ driver: "raw", "file.driver": "file", "file.filename": "/base" }, "raw", file("/base", "raw")],
    [{ driver: "qcow2", "file.filename": "/base" }, null, file("/base", "qcow2")],
    [{ file: { driver: "file" }, "file.filename": "/base" }, null, file("/base")],
    [{ file: { filename: "/base" } }, "qcow2", file("/base", "qcow2")],
    // A file name there is one to the letter.
    [{ file: { filename: "/file:base" } }, null, file("/file:base")],
    [FILE, null, file("/base", "raw")],
    [FILE, "file", file("/base", "raw")],
    [{ driver: "host_device", filename: "/dev/z" }, "host_device", file("/dev/z", "raw")],
    [{ driver: "raw", file: { driver: "raw", file: FILE } }, "raw", file("/base", "raw")],
    [nested(MAX_OPTION_DEPTH - 1), null, file("/base", "raw")],
    [
      {
        driver: "raw",
        file: { ...FILE, aio: "native", locking: "off", cache: { direct: true }, "node-name": "a" },
        "read-only": false,
      },
      null,
      file("/base", "raw"),
    ],
    [{ driver: "raw", file: UNIX }, "raw", nbd(UNIX_URI, "raw")],
    [{ file: UNIX }, null, nbd(UNIX_URI)],
    [UNIX, "nbd", nbd(UNIX_URI, "raw")],
    [
      { "file.driver": "nbd", "file.server.type": "unix", "file.server.path": "/s", "file.export": "disk" },
      "raw",
      nbd(UNIX_URI, "raw"),
    ],
    [{ file: { driver: "nbd", path: "/s", export: "disk" } }, "raw", nbd(UNIX_URI, "raw")],
    [{ file: { driver: "nbd", host: "h" } }, "raw", nbd("nbd://h/", "raw")],
    [
      { file: { driver: "nbd", server: { type: "inet", host: "::1", port: 10810 }, export: "ä/?&#" } },
      "raw",
      nbd("nbd://[::1]:10810/%C3%A4/%3F%26%23", "raw"),
    ],
    [
      { file: { driver: "nbd", server: { type: "inet", host: "h", port: "10809" } } },
      "raw",
      nbd("nbd://h/", "raw"),
    ],
  ])("json:%j with format %s", (options, format, layer) => {
    expect(resolve(json(options), format)).toEqual(layer);
    if (layer.kind === "nbd") expect(() => parseNbdUri(layer.uri)).not.toThrow();
  });

  it("keeps an export's name through its URI", () => {
    const { kind, ...rest } = resolve(json({ ...UNIX, export: "a?b#c&d=%41/ü" }));
    expect(kind).toBe("nbd");
    expect("uri" in rest && parseNbdUri(rest.uri)).toEqual({ path: "/s", exportName: "a?b#c&d=%41/ü" });
  });

  it("has a relative path with a protocol only where QEMU's folder is the image's", () => {
    const names = [
      "file:base",
      json({ driver: "raw", file: { driver: "file", filename: "base" } }),
      "nbd:unix:s",
      "nbd+unix:///?socket=s",
      json({ driver: "nbd", server: { type: "unix", path: "s" } }),
    ];
    for (const name of names) {
      expect(() => resolve(name)).toThrow("from the folder that one runs it in");
      expect(resolve(name, null, "/images")).toMatchObject(
        /nbd/.test(name) ? { uri: "nbd+unix:///?socket=/images/s" } : { path: "/images/base" },
      );
    }
    expect(resolveBacking("top.qcow2", "file:base", null, ELSEWHERE)).toEqual(file("base"));
    expect(() => resolveBacking("d/top.qcow2", "file:base", null, ELSEWHERE)).toThrow("run it");
  });

  it.each<[name: string, format: string | null, code: string, problem: string]>([
    ["rbd:pool/image", "raw", "UNSUPPORTED", "'rbd:…'"],
    [":base", "raw", "UNSUPPORTED", "':…'"],
    ["nbds://h/disk", "raw", "UNSUPPORTED", "'nbds:…'"],
    ["/base", "vmdk", "UNSUPPORTED", "'vmdk'"],
    ["/base", "nbd", "UNSUPPORTED", "'nbd'"],
    ["nbd://h/disk", "file", "UNSUPPORTED", "'file'"],
    ["file:", "raw", "FORMAT", "names no path"],
    ["nbd:", "raw", "FORMAT", "no server's address"],
    ["nbd:h", "raw", "FORMAT", "no server's address"],
    ["nbd:h:1,to=2", "raw", "FORMAT", "no server's address"],
    ["nbd:h:0", "raw", "FORMAT", "port '0'"],
    ["nbd:h:65536", "raw", "FORMAT", "port '65536'"],
    ["nbd:h/x:1", "raw", "FORMAT", "host 'h/x'"],
    ["nbd:unix:", "raw", "FORMAT", "names no path"],
    ["nbd:unix:/s:exportname=", "raw", "FORMAT", "names no export"],
    ["nbd://", "raw", "FORMAT", "'nbd://'"],
    ["nbd+unix:///disk", "raw", "FORMAT", "names no socket"],
    ["nbd+unix:///disk?socket=%00s", "raw", "FORMAT", "zero byte"],
    ["nbd://h/disk?tls-certificates=/etc", "raw", "FORMAT", "needs TLS"],
    ["json:", null, "FORMAT", "not valid JSON"],
    ["json:{'driver':'raw'}", null, "FORMAT", "not valid JSON"],
    ["json:[]", null, "FORMAT", "no object"],
    ["json:null", null, "FORMAT", "no object"],
    ["json:{}", null, "FORMAT", "no 'file'"],
    ['json:{"driver":"raw","driver":"qcow2","file":{"filename":"/b"}}', null, "FORMAT", "twice"],
    ['json:{"file":{"filename":"/a"},"file":{"filename":"/b"}}', null, "FORMAT", "twice"],
    ['json:{"file":{"filename":"/a"},"file.filename":"/b"}', null, "FORMAT", "'file.filename' twice"],
    [
      'json:{"__proto__":{"driver":"raw"},"file":{"filename":"/b"}}',
      null,
      "UNSUPPORTED",
      "'__proto__.driver'",
    ],
    [json({ filename: "/b" }), null, "FORMAT", "no 'file'"],
    [json({ driver: "raw" }), null, "FORMAT", "no 'file'"],
    [json({ driver: "raw", file: "node" }), null, "UNSUPPORTED", "('file')"],
    [json({ driver: "raw", file: null }), null, "UNSUPPORTED", "'file'"],
    [json({ driver: "raw", file: [FILE] }), null, "UNSUPPORTED", "'file'"],
    [json({ driver: "file" }), null, "FORMAT", "no 'filename'"],
    [json({ driver: 1 }), null, "FORMAT", "'driver'"],
    [json({ driver: "file", filename: "" }), null, "FORMAT", "names no path"],
    [json({ driver: "file", filename: "/a\0b" }), null, "FORMAT", "zero byte"],
    [json({ driver: "vmdk", file: FILE }), null, "UNSUPPORTED", "'vmdk'"],
    [json({ driver: "raw", file: { driver: "https", url: "https://h/" } }), null, "UNSUPPORTED", "'https'"],
    [json({ driver: "raw", offset: 512, file: FILE }), null, "UNSUPPORTED", "'offset'"],
    [json({ driver: "raw", size: 0, file: FILE }), null, "UNSUPPORTED", "'size'"],
    [
      json({ driver: "raw", file: { driver: "raw", size: 512, file: FILE } }),
      null,
      "UNSUPPORTED",
      "'file.size'",
    ],
    [json({ driver: "raw", file: { driver: "qcow2", file: FILE } }), null, "UNSUPPORTED", "upon qcow2"],
    [json({ driver: "qcow2", file: FILE, backing: null }), null, "UNSUPPORTED", "'backing'"],
    [json({ driver: "qcow2", file: FILE, "backing.driver": "raw" }), null, "UNSUPPORTED", "'backing.driver'"],
    [json({ driver: "raw", file: { ...FILE, "x-odd": 1 } }), null, "UNSUPPORTED", "'file.x-odd'"],
    [json({ file: { ...UNIX, "tls-creds": "tls0" } }), null, "UNSUPPORTED", "'file.tls-creds'"],
    [json({ file: { ...UNIX, "x-dirty-bitmap": "b" } }), null, "UNSUPPORTED", "'file.x-dirty-bitmap'"],
    [json({ driver: "nbd", server: { type: "vsock", cid: "1" } }), null, "UNSUPPORTED", "'vsock'"],
    [json({ driver: "nbd", server: { path: "/s" } }), null, "FORMAT", "no 'server.type'"],
    [json({ driver: "nbd", server: { type: "inet", host: "h" } }), null, "FORMAT", "port ''"],
    [json({ driver: "nbd", server: { type: "inet", host: "h?x", port: 1 } }), null, "FORMAT", "host 'h?x'"],
    [
      json({ driver: "nbd", server: { type: "inet", host: "h", port: 1, to: 9 } }),
      null,
      "UNSUPPORTED",
      "'server.to'",
    ],
    [json(nested(MAX_OPTION_DEPTH)), null, "LIMIT", `deeper than ${MAX_OPTION_DEPTH}`],
    [`json:{"${"file.".repeat(MAX_OPTION_DEPTH)}driver":"raw"}`, null, "FORMAT", "no 'file.filename'"],
    [
      json({ driver: "file", filename: `/${"a".repeat(MAX_BACKING_NAME_BYTES)}` }),
      null,
      "LIMIT",
      "1023 bytes",
    ],
    [json({ driver: "qcow2", file: FILE }), "raw", "FORMAT", "'raw', and the json: name"],
    [json({ driver: "raw", file: FILE }), "qcow2", "FORMAT", "'qcow2', and the json: name"],
    [json(FILE), "qcow2", "FORMAT", "'qcow2', and the json: name"],
    [json({ file: UNIX }), "file", "UNSUPPORTED", "'file'"],
  ])("refuses %s with format %s: %s", (name, format, code, problem) => {
    let error: unknown;
    try {
      resolve(name, format);
    } catch (caught) {
      error = caught;
    }
    expect(error).toMatchObject({
      code,
      object: OVERLAY,
      problem: expect.stringContaining(problem) as string,
    });
  });

  it("is not afraid of the deepest nesting that 1023 bytes hold", () => {
    const deep = `json:${'{"f":'.repeat(150)}1${"}".repeat(150)}`;
    expect(() => resolve(deep)).toThrow(`deeper than ${MAX_OPTION_DEPTH}`);
    expect(() => resolve(`json:${"[".repeat(1000)}`)).toThrow("not valid JSON");
    const flat = `json:{"driver":"raw",${Array.from(
      { length: 12 },
      (_, level) => `"${"file.".repeat(level)}driver":"raw"`,
    )
      .slice(1)
      .join()},"${"file.".repeat(12)}filename":"/b"}`;
    expect(() => resolve(flat)).toThrow(`deeper than ${MAX_OPTION_DEPTH}`);
  });

  it("has a protocol where a colon stands before any slash", () => {
    expect(["a:b", ":", "json:{}", "file:/a"].filter(hasProtocol)).toHaveLength(4);
    expect(["a", "", "./a:b", "/a:b"].filter(hasProtocol)).toEqual([]);
  });
});
