// Edits that are not saved yet, kept in this browser until they are.

const NAME = "nucleus-page", STORE = "drafts";

/**
 * @typedef {{key: string, base: {set: string, tag: string} | null, labels: string, edits: import("./nuclei.js").Edit[],
 *   when: number}} Draft `labels` names the nuclei that the edits belong to
 */

/** @returns {Promise<IDBDatabase>} */
function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "key" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** @template T @param {IDBTransactionMode} mode @param {(store: IDBObjectStore) => IDBRequest<T>} ask @returns {Promise<T>} */
async function asked(mode, ask) {
  const database = await opened();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode), request = ask(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

export const drafts = {
  /** @param {string} key @returns {Promise<Draft | undefined>} */
  find: (key) => asked("readonly", (store) => store.get(key)),
  /** @param {Draft} draft */
  keep: (draft) => asked("readwrite", (store) => store.put(draft)),
  /** @param {string} key */
  drop: (key) => asked("readwrite", (store) => store.delete(key)),
};
