// Edits that are not saved yet, kept in this browser until they are.

const NAME = "nucleus-page", STORE = "drafts";

/**
 * @typedef {{key: string, base: {set: string, tag: string} | null, labels: string, edits: import("./nuclei.js").Edit[],
 *   when: number, tab?: number}} Draft `labels` names the nuclei that the edits belong to
 */

/** This tab, for those who ask whether a draft is of another one. */
export const TAB = Math.random();

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
  /** Keep a draft; return the one that it replaces. @param {Draft} draft @returns {Promise<Draft | undefined>} */
  keep: (draft) => asked("readwrite", (store) => {
    const before = store.get(draft.key);
    before.onsuccess = () => store.put({ ...draft, tab: TAB });
    return before;
  }),
  /** @param {string} key */
  drop: (key) => asked("readwrite", (store) => store.delete(key)),
};
