// Which room may look into which. `npm run lint` holds it. A folder imports what stands below it in this list, never
// above it; docs/architecture.md shows the same list and says what each room knows.
//
// A new room gets its line here. What a room may not see it gets from its caller, by an interface of its own:
// cow/target-writer.ts is what copy-before-write knows of targets, cow/policies.ts what it knows of a job's options.

/** From the top of the house down. */
const ROOMS = [
  "bench",
  "src/cli",
  "src/run",
  "src/bench",
  "src/control",
  "src/libvirt",
  "src/qemu",
  "src/qmp",
  "workers",
  "src/backup",
  "src/target",
  "src/repository",
  "src/tracking",
  "src/cow",
  "src/image",
  "src/nbd",
  "src/rbd",
  "src/block",
  "src/native",
];

/** Within a room, from the top down, where its parts have an order. What is not listed is free within its room. */
const PARTS = {
  "src/cli": ["commands", "actions", "progress", "options", "output"],
  "src/backup": ["job", "copy", "memory"],
  "src/target": ["qcow2", "file"],
  "src/image/qcow2": ["check", "guest", "format"],
};

/** Parts of a room that know nothing of each other. */
const APART = [
  ["src/nbd/client", "src/nbd/server"],
  ["src/image/qcow2/create", "src/image/qcow2/guest"],
  ["src/image/qcow2/create", "src/image/qcow2/check"],
];

const inside = (folder) => `^${folder}/`;

function downwards(list) {
  return list.slice(1).map((folder, index) => ({
    name: `${folder} does not look upwards`,
    comment: `${folder} stands below ${list.slice(0, index + 1).join(", ")}: turn the import round, or move what both need down.`,
    severity: "error",
    from: { path: inside(folder) },
    to: { path: list.slice(0, index + 1).map(inside) },
  }));
}

export default {
  forbidden: [
    {
      name: "no circle",
      comment: "Two files that need each other are one, or what both need is a third. Types count.",
      severity: "error",
      from: {},
      to: { circular: true },
    },
    {
      name: "the ground floor stands alone",
      comment: "Errors, units, log and sockets' addresses know no room.",
      severity: "error",
      from: { path: "^src/[^/]+\\.ts$" },
      to: { path: "^(src/[^/]+/|workers/|bench/)" },
    },
    {
      name: "nothing is left in no room",
      comment: "Below src there are the rooms of this list, and the few files of the ground floor.",
      severity: "error",
      from: { path: "^src/[^/]+/", pathNot: ROOMS.map(inside) },
      to: {},
    },
    {
      name: "the product does not know its tests",
      comment: "Tests, their support and the development tools stay outside.",
      severity: "error",
      from: { path: "^(src|workers|bench)/" },
      to: { path: "^(test|scripts)/" },
    },
    {
      name: "what users install has what it needs",
      comment: "src and workers import Node's own modules and package.json's dependencies only.",
      severity: "error",
      from: { path: "^(src|workers)/" },
      to: { dependencyTypes: ["npm-dev", "npm-no-pkg", "npm-unknown", "unknown"] },
    },
    ...downwards(ROOMS),
    ...Object.entries(PARTS).flatMap(([room, parts]) => downwards(parts.map((part) => `${room}/${part}`))),
    ...APART.flatMap(([a, b]) => [
      {
        name: `${a} knows nothing of ${b}`,
        comment: "What both need stands in a part below them.",
        severity: "error",
        from: { path: inside(a) },
        to: { path: inside(b) },
      },
      {
        name: `${b} knows nothing of ${a}`,
        comment: "What both need stands in a part below them.",
        severity: "error",
        from: { path: inside(b) },
        to: { path: inside(a) },
      },
    ]),
  ],
  options: {
    // Types count: an import that the compiler erases is still one that a reader follows.
    tsPreCompilationDeps: true,
    tsConfig: { fileName: "tsconfig.json" },
    doNotFollow: { path: "node_modules" },
    // Parsed by another parser than TypeScript's own it would not see types.
    parser: "tsc",
    enhancedResolveOptions: { exportsFields: ["exports"], conditionNames: ["import", "node", "types"] },
  },
};
