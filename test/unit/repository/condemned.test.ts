// A chunk of the last backup that a prune is about to delete: the next backup does not count on it.
import { createHash } from "node:crypto";
import { expect, it } from "vitest";
import { chunkName, parseChunkName } from "../../../src/repository/format/names.js";
import { encodeIdList } from "../../../src/repository/work/id-list.js";
import { MortalStore, type Objects } from "../../support/repository/mortal-store.js";
import { backUp, readBack } from "../../support/repository/small-repository.js";

const CONTENTS = [1, 2].map((number) => createHash("sha512").update(`${number}`).digest());
/** Locks begin with the id of a run. */
const PRUNE = "0c".repeat(16);

it("is stored again under another name where it was condemned, and taken over where it was not", async () => {
  const objects: Objects = new Map();
  const store = new MortalStore(objects);
  await backUp(store, CONTENTS);
  const chunks = (): { id: Buffer; generation: number }[] =>
    [...objects.keys()].flatMap((name) => parseChunkName(name) ?? []);
  const [condemned, other] = chunks();
  if (condemned === undefined || other === undefined) throw new Error("two chunks were stored");
  await store.put(`locks/${PRUNE}.condemned-0`, encodeIdList([condemned]));
  const backup = await backUp(store, CONTENTS);
  expect(chunks().filter(({ generation }) => generation > 0)).toEqual([{ id: condemned.id, generation: 1 }]);
  // The deletions of that prune come now.
  await store.delete(chunkName(condemned.id));
  expect(await readBack(store, backup)).toEqual(Buffer.concat(CONTENTS));
});
