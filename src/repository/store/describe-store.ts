// From the address of a repository to what opens its store. Apart from open-store.ts, which loads what S3 needs: who only
// says where a repository is does not.

import { absoluteName } from "../../file-names.js";
import { CowcatcherError } from "../../errors.js";
import { describeS3, isS3Address } from "./s3-address.js";
import type { StoreDescription } from "./store.js";

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
