// One mail a run to each address: what its jobs have come to, and the logs of those that failed. It goes to the system's
// sendmail, which all mail servers of Unix have under this name.
import { spawn } from "node:child_process";
import { hostname } from "node:os";
import { ioError } from "../../errors.js";
import type { FinishedJob } from "../run-jobs.js";
import type { JobResult } from "../result.js";

/** @param environment COWCATCHER_SENDMAIL names another program that takes a mail as sendmail does (-t -i) */
export function sendmailProgram(environment: Record<string, string | undefined> = process.env): string {
  return environment["COWCATCHER_SENDMAIL"] || "/usr/sbin/sendmail";
}

const TIMEOUT_MS = 60_000;

export interface Mail {
  to: string;
  subject: string;
  body: string;
}

/** None where nobody is to hear of these jobs. @param table of results, for people */
export function composeMails(
  finished: readonly FinishedJob[],
  table: (results: readonly JobResult[]) => string[],
): Mail[] {
  const byAddress = new Map<string, FinishedJob[]>();
  for (const one of finished) {
    const { mail } = one.job;
    const isDue = mail !== undefined && one.result.result !== "skipped" && (mail.always || isBad(one.result));
    for (const address of isDue ? mail.addresses : []) {
      byAddress.set(address, [...(byAddress.get(address) ?? []), one]);
    }
  }
  return [...byAddress].map(([to, jobs]) => {
    const failed = jobs.filter(({ result }) => isBad(result));
    const what = failed.length === 0 ? "all good" : `${failed.length} of ${jobs.length} failed`;
    const logs = failed.flatMap(({ result, log }) => [
      "",
      `${result.job}: ${result.error?.message ?? "errors were ignored"}`,
      ...log,
    ]);
    return {
      to,
      subject: `cowcatcher on ${hostname()}: ${what}`,
      body: [...table(jobs.map(({ result }) => result)), ...logs].join("\n"),
    };
  });
}

function isBad({ exit_code }: JobResult): boolean {
  return exit_code !== 0;
}

/** @throws CowcatcherError IO */
export async function sendMail({ to, subject, body }: Mail, program = sendmailProgram()): Promise<void> {
  const header = (text: string): string => text.replace(/[\r\n]+/g, " ");
  const message = [
    `To: ${header(to)}`,
    `Subject: ${header(subject)}`,
    "Auto-Submitted: auto-generated",
    "Content-Type: text/plain; charset=utf-8",
    "",
    body,
    "",
  ].join("\n");
  try {
    await new Promise<void>((settle, reject) => {
      // -t: the address stands in the header; -i: a dot on a line of its own ends nothing.
      const child = spawn(program, ["-t", "-i"], {
        stdio: ["pipe", "ignore", "ignore"],
        timeout: TIMEOUT_MS,
      });
      child.stdin.on("error", () => undefined);
      child.stdin.end(message);
      child.on("error", reject);
      child.on("close", (code, signal) => {
        if (code === 0) settle();
        else
          reject(
            new Error(signal === null ? `it ended with exit code ${code}` : `it was ended by ${signal}`),
          );
      });
    });
  } catch (error) {
    throw ioError(`send mail to ${to}`, program, error);
  }
}
