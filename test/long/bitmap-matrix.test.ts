// All of the matrix of QEMU's iotest 257, beside QEMU.
import { afterAll, beforeAll, it } from "vitest";
import { ALL_CASES, MATRIX_SIZE, runMatrixCase } from "../support/bitmap-matrix.js";
import { Judged } from "../support/qmp-judge.js";
import { scratchFolder, stopAll } from "../support/server.js";

let judged: Judged;

beforeAll(async () => {
  judged = await Judged.start(scratchFolder(), MATRIX_SIZE);
});
afterAll(async () => {
  await judged.close();
  await stopAll();
});

it.each(ALL_CASES)("$sync $mode, cancelled: $isCancelled", async (matrixCase) => {
  await runMatrixCase(judged, matrixCase);
});
