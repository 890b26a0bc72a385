// The measurements: histogram with a gate, colours by a measurement, and the table.

/**
 * @typedef {import("./nuclei.js").Nuclei} Nuclei
 */

const NAMES = /** @type {Record<string, string>} */ ({
  label: "nucleus", centroid_x: "x (px)", centroid_y: "y (px)", area: "area (px)", diameter: "diameter (px)", eccentricity: "eccentricity",
  solidity: "solidity", touches_edge: "at the edge", score: "score", area_um2: "area (µm²)", diameter_um: "diameter (µm)",
});
const SVG = "http://www.w3.org/2000/svg";
const FIRST = ["area", "area_um2", "score", "diameter", "diameter_um"];
const BINS = 32;
const ROW = 30;
/** From low to high, each of them bright enough to be seen on a dark image. */
const SCALE = ["#4f6bff", "#2f8cff", "#21aef0", "#1fcbc9", "#33dd93", "#7ceb4f", "#c3ee35", "#f4de2c", "#ffb01f", "#ff7d2a", "#ff5046"];

/** @param {string} column */
export function title(column) {
  return NAMES[column] ?? column.replace(/^mean_/, "mean, channel ").replace(/^integrated_/, "sum, channel ");
}

/** @param {number | null} value */
export function shownNumber(value) {
  if (value === null) return "";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(3).replace(/e\+?/, "e");
}

/** Lowest and highest value of a measurement. @param {Nuclei} nuclei @param {string} column @returns {[number, number]} */
export function extent(nuclei, column) {
  let low = Infinity, high = -Infinity;
  for (const label of nuclei.all.keys()) {
    const value = nuclei.value(label, column);
    if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
  }
  return low <= high ? [low, high] : [0, 1];
}

/** Colours from dark to bright along a measurement. @param {Nuclei} nuclei @param {string} column */
export function colours(nuclei, column) {
  const [low, high] = extent(nuclei, column);
  return (/** @type {number} */ label) => {
    const value = nuclei.value(label, column);
    return value === null ? "#9aa4ae" : colourAt((value - low) / (high - low || 1));
  };
}

/** @param {number} part from 0 to 1 */
function colourAt(part) {
  return SCALE[Math.min(SCALE.length - 1, Math.floor(part * SCALE.length))];
}

/** Bars of how many nuclei have which value; those outside the gate are pale.
 * @param {SVGSVGElement} svg @param {Nuclei} nuclei @param {string} column @param {[number, number]} gate
 * @param {boolean} coloured whether they are the scale of the colours of the nuclei */
export function drawHistogram(svg, nuclei, column, gate, coloured) {
  const [low, high] = extent(nuclei, column), counts = new Array(BINS).fill(0), width = (high - low) / BINS || 1;
  for (const label of nuclei.all.keys()) {
    const value = nuclei.value(label, column);
    if (value !== null) counts[Math.min(BINS - 1, Math.floor((value - low) / width))]++;
  }
  const most = Math.max(1, ...counts);
  svg.replaceChildren(...counts.map((count, i) => {
    const bar = document.createElementNS(SVG, "rect"), size = count ? Math.max(1.5, (60 * count) / most) : 0;
    const middle = low + (i + 0.5) * width;
    for (const [name, value] of Object.entries({ x: i * 10 + 0.7, y: 60 - size, width: 8.6, height: size, rx: 1 })) bar.setAttribute(name, String(value));
    const out = middle < gate[0] || middle > gate[1];
    bar.setAttribute("class", out ? "bar out" : "bar");
    if (coloured && !out) bar.style.fill = colourAt((i + 0.5) / BINS);
    return bar;
  }));
  svg.setAttribute("aria-label", `Histogram of ${title(column)}: from ${shownNumber(low)} to ${shownNumber(high)}, at most ${most} nuclei in one of ${BINS} bars`);
}

/** A table that draws only the rows that are seen. */
export class Table {
  /** @param {HTMLElement} scroller @param {HTMLTableElement} table @param {(label: number, more: boolean) => void} chosen */
  constructor(scroller, table, chosen) {
    this.scroller = scroller;
    this.table = table;
    this.chosen = chosen;
    this.head = /** @type {HTMLTableSectionElement} */ (table.tHead);
    this.body = table.tBodies[0];
    this.sorted = { column: "label", down: false };
    /** @type {number[]} */
    this.order = [];
    /** @type {Nuclei | null} */
    this.nuclei = null;
    /** @type {string[]} */
    this.columns = [];
    scroller.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(scroller);
    this.body.addEventListener("click", (event) => this.clicked(event));
  }

  /** @param {Nuclei} nuclei */
  show(nuclei) {
    const names = nuclei.measures.filter((name) => !name.startsWith("integrated")), last = ["centroid_x", "centroid_y", "touches_edge"];
    const columns = ["label", ...FIRST.filter((name) => names.includes(name)), ...names.filter((name) => !FIRST.includes(name) && !last.includes(name)), ...last.filter((name) => names.includes(name))];
    if (columns.join() !== this.columns.join()) this.makeHead(columns);
    this.nuclei = nuclei;
    this.sort();
  }

  /** Show no nuclei. */
  clear() {
    this.nuclei = null;
    this.order = [];
    this.body.replaceChildren();
  }

  /** @param {string[]} columns */
  makeHead(columns) {
    this.columns = columns;
    const row = document.createElement("tr");
    for (const column of columns) {
      const cell = document.createElement("th"), button = document.createElement("button");
      cell.scope = "col";
      button.type = "button";
      button.textContent = title(column);
      button.addEventListener("click", () => {
        this.sorted = { column, down: this.sorted.column === column && !this.sorted.down };
        this.sort();
      });
      cell.append(button);
      row.append(cell);
    }
    this.head.replaceChildren(row);
  }

  sort() {
    const { nuclei } = this, { column, down } = this.sorted;
    if (!nuclei) return;
    const values = new Map(nuclei.shown.map(({ label }) => [label, nuclei.value(label, column) ?? -Infinity]));
    this.order = [...values.keys()].sort((a, b) => (/** @type {number} */ (values.get(a)) - /** @type {number} */ (values.get(b))) * (down ? -1 : 1) || a - b);
    [...this.head.rows[0].cells].forEach((cell, i) => {
      if (this.columns[i] === column) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    this.table.setAttribute("aria-rowcount", String(this.order.length + 1));
    this.draw();
  }

  draw() {
    const { nuclei } = this;
    if (!nuclei) return;
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / ROW) - 8);
    const last = Math.min(this.order.length, first + Math.ceil(this.scroller.clientHeight / ROW) + 16);
    const rows = [this.space(first)];
    for (let i = first; i < last; i++) rows.push(this.row(this.order[i], i, nuclei));
    rows.push(this.space(this.order.length - last));
    const focused = this.body.contains(document.activeElement) ? Number(/** @type {HTMLElement} */ (document.activeElement).dataset.label) : null;
    this.body.replaceChildren(...rows.filter((row) => row !== null));
    if (focused !== null) /** @type {HTMLElement | null} */ (this.body.querySelector(`button[data-label="${focused}"]`))?.focus({ preventScroll: true });
  }

  /** @param {number} count */
  space(count) {
    if (!count) return null;
    const row = document.createElement("tr"), cell = row.insertCell();
    row.setAttribute("aria-hidden", "true");
    cell.colSpan = Math.max(1, this.columns.length);
    cell.className = "space";
    cell.style.height = `${count * ROW}px`;
    return row;
  }

  /** @param {number} label @param {number} place @param {Nuclei} nuclei */
  row(label, place, nuclei) {
    const row = document.createElement("tr"), chosen = nuclei.selected.has(label);
    row.setAttribute("aria-rowindex", String(place + 2));
    row.dataset.label = String(label);
    if (chosen) row.className = "chosen";
    for (const column of this.columns) {
      if (column === "label") {
        const cell = document.createElement("th"), button = document.createElement("button");
        cell.scope = "row";
        button.type = "button";
        button.textContent = String(label);
        button.dataset.label = String(label);
        button.setAttribute("aria-pressed", String(chosen));
        cell.append(button);
        row.append(cell);
      } else row.insertCell().textContent = column === "touches_edge" ? (nuclei.value(label, column) ? "yes" : "") : shownNumber(nuclei.value(label, column));
    }
    return row;
  }

  /** @param {MouseEvent} event */
  clicked(event) {
    const row = /** @type {HTMLElement} */ (event.target).closest("tr");
    if (row?.dataset.label) this.chosen(Number(row.dataset.label), event.shiftKey || event.ctrlKey);
  }

  /** Scroll to a nucleus. @param {number} label */
  reveal(label) {
    const place = this.order.indexOf(label);
    if (place < 0) return;
    const top = place * ROW, { scrollTop, clientHeight } = this.scroller, head = this.head.offsetHeight;
    if (top < scrollTop || top + ROW > scrollTop + clientHeight - head) this.scroller.scrollTop = Math.max(0, top - clientHeight / 2);
    this.draw();
  }
}
