// The tools that correct nuclei: what a press, a stroke or a click does to them.

import { area, components, fill, fillHoles, joined, split, stroke, subtract, trace, union } from "./raster.js";
import { inPixels } from "./nuclei.js";
import { server, unpacked } from "./server.js";

/**
 * @typedef {import("./raster.js").Mask} Mask
 * @typedef {import("./raster.js").Point} Point
 * @typedef {import("./nuclei.js").Nucleus} Nucleus
 * @typedef {import("./viewer.js").Tool} Tool
 * @typedef {"select" | "draw" | "brush" | "erase" | "split" | "merge" | "missed"} ToolName
 */

const FEWEST_PIXELS = 4;

export class Tools {
  /** @param {import("./viewer.js").Viewer} viewer @param {(text: string) => void} say */
  constructor(viewer, say) {
    this.viewer = viewer;
    this.say = say;
    /** @type {ToolName} */
    this.name = "select";
    this.radius = 6;
    /** @type {Point[]} */
    this.path = [];
    /** @type {Point | null} */
    this.here = null;
    this.drawing = false;
    this.polygon = false;
    this.busy = false;
  }

  get nuclei() {
    return /** @type {import("./nuclei.js").Nuclei} */ (this.viewer.nuclei);
  }

  get limits() {
    const image = /** @type {import("./server.js").ImageInfo} */ (this.viewer.image);
    return { l: 0, t: 0, r: image.width, b: image.height };
  }

  /** @param {ToolName} name */
  use(name) {
    this.cancel();
    this.name = name;
    this.viewer.tool = name === "merge" ? this.mergeByClicks() : this[name]();
    this.viewer.paint();
  }

  cancel() {
    this.path = [];
    this.drawing = this.polygon = false;
    this.viewer.penDown = false;
    this.viewer.paint();
  }

  // What all tools share

  /** The pixels that other nuclei leave. @param {Mask} mask @param {number[]} own @returns {Mask} */
  free(mask, own) {
    const box = { l: mask.x, t: mask.y, r: mask.x + mask.w, b: mask.y + mask.h };
    for (const { label, rings } of this.nuclei.near(box)) if (!own.includes(label)) subtract(mask, fill(rings));
    return mask;
  }

  /** The outline of the largest part; null if too little is left. @param {Mask} mask @param {number[]} own */
  outline(mask, own) {
    const [largest] = components(this.free(mask, own));
    if (!largest || area(largest) < FEWEST_PIXELS) return null;
    return trace(this.free(fillHoles(largest), own));
  }

  /** @param {string} text @param {{label: number, rings: number[][] | null}[]} after */
  edit(text, after) {
    this.nuclei.edit(text, after);
    this.say(text);
  }

  /** @param {string} text @param {Mask} mask */
  add(text, mask) {
    const rings = this.outline(mask, []);
    if (!rings) { this.say("Other nuclei cover that place, or it is too small."); return; }
    const label = this.nuclei.newLabel();
    this.edit(`${text} ${label}`, [{ label, rings }]);
  }

  // Selecting, removing, merging

  remove() {
    const labels = [...this.nuclei.selected];
    if (!labels.length) { this.say("Select a nucleus first."); return; }
    this.edit(labels.length > 1 ? `Deleted ${labels.length} nuclei` : `Deleted nucleus ${labels[0]}`, labels.map((label) => ({ label, rings: null })));
  }

  merge() {
    const chosen = [...this.nuclei.selected].map((label) => this.nuclei.all.get(label)).filter((nucleus) => nucleus !== undefined);
    if (chosen.length < 2) { this.say("Select two nuclei that touch: click one, then Shift and click the other."); return false; }
    const labels = chosen.map(({ label }) => label), mask = joined(chosen.map(({ rings }) => fill(rings)));
    const rings = mask && this.outline(mask, labels);
    if (!rings) { this.say("These nuclei are too far apart to be one."); return false; }
    this.edit(`Merged nuclei ${labels.join(" and ")}`, labels.map((label, i) => ({ label, rings: i ? null : rings })));
    return true;
  }

  /** @param {1 | -1} step */
  next(step) {
    const order = this.nuclei.shown.map(({ label }) => label).sort((a, b) => a - b);
    if (!order.length) return;
    const [first] = this.nuclei.selected, place = first === undefined ? -1 : order.indexOf(first);
    const label = order[(place + step + order.length + (place < 0 && step < 0 ? 1 : 0)) % order.length];
    this.nuclei.select([label]);
    this.viewer.reveal(/** @type {Nucleus} */ (this.nuclei.all.get(label)).box);
  }

  // The tools, by name

  /** @returns {Tool} */
  select() {
    return {
      cursor: "default",
      press: (point, event) => {
        const found = this.nuclei.at(point);
        const chosen = new Set(event.shiftKey ? this.nuclei.selected : []);
        if (found && chosen.has(found.label)) chosen.delete(found.label);
        else if (found) chosen.add(found.label);
        this.viewer.panning = !found && event.type === "pointerdown";
        this.nuclei.select([...chosen]);
      },
    };
  }

  /** Click one nucleus, then the other. @returns {Tool} */
  mergeByClicks() {
    return {
      cursor: "pointer",
      press: (point) => {
        const found = this.nuclei.at(point);
        this.nuclei.select(found ? [...this.nuclei.selected, found.label] : []);
        if (this.nuclei.selected.size > 1) this.merge();
        else if (found) this.say("Now click the nucleus that belongs to it.");
      },
    };
  }

  /** Around a nucleus in one stroke, or corner by corner with clicks. @returns {Tool} */
  draw() {
    return {
      cursor: "crosshair",
      press: (point) => {
        if (this.polygon && this.closes(point)) { this.finishPath(); return; }
        this.drawing = true;
        this.path.push(point);
      },
      move: (point) => {
        this.here = point;
        if (this.drawing && !this.polygon && this.far(point)) this.path.push(point);
      },
      release: () => {
        if (!this.drawing) return;
        this.drawing = false;
        if (this.path.length > 3 && !this.polygon) this.finishPath();
        else if (!this.polygon) { this.polygon = true; this.path.length = 1; this.say("Click the next corners; click the first or press Enter to close."); }
      },
      cancel: () => this.cancel(),
      draw: (c, zoom) => this.drawPath(c, zoom, true),
    };
  }

  /** @param {Point} point */
  far(point) {
    const last = this.path[this.path.length - 1];
    return !last || Math.hypot(point.x - last.x, point.y - last.y) * this.viewer.zoom > 2;
  }

  /** @param {Point} point */
  closes(point) {
    const [first] = this.path;
    return this.path.length > 2 && Math.hypot(point.x - first.x, point.y - first.y) * this.viewer.zoom < 9;
  }

  finishPath() {
    const path = this.path;
    this.cancel();
    if (this.name === "split") { this.splitAlong(path); return; }
    if (path.length < 3) return;
    const { r, b } = this.limits;
    const ring = path.flatMap(({ x, y }) => [2 * Math.min(r, Math.max(0, x)), 2 * Math.min(b, Math.max(0, y))]);
    this.add("Drew nucleus", fill([ring]));
  }

  /** @returns {Tool} */
  brush() {
    return this.painter((mask, target) => {
      if (!target) { this.add("Painted nucleus", mask); return; }
      const rings = this.outline(union(fill(target.rings), mask), [target.label]);
      if (rings) this.edit(`Added to nucleus ${target.label}`, [{ label: target.label, rings }]);
    });
  }

  /** @returns {Tool} */
  erase() {
    return this.painter((mask) => {
      const box = { l: mask.x, t: mask.y, r: mask.x + mask.w, b: mask.y + mask.h };
      const only = this.nuclei.selected, after = [];
      for (const { label, rings } of this.nuclei.near(box)) {
        if (this.nuclei.hidden.has(label) || (only.size && !only.has(label))) continue;
        const before = fill(rings), left = subtract({ ...before, data: before.data.slice() }, mask);
        if (area(left) === area(before)) continue;
        const [largest] = components(left);
        after.push({ label, rings: largest && area(largest) >= FEWEST_PIXELS ? trace(largest) : null });
      }
      if (after.length) this.edit(after.length > 1 ? `Erased parts of ${after.length} nuclei` : `Erased a part of nucleus ${after[0].label}`, after);
    });
  }

  /** A round brush. @param {(mask: Mask, target: Nucleus | null) => void} apply @returns {Tool} */
  painter(apply) {
    /** @type {Nucleus | null} */
    let target = null;
    return {
      cursor: "none",
      press: (point) => {
        const [selected] = this.nuclei.selected;
        target = this.nuclei.at(point) ?? this.nuclei.all.get(selected) ?? null;
        if (target && target.label === selected && !this.touches(target, point)) target = null;
        this.drawing = true;
        this.path = [point];
      },
      move: (point) => {
        this.here = point;
        if (this.drawing) this.path.push(point);
      },
      release: () => {
        if (!this.drawing) return;
        const path = this.path;
        this.cancel();
        apply(stroke(path, this.radius, this.limits), target);
      },
      cancel: () => this.cancel(),
      wheel: (steps) => {
        this.radius = Math.min(200, Math.max(0.5, this.radius * 1.15 ** steps));
      },
      draw: (c, zoom) => this.drawBrush(c, zoom),
    };
  }

  /** Whether the brush at a point touches a nucleus. @param {Nucleus} nucleus @param {Point} point */
  touches({ box }, point) {
    const r = this.radius + 1;
    return point.x > box.l - r && point.x < box.r + r && point.y > box.t - r && point.y < box.b + r;
  }

  /** A line across a nucleus. @returns {Tool} */
  split() {
    return {
      cursor: "crosshair",
      press: (point) => { this.drawing = true; this.path = [point]; },
      move: (point) => {
        this.here = point;
        if (this.drawing && this.far(point)) this.path.push(point);
      },
      release: (point) => {
        if (!this.drawing) return;
        this.path.push(point);
        this.finishPath();
      },
      cancel: () => this.cancel(),
      draw: (c, zoom) => this.drawPath(c, zoom, false),
    };
  }

  /** @param {Point[]} path */
  splitAlong(path) {
    const line = stroke(path, 0.75, this.limits);
    /** @type {{label: number, rings: number[][]}[]} */
    const after = [];
    const box = { l: line.x, t: line.y, r: line.x + line.w, b: line.y + line.h };
    for (const { label, rings } of this.nuclei.near(box)) {
      const parts = this.nuclei.hidden.has(label) ? null : split(fill(rings), path);
      parts?.forEach((part, i) => after.push({ label: i ? this.nuclei.newLabel() : label, rings: trace(part) }));
    }
    if (after.length) this.edit(`Split into ${after.length} nuclei`, after);
    else this.say("Draw the line from outside a nucleus across it to the other side.");
  }

  /** Click where a nucleus was missed. @returns {Tool} */
  missed() {
    return { cursor: "copy", press: (point) => { void this.find(point); } };
  }

  /** @param {Point} point */
  async find(point) {
    if (this.busy) return;
    if (this.nuclei.at(point)) { this.say("There is a nucleus already. Click beside the others."); return; }
    const nuclei = this.nuclei, image = /** @type {import("./server.js").ImageInfo} */ (this.viewer.image);
    const reach = Math.min(512, Math.max(96, 4 * (nuclei.diameter ?? 24))) + 2;
    const near = nuclei.near({ l: point.x - reach, t: point.y - reach, r: point.x + reach, b: point.y + reach });
    this.busy = true;
    this.say("Looking …");
    try {
      const taken = near.map(({ label, rings }) => ({ label, rings: inPixels(rings) }));
      const [found] = unpacked(await server.missed(image.id, { x: point.x, y: point.y, taken, diameter: nuclei.diameter }));
      if (image !== this.viewer.image) return; // another image was opened meanwhile
      if (found) this.add("Found nucleus", fill(found.rings));
      else this.say("The network sees nothing there. Draw the nucleus instead.");
    } catch (error) {
      this.say(/** @type {Error} */ (error).message);
    } finally {
      this.busy = false;
    }
  }

  // What they show

  /** @param {CanvasRenderingContext2D} c @param {number} zoom @param {boolean} closed */
  drawPath(c, zoom, closed) {
    if (!this.path.length) return;
    const points = this.here && (this.polygon || this.drawing) ? [...this.path, this.here] : this.path;
    c.beginPath();
    points.forEach(({ x, y }, i) => (i ? c.lineTo(x, y) : c.moveTo(x, y)));
    if (closed && points.length > 2) { c.fillStyle = "rgba(47, 230, 255, .2)"; c.fill(); }
    line(c, zoom);
    if (this.polygon) for (const { x, y } of this.path) { c.beginPath(); c.arc(x, y, 4 / zoom, 0, 7); line(c, zoom); }
  }

  /** @param {CanvasRenderingContext2D} c @param {number} zoom */
  drawBrush(c, zoom) {
    if (this.path.length && this.drawing) {
      c.beginPath();
      this.path.forEach(({ x, y }, i) => (i ? c.lineTo(x, y) : c.moveTo(x, y)));
      if (this.path.length === 1) c.lineTo(this.path[0].x + 1e-3, this.path[0].y);
      c.lineWidth = 2 * this.radius;
      c.lineCap = c.lineJoin = "round";
      c.strokeStyle = this.name === "erase" ? "rgba(255, 70, 70, .35)" : "rgba(47, 230, 255, .35)";
      c.stroke();
    }
    const at = this.viewer.cursor ?? this.here;
    if (!at) return;
    c.beginPath();
    c.arc(at.x, at.y, this.radius, 0, 7);
    line(c, zoom);
  }
}

/** @param {CanvasRenderingContext2D} c @param {number} zoom */
function line(c, zoom) {
  c.lineWidth = 3.4 / zoom;
  c.strokeStyle = "rgba(0, 0, 0, .6)";
  c.stroke();
  c.lineWidth = 1.6 / zoom;
  c.strokeStyle = "#2fe6ff";
  c.stroke();
}
