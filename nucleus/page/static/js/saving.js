// Saving corrections by compare-and-swap, and what to do when somebody else saved first.

import { element, plural } from "./gallery.js";
import { boxOf, components, fill, area, subtract, trace } from "./raster.js";
import { server, ServerError } from "./server.js";

/** @typedef {import("./server.js").Revision} Revision */

const REMEMBERED = { who: "nucleus-who", set: "nucleus-set" };
const COVERED = 0.5;

export class Saving {
  /** @param {import("./editor.js").Editor} editor */
  constructor(editor) {
    this.editor = editor;
    /** @type {Revision | null} what somebody else saved */
    this.theirs = null;
    this.question = {};
    for (const [id, key] of Object.entries(REMEMBERED)) this.input(id).value = localStorage.getItem(key) ?? (id === "set" ? "corrections" : "");
    element("save").addEventListener("submit", (event) => { event.preventDefault(); void this.save(); });
    element("look").addEventListener("click", () => void this.look());
    element("merge-theirs").addEventListener("click", () => void this.takeOver());
    element("set").addEventListener("change", () => void this.opened());
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
    const { image, nuclei } = this.editor, question = (this.question = {});
    element("conflict").hidden = true;
    element("saved").textContent = "";
    this.theirs = null;
    this.editor.viewer.compare(null);
    if (!image || !nuclei || !this.input("set").checkValidity()) return;
    try {
      const set = this.set, [{ saved }, sets] = await Promise.all([server.saved(image.id, set), server.sets()]);
      if (this.question !== question || this.editor.nuclei !== nuclei) return; // another image or set was opened meanwhile, or this one is being saved
      element("sets").replaceChildren(...sets.map((name) => new Option(name)));
      if (!saved) return;
      if (nuclei.saved?.set === set && nuclei.saved.tag === saved.tag) element("saved").textContent = this.told(saved);
      else this.conflict(saved, `${saved.who} has saved ${plural(saved.nuclei, "nucleus", "nuclei")} of this image in ${set} (revision ${saved.revision}, ${moment(saved.when)}).`);
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
    const { editor, set } = this, { image, nuclei } = editor;
    if (!image || !nuclei) { element("saved").textContent = "Wait until the image is open."; return; }
    for (const [id, key] of Object.entries(REMEMBERED)) localStorage.setItem(key, this.input(id).value);
    const base = nuclei.saved?.set === set ? nuclei.saved.tag : null, { clock } = nuclei;
    const button = /** @type {HTMLButtonElement} */ (element("save-button"));
    this.question = {}; // what is saved already comes with the answer
    button.disabled = true;
    element("conflict").hidden = true;
    element("saved").textContent = "Saving …";
    const say = (/** @type {string} */ said) => {
      if (editor.image === image) element("saved").textContent = said;
      else editor.say(`${image.name}: ${said}`); // another image was opened meanwhile
    };
    try {
      const asked = { ...editor.edited(editor.checked("save-hidden")), who: this.input("who").value, base };
      const { saved, set: place } = await server.save(image.id, set, asked);
      await this.becameBase(image, nuclei, saved, set, clock);
      say(`${this.told(saved)} In ${place}.`);
    } catch (error) {
      const content = error instanceof ServerError && error.status === 409 ? error.content : null;
      if (content?.saved && editor.nuclei === nuclei) this.conflict(content.saved, /** @type {Error} */ (error).message);
      else say(/** @type {Error} */ (error).message);
    } finally {
      button.disabled = false;
    }
  }

  /** Go on from what is saved now, with what was changed since it was sent.
   * @param {import("./server.js").ImageInfo} image @param {import("./nuclei.js").Nuclei} nuclei @param {Revision} saved
   * @param {string} set @param {number} clock when it was sent, by the clock of the nuclei */
  async becameBase(image, nuclei, saved, set, clock) {
    const { editor } = this, fresh = await editor.loaded(image, /** @type {string} */ (saved.layer));
    fresh.saved = { set, tag: saved.tag };
    const since = nuclei.since(clock).filter(({ label, rings }) => rings || fresh.all.has(label));
    if (editor.nuclei === nuclei) editor.take(image, fresh);
    else if (!editor.succeed(image, nuclei, fresh)) return; // the image was opened anew, with its changes
    if (since.length) fresh.edit("Changes that were made while it was saved", since);
    await editor.keep(image, fresh);
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
    const { editor } = this, { image } = editor;
    if (!image) return;
    try {
      const { saved } = await server.openSaved(image.id, this.set);
      if (!saved?.layer) return;
      const over = await editor.loaded(image, saved.layer);
      if (editor.image !== image) return;
      editor.viewer.compare({ under: null, over, show: "both", gone: new Set(), fresh: new Set() });
      editor.say(`Dashed: what ${saved.who} saved.`);
    } catch (error) {
      element("conflict-text").textContent = /** @type {Error} */ (error).message;
    }
  }

  /** Open what somebody else saved, and make the own changes again on it. */
  async takeOver() {
    const { editor, set } = this, { image, nuclei: mine } = editor;
    if (!image || !mine) return;
    try {
      const { saved } = await server.openSaved(image.id, set);
      if (!saved?.layer) return;
      const nuclei = await editor.loaded(image, saved.layer);
      if (editor.nuclei !== mine) return; // another image was opened meanwhile
      const { after, both, dropped } = merged(mine, nuclei);
      nuclei.saved = { set, tag: saved.tag };
      editor.viewer.compare(null);
      editor.take(image, nuclei);
      if (after.length) nuclei.edit("Took over my changes", after);
      await editor.keep(image, nuclei);
      element("conflict").hidden = true;
      const remarks = [both ? `${plural(both, "nucleus", "nuclei")} both of you changed: yours is kept` : "", dropped ? `${plural(dropped, "nucleus", "nuclei")} of yours they have too` : ""].filter(Boolean);
      element("saved").textContent = `Opened revision ${saved.revision} by ${saved.who}${after.length ? ", with your changes on it; save to make the next revision" : ""}. ${remarks.join("; ")}`;
    } catch (error) {
      element("conflict-text").textContent = /** @type {Error} */ (error).message;
    }
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
