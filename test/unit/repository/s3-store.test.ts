import { randomBytes } from "node:crypto";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { describeS3 } from "../../../src/repository/store/s3-address.js";
import { MAX_IN_FLIGHT, type S3Limits, S3Store } from "../../../src/repository/store/s3-store.js";
import { type Fault, FakeS3, type FakeS3Options } from "../../support/repository/fake-s3.js";
import { storeSuite, type StoreUnderTest } from "../../support/repository/store-suite.js";

const QUICK: Partial<S3Limits> = { attempts: 4, firstPauseMs: 1, longestPauseMs: 4, timeoutMs: 10_000 };
const KEEP = { durable: true };

function suiteOver(options: FakeS3Options): () => Promise<StoreUnderTest> {
  return async () => {
    const fake = await FakeS3.listen(options);
    const description = describeS3(fake.address, fake.environment);
    return {
      store: new S3Store(description, QUICK),
      other: new S3Store(description, QUICK),
      end: () => fake.close(),
    };
  };
}

describe("a bucket", () => storeSuite(suiteOver({ pageSize: 700 })));

describe("a bucket whose server misbehaves", () => {
  let fake: FakeS3;
  let store: S3Store;
  beforeEach(async () => {
    fake = await FakeS3.listen();
    store = new S3Store(describeS3(fake.address, fake.environment), QUICK);
  });
  afterEach(() => fake.close());

  const first = (count: number, fault: Fault): void => {
    fake.faultFor = (_line, index) => (index < count ? fault : undefined);
  };

  it.each<[string, Fault]>([
    ["503", { kind: "status", status: 503 }],
    ["500", { kind: "status", status: 500, code: "InternalError" }],
    ["a broken connection", { kind: "break", when: "before" }],
    ["an answer that is lost", { kind: "break", when: "after" }],
  ])("goes on after %s", async (_what, fault) => {
    const content = randomBytes(100_000);
    for (const act of [
      () => store.put("a/x", content, { durable: true, exclusive: true }),
      () => store.get("a/x", 1_000_000),
      () => store.head("a/x"),
      () => store.touch("a/t", content),
      () => store.delete("a/t"),
    ]) {
      fake.requests.length = 0;
      first(2, fault);
      const result = await act();
      // Whose put it was is known although its answer was lost.
      if (typeof result === "string") expect(result).toBe("stored");
      if (Buffer.isBuffer(result)) expect(result.equals(content)).toBe(true);
    }
    expect([...fake.objects.keys()]).toEqual(["some/prefix/a/x"]);
  });

  it("never gives out a part of an object whose answer was cut off", async () => {
    const content = randomBytes(300_000);
    await store.put("a/x", content, KEEP);
    fake.requests.length = 0;
    first(2, { kind: "cut" });
    expect((await store.get("a/x", 1_000_000)).equals(content)).toBe(true);
    fake.faultFor = () => ({ kind: "cut" });
    await expect(store.get("a/x", 1_000_000)).rejects.toMatchObject({ code: "IO" });
  });

  it("gives up on a server that says nothing, and says where it is", async () => {
    const impatient = new S3Store(describeS3(fake.address, fake.environment), {
      ...QUICK,
      attempts: 2,
      timeoutMs: 300,
    });
    fake.faultFor = () => ({ kind: "stall" });
    await expect(impatient.head("a/x")).rejects.toMatchObject({
      code: "IO",
      hint: expect.stringContaining(fake.endpoint) as string,
    });
    expect(fake.requests).toHaveLength(2);
  });

  it("gives up on one that stays busy, after as many attempts as it was given", async () => {
    fake.faultFor = () => ({ kind: "status", status: 503 });
    await expect(store.put("a/x", randomBytes(10), KEEP)).rejects.toMatchObject({ code: "IO" });
    expect(fake.requests).toHaveLength(4);
  });

  it.each<[string, number, string, RegExp]>([
    ["a wrong clock", 403, "RequestTimeTooSkewed", /clock is wrong/],
    ["a missing bucket", 404, "NoSuchBucket", /there is no bucket backups/],
    ["a denied key", 403, "AccessDenied", /access denied/],
    ["an unknown key", 403, "InvalidAccessKeyId", /does not know the access key/],
    ["a wrong secret", 403, "SignatureDoesNotMatch", /secret key is not that/],
    ["something else", 400, "Odd", /no & no/],
  ])("has clear words for %s, at once", async (_what, status, code, words) => {
    fake.faultFor = () => ({ kind: "status", status, code });
    for (const act of [
      () => store.put("a/x", randomBytes(10), KEEP),
      () => store.get("a/x", 10),
      () => store.delete("a/x"),
      async () => {
        for await (const batch of store.list("a/")) expect(batch).toEqual([]);
      },
    ]) {
      await expect(act()).rejects.toThrow(words);
    }
    expect(fake.requests).toHaveLength(4);
  });

  it("signs in a way that the server finds right, and wrong with another secret", async () => {
    const wrong = { ...fake.environment, AWS_SECRET_ACCESS_KEY: "other" };
    await expect(
      new S3Store(describeS3(fake.address, wrong), QUICK).put("a/x", randomBytes(3), KEEP),
    ).rejects.toThrow(/secret key/);
    await store.put("groups/vm1/2026-11-28T08:31:28.123456789Z/a+b@c=d.index", randomBytes(3), KEEP);
    expect(fake.objects.size).toBe(1);
  });

  it("keeps to its number of requests in flight", async () => {
    let open: () => void = () => undefined;
    fake.gate = new Promise((resolve) => (open = resolve));
    const puts = Array.from({ length: 100 }, (_, i) => store.put(`a/${i}`, randomBytes(1000), KEEP));
    while (fake.inFlight < MAX_IN_FLIGHT) await new Promise(setImmediate);
    open();
    expect(new Set(await Promise.all(puts))).toEqual(new Set(["stored"]));
    expect(fake.inFlightMax).toBe(MAX_IN_FLIGHT);
  });

  it("does without conditional puts where the server has none", async () => {
    const old = await FakeS3.listen({ knowsCondition: false });
    const plain = new S3Store(describeS3(old.address, old.environment), QUICK);
    expect(await plain.put("a/x", Buffer.from("1"), KEEP)).toBe("stored");
    expect(await plain.put("a/x", Buffer.from("2"), KEEP)).toBe("present");
    expect(old.objects.get("some/prefix/a/x")?.content.toString()).toBe("1");
    await old.close();
  });
});

describe("the address of a bucket", () => {
  const keys = { AWS_ACCESS_KEY_ID: "id", AWS_SECRET_ACCESS_KEY: "secret" };

  it("is scheme, host, bucket and prefix; the style follows the host", () => {
    expect(describeS3("s3:https://s3.eu-west-1.amazonaws.com/my-bucket/a/b/", keys)).toMatchObject({
      endpoint: "https://s3.eu-west-1.amazonaws.com",
      bucket: "my-bucket",
      prefix: "a/b/",
      style: "virtual-host",
    });
    expect(describeS3("s3:http://[::1]:9000/my-bucket", keys)).toMatchObject({
      endpoint: "http://[::1]:9000",
      prefix: "",
      style: "path",
    });
    expect(describeS3("s3:http://h/bucket", { ...keys, COWCATCHER_S3_STYLE: "virtual-host" }).style).toBe(
      "virtual-host",
    );
  });

  it.each([
    "s3:bucket",
    "s3:ftp://h/bucket",
    "s3:https://h",
    "s3:https://h/",
    "s3:https://h/UPPER",
    "s3:https://id:secret@h/bucket",
    "s3:https://h/bucket?x=1",
    "s3:https://h/bucket/a b",
    "s3:https://h/bucket/../x",
  ])("is refused: %s", (address) => {
    expect(() => describeS3(address, keys)).toThrow(/give s3:https:|credentials|bucket/);
  });

  it("takes credentials from Amazon's file where the environment has none", () => {
    const folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-s3-"));
    const file = join(folder, "credentials");
    fs.writeFileSync(
      file,
      "[default]\naws_access_key_id = one\naws_secret_access_key=two\n[b]\naws_access_key_id=x\n",
    );
    const environment = { AWS_SHARED_CREDENTIALS_FILE: file };
    expect(describeS3("s3:https://h/bucket", environment)).toMatchObject({
      accessKeyId: "one",
      secretAccessKey: "two",
    });
    expect(() => describeS3("s3:https://h/bucket", { ...environment, AWS_PROFILE: "b" })).toThrow(
      /no credentials/,
    );
    fs.rmSync(folder, { recursive: true });
  });
});
