// From the address of a repository to its store.

import { absoluteName } from "../../file-names.js";
import { CowcatcherError } from "../../errors.js";
import { FolderStore } from "./folder-store.js";
import { describeS3, isS3Address } from "./s3-address.js";
import { S3Store } from "./s3-store.js";
import type { Store, StoreDescription } from "./store.js";

/** @throws CowcatcherError USAGE for an address that is none. */
export function describeStore(address: string): StoreDescription {
  if (address === "") {
    throw new CowcatcherError({
      code: "USAGE",
      object: "REPO",
      problem: "is missing",
      hint: "give a folder or s3:https://HOST/BUCKET, or set COWCATCHER_REPO",
    });
  }
  return isS3Address(address)
    ? describeS3(address)
    : { kind: "folder", name: address, path: absoluteName(address) };
}

/** @param isBlocking the calling thread serves nobody else (file-calls.ts) */
export function openStore(description: StoreDescription, isBlocking: boolean): Store {
  switch (description.kind) {
    case "folder":
      return new FolderStore(description, isBlocking);
    case "s3":
      return new S3Store(description);
  }
}
