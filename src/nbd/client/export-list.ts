// What a server offers, asked for when it does not have what was wanted: a name that is mistyped is found at a glance.

import { CowcatcherError } from "../../errors.js";
import { NBD_OPT_LIST, NBD_REP_SERVER } from "../wire/protocol.js";

/** A server of a whole machine's disks; more names would not be read in one line either. */
const MAX_NAMES = 16;
const MAX_NAME_CHARACTERS = 64;

/** The part of a negotiation that is needed here. */
export interface OptionTalk {
  send(option: number): void;
  reply(option: number): Promise<{ type: number; data: Buffer }>;
}

/** The error with the server's exports as its advice, where the server names them. Never rejects. */
export async function withExportNames(talk: OptionTalk, error: CowcatcherError): Promise<CowcatcherError> {
  const names = await exportNames(talk).catch(() => []);
  if (names.length === 0) return error;
  const shown = names.slice(0, MAX_NAMES).map(shownName).join(", ");
  const hint = `it has ${shown}${names.length > MAX_NAMES ? ", …" : ""}`;
  return new CowcatcherError({ ...error.toDetails(), hint });
}

async function exportNames(talk: OptionTalk): Promise<string[]> {
  const names: string[] = [];
  talk.send(NBD_OPT_LIST);
  while (names.length <= MAX_NAMES) {
    const { type, data } = await talk.reply(NBD_OPT_LIST);
    // The acknowledgement that ends the list, or a refusal: a server need not have one.
    if (type !== NBD_REP_SERVER || data.length < 4) return names;
    names.push(data.toString("utf8", 4, 4 + data.readUInt32BE(0)));
  }
  return names;
}

function shownName(name: string): string {
  const short = name.length > MAX_NAME_CHARACTERS ? `${name.slice(0, MAX_NAME_CHARACTERS)}…` : name;
  return `'${short}'`;
}
