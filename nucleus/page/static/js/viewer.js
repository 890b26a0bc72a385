// The canvas: tiles of the image, outlines of the nuclei over them, zoom and pan. What a press means is a tool's.

import { Overlay, stroke } from "./overlay.js";
import { server } from "./server.js";

/**
 * @typedef {import("./raster.js").Point} Point
 * @typedef {import("./raster.js").Box} Box
 * @typedef {import("./raster.js").Ring} Ring
 * @typedef {import("./nuclei.js").Nuclei} Nuclei
 * @typedef {import("./nuclei.js").Nucleus} Nucleus
 * @typedef {{cursor: string, press?: (p: Point, e: MouseEvent | KeyboardEvent) => void, move?: (p: Point) => void,
 *   release?: (p: Point) => void, cancel?: () => void, wheel?: (steps: number) => void,
 *   draw?: (canvas: CanvasRenderingContext2D, zoom: number) => void}} Tool
 * @typedef {{pixels: ImageBitmap | null, loading: AbortController | null}} TileState
 * @typedef {{under: Nuclei | null, over: Nuclei, show: "before" | "both" | "after", gone: Set<number>, fresh: Set<number>}} Compared nuclei
 *   of somebody else or of another version over those of `under`, or else of the image; `gone` are labels that only the
 *   lower ones have, `fresh` labels that only the upper ones have
 */

const TILE = 256;
const LARGEST_ZOOM = 40;
const KEPT_TILES = 600;
const DOTS_BELOW = 3;
/** With more nuclei in view than this, each is a dot: their outlines could not be told apart. */
const MOST_OUTLINES = 6000;
/** With more, outlines are drawn by tiles. */
const MOST_LIVE = 150;
const FOUND = "#ffd21f", OTHERS = "#ff5cf0", CHANGED = "#2fe6ff", SELECTED = "#ffffff";

export class Viewer extends EventTarget {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    super();
    this.canvas = canvas;
    this.context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    this.zoom = 1;
    this.fitted = 1;
    /** @type {Point} the image's point at the canvas's upper left corner */
    this.origin = { x: 0, y: 0 };
    /** @type {Point | null} the crosshair of the keyboard */
    this.cursor = null;
    this.penDown = false;
    /** @type {import("./server.js").ImageInfo | null} */
    this.image = null;
    /** @type {Nuclei | null} */
    this.nuclei = null;
    /** @type {Compared | null} */
    this.compared = null;
    /** @type {Tool} */
    this.tool = { cursor: "default" };
    this.views = "";
    this.before = "";
    this.style = { outlines: true, filled: false };
    /** @type {((label: number) => string) | null} */
    this.colourOf = null;
    /** @type {Map<string, TileState>} */
    this.tiles = new Map();
    /** @type {Set<string>} tiles that are being loaded and were asked for by the last frame */
    this.asked = new Set();
    this.layer = new OffscreenCanvas(1, 1);
    /** @type {ImageData | null} pixels of the dots */
    this.picture = null;
    this.own = new Overlay();
    this.others = new Overlay();
    /** @type {Map<Nuclei, {colourOf: any, places: Float32Array, colours: Uint32Array}>} */
    this.dots = new Map();
    this.diameter = 20;
    this.waiting = false;
    /** @type {Map<number, Point>} */
    this.pointers = new Map();
    this.panning = false;
    new ResizeObserver(() => this.resized()).observe(canvas);
    this.listen();
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => this.pressed(event));
    canvas.addEventListener("pointermove", (event) => this.moved(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.released(/** @type {PointerEvent} */ (event)));
    canvas.addEventListener("wheel", (event) => this.wheeled(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("blur", () => { this.cursor = null; this.paint(); });
  }

  /** @param {import("./server.js").ImageInfo} image @param {Nuclei} nuclei */
  open(image, nuclei) {
    const same = this.image?.id === image.id && this.image.version === image.version;
    this.image = image;
    this.cursor = null;
    this.show(nuclei);
    if (same) return;
    this.tiles.clear();
    this.before = "";
    this.resized();
    this.fit();
  }

  /** No image is shown, and none takes a press or a key. */
  close() {
    this.image = this.nuclei = this.compared = this.cursor = null;
    this.dots.clear();
    this.penDown = this.panning = false;
    this.pointers.clear();
    for (const { loading } of this.tiles.values()) loading?.abort();
    this.tiles.clear();
    this.own.clear();
    this.others.clear();
    this.context.setTransform(1, 0, 0, 1, 0, 0);
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /** Show other nuclei over those of the image, or none. @param {Compared | null} compared */
  compare(compared) {
    this.compared = compared;
    this.paint();
  }

  /** @param {Nuclei} nuclei */
  show(nuclei) {
    this.nuclei = nuclei;
    nuclei.addEventListener("select", () => this.paint());
    nuclei.addEventListener("change", () => {
      if (this.nuclei !== nuclei) return;
      this.dots.delete(nuclei);
      this.diameter = nuclei.diameter ?? 20;
      this.paint();
    });
    this.dots.clear();
    this.diameter = nuclei.diameter ?? 20;
    this.paint();
  }

  /** @param {string} views how the channels are shown, as the server reads it */
  setViews(views) {
    if (views === this.views) return;
    this.before = this.views;
    this.views = views;
    this.paint();
  }

  resized() {
    const { clientWidth, clientHeight } = this.canvas, ratio = window.devicePixelRatio || 1;
    if (!clientWidth || !clientHeight) return;
    const fitted = this.zoom === this.fitted;
    this.canvas.width = Math.round(clientWidth * ratio);
    this.canvas.height = Math.round(clientHeight * ratio);
    if (fitted) this.fit();
    this.paint();
  }

  fit() {
    if (!this.image || !this.canvas.clientWidth) return;
    const { width, height } = this.image, { clientWidth, clientHeight } = this.canvas;
    this.zoom = this.fitted = Math.min(LARGEST_ZOOM, 0.96 * Math.min(clientWidth / width, clientHeight / height));
    this.origin = { x: width / 2 - clientWidth / this.zoom / 2, y: height / 2 - clientHeight / this.zoom / 2 };
    this.paint();
  }

  /** @param {number} factor @param {Point} [at] in pixels of the canvas */
  zoomBy(factor, at = { x: this.canvas.clientWidth / 2, y: this.canvas.clientHeight / 2 }) {
    const zoom = Math.min(LARGEST_ZOOM, Math.max(Math.min(1, this.fitted) / 2, this.zoom * factor));
    const here = this.toImage(at);
    this.zoom = zoom;
    this.origin = { x: here.x - at.x / zoom, y: here.y - at.y / zoom };
    this.keepInside();
    this.paint();
  }

  /** @param {number} x @param {number} y in pixels of the canvas */
  panBy(x, y) {
    this.origin = { x: this.origin.x - x / this.zoom, y: this.origin.y - y / this.zoom };
    this.keepInside();
    this.paint();
  }

  keepInside() {
    if (!this.image) return;
    const { clientWidth, clientHeight } = this.canvas, margin = 60 / this.zoom;
    this.origin.x = Math.min(this.image.width - margin, Math.max(margin - clientWidth / this.zoom, this.origin.x));
    this.origin.y = Math.min(this.image.height - margin, Math.max(margin - clientHeight / this.zoom, this.origin.y));
  }

  /** Bring a box into view, larger if it is small. @param {Box} box */
  reveal(box) {
    const { clientWidth, clientHeight } = this.canvas, seen = this.seen();
    const inside = box.l >= seen.l && box.r <= seen.r && box.t >= seen.t && box.b <= seen.b;
    if (inside && (box.r - box.l) * this.zoom > 14) return;
    this.zoom = Math.max(this.zoom, Math.min(8, 60 / Math.max(4, box.r - box.l)));
    this.origin = { x: (box.l + box.r) / 2 - clientWidth / this.zoom / 2, y: (box.t + box.b) / 2 - clientHeight / this.zoom / 2 };
    this.paint();
  }

  /** @param {Point} at @returns {Point} */
  toImage(at) {
    return { x: this.origin.x + at.x / this.zoom, y: this.origin.y + at.y / this.zoom };
  }

  /** What of the image is seen. @returns {Box} */
  seen() {
    const end = this.toImage({ x: this.canvas.clientWidth, y: this.canvas.clientHeight });
    return { l: this.origin.x, t: this.origin.y, r: end.x, b: end.y };
  }

  // Pointer and keyboard

  /** @param {MouseEvent} event @returns {Point} */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  /** @param {PointerEvent} event */
  pressed(event) {
    if (!this.image) return; // it is being opened
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.place(event));
    this.cursor = null;
    if (this.pointers.size > 1) { // a pinch: what the first finger began is no stroke
      this.tool.cancel?.();
      this.panning = true;
      return;
    }
    this.panning = event.button !== 0 || !this.tool.press;
    if (!this.panning) this.tool.press?.(this.toImage(this.place(event)), event);
    this.paint();
  }

  /** @param {PointerEvent} event */
  moved(event) {
    if (!this.image) return; // it is being opened
    const before = this.pointers.get(event.pointerId), now = this.place(event);
    if (before && this.panning) this.dragged(event.pointerId, before, now);
    if (before) this.pointers.set(event.pointerId, now);
    if (!this.panning) this.tool.move?.(this.toImage(now));
    this.paint();
  }

  /** @param {number} id @param {Point} before @param {Point} now */
  dragged(id, before, now) {
    const other = [...this.pointers].find(([each]) => each !== id)?.[1];
    if (other) {
      const distance = (/** @type {Point} */ p) => Math.hypot(p.x - other.x, p.y - other.y);
      this.zoomBy(distance(now) / Math.max(1, distance(before)), { x: (now.x + other.x) / 2, y: (now.y + other.y) / 2 });
      this.panBy((now.x - before.x) / 2, (now.y - before.y) / 2);
    } else this.panBy(now.x - before.x, now.y - before.y);
  }

  /** @param {PointerEvent} event */
  released(event) {
    this.pointers.delete(event.pointerId);
    if (!this.panning && this.image) this.tool.release?.(this.toImage(this.place(event)));
    if (!this.pointers.size) this.panning = false;
    this.paint();
  }

  /** @param {WheelEvent} event */
  wheeled(event) {
    if (!this.image) return; // it is being opened
    event.preventDefault();
    const steps = -event.deltaY / (event.deltaMode ? 3 : 100);
    if (this.tool.wheel && !event.ctrlKey) this.tool.wheel(steps);
    else this.zoomBy(2 ** (steps * (event.ctrlKey ? 1.2 : 0.45)), this.place(event));
    this.paint();
  }

  /** Keys of the canvas that move the view or the crosshair. @param {KeyboardEvent} event */
  key(event) {
    if (!this.image) return; // it is being opened
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const arrow = arrows[/** @type {keyof typeof arrows} */ (event.key)];
    if (event.metaKey || (event.ctrlKey && !arrow)) return;
    if (arrow) this.moveCursor(arrow[0], arrow[1], event);
    else if (event.key === "+" || event.key === "=") this.zoomBy(1.4, this.cursorPlace());
    else if (event.key === "-") this.zoomBy(1 / 1.4, this.cursorPlace());
    else if (event.key === "0") this.fit();
    else if (event.key === " ") this.pen(event);
    else if (event.key === "[" || event.key === "]") this.tool.wheel?.(event.key === "]" ? 1 : -1);
    else return;
    event.preventDefault();
    this.paint();
  }

  /** @param {number} x @param {number} y @param {KeyboardEvent} event */
  moveCursor(x, y, event) {
    const { clientWidth, clientHeight } = this.canvas;
    if (event.ctrlKey) { this.panBy(-60 * x, -60 * y); return; }
    if (!this.cursor) { this.cursor = this.toImage({ x: clientWidth / 2, y: clientHeight / 2 }); return; }
    const step = event.altKey ? 1 : Math.max(1, (event.shiftKey ? 48 : 8) / this.zoom);
    const image = /** @type {import("./server.js").ImageInfo} */ (this.image);
    this.cursor = { x: Math.min(image.width - 0.5, Math.max(0.5, this.cursor.x + x * step)), y: Math.min(image.height - 0.5, Math.max(0.5, this.cursor.y + y * step)) };
    const seen = this.seen(), margin = 30 / this.zoom;
    this.panBy(this.zoom * (Math.max(0, seen.l + margin - this.cursor.x) - Math.max(0, this.cursor.x - seen.r + margin)),
      this.zoom * (Math.max(0, seen.t + margin - this.cursor.y) - Math.max(0, this.cursor.y - seen.b + margin)));
    this.tool.move?.(this.cursor);
  }

  /** @returns {Point | undefined} */
  cursorPlace() {
    return this.cursor ? { x: (this.cursor.x - this.origin.x) * this.zoom, y: (this.cursor.y - this.origin.y) * this.zoom } : undefined;
  }

  /** The space bar presses at the crosshair, and releases. @param {KeyboardEvent} event */
  pen(event) {
    if (!this.cursor) { this.moveCursor(0, 0, event); return; }
    if (this.penDown) this.tool.release?.(this.cursor); else this.tool.press?.(this.cursor, event);
    this.penDown = !this.penDown && Boolean(this.tool.release);
  }

  // Painting

  paint() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.canvas.style.cursor = this.panning ? "grabbing" : this.tool.cursor;
      if (this.image && this.canvas.clientWidth) this.paintNow();
    });
  }

  paintNow() {
    const { context: c, canvas } = this, ratio = canvas.width / canvas.clientWidth;
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, canvas.width, canvas.height);
    c.setTransform(ratio * this.zoom, 0, 0, ratio * this.zoom, -this.origin.x * this.zoom * ratio, -this.origin.y * this.zoom * ratio);
    this.paintTiles(c);
    this.paintNuclei(c);
    this.tool.draw?.(c, this.zoom);
    if (this.cursor) this.paintCursor(c, this.cursor);
    this.dispatchEvent(new Event("painted"));
  }

  /** @param {CanvasRenderingContext2D} c */
  paintTiles(c) {
    const image = /** @type {import("./server.js").ImageInfo} */ (this.image);
    c.imageSmoothingEnabled = this.zoom < 3;
    c.fillStyle = "#000";
    c.fillRect(0, 0, image.width, image.height);
    const fine = Math.min(image.levels - 1, Math.max(0, Math.floor(Math.log2(1 / (this.zoom * (window.devicePixelRatio || 1))) + 0.35)));
    const coarse = image.levels - 1;
    this.asked.clear();
    if (this.before) for (const level of new Set([coarse, fine])) this.paintLevel(c, level, this.before, false);
    for (const level of new Set([coarse, Math.min(coarse, fine + 2), fine])) this.paintLevel(c, level, this.views, level === fine || level === coarse);
    this.forget();
    for (const [key, tile] of this.tiles) if (tile.loading && !this.asked.has(key)) { tile.loading.abort(); this.tiles.delete(key); }
  }

  /** @param {CanvasRenderingContext2D} c @param {number} level @param {string} views @param {boolean} load */
  paintLevel(c, level, views, load) {
    const image = /** @type {import("./server.js").ImageInfo} */ (this.image), seen = this.seen(), size = TILE * 2 ** level;
    const last = { x: Math.ceil(image.width / size) - 1, y: Math.ceil(image.height / size) - 1 };
    for (let y = Math.max(0, Math.floor(seen.t / size)); y <= Math.min(last.y, Math.floor(seen.b / size)); y++) {
      for (let x = Math.max(0, Math.floor(seen.l / size)); x <= Math.min(last.x, Math.floor(seen.r / size)); x++) {
        const tile = this.tile(level, x, y, views, load);
        if (!tile?.pixels) continue;
        const scale = 2 ** level, { pixels } = tile;
        c.drawImage(pixels, x * size, y * size, pixels.width * scale, pixels.height * scale);
      }
    }
  }

  /** @param {number} level @param {number} x @param {number} y @param {string} views @param {boolean} load */
  tile(level, x, y, views, load) {
    const image = /** @type {import("./server.js").ImageInfo} */ (this.image), key = server.tile(image, level, x, y, views);
    let tile = this.tiles.get(key);
    if (!tile && load) {
      tile = { pixels: null, loading: new AbortController() };
      void this.load(key, tile);
    }
    if (tile?.loading && load) this.asked.add(key);
    if (tile) { this.tiles.delete(key); this.tiles.set(key, tile); }
    return tile;
  }

  /** @param {string} key @param {TileState} tile */
  async load(key, tile) {
    try {
      tile.pixels = await createImageBitmap(await server.picture(key, tile.loading?.signal));
      tile.loading = null;
      this.paint();
    } catch {
      if (this.tiles.get(key) === tile) this.tiles.delete(key); // asked for again when it is next seen
    }
  }

  forget() {
    for (const key of this.tiles.keys()) {
      if (this.tiles.size <= KEPT_TILES) return;
      this.tiles.delete(key);
    }
  }

  /** @param {CanvasRenderingContext2D} c */
  paintNuclei(c) {
    const { compared } = this, nuclei = compared?.under ?? this.nuclei;
    if (!nuclei || !(this.style.outlines || this.style.filled)) return;
    const seen = this.seen(), small = this.diameter * this.zoom < DOTS_BELOW;
    if (compared?.show !== "after") {
      if (small || nuclei.countNear(seen) > MOST_OUTLINES) this.paintDots(c, nuclei);
      else this.paintOwn(c, nuclei, seen);
    }
    if (!compared || compared.show === "before") return;
    if (small || compared.over.countNear(seen) > MOST_OUTLINES) this.paintDots(c, compared.over);
    else this.paintOthers(c, compared, seen);
  }

  /** @param {CanvasRenderingContext2D} c @param {Nuclei} nuclei @param {Box} seen */
  paintOwn(c, nuclei, seen) {
    const { touched } = nuclei, unit = 1 / this.zoom, colourOf = nuclei === this.nuclei ? this.colourOf : null;
    const coloured = (/** @type {Box} */ box) => {
      /** @type {Map<string, Nucleus[]>} */
      const found = new Map();
      for (const nucleus of nuclei.near(box)) {
        if (nuclei.hidden.has(nucleus.label)) continue;
        const colour = colourOf ? colourOf(nucleus.label) : touched.has(nucleus.label) ? CHANGED : FOUND, there = found.get(colour);
        if (there) there.push(nucleus); else found.set(colour, [nucleus]);
      }
      return found;
    };
    if (nuclei.countNear(seen) > MOST_LIVE) this.paintTiled(c, this.own, nuclei, seen, coloured, false);
    else for (const [colour, shown] of coloured(seen)) stroke(c, shown, colour, 1.6, unit, this.style);
    if (this.compared) stroke(c, some(nuclei, this.compared.gone, seen), FOUND, 3, unit, this.style, true);
    stroke(c, some(nuclei, nuclei.selected, seen), SELECTED, 3, unit, this.style, true);
  }

  /** @param {CanvasRenderingContext2D} c @param {Compared} compared @param {Box} seen */
  paintOthers(c, { over, fresh }, seen) {
    const unit = 1 / this.zoom;
    if (over.countNear(seen) > MOST_LIVE) this.paintTiled(c, this.others, over, seen, (box) => new Map([[OTHERS, over.near(box)]]), true);
    else {
      c.setLineDash([5 * unit, 4 * unit]);
      stroke(c, over.near(seen), OTHERS, 1.6, unit, this.style);
      c.setLineDash([]);
    }
    stroke(c, some(over, fresh, seen), OTHERS, 3, unit, this.style, true);
  }

  /** @param {CanvasRenderingContext2D} c @param {Overlay} overlay @param {Nuclei} nuclei @param {Box} seen @param {(box: Box) => Map<string, Nucleus[]>} coloured @param {boolean} dashed */
  paintTiled(c, overlay, nuclei, seen, coloured, dashed) {
    const ratio = this.canvas.width / this.canvas.clientWidth, gates = nuclei.gates.map(({ column, low, high }) => `${column} ${low} ${high}`).join();
    overlay.forget(nuclei.changedPlaces.splice(0));
    const kind = `${numberOf(nuclei)} ${this.colourOf ? numberOf(this.colourOf) : ""} ${this.style.outlines} ${this.style.filled} ${ratio} ${gates}`;
    if (!overlay.draw(c, seen, this.zoom * ratio, ratio, kind, coloured, this.style, dashed)) this.paint();
  }

  /** One pixel for each nucleus, and four if it is selected. @param {CanvasRenderingContext2D} c @param {Nuclei} nuclei */
  paintDots(c, nuclei) {
    const { width, height } = this.canvas, ratio = width / this.canvas.clientWidth, scale = this.zoom * ratio;
    if (this.picture?.width !== width || this.picture.height !== height) this.picture = new ImageData(width, height);
    const { picture } = this, pixels = new Uint32Array(picture.data.buffer), dots = this.dotsOf(nuclei);
    pixels.fill(0);
    for (let i = 0; i < dots.colours.length; i++) {
      const x = Math.round((dots.places[2 * i] - this.origin.x) * scale), y = Math.round((dots.places[2 * i + 1] - this.origin.y) * scale);
      if (x >= 0 && y >= 0 && x < width && y < height) pixels[y * width + x] = dots.colours[i];
    }
    if (this.layer.width !== width || this.layer.height !== height) Object.assign(this.layer, { width, height });
    /** @type {OffscreenCanvasRenderingContext2D} */ (this.layer.getContext("2d")).putImageData(picture, 0, 0);
    c.save();
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.drawImage(this.layer, 0, 0);
    c.restore();
    for (const label of nuclei.selected) {
      const { box } = /** @type {Nucleus} */ (nuclei.all.get(label)), side = 5 / this.zoom;
      c.fillStyle = SELECTED;
      c.fillRect((box.l + box.r - side) / 2, (box.t + box.b - side) / 2, side, side);
    }
  }

  /** Places and colours of the nuclei that are not hidden, until they change. @param {Nuclei} nuclei */
  dotsOf(nuclei) {
    const known = this.dots.get(nuclei);
    if (known && known.colourOf === this.colourOf) return known;
    const usual = nuclei === this.compared?.over ? OTHERS : FOUND, colourOf = nuclei === this.nuclei ? this.colourOf : null;
    const { shown } = nuclei, places = new Float32Array(2 * shown.length), colours = new Uint32Array(shown.length);
    shown.forEach(({ label, box }, i) => {
      places.set([(box.l + box.r) / 2, (box.t + box.b) / 2], 2 * i);
      const colour = parseInt((colourOf ? colourOf(label) : usual).slice(1), 16);
      colours[i] = 0xff000000 | ((colour & 0xff) << 16) | (colour & 0xff00) | (colour >> 16);
    });
    const found = { colourOf: this.colourOf, places, colours };
    this.dots.set(nuclei, found);
    return found;
  }

  /** @param {CanvasRenderingContext2D} c @param {Point} at */
  paintCursor(c, at) {
    const size = 12 / this.zoom;
    for (const [width, colour] of /** @type {[number, string][]} */ ([[4, "#000"], [1.6, "#fff"]])) {
      c.lineWidth = width / this.zoom;
      c.strokeStyle = colour;
      c.beginPath();
      c.moveTo(at.x - size, at.y); c.lineTo(at.x + size, at.y);
      c.moveTo(at.x, at.y - size); c.lineTo(at.x, at.y + size);
      c.stroke();
    }
  }
}

/** Those of some nuclei that are in a box. @param {Nuclei} nuclei @param {Set<number>} labels @param {Box} seen */
function some(nuclei, labels, seen) {
  const found = [];
  for (const label of labels) {
    const nucleus = nuclei.all.get(label);
    if (nucleus && nucleus.box.l < seen.r && nucleus.box.r > seen.l && nucleus.box.t < seen.b && nucleus.box.b > seen.t) found.push(nucleus);
  }
  return found;
}

/** @type {WeakMap<object, number>} */
const numbers = new WeakMap();
let given = 0;

/** A number that no other object has. @param {object} object */
function numberOf(object) {
  let found = numbers.get(object);
  if (found === undefined) numbers.set(object, (found = ++given));
  return found;
}
