// From the description of a repository's store to the store.

import { FolderStore } from "./folder-store.js";
import { S3Store } from "./s3-store.js";
import type { Store, StoreDescription } from "./store.js";

/** @param isBlocking the calling thread serves nobody else (file-calls.ts) */
export function openStore(description: StoreDescription, isBlocking: boolean): Store {
  switch (description.kind) {
    case "folder":
      return new FolderStore(description, isBlocking);
    case "s3":
      return new S3Store(description);
  }
}
