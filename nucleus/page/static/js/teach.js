// Teaching: the commands, the button that runs them, the run's curve, and the image with the new version beside the old one.

import { element, plural, text } from "./gallery.js";
import { server } from "./server.js";

/**
 * @typedef {import("./server.js").Run} Run
 * @typedef {import("./server.js").Comparison} Comparison
 */

const SOON = 3000, LATER = 20_000;
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 320, HEIGHT = 90;

export class Teaching {
  /** @param {import("./server.js").Service} service @param {import("./editor.js").Editor} editor */
  constructor(service, editor) {
    this.service = service;
    this.editor = editor;
    /** @type {import("./server.js").Teaching | null} */
    this.state = null;
    /** @type {Run | null} */
    this.run = null;
    /** @type {Comparison | null} */
    this.found = null;
    /** @type {number | undefined} */
    this.timer = undefined;
    this.question = {};
    this.place = -1;
    for (const id of ["dataset", "set"]) element(id).addEventListener("input", () => this.renamed());
    element("teach-start").addEventListener("click", () => void this.start());
    element("compare").addEventListener("click", () => void this.compare());
    element("compare-close").addEventListener("click", () => this.opened());
    element("difference").addEventListener("click", () => this.next());
    for (const shown of document.getElementsByName("compared")) shown.addEventListener("change", () => this.draw());
    document.addEventListener("visibilitychange", () => this.watch());
    this.renamed();
  }

  /** @param {string} id */
  value(id) {
    return /** @type {HTMLInputElement} */ (element(id)).value.trim();
  }

  get dataset() {
    return this.value("dataset") || "cells";
  }

  get seen() {
    return !element("panel-teach").hidden && !document.hidden;
  }

  /** Another dataset or set was named. */
  renamed() {
    const { dataset } = this, set = this.value("set") || "corrections", place = quoted(`${this.service.corrections.replace(/\/$/, "")}/${set}`);
    const recipe = this.service.recipe.replaceAll("{dataset}", dataset).replaceAll("{model}", this.service.model);
    element("teach").replaceChildren(
      copied("Import the set: the first time as a new dataset,", `nucleus data import ${place} ${dataset} --val 0.2 --test 0.2`),
      copied("and later into it:", `nucleus data import ${place} --into ${dataset}`),
      copied(`Save this as ${dataset}.toml,`, recipe),
      copied("and train from the model that you corrected:", `nucleus train ${dataset}.toml`),
    );
    if (this.run && this.run.run !== this.state?.state?.run) this.run = null;
    this.drawRun();
    this.watch();
  }

  /** Ask how far the run is, now and from time to time, while this is seen. */
  watch() {
    clearTimeout(this.timer);
    if (!this.seen) return;
    void this.ask().then((soon) => {
      clearTimeout(this.timer);
      if (this.seen) this.timer = setTimeout(() => this.watch(), soon ? SOON : LATER);
    });
  }

  /** @returns {Promise<boolean>} whether something is going on */
  async ask() {
    const { dataset } = this, question = (this.question = {});
    try {
      const found = await server.teaching();
      if (this.question !== question) return true; // it was asked again, or a run was started
      this.state = found;
      const { state } = found, own = state?.dataset === dataset ? state : null;
      this.drawState(found, own);
      if (!found.bucket || !/^[a-z0-9][a-z0-9._-]*$/.test(dataset)) return false;
      const known = own?.stage === "begun" ? own.run : this.run?.state === "running" ? this.run.run : null;
      const { run } = known ? await server.run(known) : await server.newestRun(dataset);
      if (this.question !== question || dataset !== this.dataset) return true; // another one was named meanwhile
      this.run = run;
      this.drawRun();
      const starting = own?.stage === "begun" && run?.state === "unknown"; // its plan is there, its state not yet
      return starting || run?.state === "running" || (own !== null && ["importing", "submitting", "waiting"].includes(own.stage));
    } catch (error) {
      element("teach-state").textContent = /** @type {Error} */ (error).message;
      return false;
    }
  }

  /** Import the set, and train from it on the cluster. */
  async start() {
    const button = /** @type {HTMLButtonElement} */ (element("teach-start"));
    button.disabled = true;
    try {
      this.state = await server.teach(this.value("set"), this.dataset);
      this.question = {}; // answers to older questions are of before
      this.run = null;
      this.drawRun();
      this.drawState(this.state, this.state.state);
    } catch (error) {
      element("teach-state").textContent = /** @type {Error} */ (error).message;
      button.disabled = false;
      return;
    }
    this.watch();
  }

  /** @param {import("./server.js").Teaching} found @param {import("./server.js").TeachState | null} state of this dataset */
  drawState({ available, bucket, state: any }, state) {
    const button = /** @type {HTMLButtonElement} */ (element("teach-start"));
    const busy = any !== null && ["importing", "submitting", "waiting"].includes(any.stage);
    button.hidden = !available;
    button.disabled = busy;
    const commands = /** @type {HTMLDetailsElement} */ (element("teach-commands"));
    if (!available && !commands.dataset.opened) { commands.open = true; commands.dataset.opened = "yes"; }
    const said = state && {
      importing: `Importing ${state.set} into ${state.dataset} …`, submitting: `${state.message ?? ""} Submitting the run …`,
      waiting: `${state.message ?? ""} ${state.run} waits for the cluster …`, begun: state.message ?? "", failed: state.message ?? "It failed.",
    }[state.stage];
    const other = busy && !state ? `A run from ${any.set} is being started for ${any.dataset}.` : "";
    element("teach-state").textContent = said ?? (other || (bucket ? "" : "Training, and what it shows here, needs a bucket: start the service with NUCLEUS_BUCKET."));
    element("teach-state").className = state?.stage === "failed" ? "warning" : "";
  }

  drawRun() {
    const { run } = this;
    element("run").hidden = !run;
    if (!run) return;
    element("run-name").textContent = run.run;
    element("run-state").textContent = inWords(run);
    drawCurve(/** @type {any} */ (element("curve")), run);
    const scored = run.curve.filter(({ score }) => score !== null), last = run.curve.at(-1), best = scored.find(({ epoch }) => epoch === run.best);
    element("curve-words").textContent = last ? [`loss ${shown(run.curve[0].loss)} → ${shown(last.loss)}`, scored.length ? `${metric(run)} ${shown(scored[0].score)} → ${shown(scored.at(-1)?.score ?? null)}` : "", best ? `best after epoch ${best.epoch}: ${shown(best.score)}` : ""].filter(Boolean).join(", ") : "";
    element("run-gate").textContent = run.gate?.text ?? "";
    element("run-gate").className = run.gate && !run.gate.passed ? "warning" : "";
    element("compare").hidden = !run.version;
    element("compare").textContent = `Look at this image with ${run.version}`;
    element("follow").hidden = !run.gate?.passed;
    element("follow-command").textContent = `nucleus serve --model ${run.version?.split("@")[0]}@${run.gate?.alias}`;
  }

  // The image with another version

  /** An image was opened, or no comparison is wanted any more. */
  opened() {
    this.found = null;
    this.editor.viewer.compare(null);
    element("comparison").hidden = true;
    element("compare-state").textContent = "";
  }

  /** Nuclei were changed, so that those of before are no longer what is worked on. @param {import("./nuclei.js").Nuclei} nuclei */
  edited(nuclei) {
    if (this.found && this.editor.nuclei === nuclei && nuclei.clock !== this.clock) this.opened();
  }

  async compare() {
    const { image, nuclei } = this.editor, version = this.run?.version, button = /** @type {HTMLButtonElement} */ (element("compare"));
    if (!image || !nuclei || !version) return;
    button.disabled = true;
    element("compare-state").textContent = `Finding nuclei with ${version} …`;
    try {
      const found = await server.version(image.id, version, nuclei.saved ? nuclei.layer : null);
      const [over, before] = await Promise.all([this.editor.loaded(image, found.layer), this.editor.loaded(image, "found")]);
      if (this.editor.nuclei !== nuclei) return; // another one was opened meanwhile
      this.clock = nuclei.clock;
      this.found = found;
      this.over = over;
      this.before = before;
      this.place = -1;
      element("compare-state").textContent = "";
      element("comparison").hidden = false;
      element("comparison-text").replaceChildren(...comparedInWords(found, image.model, nuclei.done > 0).map((line) => text("li", line)));
      element("difference").hidden = !(found.gone.length + found.new.length);
      element("compared-before").textContent = `${image.model}: ${found.before.toLocaleString("en")}`;
      element("compared-after").textContent = `${found.model}: ${found.after.toLocaleString("en")}`;
      this.draw();
    } catch (error) {
      element("compare-state").textContent = /** @type {Error} */ (error).message;
    } finally {
      button.disabled = false;
    }
  }

  draw() {
    const { found, over, before } = this;
    if (!found || !over || !before) return;
    const show = /** @type {"before" | "both" | "after"} */ (/** @type {HTMLInputElement} */ (document.querySelector("input[name=compared]:checked")).value);
    this.editor.viewer.compare({ under: before, over, show, gone: new Set(found.gone), fresh: new Set(found.new) });
  }

  /** Show the next nucleus that only one of the two found. */
  next() {
    const { found, over, before } = this;
    if (!found || !over || !before) return;
    const places = [...found.gone.map((label) => ({ label, from: before, who: "no longer found" })), ...found.new.map((label) => ({ label, from: over, who: "found now" }))];
    this.place = (this.place + 1) % places.length;
    const { label, from, who } = places[this.place], nucleus = from.all.get(label);
    if (nucleus) this.editor.viewer.reveal(nucleus.box);
    this.editor.say(`Difference ${this.place + 1} of ${places.length}: ${who}`);
  }
}

/** @param {Run} run */
function inWords(run) {
  const epochs = run.epochs ? ` of ${run.epochs}` : "", after = run.done ? `, after ${plural(run.done, "epoch")}` : "";
  const words = /** @type {Record<string, string>} */ ({
    running: run.done ? `Trains: ${run.done}${epochs} epochs done.` : "Starts; the first epoch is not done yet.",
    published: `Published as ${run.version}${after}.`, finished: `Finished${after}, without a version.`, stopped: `Stopped${after}.`,
    failed: `Failed${after}: ${run.message ?? "see its log"}`, lost: `Lost${after}: nothing was heard of it for minutes. Look at it: nucleus runs show ${run.run}`,
  });
  return words[run.state] ?? (run.message || `Its state is not known. Look at it: nucleus runs show ${run.run}`);
}

/** @param {Comparison} found @param {string} old @param {boolean} changed whether there are changes that are not saved */
function comparedInWords({ model, before, after, same, gone, new: fresh, corrected }, old, changed) {
  const lines = [`${old} found ${plural(before, "nucleus", "nuclei")}, ${model} finds ${after.toLocaleString("en")}.`, `${are(same)} the same, ${are(gone.length)} no longer found, ${are(fresh.length)} new.`];
  if (corrected) lines.push(`Of the ${plural(corrected.nuclei, "nucleus", "nuclei")} that were saved, ${old} found ${corrected.before.toLocaleString("en")}, ${model} finds ${corrected.after.toLocaleString("en")}. It may have learned from this very image.`);
  if (changed) lines.push("Your changes that are not saved are not counted.");
  return lines;
}

/** @param {number} number */
function are(number) {
  return `${number.toLocaleString("en")} ${number === 1 ? "is" : "are"}`;
}

/** @param {Run} run */
function metric(run) {
  return (run.monitor ?? "val_map").replace(/^val_/, "validation ").replace("map", "mAP");
}

/** @param {number | null} value */
function shown(value) {
  return value === null ? "–" : value.toPrecision(3);
}

/** Loss and score by epoch, each from its lowest to its highest value. @param {SVGSVGElement} svg @param {Run} run */
function drawCurve(svg, run) {
  const last = Math.max(run.epochs ?? 1, ...run.curve.map(({ epoch }) => epoch)), parts = [];
  for (const name of /** @type {("loss" | "score")[]} */ (["loss", "score"])) {
    const points = run.curve.filter((point) => point[name] !== null), values = points.map((point) => Number(point[name]));
    const low = Math.min(...values), span = Math.max(...values) - low || 1;
    const places = points.map(({ epoch }, i) => [6 + ((WIDTH - 12) * (epoch - 1)) / Math.max(1, last - 1), 6 + (HEIGHT - 12) * (1 - (values[i] - low) / span)]);
    parts.push(made("polyline", { points: places.map((place) => place.join(",")).join(" "), class: name }));
    for (const [x, y] of places) parts.push(made("circle", { cx: x, cy: y, r: 2.5, class: name }));
  }
  svg.replaceChildren(...parts);
  svg.setAttribute("aria-label", `Curve of ${run.run}: ${run.curve.map(({ epoch, loss, score }) => `epoch ${epoch}: loss ${shown(loss)}${score === null ? "" : `, ${metric(run)} ${shown(score)}`}`).join("; ") || "no epoch is done"}`);
  element("curve-score").textContent = metric(run);
}

/** @param {string} name @param {Record<string, any>} attributes */
function made(name, attributes) {
  const found = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, String(value));
  return found;
}

/** A word as a shell reads it. @param {string} word */
function quoted(word) {
  return /^[\w./:@%+,=-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
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
    const copying = navigator.clipboard?.writeText(command) ?? Promise.reject(new Error("not without TLS"));
    copying.then(() => { button.textContent = "Copied"; }, () => { button.textContent = "Select it"; });
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  head.append(text("p", said), button);
  box.append(head, block);
  return box;
}
