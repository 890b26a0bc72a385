// Saving corrections by compare-and-swap, what to do when somebody else saved first, and the commands that teach.

import { drafts } from "./drafts.js";
import { element, plural, text } from "./gallery.js";
import { boxOf, components, fill, area, subtract, trace } from "./raster.js";
import { server, ServerError, unpacked } from "./server.js";

/** @typedef {import("./server.js").Revision} Revision */

const REMEMBERED = { who: "nucleus-who", set: "nucleus-set" };
const COVERED = 0.5;

export class Saving {
  /** @param {import("./server.js").Service} service @param {import("./editor.js").Editor} editor */
  constructor(service, editor) {
    this.service = service;
    this.editor = editor;
    /** @type {Revision | null} what somebody else saved */
    this.theirs = null;
    for (const [id, key] of Object.entries(REMEMBERED)) this.input(id).value = localStorage.getItem(key) ?? (id === "set" ? "corrections" : "");
    element("save").addEventListener("submit", (event) => { event.preventDefault(); void this.save(); });
    element("look").addEventListener("click", () => void this.look());
    element("merge-theirs").addEventListener("click", () => void this.takeOver());
    for (const id of ["dataset", "set"]) element(id).addEventListener("input", () => this.drawTeach());
    element("set").addEventListener("change", () => void this.opened());
    this.drawTeach();
  }

  /** @param {string} id @returns {HTMLInputElement} */
  input(id) {
    return /** @type {HTMLInputElement} */ (element(id));
  }

  get set() {
    return this.input("set").value.trim();
  }

  /** After an image was opened: say what is saved of it. */
  async opened() {
    const { image, base } = this.editor;
    element("conflict").hidden = true;
    element("saved").textContent = "";
    this.theirs = null;
    this.editor.viewer.theirs = [];
    if (!image || !this.input("set").checkValidity()) return;
    try {
      const [{ saved }, sets] = await Promise.all([server.saved(image.id, this.set), server.sets()]);
      element("sets").replaceChildren(...sets.map((name) => new Option(name)));
      if (!saved) return;
      if (base?.set === this.set && base.tag === saved.tag) element("saved").textContent = this.told(saved);
      else this.conflict(saved, `${saved.who} has saved ${plural(saved.nuclei, "nucleus", "nuclei")} of this image in ${this.set} (revision ${saved.revision}, ${moment(saved.when)}).`);
    } catch (error) {
      element("saved").textContent = /** @type {Error} */ (error).message;
    }
  }

  /** @param {Revision} saved */
  told(saved) {
    return `Saved: revision ${saved.revision} by ${saved.who}, ${moment(saved.when)}, ${plural(saved.nuclei, "nucleus", "nuclei")}.`;
  }

  drawChanges() {
    const { nuclei } = this.editor;
    if (!nuclei) return;
    const { removed, shapes } = nuclei.changes, added = shapes.filter(({ label }) => !nuclei.base.has(label)).length;
    const parts = [[removed.length, "removed"], [added, "added"], [shapes.length - added, "changed"]].filter(([count]) => count).map(([count, what]) => `${count} ${what}`);
    element("changes").textContent = parts.length ? `Not saved yet: ${parts.join(", ")}.` : "No changes that are not saved.";
  }

  async save() {
    const { editor } = this, { image, nuclei } = editor;
    if (!image || !nuclei) return;
    for (const [id, key] of Object.entries(REMEMBERED)) localStorage.setItem(key, this.input(id).value);
    const base = editor.base?.set === this.set ? editor.base.tag : null;
    const button = /** @type {HTMLButtonElement} */ (element("save-button"));
    button.disabled = true;
    element("conflict").hidden = true;
    element("saved").textContent = "Saving …";
    try {
      const asked = { ...editor.edited(editor.checked("save-hidden")), who: this.input("who").value, base };
      const { saved, set } = await server.save(image.id, this.set, asked);
      await this.becameBase(saved);
      element("saved").textContent = `${this.told(saved)} In ${set}.`;
      this.drawTeach();
    } catch (error) {
      if (error instanceof ServerError && error.status === 409 && error.content?.saved) this.conflict(error.content.saved, error.message);
      else element("saved").textContent = /** @type {Error} */ (error).message;
    } finally {
      button.disabled = false;
    }
  }

  /** Go on from what is saved now. @param {Revision} saved */
  async becameBase(saved) {
    const { editor } = this, image = /** @type {import("./server.js").ImageInfo} */ (editor.image);
    const nuclei = await editor.loaded(/** @type {string} */ (saved.layer));
    editor.base = { set: this.set, tag: saved.tag };
    editor.take(nuclei);
    await drafts.keep({ key: image.key, base: editor.base, labels: nuclei.layer, edits: [], when: Date.now() });
  }

  /** @param {Revision} saved @param {string} message */
  conflict(saved, message) {
    this.theirs = saved;
    const mine = this.editor.nuclei?.done ?? 0;
    element("saved").textContent = "";
    element("conflict-text").textContent = message;
    element("merge-theirs").textContent = mine ? "Take theirs, then mine" : "Open theirs";
    element("conflict").hidden = false;
    this.editor.showTab("save");
  }

  /** Show what somebody else saved, dashed over the image. */
  async look() {
    const { editor } = this, image = /** @type {import("./server.js").ImageInfo} */ (editor.image);
    const { saved } = await server.openSaved(image.id, this.set);
    if (!saved?.layer) return;
    editor.viewer.theirs = unpacked(await server.outlines(image.id, saved.layer));
    editor.viewer.paint();
    editor.say(`Dashed: what ${saved.who} saved.`);
  }

  /** Open what somebody else saved, and make the own changes again on it. */
  async takeOver() {
    const { editor } = this, image = /** @type {import("./server.js").ImageInfo} */ (editor.image);
    const { saved } = await server.openSaved(image.id, this.set);
    if (!saved?.layer || !editor.nuclei) return;
    const mine = editor.nuclei, nuclei = await editor.loaded(saved.layer), { after, both, dropped } = merged(mine, nuclei);
    editor.base = { set: this.set, tag: saved.tag };
    editor.viewer.theirs = [];
    editor.take(nuclei);
    if (after.length) nuclei.edit("Took over my changes", after);
    await editor.keep();
    element("conflict").hidden = true;
    const remarks = [both ? `${plural(both, "nucleus", "nuclei")} both of you changed: yours is kept` : "", dropped ? `${plural(dropped, "nucleus", "nuclei")} of yours they have too` : ""].filter(Boolean);
    element("saved").textContent = `Opened revision ${saved.revision} by ${saved.who}${after.length ? ", with your changes on it; save to make the next revision" : ""}. ${remarks.join("; ")}`;
  }

  drawTeach() {
    const dataset = this.input("dataset").value.trim() || "cells", set = this.set || "corrections", place = `${this.service.corrections.replace(/\/$/, "")}/${set}`;
    const recipe = `model = "${dataset}"\ndataset = "${dataset}"\nworkers = 2\n# mix = { "dsb2018@latest" = 0.75 }   # with a dataset of what it knows, it forgets less\n\n[network]\nstart = "${this.service.model}"\n\n[optimizer]\nepochs = 10\nsteps_per_epoch = 24\nvalidate_every = 5\n`;
    element("teach").replaceChildren(
      copied("Import the set: the first time as a new dataset,", `nucleus data import ${place} ${dataset} --val 0.2 --test 0.2`),
      copied("and later into it:", `nucleus data import ${place} --into ${dataset}`),
      copied(`Save this as ${dataset}.toml,`, recipe),
      copied("and train from the model that you corrected:", `nucleus train ${dataset}.toml`),
    );
  }
}

/** My changes as edits of what somebody else saved.
 * @param {import("./nuclei.js").Nuclei} mine @param {import("./nuclei.js").Nuclei} theirs */
function merged(mine, theirs) {
  /** @type {{label: number, rings: number[][] | null}[]} */
  const after = [];
  let both = 0, dropped = 0;
  for (const label of mine.touched) {
    const nucleus = mine.all.get(label), known = mine.base.has(label), there = theirs.all.get(label);
    if (!nucleus) { if (known && there) after.push({ label, rings: null }); continue; }
    const own = known && there ? label : theirs.newLabel(), mask = fill(nucleus.rings), before = area(mask);
    for (const other of theirs.near(boxOf(nucleus.rings))) if (other.label !== own) subtract(mask, fill(other.rings));
    const [largest] = components(mask);
    if (!largest || area(largest) < COVERED * before) { dropped++; continue; }
    if (known && !there) both++;
    after.push({ label: own, rings: trace(largest) });
  }
  return { after, both, dropped };
}

/** @param {string} when */
function moment(when) {
  return new Date(when).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

/** A command with a button that copies it. @param {string} said @param {string} command */
function copied(said, command) {
  const box = text("div", ""), head = text("div", "", "copy"), block = text("pre", ""), button = document.createElement("button");
  block.append(text("code", command));
  block.tabIndex = 0;
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-label", `Copy: ${command.split("\n")[0]}`);
  button.addEventListener("click", () => {
    navigator.clipboard.writeText(command).then(() => { button.textContent = "Copied"; }, () => { button.textContent = "Select it"; });
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  head.append(text("p", said), button);
  box.append(head, block);
  return box;
}
