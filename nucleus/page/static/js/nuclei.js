// The nuclei of the opened image: outlines, measurements, selection, gate, and changes that can be undone.

import { boxOf, contains, fill } from "./raster.js";

/**
 * @typedef {import("./raster.js").Ring} Ring
 * @typedef {import("./raster.js").Point} Point
 * @typedef {import("./raster.js").Box} Box
 * @typedef {{label: number, rings: Ring[], box: Box}} Nucleus
 * @typedef {Record<string, number | boolean | null>} Row
 * @typedef {{label: number, rings: number[][] | null, row: Row | null}} Step a nucleus, or none, with this label
 * @typedef {{text: string, before: Step[], after: Step[]}} Edit
 * @typedef {{column: string, low: number, high: number}} Gate
 */

const CELL = 256;

export class Nuclei extends EventTarget {
  /** @param {{label: number, rings: Ring[]}[]} outlines @param {Record<string, any[]>} columns @param {string} layer */
  constructor(outlines, columns, layer) {
    super();
    this.layer = layer;
    /** @type {Map<number, Nucleus>} */
    this.all = new Map();
    /** @type {Map<string, Set<number>>} */
    this.cells = new Map();
    this.columns = columns;
    /** @type {Map<number, number>} */
    this.places = new Map((columns.label ?? []).map((label, i) => [label, i]));
    /** @type {Map<number, Row>} */
    this.rows = new Map();
    /** @type {Set<number>} */
    this.base = new Set();
    for (const { label, rings } of outlines) {
      this.base.add(label);
      this.put(label, rings);
    }
    /** @type {{set: string, tag: string} | null} the saved revision that is corrected */
    this.saved = null;
    /** @type {Edit[]} */
    this.edits = [];
    this.done = 0;
    this.clock = 0;
    /** @type {Map<number, number>} when a nucleus was changed last, by the clock of the changes */
    this.times = new Map();
    /** @type {Set<number>} */
    this.selected = new Set();
    /** @type {Gate[]} */
    this.gates = [];
    /** @type {Set<number>} */
    this.hidden = new Set();
    /** @type {Box[]} places whose nuclei were changed; who shows them empties it */
    this.changedPlaces = [];
    this.highest = Math.max(0, ...this.places.keys().next().value !== undefined ? [maximum(columns.label)] : []);
  }

  /** @param {number} label @param {Ring[]} rings */
  put(label, rings) {
    const box = boxOf(rings);
    this.drop(label);
    this.changedPlaces?.push(box);
    this.all.set(label, { label, rings, box });
    for (const cell of cellsOf(box)) {
      const there = this.cells.get(cell);
      if (there) there.add(label); else this.cells.set(cell, new Set([label]));
    }
  }

  /** @param {number} label */
  drop(label) {
    const nucleus = this.all.get(label);
    if (!nucleus) return;
    this.changedPlaces?.push(nucleus.box);
    for (const cell of cellsOf(nucleus.box)) this.cells.get(cell)?.delete(label);
    this.all.delete(label);
  }

  /** The names of the measurements. @returns {string[]} */
  get measures() {
    const names = Object.keys(this.columns).filter((name) => name !== "label");
    return names.filter((name) => this.columns[name].some((value) => value !== null));
  }

  /** @param {number} label @param {string} column @returns {number | null} */
  value(label, column) {
    if (column === "label") return label;
    const row = this.rows.get(label);
    const place = this.places.get(label);
    const value = row ? row[column] : place === undefined ? null : this.columns[column]?.[place];
    return value === undefined || value === null ? null : Number(value);
  }

  /** Nuclei that are not hidden by the gate. @returns {Nucleus[]} */
  get shown() {
    return [...this.all.values()].filter(({ label }) => !this.hidden.has(label));
  }

  /** The nuclei that touch a box. @param {Box} box @returns {Nucleus[]} */
  near(box) {
    const labels = new Set();
    for (const cell of cellsOf(box)) for (const label of this.cells.get(cell) ?? []) labels.add(label);
    const found = [...labels].map((label) => /** @type {Nucleus} */ (this.all.get(label)));
    return found.filter(({ box: b }) => b.l < box.r && b.r > box.l && b.t < box.b && b.b > box.t);
  }

  /** About how many nuclei are in a box. @param {Box} box */
  countNear(box) {
    let count = 0;
    for (const cell of cellsOf(box)) count += this.cells.get(cell)?.size ?? 0;
    return count;
  }

  /** The nucleus at a point; hidden ones do not count. @param {Point} point @returns {Nucleus | null} */
  at(point) {
    const x = Math.floor(point.x), y = Math.floor(point.y);
    const near = this.near({ l: x, t: y, r: x + 1, b: y + 1 });
    return near.find(({ label, rings }) => !this.hidden.has(label) && contains(rings, point)) ?? null;
  }

  /** @param {number[]} labels */
  select(labels) {
    this.selected = new Set(labels.filter((label) => this.all.has(label)));
    this.dispatchEvent(new Event("select"));
  }

  /** @param {Gate[]} gates */
  setGates(gates) {
    this.gates = gates;
    this.applyGates();
    this.dispatchEvent(new Event("change"));
  }

  applyGates() {
    this.hidden = new Set();
    for (const { column, low, high } of this.gates) {
      for (const label of this.all.keys()) {
        const value = this.value(label, column);
        if (value !== null && (value < low || value > high)) this.hidden.add(label);
      }
    }
  }

  /** A label that no nucleus has had. */
  newLabel() {
    return ++this.highest;
  }

  /** Change nuclei; rings of null remove one. @param {string} text @param {{label: number, rings: number[][] | null}[]} after */
  edit(text, after) {
    /** @type {Edit} */
    const edit = {
      text,
      before: after.map(({ label }) => this.step(label)),
      after: after.map(({ label, rings }) => ({ label, rings, row: rings && roughRow(label, rings) })),
    };
    this.edits.length = this.done;
    this.edits.push(edit);
    this.done++;
    this.apply(edit.after);
    this.select(after.filter(({ rings }) => rings).map(({ label }) => label));
    this.changed(edit);
  }

  /** @param {number} label @returns {Step} */
  step(label) {
    const nucleus = this.all.get(label);
    return { label, rings: nucleus ? nucleus.rings.map((ring) => Array.from(ring)) : null, row: this.rows.get(label) ?? null };
  }

  /** @param {Step[]} steps */
  apply(steps) {
    this.clock++;
    for (const { label, rings, row } of steps) {
      this.times.set(label, this.clock);
      if (rings) this.put(label, rings); else this.drop(label);
      if (row) this.rows.set(label, row); else this.rows.delete(label);
      if (!rings) this.selected.delete(label);
      this.highest = Math.max(this.highest, label);
    }
  }

  /** @param {Edit | null} edit */
  changed(edit) {
    this.applyGates();
    this.dispatchEvent(new CustomEvent("change", { detail: edit }));
    this.dispatchEvent(new Event("edit"));
  }

  undo() {
    if (!this.done) return null;
    const edit = this.edits[--this.done];
    this.apply(edit.before);
    this.changed(null);
    return edit;
  }

  redo() {
    if (this.done === this.edits.length) return null;
    const edit = this.edits[this.done++];
    this.apply(edit.after);
    this.changed(null);
    return edit;
  }

  /** Do edits again that were kept. @param {Edit[]} edits */
  restore(edits) {
    this.edits = edits;
    this.done = edits.length;
    for (const edit of edits) this.apply(edit.after);
    this.changed(null);
  }

  /** Take over what the server measured, and its outline of the same pixels.
   * @param {number} label @param {number[][]} asked @param {number[][]} rings @param {Row} row */
  measured(label, asked, rings, row) {
    for (const edit of this.edits) {
      for (const step of [...edit.before, ...edit.after]) {
        if (step.label === label && same(step.rings, asked)) { step.rings = rings; step.row = row; }
      }
    }
    const nucleus = this.all.get(label);
    if (nucleus && same(nucleus.rings, asked)) { this.put(label, rings); this.rows.set(label, row); }
    this.changed(null);
  }

  /** The nuclei that were changed after a time of the clock, as they are now. @param {number} clock */
  since(clock) {
    const labels = [...this.times].filter(([, time]) => time > clock).map(([label]) => label);
    return labels.map((label) => ({ label, rings: this.step(label).rings }));
  }

  /** What was drawn and is not measured yet. @returns {Step[]} */
  get unmeasured() {
    return [...this.touched].map((label) => this.step(label)).filter(({ rings, row }) => rings && (!row || row.score === undefined));
  }

  /** Every label that differs from the layer. @returns {Set<number>} */
  get touched() {
    const labels = new Set();
    for (const edit of this.edits.slice(0, this.done)) for (const { label } of edit.after) labels.add(label);
    return labels;
  }

  /** What differs from the layer, as the server takes it. @returns {import("./server.js").Changes} */
  get changes() {
    /** @type {import("./server.js").Changes} */
    const changes = { removed: [], shapes: [] };
    for (const label of this.touched) {
      const nucleus = this.all.get(label);
      if (nucleus) changes.shapes.push({ label, rings: inPixels(nucleus.rings) });
      else if (this.base.has(label)) changes.removed.push(label);
    }
    return changes;
  }

  /** Typical diameter, px. @returns {number | null} */
  get diameter() {
    const found = [...this.all.keys()].slice(0, 5000).map((label) => this.value(label, "diameter") ?? 0).sort((a, b) => a - b);
    return found.length ? found[found.length >> 1] : null;
  }
}

/** @param {Ring[]} rings @returns {number[][]} */
export function inPixels(rings) {
  return rings.map((ring) => Array.from(ring, (value) => value / 2));
}

/** @param {Ring[] | null} one @param {Ring[]} other */
function same(one, other) {
  return one !== null && one.length === other.length
    && one.every((ring, i) => ring.length === other[i].length && Array.from(ring).every((value, j) => value === other[i][j]));
}

/** @param {Box} box */
function cellsOf(box) {
  const found = [];
  for (let y = Math.floor(box.t / CELL); y <= Math.floor((box.b - 1) / CELL); y++) {
    for (let x = Math.floor(box.l / CELL); x <= Math.floor((box.r - 1) / CELL); x++) found.push(`${x},${y}`);
  }
  return found;
}

/** @param {number[]} values */
function maximum(values) {
  let found = 0;
  for (const value of values) found = Math.max(found, value);
  return found;
}

/** What can be measured here until the server answers. @param {number} label @param {number[][]} rings @returns {Row} */
function roughRow(label, rings) {
  const mask = fill(rings);
  let area = 0, x = 0, y = 0;
  mask.data.forEach((inside, i) => {
    if (inside) { area++; x += mask.x + (i % mask.w); y += mask.y + Math.floor(i / mask.w); }
  });
  return { label, area, centroid_x: x / area, centroid_y: y / area, diameter: Math.sqrt((4 * area) / Math.PI) };
}

/** @type {WeakMap<object, Path2D>} */
const kept = new WeakMap();

/** @param {{rings: Ring[]}} nucleus @returns {Path2D} */
export function pathOf(nucleus) {
  const found = kept.get(nucleus);
  if (found) return found;
  const path = new Path2D();
  for (const ring of nucleus.rings) {
    path.moveTo(ring[0] / 2, ring[1] / 2);
    for (let i = 2; i < ring.length; i += 2) path.lineTo(ring[i] / 2, ring[i + 1] / 2);
    path.closePath();
  }
  kept.set(nucleus, path);
  return path;
}
