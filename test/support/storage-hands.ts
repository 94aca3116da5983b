// Storage threads that are none: their calls are carried out on the test's own thread, for tests that replace what the
// calls do, or have no threads.
import { StorageOperations } from "../../src/backup/storage/operations.js";
import type {
  ArgumentOf,
  ResultOf,
  StorageCall,
  StorageHand,
  StorageHands,
} from "../../src/backup/storage/protocol.js";

export class LocalHands implements StorageHands {
  /** Of all calls, in order. */
  readonly calls: StorageCall[] = [];
  /** Hands that nobody has given back. */
  takenCount = 0;

  take(): StorageHand {
    const operations = new StorageOperations();
    let openCount = 0;
    const log = this.calls;
    this.takenCount++;
    return {
      get isBusy() {
        return openCount > 0;
      },
      async call<Call extends StorageCall>(call: Call, argument: ArgumentOf<Call>): Promise<ResultOf<Call>> {
        log.push(call);
        openCount++;
        try {
          return (await operations[call](argument as never)) as ResultOf<Call>;
        } finally {
          openCount--;
        }
      },
      release: () => {
        this.takenCount--;
      },
    };
  }

  warmUp(): Promise<void> {
    return Promise.resolve();
  }

  close(): void {
    // There is no thread to be ended.
  }
}
