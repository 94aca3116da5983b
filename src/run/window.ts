// The part of the day in which a job may start, by local time. It may go over midnight.
import { CowcatcherError } from "../errors.js";

export interface Window {
  /** Minutes since midnight. */
  fromMinute: number;
  /** The first minute that is not in it. */
  toMinute: number;
  text: string;
}

/** @throws CowcatcherError USAGE */
export function parseWindow(text: string): Window {
  const [, fromHour, fromMinute, toHour, toMinute] = /^(\d\d):(\d\d)-(\d\d):(\d\d)$/.exec(text) ?? [];
  const from = minuteOf(fromHour, fromMinute);
  const to = minuteOf(toHour, toMinute);
  if (Number.isNaN(from) || Number.isNaN(to) || from === to) {
    throw new CowcatcherError({
      code: "USAGE",
      object: "window",
      problem: `'${text}' is no part of a day`,
      hint: "give two different times from 00:00 to 24:00, such as 22:00-06:00",
    });
  }
  return { fromMinute: from, toMinute: to, text };
}

function minuteOf(hour = "", minute = ""): number {
  const minutes = Number(hour) * 60 + Number(minute);
  const isTime = hour !== "" && minute !== "" && Number(minute) < 60 && minutes <= 24 * 60;
  return isTime ? minutes : NaN;
}

export function isInWindow({ fromMinute, toMinute }: Window, now: Date): boolean {
  const minute = now.getHours() * 60 + now.getMinutes();
  return fromMinute < toMinute
    ? minute >= fromMinute && minute < toMinute
    : minute >= fromMinute || minute < toMinute;
}
