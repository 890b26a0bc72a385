// Nuclei as pixels: fill outlines, trace pixels, and what the tools do with them. No state, no DOM.
//
// Outlines are in half pixels, where their corners are integers: the first pixel reaches from 0 to 2, its centre is 1.
// A pixel is in a nucleus if its centre is inside an odd number of its rings, as on the server.

/**
 * @typedef {number[] | Int32Array} Ring x and y of each corner in turn, half pixels
 * @typedef {{x: number, y: number, w: number, h: number, data: Uint8Array}} Mask pixels in a box, 1 inside
 * @typedef {{l: number, t: number, r: number, b: number}} Box in pixels; r and b are outside
 * @typedef {{x: number, y: number}} Point in pixels
 */

/** @param {number} x @param {number} y @param {number} w @param {number} h @returns {Mask} */
export function emptyMask(x, y, w, h) {
  return { x, y, w, h, data: new Uint8Array(Math.max(0, w) * Math.max(0, h)) };
}

/** @param {ArrayLike<Ring>} rings @returns {Box} */
export function boxOf(rings) {
  let l = Infinity, t = Infinity, r = -Infinity, b = -Infinity;
  for (const ring of Array.from(rings)) {
    for (let i = 0; i < ring.length; i += 2) {
      l = Math.min(l, ring[i]); r = Math.max(r, ring[i]);
      t = Math.min(t, ring[i + 1]); b = Math.max(b, ring[i + 1]);
    }
  }
  return { l: Math.floor(l / 2), t: Math.floor(t / 2), r: Math.ceil(r / 2), b: Math.ceil(b / 2) };
}

/** The pixels of an outline. @param {Ring[]} rings @returns {Mask} */
export function fill(rings) {
  const { l, t, r, b } = boxOf(rings);
  const mask = emptyMask(l, t, r - l, b - t);
  for (let row = 0; row < mask.h; row++) {
    const crossings = crossingsAt(rings, 2 * (t + row) + 1);
    for (let i = 0; i + 1 < crossings.length; i += 2) {
      const first = Math.max(0, Math.ceil((crossings[i] - 1) / 2) - l);
      const last = Math.min(mask.w, Math.ceil((crossings[i + 1] - 1) / 2) - l);
      if (last > first) mask.data.fill(1, row * mask.w + first, row * mask.w + last);
    }
  }
  return mask;
}

/** @param {Ring[]} rings @param {number} y @returns {number[]} */
function crossingsAt(rings, y) {
  const found = [];
  for (const ring of rings) {
    const n = ring.length;
    for (let i = 0, j = n - 2; i < n; j = i, i += 2) {
      const y0 = ring[j + 1], y1 = ring[i + 1];
      if (y0 <= y !== y1 <= y) found.push(ring[j] + ((y - y0) / (y1 - y0)) * (ring[i] - ring[j]));
    }
  }
  return found.sort((a, b) => a - b);
}

/** Whether a point in pixels is inside. @param {Ring[]} rings @param {Point} point */
export function contains(rings, point) {
  return crossingsAt(rings, 2 * point.y + 1e-7).filter((x) => x <= 2 * point.x).length % 2 === 1;
}

/** The outline of pixels, along their edges. @param {Mask} mask @returns {number[][]} */
export function trace(mask) {
  const { w, h } = mask;
  /** @type {Map<number, number[]>} */
  const edges = new Map();
  const at = (/** @type {number} */ x, /** @type {number} */ y) => x >= 0 && y >= 0 && x < w && y < h && mask.data[y * w + x];
  const side = w + 1;
  const add = (/** @type {number} */ x0, /** @type {number} */ y0, /** @type {number} */ x1, /** @type {number} */ y1) => {
    const key = y0 * side + x0;
    edges.set(key, [...(edges.get(key) ?? []), y1 * side + x1]);
  };
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      if (!at(x, y)) continue;
      if (!at(x, y - 1)) add(x, y, x + 1, y);
      if (!at(x + 1, y)) add(x + 1, y, x + 1, y + 1);
      if (!at(x, y + 1)) add(x + 1, y + 1, x, y + 1);
      if (!at(x - 1, y)) add(x, y + 1, x, y);
    }
  }
  const rings = [];
  for (const start of edges.keys()) {
    while (edges.get(start)?.length) rings.push(ringFrom(start, edges, mask, side));
  }
  return rings;
}

/** @param {number} start @param {Map<number, number[]>} edges @param {Mask} mask @param {number} side */
function ringFrom(start, edges, mask, side) {
  const path = [];
  let here = start;
  do {
    path.push(here);
    here = /** @type {number} */ (edges.get(here)?.pop());
  } while (here !== start);
  const points = path.map((key) => [key % side, Math.floor(key / side)]);
  const n = points.length;
  return points.filter(([x, y], i) => {
    const [px, py] = points[(i + n - 1) % n], [nx, ny] = points[(i + 1) % n];
    return (x - px) * (ny - y) !== (y - py) * (nx - x);
  }).flatMap(([x, y]) => [2 * (mask.x + x), 2 * (mask.y + y)]);
}

/** @param {Mask} mask */
export function area(mask) {
  let sum = 0;
  for (const value of mask.data) sum += value;
  return sum;
}

/** A mask that covers a box as well. @param {Mask} mask @param {Box} box @returns {Mask} */
export function grown(mask, box) {
  const l = Math.min(mask.x, box.l), t = Math.min(mask.y, box.t);
  const r = Math.max(mask.x + mask.w, box.r), b = Math.max(mask.y + mask.h, box.b);
  const larger = emptyMask(l, t, r - l, b - t);
  for (let y = 0; y < mask.h; y++) {
    larger.data.set(mask.data.subarray(y * mask.w, (y + 1) * mask.w), (y + mask.y - t) * larger.w + mask.x - l);
  }
  return larger;
}

/** The pixels of both. @param {Mask} one @param {Mask} other @returns {Mask} */
export function union(one, other) {
  const both = grown(one, { l: other.x, t: other.y, r: other.x + other.w, b: other.y + other.h });
  eachPixel(other, (x, y) => { both.data[(y - both.y) * both.w + x - both.x] = 1; });
  return both;
}

/** Remove the pixels of another mask, in place. @param {Mask} mask @param {Mask} other @returns {Mask} */
export function subtract(mask, other) {
  eachPixel(other, (x, y) => {
    const column = x - mask.x, row = y - mask.y;
    if (column >= 0 && row >= 0 && column < mask.w && row < mask.h) mask.data[row * mask.w + column] = 0;
  });
  return mask;
}

/** @param {Mask} mask @param {(x: number, y: number) => void} visit */
export function eachPixel(mask, visit) {
  for (let i = 0; i < mask.data.length; i++) {
    if (mask.data[i]) visit(mask.x + (i % mask.w), mask.y + Math.floor(i / mask.w));
  }
}

/** The pixels that a round brush covers on its way. @param {Point[]} path @param {number} radius @param {Box} limits */
export function stroke(path, radius, limits) {
  const xs = path.map((p) => p.x), ys = path.map((p) => p.y);
  const l = Math.max(limits.l, Math.floor(Math.min(...xs) - radius)), t = Math.max(limits.t, Math.floor(Math.min(...ys) - radius));
  const r = Math.min(limits.r, Math.ceil(Math.max(...xs) + radius) + 1), b = Math.min(limits.b, Math.ceil(Math.max(...ys) + radius) + 1);
  const mask = emptyMask(l, t, Math.max(0, r - l), Math.max(0, b - t));
  path.forEach((point, i) => stamp(mask, path[Math.max(0, i - 1)], point, radius));
  return mask;
}

/** @param {Mask} mask @param {Point} from @param {Point} to @param {number} radius */
function stamp(mask, from, to, radius) {
  const dx = to.x - from.x, dy = to.y - from.y, length = dx * dx + dy * dy;
  const y0 = Math.max(mask.y, Math.floor(Math.min(from.y, to.y) - radius)), y1 = Math.min(mask.y + mask.h, Math.ceil(Math.max(from.y, to.y) + radius) + 1);
  const x0 = Math.max(mask.x, Math.floor(Math.min(from.x, to.x) - radius)), x1 = Math.min(mask.x + mask.w, Math.ceil(Math.max(from.x, to.x) + radius) + 1);
  for (let y = y0; y < y1; y++) {
    for (let x = x0; x < x1; x++) {
      const px = x + 0.5 - from.x, py = y + 0.5 - from.y;
      const along = length ? Math.max(0, Math.min(1, (px * dx + py * dy) / length)) : 0;
      if ((px - along * dx) ** 2 + (py - along * dy) ** 2 <= radius * radius) mask.data[(y - mask.y) * mask.w + x - mask.x] = 1;
    }
  }
}

/** The connected parts, the largest first. @param {Mask} mask @param {boolean} diagonal @returns {Mask[]} */
export function components(mask, diagonal = true) {
  const seen = new Uint8Array(mask.data.length);
  /** @type {number[][]} */
  const found = [];
  for (let start = 0; start < seen.length; start++) {
    if (mask.data[start] && !seen[start]) found.push(flood(mask, seen, start, diagonal));
  }
  return found.sort((a, b) => b.length - a.length).map((pixels) => {
    const part = emptyMask(mask.x, mask.y, mask.w, mask.h);
    for (const pixel of pixels) part.data[pixel] = 1;
    return part;
  });
}

/** @param {Mask} mask @param {Uint8Array} seen @param {number} start @param {boolean} diagonal */
function flood(mask, seen, start, diagonal) {
  const pixels = [start];
  seen[start] = 1;
  for (let next = 0; next < pixels.length; next++) {
    for (const near of neighbours(mask, pixels[next], diagonal)) {
      if (mask.data[near] && !seen[near]) { seen[near] = 1; pixels.push(near); }
    }
  }
  return pixels;
}

/** @param {Mask} mask @param {number} pixel @param {boolean} diagonal */
function neighbours(mask, pixel, diagonal) {
  const x = pixel % mask.w, y = Math.floor(pixel / mask.w), found = [];
  for (let dy = -1; dy <= 1; dy++) {
    for (let dx = -1; dx <= 1; dx++) {
      if ((!dx && !dy) || (!diagonal && dx && dy)) continue;
      if (x + dx >= 0 && y + dy >= 0 && x + dx < mask.w && y + dy < mask.h) found.push(pixel + dy * mask.w + dx);
    }
  }
  return found;
}

/** Fill what the pixels enclose, in place. @param {Mask} mask @returns {Mask} */
export function fillHoles(mask) {
  const around = grown(emptyMask(mask.x - 1, mask.y - 1, mask.w + 2, mask.h + 2), { l: mask.x, t: mask.y, r: mask.x, b: mask.y });
  around.data.fill(1);
  subtract(around, mask);
  const seen = new Uint8Array(around.data.length);
  flood(around, seen, 0, false);
  for (let i = 0; i < mask.data.length; i++) {
    const place = (Math.floor(i / mask.w) + 1) * around.w + (i % mask.w) + 1;
    if (!seen[place]) mask.data[i] = 1;
  }
  return mask;
}

/** Divide pixels along a line; null if they stay in one part. @param {Mask} mask @param {Point[]} path @returns {Mask[] | null} */
export function split(mask, path) {
  const cut = { ...mask, data: mask.data.slice() };
  subtract(cut, stroke(path, 0.75, { l: mask.x, t: mask.y, r: mask.x + mask.w, b: mask.y + mask.h }));
  const parts = components(cut, false).filter((part) => area(part) >= 6);
  if (parts.length < 2) return null;
  const owner = new Uint8Array(mask.data.length);
  /** @type {number[]} */
  let edge = [];
  parts.forEach((part, number) => part.data.forEach((inside, i) => { if (inside) { owner[i] = number + 1; edge.push(i); } }));
  while (edge.length) { // what the line covered goes to the nearest part
    const next = [];
    for (const pixel of edge) {
      for (const near of neighbours(mask, pixel, true)) {
        if (mask.data[near] && !owner[near]) { owner[near] = owner[pixel]; next.push(near); }
      }
    }
    edge = next;
  }
  return parts.map((part, number) => ({ ...part, data: owner.map((of) => (of === number + 1 ? 1 : 0)) }));
}

/** The pixels of several, with those between that are near two of them; null if they are too far apart.
 * @param {Mask[]} masks @returns {Mask | null} */
export function joined(masks) {
  const gap = 3;
  const all = masks.reduce(union);
  if (components(all).length === 1) return all;
  const near = masks.map((mask) => {
    const wide = emptyMask(all.x, all.y, all.w, all.h);
    eachPixel(mask, (x, y) => {
      for (let dy = -gap; dy <= gap; dy++) {
        for (let dx = -gap; dx <= gap; dx++) {
          const column = x + dx - all.x, row = y + dy - all.y;
          if (column >= 0 && row >= 0 && column < all.w && row < all.h) wide.data[row * all.w + column] = 1;
        }
      }
    });
    return wide;
  });
  for (let i = 0; i < all.data.length; i++) {
    if (near.filter((mask) => mask.data[i]).length > 1) all.data[i] = 1;
  }
  return components(all).length === 1 ? all : null;
}
