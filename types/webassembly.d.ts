// The part of WebAssembly's JavaScript interface that this project uses. @types/node 20 has none, and
// TypeScript's own declaration comes only with the whole of "lib.dom".
declare namespace WebAssembly {
  interface MemoryDescriptor {
    initial: number;
    maximum: number;
    shared: boolean;
  }
  class Memory {
    constructor(descriptor: MemoryDescriptor);
    readonly buffer: ArrayBufferLike;
  }
}
