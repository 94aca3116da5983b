// What QEMU sends by the method `ring` becomes captures: the interceptor gets the request's own bytes.
import { describe, expect, it } from "vitest";
import { ArrivedData, CaptureDevice } from "../../../src/qemu/capture-device.js";

const SIZE = 256 * 1024;

describe("CaptureDevice", () => {
  it("gives the interceptor what has arrived, also when it asks later, until it lets the write go", async () => {
    const arrived = new ArrivedData("vd0", SIZE);
    const found: number[] = [];
    const look = (offset: number): void => {
      const buffer = new Uint8Array(4096);
      void arrived.read(buffer, 0, 4096, offset);
      found.push(buffer[0], buffer[4095]);
    };
    let letGo: () => void = () => undefined;
    const device = new CaptureDevice(arrived, {
      beforeWrite(offset) {
        if (offset === 0) {
          look(4096);
          return undefined;
        }
        return new Promise<void>((resolve) => (letGo = resolve)).then(() => look(offset));
      },
    });
    const request = new Uint8Array(65_536 + 7);
    request.fill(1, 7).fill(2, 7 + 4096, 7 + 8192);
    expect(device.write(request, 7, 65_536, 0)).toBeUndefined();
    expect(found).toEqual([2, 2]);
    const late = device.writeZeroes(65_536, 65_536);
    const other = device.write(request, 7, 65_536, 131_072);
    void other;
    letGo();
    await other;
    expect(found).toEqual([2, 2, 1, 1]);
    expect(late).toBeInstanceOf(Promise);
    // What is answered is forgotten.
    expect(() => arrived.read(new Uint8Array(4096), 0, 4096, 131_072)).toThrow("no whole block");
  });

  it("keeps no part of a block for the whole, and reads zeroes as zeroes", () => {
    const arrived = new ArrivedData("vd0", SIZE);
    const device = new CaptureDevice(arrived, {
      beforeWrite(offset, length) {
        const buffer = new Uint8Array(4096).fill(9);
        void arrived.read(buffer, 0, Math.min(4096, SIZE - offset), offset);
        expect(buffer.every((byte) => byte === 0)).toBe(true);
        expect(() => arrived.read(buffer, 0, 4096, offset + length - 2048)).toThrow("no whole block");
        return undefined;
      },
    });
    void device.writeZeroes(65_536, 65_536);
    expect.assertions(2);
  });

  it("passes on that a write must fail, and forgets it", async () => {
    const arrived = new ArrivedData("vd0", SIZE);
    const device = new CaptureDevice(arrived, { beforeWrite: () => Promise.reject(new Error("no room")) });
    await expect(device.write(new Uint8Array(65_536), 0, 65_536, 0)).rejects.toThrow("no room");
    expect(() => arrived.read(new Uint8Array(4096), 0, 4096, 0)).toThrow("no whole block");
  });
});
