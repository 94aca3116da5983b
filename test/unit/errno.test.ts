// Every errno of Linux has a name, words and a class, whatever Node calls it.
import { constants } from "node:os";
import { expect, it } from "vitest";
import { errnoError } from "../../src/block/file/fileio.js";
import { errnoKind, errnoName, errnoText, isErrnoName } from "../../src/errno.js";
import { CowcatcherError, ioError, isTransient } from "../../src/errors.js";

/** As Node throws what libuv has no name for. */
function unnamed(errno: number): Error {
  const code = `Unknown system error -${errno}`;
  return Object.assign(new Error(`${code}: ${code}, write`), { errno: -errno, code, syscall: "write" });
}

it("no number up to the last lacks a name and words of its own", () => {
  const texts = new Set<string>();
  for (let number = 1; number <= 133; number++) {
    if (number === 41 || number === 58) continue;
    const name = errnoName(number);
    expect(name).toMatch(/^E[A-Z2]/);
    expect(errnoText(name)).toMatch(/^[a-zR.]/);
    texts.add(errnoText(name));
  }
  expect(texts.size).toBeGreaterThan(125);
});

it("the numbers are the system's", () => {
  for (const [name, number] of Object.entries(constants.errno)) {
    expect(isErrnoName(name), name).toBe(true);
    expect(constants.errno[errnoName(number) as keyof typeof constants.errno]).toBe(number);
  }
});

it.each([
  [122, "EDQUOT", "NO_SPACE", "disk quota exceeded"],
  [116, "ESTALE", "IO", "stale file handle"],
  [117, "EUCLEAN", "IO", "the file system is damaged"],
  [121, "EREMOTEIO", "IO", "input/output error"],
])("%i is %s, from Node and from libc, and of the class %s", (errno, name, code, words) => {
  for (const error of [ioError("write", "t", unnamed(errno)), errnoError("write", "t", -errno)]) {
    expect(error).toMatchObject({ errno: name, code });
    expect(error.message).toContain(words);
  }
});

it("only what may go well the next time is tried again", () => {
  const of = (errno: number): boolean => isTransient(ioError("write", "t", unnamed(errno)));
  const { EIO, EAGAIN, ETIMEDOUT, EDQUOT, ENOSPC, EFBIG, EROFS, EACCES, ESTALE, EBADF } = constants.errno;
  expect([EIO, EAGAIN, ETIMEDOUT].map(of)).toEqual([true, true, true]);
  expect([EDQUOT, ENOSPC, EFBIG, EROFS, EACCES, ESTALE, EBADF].map(of)).toEqual(Array(7).fill(false));
  expect(of(constants.errno.ENOENT)).toBe(false);
  const noSocket = new CowcatcherError({
    code: "IO",
    object: "t",
    problem: "cannot connect",
    errno: "ENOENT",
  });
  expect(isTransient(noSocket)).toBe(true);
  expect(errnoKind("EOPNOTSUPP")).toBe("lasting");
  expect(errnoName(999)).toBe("E999");
});
