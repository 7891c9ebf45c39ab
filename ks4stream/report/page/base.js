// What all sections use: the content, elements, numbers in words, packed arrays.

const content = JSON.parse(document.getElementById("content").textContent);
const recording = content.recording;
const verdict = content.verdict;
const metrics = content.metrics ?? [];
const run = content.run ?? {};

/** An element: attributes (functions are listeners), then children: elements and text, never HTML. */
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(2).filter((child) => child != null && child !== false));
  return element;
}

const formats = new Map();

/** A number with so many digits after the point, or a dash where it is not defined. */
function number(value, digits = 0) {
  if (value == null || Number.isNaN(value)) return "–";
  if (!formats.has(digits)) {
    formats.set(digits, new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
  }
  const text = formats.get(digits).format(value);
  return /^-[0.]*$/.test(text) ? text.slice(1) : text.replace("-", "−");
}

/** A number to three digits, without the zeros at its end. */
const figures = (value) =>
  value == null
    ? "–"
    : Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 }).replace("-", "−");

/** 8.3 million, 12,300, 34. */
const short = (value) => (value >= 1e6 ? `${figures(value / 1e6)} million` : number(value));

const percent = (share) =>
  share > 0 && share < 0.001 ? "under 0.1 %" : `${number(100 * share, share >= 0.1 || share === 0 ? 0 : 1)} %`;

const count = (n, one, many = `${one}s`) => `${number(n)} ${n === 1 ? one : many}`;

function duration(seconds) {
  if (seconds < 90) return `${figures(seconds)} s`;
  if (seconds < 5400) return `${figures(seconds / 60)} min`;
  return `${Math.floor(Math.round(seconds / 60) / 60)} h ${String(Math.round(seconds / 60) % 60).padStart(2, "0")} min`;
}

/** All times of the page are drawn in one unit. */
const clock =
  recording.duration_s < 180
    ? { s: 1, name: "s" }
    : recording.duration_s < 10800
      ? { s: 60, name: "min" }
      : { s: 3600, name: "h" };
const span = [recording.start_s / clock.s, (recording.start_s + Math.max(recording.duration_s, 1e-3)) / clock.s];
const at = (seconds) => `${figures(seconds / clock.s)} ${clock.name}`;

function quantile(values, share) {
  if (!values.length) return null;
  const sorted = Float64Array.from(values).sort();
  const place = (sorted.length - 1) * share;
  const below = Math.floor(place);
  return sorted[below] + (sorted[Math.min(below + 1, sorted.length - 1)] - sorted[below]) * (place - below);
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

const ARRAYS = {
  int8: Int8Array,
  uint8: Uint8Array,
  int16: Int16Array,
  uint16: Uint16Array,
  int32: Int32Array,
  uint32: Uint32Array,
  float32: Float32Array,
  float64: Float64Array,
};
const unpacked = new WeakMap();

/** The array of {dtype, shape, base64}, whose bytes are deflated; null for null. Each is unpacked once. */
function unpack(packed) {
  if (packed == null) return Promise.resolve(null);
  if (!unpacked.has(packed)) unpacked.set(packed, inflate(packed));
  return unpacked.get(packed);
}

async function inflate({ dtype, shape, base64 }) {
  const text = atob(base64);
  const deflated = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) deflated[i] = text.charCodeAt(i);
  const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
  return { shape, data: new ARRAYS[dtype](await new Response(stream).arrayBuffer()) };
}

/** What an array holds at the first indices: a view on the rest of its axes. */
function part(array, ...indices) {
  let start = 0;
  let size = array.data.length;
  indices.forEach((index, axis) => {
    size = array.shape[axis] ? size / array.shape[axis] : 0;
    start += index * size;
  });
  return array.data.subarray(start, start + size);
}

/** Rows of the unit table: one object per unit, with its column values. */
const units = (content.units?.id ?? []).map((id, row) => {
  const unit = { row };
  for (const [name, column] of Object.entries(content.units)) unit[name] = column[row];
  return unit;
});
const rowOf = new Map(units.map((unit) => [unit.id, unit.row]));
const hasShanks = new Set([...(content.probe?.shank ?? []), ...units.map((unit) => unit.shank)]).size > 1;
const LABELS = { good: "good", mua: "multi-unit" };

/** Whether a unit is beyond a metric's threshold; some metrics are, too, where they are not defined. */
function fails(metric, value) {
  if (metric.threshold == null || !metric.better) return false;
  if (!isNumber(value)) return Boolean(metric.undefined);
  return metric.better === "low" ? value > metric.threshold : value < metric.threshold;
}

const limit = (metric) =>
  metric.threshold == null || !metric.better
    ? ""
    : `${metric.better === "low" ? "at most" : "at least"} ${figures(metric.threshold)}${metric.unit ? ` ${metric.unit}` : ""}`;

const withUnit = (text, unit) => (unit ? `${text} ${unit}` : text);

/** The symbol of a label: a disc or a diamond, so that colour is not needed. */
function symbol(label) {
  return h("span", { class: `symbol ${label}`, "aria-hidden": "true" });
}
