import { expect, it } from "vitest";
import { RangeLock } from "../../../src/block/file/range-lock.js";

it("keeps earlier holders' order, and lets others pass", async () => {
  const lock = new RangeLock();
  const order: string[] = [];
  const a = await lock.hold(0, 10);
  const b = lock.hold(5, 15).then((range) => (order.push("b"), range));
  const c = lock.hold(12, 20).then((range) => (order.push("c"), range));
  const d = await lock.hold(20, 30);
  order.push("d");
  lock.release(a);
  lock.release(await b);
  lock.release(await c);
  lock.release(d);
  expect(order).toEqual(["d", "b", "c"]);
});

it("gives nothing at once that is held or waited for, and all of it once that is over", async () => {
  const lock = new RangeLock();
  const held = lock.tryHold(0, 10);
  expect(held).toBeDefined();
  expect(lock.tryHold(9, 11)).toBeUndefined();
  const waiting = lock.hold(5, 20);
  expect(lock.tryHold(15, 16)).toBeUndefined();
  const beside = lock.tryHold(20, 30);
  expect(beside).toBeDefined();
  if (held !== undefined) lock.release(held);
  lock.release(await waiting);
  expect(lock.tryHold(0, 20)).toBeDefined();
});
