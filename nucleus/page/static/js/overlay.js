// Outlines of many nuclei as tiles that are drawn once: a frame draws some of them anew at most, however many there are.

import { pathOf } from "./nuclei.js";

/**
 * @typedef {import("./raster.js").Box} Box
 * @typedef {import("./nuclei.js").Nuclei} Nuclei
 * @typedef {import("./nuclei.js").Nucleus} Nucleus
 * @typedef {CanvasRenderingContext2D | OffscreenCanvasRenderingContext2D} Context
 * @typedef {{outlines: boolean, filled: boolean}} Style
 */

const SIDE = 256, KEPT = 256, BUDGET_MS = 6;
const LEAST_LEVEL = -4;
/** Where tiles are between half and whole size on the screen, this is how wide a line of 1 is in them. */
const LINE = 1.3;

export class Overlay {
  constructor() {
    /** @type {Map<string, OffscreenCanvas>} */
    this.tiles = new Map();
    this.kind = "";
  }

  clear() {
    this.tiles.clear();
  }

  /** Forget what shows some places. @param {Box[]} boxes */
  forget(boxes) {
    if (!boxes.length) return;
    for (const key of this.tiles.keys()) {
      const { l, t, r, b } = placeOf(key), margin = (r - l) / 32;
      if (boxes.some((box) => box.l <= r + margin && box.r >= l - margin && box.t <= b + margin && box.b >= t - margin)) this.tiles.delete(key);
    }
  }

  /** Draw the outlines in view; return whether all of them are there.
   * @param {Context} c in pixels of the image @param {Box} seen @param {number} scale pixels of the screen for one of the image
   * @param {number} ratio pixels of the screen for one of the page @param {string} kind of all that the tiles depend on
   * @param {(box: Box) => Map<string, Nucleus[]>} coloured what is in a box, by its colour @param {Style} style @param {boolean} dashed */
  draw(c, seen, scale, ratio, kind, coloured, style, dashed) {
    if (kind !== this.kind) { this.kind = kind; this.clear(); }
    const level = Math.max(LEAST_LEVEL, Math.floor(Math.log2(1 / scale))), size = SIDE * 2 ** level, began = performance.now();
    let whole = true;
    for (let y = Math.floor(seen.t / size); y * size < seen.b; y++) {
      for (let x = Math.floor(seen.l / size); x * size < seen.r; x++) {
        const key = `${level},${x},${y}`;
        let tile = this.tiles.get(key);
        if (!tile && (performance.now() - began < BUDGET_MS)) tile = made(placeOf(key), 2 ** -level, ratio, coloured, style, dashed);
        if (tile) {
          this.tiles.delete(key);
          this.tiles.set(key, tile);
          c.drawImage(tile, x * size, y * size, size, size);
        } else {
          whole = false;
          this.coarser(c, level, x, y, size);
        }
      }
    }
    for (const key of this.tiles.keys()) {
      if (this.tiles.size <= KEPT) break;
      this.tiles.delete(key);
    }
    return whole;
  }

  /** Draw what a coarser tile has of a place, if there is one. @param {Context} c @param {number} level @param {number} x @param {number} y @param {number} size */
  coarser(c, level, x, y, size) {
    for (const more of [1, 2]) {
      const parts = 2 ** more, tile = this.tiles.get(`${level + more},${Math.floor(x / parts)},${Math.floor(y / parts)}`);
      if (!tile) continue;
      const side = SIDE / parts, left = (x - parts * Math.floor(x / parts)) * side, top = (y - parts * Math.floor(y / parts)) * side;
      c.drawImage(tile, left, top, side, side, x * size, y * size, size, size);
      return;
    }
  }
}

/** @param {string} key @returns {Box} */
function placeOf(key) {
  const [level, x, y] = key.split(",").map(Number), size = SIDE * 2 ** level;
  return { l: x * size, t: y * size, r: (x + 1) * size, b: (y + 1) * size };
}

/** @param {Box} place @param {number} scale @param {number} ratio @param {(box: Box) => Map<string, Nucleus[]>} coloured @param {Style} style @param {boolean} dashed */
function made(place, scale, ratio, coloured, style, dashed) {
  const tile = new OffscreenCanvas(SIDE, SIDE), c = /** @type {OffscreenCanvasRenderingContext2D} */ (tile.getContext("2d"));
  const unit = (LINE * ratio) / scale, margin = 4 * unit;
  c.setTransform(scale, 0, 0, scale, -place.l * scale, -place.t * scale);
  if (dashed) c.setLineDash([5 * unit, 4 * unit]);
  for (const [colour, nuclei] of coloured({ l: place.l - margin, t: place.t - margin, r: place.r + margin, b: place.b + margin })) stroke(c, nuclei, colour, 1.6, unit, style);
  return tile;
}

/** Outline nuclei. @param {Context} c @param {Nucleus[]} nuclei @param {string} colour @param {number} width in pixels of the page
 * @param {number} unit such a pixel in those of the image @param {Style} style @param {boolean} [chosen] */
export function stroke(c, nuclei, colour, width, unit, style, chosen = false) {
  if (!nuclei.length) return;
  const path = new Path2D();
  for (const nucleus of nuclei) path.addPath(pathOf(nucleus));
  if (style.filled || chosen) {
    c.globalAlpha = chosen ? 0.25 : 0.45;
    c.fillStyle = colour;
    c.fill(path, "evenodd");
    c.globalAlpha = 1;
  }
  if (!style.outlines && !chosen) return;
  c.lineJoin = "round";
  c.lineWidth = (width + 1.8) * unit;
  c.strokeStyle = "rgba(0, 0, 0, .55)";
  c.stroke(path);
  c.lineWidth = width * unit;
  c.strokeStyle = colour;
  c.stroke(path);
}
