// `create -o NAME=VALUE,…`: qemu-img's option names, as far as this version has what they name.
import { IMAGE_FORMATS, type ImageFormat } from "../../block/format.js";
import type { CompressionType } from "../../image/qcow2/format/header.js";
import { PREALLOCATIONS, type Preallocation } from "../../block/file/preallocate.js";
import { KiB, parseSize } from "../../units.js";
import { checkClusterSize } from "./backup-options.js";
import { parseChoice, parseCount, unsupported, usageError } from "./options.js";

export interface FormatOptions {
  /** Bytes; `size` of -o. */
  sizeBytes?: number;
  backingFile?: string;
  backingFormat?: ImageFormat;
  clusterSizeBytes: number;
  refcountBits: number;
  compressionType: CompressionType;
  lazyRefcounts: boolean;
  extendedL2: boolean;
  dataFile?: string;
  dataFileRaw: boolean;
  version: 2 | 3;
  /** As it was given, for the line that says what is made. */
  compat?: string;
  preallocation?: Preallocation;
}

const DEFAULTS: FormatOptions = {
  clusterSizeBytes: 64 * KiB,
  refcountBits: 16,
  compressionType: "zlib",
  lazyRefcounts: false,
  extendedL2: false,
  dataFileRaw: false,
  version: 3,
};

const QCOW2_ONLY = [
  "cluster_size",
  "compat",
  "compression_type",
  "lazy_refcounts",
  "refcount_bits",
  "extended_l2",
  "data_file",
  "data_file_raw",
];

const VERSION_OF_COMPAT: Record<string, 2 | 3> = { "0.10": 2, v2: 2, "1.1": 3, v3: 3 };

/** qemu-img's, that are known and missing: each is refused by its name. */
const MISSING = ["encryption", "nocow", "extent_size_hint"];

/**
 * Parses "cluster_size=128K,lazy_refcounts=on". A comma in a value is written twice, as in QEMU.
 * @throws CowcatcherError USAGE, or UNSUPPORTED for a value that only QEMU has.
 */
export function parseFormatOptions(text: string | undefined, format: ImageFormat): FormatOptions {
  const options = { ...DEFAULTS };
  for (const [name, value] of splitOptions(text ?? "")) {
    if (format === "raw" && QCOW2_ONLY.includes(name)) {
      throw usageError(`-o ${name}`, "a raw image does not have it", "choose qcow2 with -f qcow2");
    }
    applyOption(options, name, value);
  }
  if (format === "raw" && options.preallocation === "metadata") {
    throw usageError("-o preallocation", "a raw image has no metadata", "give off, falloc or full");
  }
  return options;
}

function splitOptions(text: string): [name: string, value: string][] {
  const parts = text.split(/(?<!,),(?!,)/).filter((part) => part !== "");
  return parts.map((part) => {
    const match = /^([^=]+)=(.*)$/s.exec(part);
    if (match?.[1] === undefined) throw usageError("-o", `'${part}' has no value`, "give NAME=VALUE");
    return [match[1], (match[2] ?? "").replaceAll(",,", ",")];
  });
}

function applyOption(options: FormatOptions, name: string, value: string): void {
  const object = `-o ${name}`;
  switch (name) {
    case "size":
      options.sizeBytes = parseSize(value, object);
      break;
    case "backing_file":
      options.backingFile = value;
      break;
    case "backing_fmt":
      options.backingFormat = parseChoice(value, object, IMAGE_FORMATS);
      break;
    case "cluster_size":
      options.clusterSizeBytes = parseSize(value, object);
      checkClusterSize(options.clusterSizeBytes, object);
      break;
    case "refcount_bits":
      options.refcountBits = parseRefcountBits(value, object);
      break;
    case "compression_type":
      options.compressionType = parseChoice(value, object, ["zlib", "zstd"]);
      break;
    case "lazy_refcounts":
      options.lazyRefcounts = parseSwitch(value, object);
      break;
    case "extended_l2":
      options.extendedL2 = parseSwitch(value, object);
      break;
    case "data_file":
      options.dataFile = value;
      break;
    case "data_file_raw":
      options.dataFileRaw = parseSwitch(value, object);
      break;
    case "compat":
      options.compat = parseChoice(value, object, Object.keys(VERSION_OF_COMPAT));
      options.version = VERSION_OF_COMPAT[options.compat] ?? 3;
      break;
    case "preallocation":
      options.preallocation = parseChoice(value, object, PREALLOCATIONS);
      break;
    default:
      refuseOther(name, object);
  }
}

function refuseOther(name: string, object: string): void {
  if (MISSING.includes(name) || name.startsWith("encrypt.")) {
    throw unsupported(object, "is not supported in this version");
  }
  throw usageError(object, "is not an option of the format");
}

function parseSwitch(value: string, object: string): boolean {
  return parseChoice(value, object, ["on", "off"]) === "on";
}

function parseRefcountBits(value: string, object: string): number {
  const bits = parseCount(value, object, { min: 1, max: 64 });
  if (!Number.isInteger(Math.log2(bits))) throw usageError(object, `${bits} is not a power of two`);
  return bits;
}
