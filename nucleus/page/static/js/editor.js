// The opened image: what the tools, panels and keys do with the viewer and the nuclei.

import { drafts, TAB } from "./drafts.js";
import { element, plural, text } from "./gallery.js";
import { colours, drawHistogram, extent, shownNumber, Table, title } from "./measures.js";
import { inPixels, Nuclei } from "./nuclei.js";
import { Saving } from "./saving.js";
import { server, unpacked } from "./server.js";
import { Teaching } from "./teach.js";
import { Tools } from "./tools.js";
import { Viewer } from "./viewer.js";

/**
 * @typedef {import("./tools.js").ToolName} ToolName
 * @typedef {import("./server.js").ImageInfo} ImageInfo
 */

/** @type {[ToolName, string, string, string][]} name, text, key, path of the icon */
const TOOLS = [
  ["select", "Select", "v", "M5 3l10 7-4.5 1L13 16l-2 1-2.500-5L5 15z"],
  ["draw", "Draw", "d", "M4 13c-1-6 4-9 8-8s5 6 2 9-9 3-10-1z"],
  ["brush", "Brush: add", "b", "M10 4a6 6 0 1 0 .01 0M10 7.500v5M7.500 10h5"],
  ["erase", "Brush: erase", "e", "M10 4a6 6 0 1 0 .01 0M7.500 10h5"],
  ["split", "Split by a line", "s", "M8 5a4 5 0 1 0 0 10M12 5a4 5 0 1 1 0 10M10 2v16"],
  ["merge", "Merge two", "m", "M8 5a5 5 0 1 0 0 10M12 5a5 5 0 1 1 0 10M8 10h4"],
  ["missed", "Find a missed one by a click", "a", "M10 6a4 4 0 1 0 .01 0M10 1v3M10 16v3M1 10h3M16 10h3"],
];
const KEYS = [
  ["V D B E S M A", "tools, from the top"], ["Delete", "delete the selected nuclei"], ["Ctrl Z, Ctrl Shift Z", "undo, redo"],
  ["N, P", "select the next or previous nucleus"], ["arrows", "move the crosshair; Shift: far, Alt: by a pixel, Ctrl: the view"],
  ["space", "press, and release, at the crosshair"], ["Enter, Esc", "close the polygon; give up"], ["[ ], wheel", "size of the brush; Ctrl and wheel zooms"],
  ["+ − 0", "zoom in, out, fit"], ["Page up, Page down", "previous or next image"], ["H", "show or hide the outlines"], ["?", "this list"],
];
const DOWNLOADS = /** @type {Record<string, [string, string]>} */ ({
  labels: ["Label image", "TIFF"], csv: ["Table", "CSV"], geojson: ["Outlines for QuPath", "GeoJSON"], roi: ["Outlines for ImageJ", "ZIP"],
  coco: ["Outlines, COCO", "JSON"], picture: ["Picture with outlines", "PNG"],
});

const MANY = 5000;
const OPENING = "Opening …";

export class Editor {
  /** @param {import("./server.js").Service} service @param {import("./gallery.js").Gallery} gallery */
  constructor(service, gallery) {
    this.gallery = gallery;
    this.viewer = new Viewer(/** @type {HTMLCanvasElement} */ (element("canvas")));
    this.tools = new Tools(this.viewer, (said) => this.say(said));
    this.table = new Table(element("scroller"), /** @type {HTMLTableElement} */ (element("table")), (label, more) => this.choose(label, more));
    this.saving = new Saving(this);
    this.teaching = new Teaching(service, this);
    /** @type {ImageInfo | null} the open image; it changes together with its nuclei */
    this.image = null;
    /** @type {Nuclei | null} */
    this.nuclei = null;
    /** @type {string | null} the image that was asked for last */
    this.wanted = null;
    /** When the kept changes of the open image were read. */
    this.since = 0;
    /** @type {Map<string, Nuclei>} whose changes are kept for an image, by its key */
    this.owners = new Map();
    this.column = "area";
    this.makeTools();
    this.makeTabs();
    this.makePanels();
    this.makeKeys();
  }

  /** @param {string} said */
  say(said) {
    element("status").textContent = said;
  }

  // Opening

  /** Open an image. Until it is there, none is open, so that no change can reach another one. @param {string} id */
  async open(id) {
    const state = this.gallery.images.find((each) => each.id === id);
    if (this.image?.id === id && this.image.version === state?.version) { this.wanted = id; this.viewer.resized(); return; }
    const opening = (this.opening = {});
    this.wanted = id;
    this.close();
    this.say(OPENING);
    try {
      const image = await server.image(id), found = await this.loaded(image, "found"), draft = await this.draft(image);
      if (this.opening !== opening) return; // another image was asked for meanwhile
      this.show(image, draft?.nuclei ?? found, draft?.edits ?? [], draft?.said ?? "");
    } catch (error) {
      if (this.opening !== opening) return;
      this.say("");
      throw error;
    }
    await this.saving.opened();
  }

  /** No image is open. */
  close() {
    this.image = this.nuclei = null;
    this.tools.cancel();
    this.viewer.close();
    this.table.clear();
    element("count").textContent = "…";
    element("count-more").textContent = element("saved").textContent = element("changes").textContent = "";
    element("conflict").hidden = true;
  }

  /** @param {ImageInfo} image @param {Nuclei} nuclei @param {import("./nuclei.js").Edit[]} edits @param {string} said */
  show(image, nuclei, edits, said) {
    this.drawChannels(image);
    this.viewer.setViews(this.views());
    this.drawOptions(image);
    this.take(image, nuclei);
    if (edits.length) nuclei.restore(edits);
    const heard = element("status").textContent ?? ""; // of another image, while this one was opened: "… was saved", or not
    this.say([heard === OPENING ? "" : heard, said].filter(Boolean).join(" "));
    void this.measure(image, nuclei, nuclei.unmeasured);
  }

  /** Nuclei of a layer. @param {ImageInfo} image @param {string} layer */
  async loaded(image, layer) {
    const [outlines, columns] = await Promise.all([server.outlines(image.id, layer), server.rows(image.id, layer)]);
    return new Nuclei(unpacked(outlines), columns, layer);
  }

  /** Edits that were kept in this browser, and the nuclei that they belong to if those were saved. @param {ImageInfo} image */
  async draft(image) {
    this.since = Date.now();
    const draft = await drafts.find(image.key).catch(() => undefined);
    if (!draft) return null;
    const said = draft.edits.length ? `${plural(draft.edits.length, "change")} of an earlier visit, not saved yet` : "";
    if (!draft.base) return { nuclei: null, edits: draft.edits, said };
    const { saved } = await server.openSaved(image.id, draft.base.set);
    if (saved?.tag === draft.base.tag && saved.layer) {
      const nuclei = await this.loaded(image, saved.layer);
      nuclei.saved = draft.base;
      return { nuclei, edits: draft.edits, said };
    }
    return { nuclei: null, edits: [], said: draft.edits.length ? "Changes of an earlier visit belong to a revision that was replaced since; they were not taken over." : "" };
  }

  /** Show nuclei and listen to them. @param {ImageInfo} image @param {Nuclei} nuclei */
  take(image, nuclei) {
    if (this.nuclei) nuclei.gates = this.nuclei.gates.filter(({ column }) => nuclei.measures.includes(column));
    nuclei.applyGates();
    this.image = image;
    this.nuclei = nuclei;
    this.owners.set(image.key, nuclei);
    this.viewer.open(image, nuclei);
    nuclei.addEventListener("change", () => { if (this.nuclei === nuclei) this.changed(); });
    nuclei.addEventListener("select", () => { if (this.nuclei === nuclei) this.selected(); });
    nuclei.addEventListener("edit", () => { this.teaching.edited(nuclei); void this.keep(image, nuclei); });
    nuclei.addEventListener("change", (event) => void this.measure(image, nuclei, /** @type {CustomEvent} */ (event).detail?.after ?? []));
    this.tools.use(this.tools.name);
    this.drawMeasures();
    this.changed();
    this.teaching.opened();
  }

  /** Have nuclei go on from others whose image is not open. @param {ImageInfo} image @param {Nuclei} before @param {Nuclei} nuclei */
  succeed(image, before, nuclei) {
    if (this.owners.get(image.key) !== before) return false;
    this.owners.set(image.key, nuclei);
    return true;
  }

  /** Keep the edits in this browser until they are saved. @param {ImageInfo} image @param {Nuclei} nuclei */
  async keep(image, nuclei) {
    if (this.owners.get(image.key) !== nuclei) return; // the image was opened anew since
    const edits = nuclei.edits.slice(0, nuclei.done);
    try {
      if (edits.length || nuclei.saved) {
        const before = await drafts.keep({ key: image.key, base: nuclei.saved, labels: nuclei.layer, edits, when: Date.now() });
        if (before && before.tab !== TAB && before.when > this.since) this.say("This image was changed in another tab too. The browser keeps the changes of one tab only, now those of this one: save the others there.");
      } else await drafts.drop(image.key);
    } catch (error) {
      this.say(`This browser cannot keep the changes of ${image.name} (${/** @type {Error} */ (error).message}): save them before you leave.`);
    }
  }

  /** Have the server measure nuclei that were changed. @param {ImageInfo} image @param {Nuclei} nuclei @param {import("./nuclei.js").Step[]} steps */
  async measure(image, nuclei, steps) {
    for (const { label, rings } of steps) {
      if (!rings) continue;
      try {
        const found = await server.measure(image.id, { label, rings: inPixels(rings) });
        nuclei.measured(label, rings, found.rings.map((ring) => ring.map((value) => Math.round(2 * value))), found.row);
      } catch (error) {
        if (this.nuclei === nuclei) this.say(`Nucleus ${label}: ${/** @type {Error} */ (error).message}`);
      }
    }
  }

  // Nuclei: count, histogram, gate, table

  changed() {
    const nuclei = /** @type {Nuclei} */ (this.nuclei), hidden = nuclei.hidden.size, count = nuclei.all.size - hidden;
    element("count").textContent = count.toLocaleString("en");
    element("count-word").textContent = count === 1 ? "nucleus" : "nuclei";
    element("count-more").textContent = hidden ? `shown, ${hidden.toLocaleString("en")} hidden by the gate` : "";
    for (const id of ["hidden-check", "download-check"]) element(id).hidden = !hidden;
    /** @type {HTMLButtonElement} */ (element("undo")).disabled = !nuclei.done;
    /** @type {HTMLButtonElement} */ (element("redo")).disabled = nuclei.done === nuclei.edits.length;
    element("warning").textContent = this.image?.warning ?? "";
    element("warning").hidden = !this.image?.warning;
    this.saving.drawChanges();
    clearTimeout(this.drawing);
    if (nuclei.all.size < MANY) this.drawAll(nuclei);
    else this.drawing = setTimeout(() => this.drawAll(nuclei), 150); // not between the strokes of a person
  }

  /** What takes its time with many nuclei: the table, the histogram and the colours. @param {Nuclei} nuclei */
  drawAll(nuclei) {
    if (this.nuclei !== nuclei) return; // another image was opened meanwhile
    this.viewer.colourOf = this.checked("colour") ? colours(nuclei, this.column) : null;
    this.table.show(nuclei);
    this.drawGate();
    this.viewer.paint();
  }

  drawMeasures() {
    const select = /** @type {HTMLSelectElement} */ (element("measure")), nuclei = /** @type {Nuclei} */ (this.nuclei);
    const names = nuclei.measures.filter((name) => !name.startsWith("centroid") && name !== "touches_edge");
    if (!names.includes(this.column)) this.column = names[0] ?? "area";
    select.replaceChildren(...names.map((name) => new Option(title(name), name, false, name === this.column)));
  }

  /** @returns {[number, number]} */
  get gate() {
    const found = this.nuclei?.gates.find(({ column }) => column === this.column);
    return found ? [found.low, found.high] : [-Infinity, Infinity];
  }

  drawGate() {
    const nuclei = /** @type {Nuclei} */ (this.nuclei), range = extent(nuclei, this.column), gate = this.gate;
    drawHistogram(/** @type {any} */ (element("histogram")), nuclei, this.column, gate, this.checked("colour"));
    ["gate-low", "gate-high"].forEach((id, i) => {
      const input = /** @type {HTMLInputElement} */ (element(id));
      if (document.activeElement !== input) input.value = Number.isFinite(gate[i]) ? String(gate[i]) : "";
      input.placeholder = shownNumber(range[i]);
    });
    const others = nuclei.gates.map(({ column, low, high }) => [title(column), Number.isFinite(low) ? `from ${shownNumber(low)}` : "", Number.isFinite(high) ? `to ${shownNumber(high)}` : ""].filter(Boolean).join(" "));
    element("gates").textContent = others.length ? `Gate: ${others.join("; ")}` : "";
  }

  setGate() {
    const { nuclei } = this;
    if (!nuclei) return;
    const [low, high] = ["gate-low", "gate-high"].map((id) => /** @type {HTMLInputElement} */ (element(id)).value);
    const gates = nuclei.gates.filter(({ column }) => column !== this.column);
    if (low !== "" || high !== "") gates.push({ column: this.column, low: low === "" ? -Infinity : Number(low), high: high === "" ? Infinity : Number(high) });
    nuclei.setGates(gates);
  }

  /** @param {number} label @param {boolean} more */
  choose(label, more) {
    const { nuclei } = this;
    if (!nuclei) return;
    nuclei.select(more ? [...nuclei.selected, label] : [label]);
    this.viewer.reveal(/** @type {import("./nuclei.js").Nucleus} */ (nuclei.all.get(label)).box);
  }

  selected() {
    const nuclei = /** @type {Nuclei} */ (this.nuclei), labels = [...nuclei.selected], [label] = labels;
    this.table.draw();
    if (labels.length === 1) {
      this.table.reveal(label);
      const facts = ["area", "score"].map((column) => [column, nuclei.value(label, column)]).filter(([, value]) => value !== null);
      this.say(`Nucleus ${label}: ${facts.map(([column, value]) => `${title(String(column))} ${shownNumber(Number(value))}`).join(", ")}`);
    } else this.say(labels.length ? `${labels.length} nuclei selected` : "");
  }

  // View: channels and options

  views() {
    return (this.channels ?? []).map((channel, i) => ({ ...channel, i })).filter(({ on }) => on)
      .map(({ i, low, high, colour }) => `${i}:${low}:${high}:${colour.slice(1)}`).join(",") || "0:0:1e30:000000";
  }

  /** @param {ImageInfo} image */
  drawChannels(image) {
    this.channels = image.channels.map((channel) => ({ ...channel, on: true }));
    const together = image.channels.length === 3 && !image.choose;
    element("channels").replaceChildren(...this.channels.map((channel, i) => this.channel(channel, i, together)));
  }

  /** @param {import("./server.js").Channel & {on: boolean}} channel @param {number} i @param {boolean} fixed */
  channel(channel, i, fixed) {
    const box = text("div", "", "channel"), show = document.createElement("label"), on = document.createElement("input");
    show.className = "check";
    on.type = "checkbox";
    on.checked = true;
    on.addEventListener("change", () => { channel.on = on.checked; this.viewer.setViews(this.views()); });
    show.append(on, channel.name);
    box.append(show, text("span", ""));
    if (!fixed) box.append(this.colourInput(channel));
    const ranges = text("div", "", "ranges"), [least, most] = channel.range, span = most - least || 1;
    for (const name of /** @type {("low" | "high")[]} */ (["low", "high"])) {
      const label = document.createElement("label"), input = document.createElement("input"), output = document.createElement("output");
      Object.assign(input, { type: "range", min: String(Math.min(least, channel.low)), max: String(Math.max(most, channel.high)), step: String(span / 500), value: String(channel[name]) });
      output.textContent = shownNumber(channel[name]);
      input.addEventListener("input", () => {
        channel[name] = Number(input.value);
        output.textContent = shownNumber(channel[name]);
        clearTimeout(this.later);
        this.later = setTimeout(() => this.viewer.setViews(this.views()), 60);
      });
      label.append(name === "low" ? "black" : "white", input, output);
      ranges.append(label);
    }
    const auto = document.createElement("button");
    auto.type = "button";
    auto.textContent = "Auto";
    auto.setAttribute("aria-label", `Automatic contrast of ${channel.name}`);
    auto.addEventListener("click", () => {
      [channel.low, channel.high] = channel.contrast;
      const fresh = this.channel(channel, i, fixed);
      box.replaceWith(fresh);
      this.viewer.setViews(this.views());
    });
    box.insertBefore(auto, box.children[2] ?? null);
    box.append(ranges);
    return box;
  }

  /** @param {import("./server.js").Channel} channel */
  colourInput(channel) {
    const input = document.createElement("input");
    input.type = "color";
    input.value = channel.colour;
    input.setAttribute("aria-label", `Colour of ${channel.name}`);
    input.addEventListener("input", () => { channel.colour = input.value; this.viewer.setViews(this.views()); });
    return input;
  }

  /** The form of how the image is segmented. @param {ImageInfo} image */
  drawOptions(image) {
    const form = element("again"), { options } = image;
    /** @type {[string, string, HTMLElement][]} */
    const fields = [];
    const number = (/** @type {string} */ name, /** @type {string} */ placeholder) => {
      const input = document.createElement("input");
      Object.assign(input, { type: "number", step: "any", min: "0", name, placeholder, value: options[name] ?? "" });
      return input;
    };
    const choice = (/** @type {string} */ name, /** @type {[string, string][]} */ values) => {
      const select = document.createElement("select");
      select.name = name;
      select.append(...values.map(([value, shown]) => new Option(shown, value, false, String(options[name]) === value)));
      return select;
    };
    const upTo = (/** @type {number} */ count) => Array.from({ length: count }, (_, i) => /** @type {[string, string]} */ ([String(i), String(i)]));
    if (image.choose) fields.push(["channel", "Channel", choice("channel", image.channels.map(({ name }, i) => [String(i), name]))]);
    if (image.depths > 1) fields.push(["z", "Depth", choice("z", [["max", "brightest of all"], ["mean", "mean of all"], ["best", "sharpest"], ...upTo(image.depths)])]);
    if (image.times > 1) fields.push(["t", "Time", choice("t", upTo(image.times))]);
    fields.push(["diameter", "Diameter (px)", number("diameter", "from the image")], ["pixel_size", "Pixel (µm)", number("pixel_size", image.pixel_size ? String(image.pixel_size) : "from the file")]);
    const button = document.createElement("button");
    button.textContent = "Find again";
    form.replaceChildren(...fields.map(([, shown, input]) => { const label = document.createElement("label"); label.append(shown, input); return label; }), button);
    element("notes").replaceChildren(...image.notes.map((note) => text("li", note)));
  }

  /** @param {HTMLFormElement} form */
  async again(form) {
    const { image, nuclei } = this, options = /** @type {Record<string, any>} */ ({});
    if (!image || !nuclei) return;
    for (const [name, value] of new FormData(form)) if (value !== "") options[name] = Number.isNaN(Number(value)) ? value : Number(value);
    const changes = nuclei.done;
    try {
      this.say("Finding nuclei …");
      await server.segment(image.id, options);
      await this.gallery.poll(image.id);
      const state = this.gallery.images.find(({ id }) => id === image.id);
      if (state?.message) throw new Error(state.message); // what was found before is still there
      if (this.wanted !== image.id) return; // another image was opened meanwhile
      await this.open(image.id);
      if (changes && this.nuclei?.done !== changes) this.say(`Found again. ${plural(changes, "change")} that you had not saved belong to the nuclei of before; they come back with the same options as before.`);
    } catch (error) {
      this.say(/** @type {Error} */ (error).message);
    }
  }

  /** @param {string} id */
  checked(id) {
    return /** @type {HTMLInputElement} */ (element(id)).checked;
  }

  /** What the server needs to know the nuclei. @param {boolean} without whether hidden ones are left out */
  edited(without) {
    const nuclei = /** @type {Nuclei} */ (this.nuclei);
    return { layer: nuclei.layer, changes: nuclei.changes, hidden: without ? [...nuclei.hidden] : [] };
  }

  /** @param {string} what */
  async download(what) {
    const { image } = this;
    if (!image) return;
    try {
      const { blob, ending } = await server.download(image.id, what, this.edited(this.checked("download-hidden")));
      const link = document.createElement("a"), address = URL.createObjectURL(blob);
      link.href = address;
      link.download = (image.name.split("/").pop() ?? "image").replace(/\.[^.]*$/, "") + ending;
      link.click();
      setTimeout(() => URL.revokeObjectURL(address), 10_000);
    } catch (error) {
      this.say(/** @type {Error} */ (error).message);
    }
  }

  // Making the controls

  makeTools() {
    const bar = element("tools");
    const button = (/** @type {string} */ id, /** @type {string} */ name, /** @type {string} */ key, /** @type {string} */ path, /** @type {() => void} */ act) => {
      const made = document.createElement("button");
      Object.assign(made, { type: "button", id, className: "icon", title: `${name} (${key})`, onclick: act });
      made.setAttribute("aria-label", name);
      made.innerHTML = `<svg viewBox="0 0 20 20" aria-hidden="true"><path d="${path}"/></svg>`;
      bar.append(made);
      return made;
    };
    for (const [name, shown, key, path] of TOOLS) button(`tool-${name}`, shown, key.toUpperCase(), path, () => this.use(name));
    bar.append(document.createElement("hr"));
    button("delete", "Delete the selected nuclei", "Delete", "M4 6h12M8 6V4h4v2M6 6l1 10h6l1-10", () => { if (this.nuclei) this.tools.remove(); });
    button("undo", "Undo", "Ctrl Z", "M8 5 4 9l4 4M4 9h7a4.500 4.500 0 0 1 0 9h-1", () => this.undo());
    button("redo", "Redo", "Ctrl Shift Z", "m12 5 4 4-4 4M16 9H9a4.500 4.500 0 0 0 0 9h1", () => this.redo());
    this.use("select");
  }

  /** @param {ToolName} name */
  use(name) {
    if (this.nuclei || name === "select") this.tools.use(name);
    for (const [each] of TOOLS) element(`tool-${each}`).setAttribute("aria-pressed", String(each === name));
    if (name === "merge" && (this.nuclei?.selected.size ?? 0) > 1 && this.tools.merge()) this.use("select");
  }

  undo() {
    const edit = this.nuclei?.undo();
    if (edit) this.say(`Undone: ${edit.text}`);
  }

  redo() {
    const edit = this.nuclei?.redo();
    if (edit) this.say(edit.text);
  }

  makeTabs() {
    const names = [["nuclei", "Nuclei"], ["view", "View"], ["save", "Save"], ["teach", "Teach"], ["download", "Download"]], list = element("tabs");
    for (const [name, shown] of names) {
      const tab = document.createElement("button");
      Object.assign(tab, { type: "button", id: `tab-${name}`, textContent: shown, onclick: () => this.showTab(name) });
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", `panel-${name}`);
      list.append(tab);
    }
    list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const place = names.findIndex(([name]) => document.activeElement?.id === `tab-${name}`);
      this.showTab(names[(place + step + names.length) % names.length][0], true);
    });
    this.showTab("nuclei");
  }

  /** @param {string} name @param {boolean} [focus] */
  showTab(name, focus = false) {
    for (const tab of /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll("[role=tab]"))) {
      const chosen = tab.id === `tab-${name}`;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      element(tab.id.replace("tab-", "panel-")).hidden = !chosen;
      if (chosen && focus) tab.focus();
    }
    this.teaching.watch();
  }

  makePanels() {
    const on = (/** @type {string} */ id, /** @type {string} */ name, /** @type {() => void} */ act) => element(id).addEventListener(name, act);
    on("measure", "change", () => { if (!this.nuclei) return; this.column = /** @type {HTMLSelectElement} */ (element("measure")).value; this.changed(); this.viewer.paint(); });
    for (const id of ["gate-low", "gate-high"]) on(id, "input", () => this.setGate());
    on("gate-clear", "click", () => this.nuclei?.setGates([]));
    on("colour", "change", () => { if (this.nuclei) this.changed(); this.viewer.paint(); });
    for (const id of ["outlines", "filled"]) on(id, "change", () => this.restyle());
    on("zoom-in", "click", () => this.viewer.zoomBy(1.5));
    on("zoom-out", "click", () => this.viewer.zoomBy(1 / 1.5));
    on("fit", "click", () => this.viewer.fit());
    on("help", "click", () => /** @type {HTMLDialogElement} */ (element("keys")).showModal());
    element("again").addEventListener("submit", (event) => { event.preventDefault(); void this.again(/** @type {HTMLFormElement} */ (element("again"))); });
    this.viewer.addEventListener("painted", () => { element("scale").textContent = `${(100 * this.viewer.zoom).toPrecision(3)} %`; });
    element("downloads").replaceChildren(...Object.entries(DOWNLOADS).map(([what, [shown, kind]]) => {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.id = `download-${what}`;
      button.append(shown, text("span", kind, "quiet"));
      button.addEventListener("click", () => void this.download(what));
      item.append(button);
      return item;
    }));
    element("keys-list").replaceChildren(...KEYS.flatMap(([keys, means]) => {
      const term = document.createElement("dt");
      term.append(...keys.split(", ").flatMap((key, i) => (i ? [", ", text("kbd", key)] : [text("kbd", key)])));
      return [term, text("dd", means)];
    }));
  }

  restyle() {
    this.viewer.style = { outlines: this.checked("outlines"), filled: this.checked("filled") };
    this.viewer.paint();
  }

  /** Keys of the image; they work while it has the focus, so that they are letters everywhere else. */
  makeKeys() {
    element("canvas").addEventListener("keydown", (event) => {
      const key = event.key.toLowerCase(), command = event.ctrlKey || event.metaKey;
      const tool = TOOLS.find(([, , each]) => each === key);
      if (!this.nuclei && !["?", "pageup", "pagedown"].includes(key)) return; // it is being opened
      if (command && key === "z") { if (event.shiftKey) this.redo(); else this.undo(); }
      else if (command && key === "y") this.redo();
      else if (command) return;
      else if (tool) this.use(tool[0]);
      else if (key === "delete" || key === "backspace") this.tools.remove();
      else if (key === "n" || key === "p") this.tools.next(key === "n" ? 1 : -1);
      else if (key === "enter") { if (this.tools.path.length) this.tools.finishPath(); }
      else if (key === "escape") { this.tools.cancel(); this.nuclei?.select([]); }
      else if (key === "h") { /** @type {HTMLInputElement} */ (element("outlines")).checked = !this.checked("outlines"); this.restyle(); }
      else if (key === "?") /** @type {HTMLDialogElement} */ (element("keys")).showModal();
      else if (key === "pageup" || key === "pagedown") this.step(key === "pagedown" ? 1 : -1);
      else return;
      event.preventDefault();
    });
  }

  /** Open the previous or next image. @param {1 | -1} step */
  step(step) {
    const done = this.gallery.images.filter(({ status }) => status === "done");
    const place = done.findIndex(({ id }) => id === this.wanted);
    if (done.length > 1) location.hash = `#/image/${done[(place + step + done.length) % done.length].id}`;
  }
}
