// What the page asks of the server.

/**
 * @typedef {{id: string, name: string, status: "waiting" | "working" | "done" | "failed", message: string | null,
 *   notes: string[], nuclei: number | null, warning: string | null, version: number}} ImageState
 * @typedef {{name: string, low: number, high: number, colour: string, range: [number, number],
 *   contrast: [number, number]}} Channel
 * @typedef {ImageState & {width: number, height: number, levels: number, pixel_size: number | null, depths: number,
 *   times: number, options: Record<string, any>, choose: boolean, key: string, model: string,
 *   channels: Channel[]}} ImageInfo
 * @typedef {{revision: number, who: string, when: string, tag: string, layer: string | null, nuclei: number,
 *   labels_sha256: string}} Revision
 * @typedef {{label: number, rings: number[][]}} Shape rings in pixels
 * @typedef {{removed: number[], shapes: Shape[]}} Changes
 * @typedef {{model: string, images: number, corrections: string, bucket: string | null, image_bytes: number,
 *   downloads: string[], recipe: string}} Service
 * @typedef {{stage: "importing" | "submitting" | "waiting" | "begun" | "failed", set: string, dataset: string,
 *   run: string, message: string | null}} TeachState
 * @typedef {{available: boolean, bucket: boolean, state: TeachState | null}} Teaching
 * @typedef {{run: string, state: string, message: string | null, begun?: string, done?: number, epochs?: number | null,
 *   monitor?: string, curve: {epoch: number, loss: number | null, score: number | null}[], best?: number | null,
 *   version: string | null, gate: {passed: boolean, alias: string, text: string} | null}} Run
 * @typedef {{model: string, layer: string, before: number, after: number, same: number, gone: number[],
 *   new: number[], corrected: {nuclei: number, before: number, after: number} | null}} Comparison
 */

const API = "/page/api";

/** An answer that is no success. */
export class ServerError extends Error {
  /** @param {string} message @param {number} status @param {any} content */
  constructor(message, status, content) {
    super(message);
    this.status = status;
    this.content = content;
  }
}

const TOKEN = "nucleus-token";

/** Send this token from now on, for as long as the tab is open. @param {string} token */
export function useToken(token) {
  sessionStorage.setItem(TOKEN, token.replace(/[^!-~]/g, "")); // no token has others, and no header takes them
}

/** @param {string} path @param {RequestInit} [options] @returns {Promise<Response>} */
async function ask(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN), headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let answer;
  try {
    answer = await fetch(API + path, { credentials: "same-origin", ...options, headers });
  } catch {
    throw new ServerError("The service does not answer. Is nucleus serve still running?", 0, null);
  }
  if (answer.ok) return answer;
  const content = await answer.json().catch(() => null);
  const detail = content?.detail;
  throw new ServerError(typeof detail === "string" ? detail : `The service answered ${answer.status}.`, answer.status, content);
}

/** @param {string} path @param {any} [body] @returns {Promise<any>} */
async function post(path, body = {}) {
  return (await ask(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } })).json();
}

/** @param {string} path @returns {Promise<any>} */
const get = async (path) => (await ask(path)).json();
const part = encodeURIComponent;

export const server = {
  /** @returns {Promise<Service>} */
  session: () => post("/session"),
  /** @returns {Promise<ImageState[]>} */
  images: () => get("/images"),
  /** @param {string} name @param {Blob} body @param {string} type @returns {Promise<ImageState>} */
  upload: async (name, body, type) => (await ask(`/images?name=${part(name)}`, { method: "POST", body, headers: { "Content-Type": type } })).json(),
  /** @param {string} id @returns {Promise<ImageInfo>} */
  image: (id) => get(`/images/${id}`),
  /** @param {string} id */
  remove: (id) => ask(`/images/${id}`, { method: "DELETE" }),
  /** @param {string} id @param {Record<string, any>} options */
  segment: (id, options) => post(`/images/${id}/segment`, options),
  /** @param {ImageState} image @returns {string} */
  thumbnail: (image) => `/images/${image.id}/thumbnail.png?version=${image.version}`,
  /** @param {string} path @param {AbortSignal} [signal] @returns {Promise<Blob>} */
  picture: async (path, signal) => (await ask(path, { signal })).blob(),
  /** @param {ImageState} image @param {number} level @param {number} x @param {number} y @param {string} views @returns {string} */
  tile: (image, level, x, y, views) => `/images/${image.id}/tiles/${level}/${x}/${y}.png?views=${views}&version=${image.version}`,
  /** @param {string} id @param {string} layer @returns {Promise<Int32Array>} */
  outlines: async (id, layer) => new Int32Array(await (await ask(`/images/${id}/layers/${layer}/outlines`)).arrayBuffer()),
  /** @param {string} id @param {string} layer @returns {Promise<Record<string, any[]>>} */
  rows: (id, layer) => get(`/images/${id}/layers/${layer}/rows`),
  /** @param {string} id @param {any} asked @returns {Promise<Int32Array>} */
  missed: async (id, asked) => new Int32Array(await (await ask(`/images/${id}/missed`, { method: "POST", body: JSON.stringify(asked), headers: { "Content-Type": "application/json" } })).arrayBuffer()),
  /** @param {string} id @param {Shape} shape @returns {Promise<{row: Record<string, any>, rings: number[][]}>} */
  measure: (id, shape) => post(`/images/${id}/measure`, shape),
  /** @param {string} id @param {string} what @param {any} edited @returns {Promise<{blob: Blob, ending: string}>} */
  download: async (id, what, edited) => {
    const answer = await ask(`/images/${id}/download/${what}`, { method: "POST", body: JSON.stringify(edited), headers: { "Content-Type": "application/json" } });
    return { blob: await answer.blob(), ending: answer.headers.get("X-File-Ending") ?? "" };
  },
  /** @returns {Promise<string[]>} */
  sets: () => get("/corrections"),
  /** @param {string} id @param {string} set @returns {Promise<{saved: Revision | null}>} */
  saved: (id, set) => get(`/images/${id}/corrections/${part(set)}`),
  /** @param {string} id @param {string} set @returns {Promise<{saved: Revision | null}>} */
  openSaved: (id, set) => post(`/images/${id}/corrections/${part(set)}/open`),
  /** @param {string} id @param {string} set @param {any} asked @returns {Promise<{saved: Revision, set: string}>} */
  save: (id, set, asked) => post(`/images/${id}/corrections/${part(set)}`, asked),
  /** @returns {Promise<Teaching>} */
  teaching: () => get("/teach"),
  /** @param {string} set @param {string} dataset @returns {Promise<Teaching>} */
  teach: (set, dataset) => post("/teach", { set, dataset }),
  /** The newest run of a model. @param {string} model @returns {Promise<{run: Run | null}>} */
  newestRun: (model) => get(`/runs?model=${part(model)}`),
  /** @param {string} run @returns {Promise<{run: Run | null}>} */
  run: (run) => get(`/runs/${part(run)}`),
  /** What another version finds. @param {string} id @param {string} model @param {string | null} corrected @returns {Promise<Comparison>} */
  version: (id, model, corrected) => post(`/images/${id}/version`, { model, corrected }),
  /** @param {string} prefix @returns {Promise<{folders: string[], images: {key: string, size: number}[], more: number}>} */
  bucket: (prefix) => get(`/bucket?prefix=${part(prefix)}`),
  /** @param {string[]} keys @returns {Promise<ImageState[]>} */
  fromBucket: (keys) => post("/bucket", { keys }),
};

/** Outlines as the server packs them. @param {Int32Array} data @returns {{label: number, rings: Int32Array[]}[]} */
export function unpacked(data) {
  const found = [];
  for (let at = 0; at < data.length;) {
    const label = data[at++], count = data[at++], rings = [];
    for (let i = 0; i < count; i++) {
      const points = data[at++];
      rings.push(data.subarray(at, at + 2 * points));
      at += 2 * points;
    }
    found.push({ label, rings });
  }
  return found;
}
