// The images of this session: dropping files and folders, choosing from the bucket, thumbnails with counts.

import { server } from "./server.js";

/** @typedef {import("./server.js").ImageState} ImageState */

const AT_ONCE = 2;
const POLL = 600;
const IMAGE = /\.(png|tiff?|jpe?g|bmp|webp|lsm|ome\.tiff?|btf|tf8)$/i;

/** @template {HTMLElement} T @param {string} id @returns {T} */
export function element(id) {
  return /** @type {T} */ (document.getElementById(id));
}

export class Gallery extends EventTarget {
  /** @param {import("./server.js").Service} service @param {(text: string) => void} notify */
  constructor(service, notify) {
    super();
    this.service = service;
    this.notify = notify;
    /** @type {ImageState[]} */
    this.images = [];
    /** @type {Map<string, {item: HTMLLIElement, shown: string}>} */
    this.items = new Map();
    /** @type {{name: string, file: File}[]} */
    this.queue = [];
    this.sending = 0;
    this.total = 0;
    this.polling = false;
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
    const files = entries.length ? (await Promise.all(entries.map(filesIn))).flat() : [...(data?.files ?? [])].map((file) => ({ name: file.name, file }));
    this.add(files);
  }

  /** @param {{name: string, file: File}[]} files */
  add(files) {
    const visible = files.filter(({ name }) => !name.split("/").some((part) => part.startsWith(".")));
    const images = visible.length > 1 ? visible.filter(({ name }) => IMAGE.test(name)) : visible;
    const others = visible.length - images.length;
    this.notify(others ? `${others} of ${visible.length} files are no images by their names, and were left out.` : "");
    if (location.hash.startsWith("#/image")) location.hash = "#/";
    this.queue.push(...images.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true })));
    this.total = this.queue.length + this.sending;
    while (this.sending < AT_ONCE && this.queue.length) void this.send();
    this.draw();
  }

  async send() {
    this.sending++;
    for (let next = this.queue.shift(); next; next = this.queue.shift()) {
      try {
        if (next.file.size > this.service.image_bytes) throw new Error(`${next.name} has more than ${Math.round(this.service.image_bytes / 2 ** 20)} MiB. Use nucleus predict for it.`);
        this.images = ordered([...this.images, await server.upload(next.name, next.file)]);
      } catch (error) {
        this.notify(`${next.name}: ${/** @type {Error} */ (error).message}`);
      }
      this.draw();
      void this.poll();
    }
    this.sending--;
    this.draw();
  }

  /** Ask how far the images are until all are done. */
  async poll() {
    if (this.polling) return;
    this.polling = true;
    try {
      do {
        this.images = ordered(await server.images());
        this.draw();
        this.dispatchEvent(new Event("change"));
        if (this.busy) await new Promise((done) => setTimeout(done, POLL));
      } while (this.busy || this.sending);
    } catch (error) {
      this.notify(/** @type {Error} */ (error).message);
    } finally {
      this.polling = false;
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
    await server.remove(image.id);
    this.images = ordered(await server.images());
    this.draw();
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
      if (more) list.append(text("li", `and ${more} more, which are not shown`, "quiet"));
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

  async openListed() {
    element("bucket").hidden = true;
    try {
      this.images = ordered([...this.images, ...(await server.fromBucket(this.listed ?? []))]);
      void this.poll();
    } catch (error) {
      this.notify(/** @type {Error} */ (error).message);
    }
  }
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
