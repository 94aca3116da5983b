// How a library is loaded that may be missing: once, when it is first asked for, and null where it cannot be had.

/**
 * Returns the function that gives what `bind` made of the library, from then on the same. Null where `bind` throws, off
 * Linux, on processors that are not in `architectures`, and with COWCATCHER_NO_NATIVE=1.
 */
export function optionalLibrary<T>(
  bind: () => T,
  architectures: readonly NodeJS.Architecture[] = [process.arch],
): () => T | null {
  let loaded: T | null | undefined;
  return () => {
    if (loaded === undefined) loaded = isAllowed(architectures) ? bindOrNull(bind) : null;
    return loaded;
  };
}

function isAllowed(architectures: readonly NodeJS.Architecture[]): boolean {
  const isForbidden = process.env["COWCATCHER_NO_NATIVE"] === "1";
  return !isForbidden && process.platform === "linux" && architectures.includes(process.arch);
}

function bindOrNull<T>(bind: () => T): T | null {
  try {
    return bind();
  } catch {
    return null;
  }
}
