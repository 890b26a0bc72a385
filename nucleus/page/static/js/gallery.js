// The images of this session: dropping files and folders, choosing from the bucket, thumbnails with counts.

import { server } from "./server.js";
import { archive } from "./tar.js";

/**
 * @typedef {import("./server.js").ImageState} ImageState
 * @typedef {{name: string, file: File}} Dropped
 */

const AT_ONCE = 2;
const POLL = 600;
const IMAGE = /\.(png|tiff?|jpe?g|bmp|webp|lsm|btf|tf8|svs|ndpi|mrxs|dcm|scn|bif|svslide)$/i;
const ZARR = /^(.*?\.zarr)\/(.+)$/i;
const MOST_NAMED = 3;
const SYSTEM = new Set(["__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"]);

/** @template {HTMLElement} T @param {string} id @returns {T} */
export function element(id) {
  return /** @type {T} */ (document.getElementById(id));
}

export class Gallery {
  /** @param {import("./server.js").Service} service @param {(text: string) => void} notify */
  constructor(service, notify) {
    this.service = service;
    this.notify = notify;
    /** @type {ImageState[]} */
    this.images = [];
    /** @type {Map<string, {item: HTMLLIElement, shown: string}>} */
    this.items = new Map();
    /** @type {{name: string, size: number, body: () => Promise<Blob>, type: string}[]} */
    this.queue = [];
    /** @type {string[]} what was passed over of the last drop, and what failed since */
    this.remarks = [];
    this.sending = 0;
    this.polling = false;
    /** How often it was asked for the images, and up to which question they are known. */
    this.asked = this.known = 0;
    this.prefix = "";
    this.listen();
  }

  listen() {
    const drop = element("drop");
    for (const id of ["files", "folder"]) {
      const input = /** @type {HTMLInputElement} */ (element(id));
      input.addEventListener("change", () => {
        this.add([...(input.files ?? [])].map((file) => ({ name: file.webkitRelativePath || file.name, file })));
        input.value = "";
      });
    }
    document.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
    document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      void this.dropped(event.dataTransfer);
    });
    element("from-bucket").hidden = !this.service.bucket;
    element("from-bucket").addEventListener("click", () => void this.browse(""));
    element("bucket-close").addEventListener("click", () => { element("bucket").hidden = true; });
    element("bucket-add").addEventListener("click", () => void this.openListed());
  }

  /** @param {DataTransfer | null} data */
  async dropped(data) {
    const entries = [...(data?.items ?? [])].map((item) => item.webkitGetAsEntry?.()).filter((entry) => entry !== null && entry !== undefined);
    try {
      const files = entries.length ? (await Promise.all(entries.map(filesIn))).flat() : [...(data?.files ?? [])].map((file) => ({ name: file.name, file }));
      this.add(files);
    } catch (error) {
      this.notify(`What was dropped cannot be read (${/** @type {Error} */ (error).message}). Was it moved or renamed? Drop it again.`);
    }
  }

  /** @param {Dropped[]} files */
  add(files) {
    /** @type {Map<string, Dropped[]>} */
    const folders = new Map(), /** @type {Dropped[]} */ plain = [];
    for (const each of files) {
      const zarr = ZARR.exec(each.name)?.[1];
      if (!zarr) plain.push(each);
      else if (folders.has(zarr)) folders.get(zarr)?.push(each);
      else folders.set(zarr, [each]);
    }
    const hidden = plain.filter(({ name }) => isHidden(name)), visible = plain.filter((each) => !hidden.includes(each));
    const images = plain.length + folders.size > 1 ? visible.filter(({ name }) => IMAGE.test(name)) : visible, others = visible.filter((each) => !images.includes(each));
    this.remarks = [];
    if (!files.length) this.remarks.push("There is no file in what was dropped.");
    if (others.length) this.remarks.push(`${plural(others.length, "file is no image by its name and was", "files are no images by their names and were")} left out: ${named(others)}.`);
    if (hidden.length) this.remarks.push(`${plural(hidden.length, "hidden file was", "hidden files were")} left out (a name begins with a dot, or it is a folder of the system): ${named(hidden)}.`);
    this.remark();
    if (location.hash.startsWith("#/image")) location.hash = "#/";
    const queued = images.map(({ name, file }) => ({ name, size: file.size, body: async () => /** @type {Blob} */ (file), type: "application/octet-stream" }));
    for (const [name, parts] of folders) queued.push({ name, size: parts.reduce((sum, { file }) => sum + file.size, 0), body: () => archive(parts.map((part) => ({ ...part, name: part.name.slice(name.length + 1) }))), type: "application/x-tar" });
    this.queue.push(...queued.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true })));
    while (this.sending < AT_ONCE && this.queue.length) void this.send();
    this.draw();
  }

  /** Show what was passed over, and what failed. */
  remark() {
    this.notify(this.remarks.length > 2 * MOST_NAMED ? [...this.remarks.slice(0, 2 * MOST_NAMED), `And ${this.remarks.length - 2 * MOST_NAMED} more.`].join("\n") : this.remarks.join("\n"));
  }

  async send() {
    this.sending++;
    for (let next = this.queue.shift(); next; next = this.queue.shift()) {
      try {
        if (next.size > this.service.image_bytes) throw new Error(`it has more than ${Math.round(this.service.image_bytes / 2 ** 20)} MiB. Use nucleus predict for it, or start the service with a larger --max-bytes.`);
        const added = await server.upload(next.name, await next.body(), next.type);
        this.images = ordered([...this.images.filter(({ id }) => id !== added.id), added]);
        this.known = ++this.asked;
      } catch (error) {
        this.remarks.push(`${next.name} was not taken: ${/** @type {Error} */ (error).message}`);
        this.remark();
      }
      this.draw();
      void this.poll();
    }
    this.sending--;
    this.draw();
  }

  /** Ask for the images. An answer that comes after that to a later question, or after an upload, is of before. */
  async refresh() {
    const asked = ++this.asked, images = await server.images();
    if (asked < this.known) return;
    this.known = asked;
    this.images = ordered(images);
    this.draw();
  }

  /** Ask how far the images are until all are done, or one of them. @param {string} [one] */
  async poll(one) {
    const waits = (/** @type {ImageState} */ { id, status }) => (one === undefined || id === one) && (status === "waiting" || status === "working");
    if (this.polling && one === undefined) return;
    if (one === undefined) this.polling = true;
    try {
      do {
        await this.refresh();
        if (this.images.some(waits)) await new Promise((done) => setTimeout(done, POLL));
      } while (this.images.some(waits) || (this.sending && one === undefined));
    } catch (error) {
      this.notify(/** @type {Error} */ (error).message);
    } finally {
      if (one === undefined) this.polling = false;
    }
  }

  get busy() {
    return this.images.some(({ status }) => status === "waiting" || status === "working");
  }

  draw() {
    const { images } = this, done = images.filter(({ status }) => status === "done"), list = element("images");
    const waiting = images.filter(({ status }) => status === "waiting" || status === "working").length + this.queue.length + this.sending;
    element("drop").classList.toggle("small", images.length > 0);
    element("summary").hidden = !images.length && !waiting;
    element("progress").textContent = waiting ? `${done.length} of ${images.length + this.queue.length + this.sending} images done` : `${plural(images.length, "image")}`;
    const nuclei = done.reduce((sum, { nuclei: found }) => sum + (found ?? 0), 0);
    element("total").textContent = done.length ? plural(nuclei, "nucleus", "nuclei") : "";
    for (const [id, { item }] of this.items) if (!images.some((image) => image.id === id)) { item.remove(); this.items.delete(id); }
    images.forEach((image, place) => {
      const shown = JSON.stringify(image), found = this.items.get(image.id), item = found?.shown === shown ? found.item : this.item(image);
      if (found && found.item !== item) found.item.replaceWith(item);
      if (list.children[place] !== item) list.insertBefore(item, list.children[place] ?? null);
      this.items.set(image.id, { item, shown });
    });
  }

  /** @param {ImageState} image @returns {HTMLLIElement} */
  item(image) {
    const item = document.createElement("li"), picture = document.createElement("div"), remove = document.createElement("button");
    const link = document.createElement(image.status === "done" ? "a" : "div"), busy = image.status === "waiting" || image.status === "working";
    if (link instanceof HTMLAnchorElement) link.href = `#/image/${image.id}`;
    picture.className = busy ? "picture busy" : "picture";
    if (image.status === "done") {
      const shown = new Image();
      server.picture(server.thumbnail(image)).then((blob) => {
        shown.src = URL.createObjectURL(blob);
        shown.onload = () => URL.revokeObjectURL(shown.src);
      }, () => undefined); // the count is there without its picture
      shown.alt = "";
      picture.append(shown);
    } else if (image.status === "failed") picture.append(text("span", "not read"));
    const caption = text("div", "", "caption"), name = text("span", image.name, "name");
    name.title = image.name;
    caption.append(name, text("strong", image.nuclei === null ? "" : image.nuclei.toLocaleString("en")));
    if (image.nuclei !== null) caption.append(text("span", image.nuclei === 1 ? "nucleus" : "nuclei", "visually-hidden"));
    const note = image.status === "failed" ? image.message : image.warning ?? (image.notes[0] || (busy ? (image.status === "working" ? "finding nuclei …" : "waiting …") : ""));
    link.append(picture, caption);
    remove.type = "button";
    remove.className = "icon remove";
    remove.setAttribute("aria-label", `Remove ${image.name}`);
    remove.textContent = "✕";
    remove.addEventListener("click", () => void this.remove(image));
    item.append(link, text("p", note ?? "", "more"), remove);
    return item;
  }

  /** @param {ImageState} image */
  async remove(image) {
    try {
      await server.remove(image.id);
      await this.refresh();
    } catch (error) {
      this.notify(/** @type {Error} */ (error).message);
    }
  }

  // The bucket

  /** @param {string} prefix */
  async browse(prefix) {
    try {
      const { folders, images, more } = await server.bucket(prefix), list = element("bucket-list");
      this.prefix = prefix;
      this.listed = images.map(({ key }) => key);
      element("bucket").hidden = false;
      element("bucket-path").textContent = `${this.service.bucket}/${prefix}`;
      const parts = prefix ? [this.folder("..", prefix.split("/").slice(0, -1).join("/"))] : [];
      list.replaceChildren(...parts, ...folders.map((name) => this.folder(name, prefix ? `${prefix}/${name}` : name)), ...images.map(({ key }) => text("li", key.split("/").pop() ?? key)));
      if (more) list.append(text("li", `and ${plural(more, "image")} more, which are not opened with these`, "quiet"));
      /** @type {HTMLButtonElement} */ (element("bucket-add")).disabled = !images.length;
      element("bucket-add").textContent = images.length ? `Open ${plural(images.length, "image")}` : "No images here";
    } catch (error) {
      this.notify(/** @type {Error} */ (error).message);
    }
  }

  /** @param {string} name @param {string} prefix */
  folder(name, prefix) {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.textContent = `${name}/`;
    button.addEventListener("click", () => void this.browse(prefix));
    item.append(button);
    return item;
  }

  /** Open an image of the bucket by its key; return its id. @param {string} key @returns {Promise<string>} */
  async fromKey(key) {
    const known = this.images.find(({ name, status }) => name === key && status !== "failed");
    const id = known?.id ?? (await server.fromBucket([key]))[0].id;
    await this.poll(id);
    const found = this.images.find((image) => image.id === id);
    if (found?.status !== "done") throw new Error(`${key}: ${found?.message ?? "it was not opened."}`);
    return id;
  }

  async openListed() {
    element("bucket").hidden = true;
    try {
      await server.fromBucket(this.listed ?? []);
    } catch (error) {
      this.notify(/** @type {Error} */ (error).message);
    }
    void this.poll(); // also those before one that failed
  }
}

/** As an import passes over files. @param {string} name */
function isHidden(name) {
  return name.split("/").some((part) => part.startsWith(".") || SYSTEM.has(part.toLowerCase()));
}

/** @param {Dropped[]} files */
function named(files) {
  const names = files.slice(0, MOST_NAMED).map(({ name }) => name).join(", ");
  return files.length > MOST_NAMED ? `${names} and ${files.length - MOST_NAMED} more` : names;
}

/** @param {ImageState[]} images */
function ordered(images) {
  return [...images].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
}

/** @param {FileSystemEntry} entry @returns {Promise<{name: string, file: File}[]>} */
async function filesIn(entry) {
  if (entry.isFile) {
    const file = await new Promise((done, failed) => /** @type {FileSystemFileEntry} */ (entry).file(done, failed));
    return [{ name: entry.fullPath.replace(/^\//, ""), file: /** @type {File} */ (file) }];
  }
  const reader = /** @type {FileSystemDirectoryEntry} */ (entry).createReader(), found = [];
  for (;;) { // browsers give a hundred at a time
    const entries = /** @type {FileSystemEntry[]} */ (await new Promise((done, failed) => reader.readEntries(done, failed)));
    if (!entries.length) return (await Promise.all(found.map(filesIn))).flat();
    found.push(...entries);
  }
}

/** @param {string} tag @param {string} content @param {string} [name] @returns {HTMLElement} */
export function text(tag, content, name = "") {
  const found = document.createElement(tag);
  found.textContent = content;
  if (name) found.className = name;
  return found;
}

/** @param {number} number @param {string} one @param {string} [more] */
export function plural(number, one, more = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : more}`;
}
