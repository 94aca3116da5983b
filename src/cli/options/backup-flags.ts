// What commander makes of the options of `backup` and `restore`: each value parsed by itself, none checked against another.
import type { LevelChoice } from "../../backup/options.js";
import type { QemuMethod } from "../../qemu/methods.js";
import type { SyncMode } from "../../backup/options.js";
import type { OnBufferFull, OnCbwError, OnIoError } from "../../cow/policies.js";
import type { ImageFormat } from "../../block/format.js";
import type { KeyFlags } from "./repository-options.js";
import type { Compression } from "../../image/qcow2/format/compression.js";

export interface CopyFlags {
  sourceFormat?: ImageFormat;
  targetFormat?: ImageFormat;
  workers?: number;
  clusterSize?: number;
  rateLimit?: number;
  onSourceError?: OnIoError;
  onTargetError?: OnIoError;
  targetRetries?: number;
  targetSnapshot?: string;
  direct?: boolean;
  verify?: boolean;
  force?: boolean;
}

export interface BackupFlags extends CopyFlags, KeyFlags {
  repo?: string;
  group?: string;
  level?: LevelChoice;
  vmConfig?: string;
  control?: string;
  qmp?: string;
  libvirt?: string;
  connect?: string;
  qemuMethod?: QemuMethod;
  fleeceDir?: string;
  nbd?: string;
  acceptGuestRisk?: boolean;
  cleanup?: boolean;
  freeze?: string;
  t0Gate?: string;
  disk?: string[];
  /** One, or one for each TARGET. */
  backingFile?: string[];
  backingFormat?: ImageFormat;
  snapshot?: string;
  compress?: Compression;
  dryRun?: boolean;
  cowBufferSize?: number;
  onBufferFull?: OnBufferFull;
  spillDir?: string;
  spillLimit?: number;
  guestTimeout?: number;
  onCbwError?: OnCbwError;
  sync?: SyncMode | "incremental";
  bitmap?: string;
  bitmapMode?: string;
  bitmapReplaces?: string[];
  bitmapKeepsBase?: boolean;
  checkpoint?: string;
  since?: string;
  sinceOrFull?: boolean;
}
