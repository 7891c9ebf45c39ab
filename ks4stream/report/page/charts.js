// Charts: drawn when they come into view, drawn again when their width changes; rasters on a canvas under the axes.

const AXES = { fontSize: 11, fontFamily: "inherit", background: "none", color: "inherit", overflow: "visible" };
const drawings = new Map(); // element of a chart → what draws it

const seen = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
  { rootMargin: "400px" },
);

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const drawing = drawings.get(target);
    if (drawing?.width && Math.abs(target.clientWidth - drawing.width) > 1 && target.clientWidth) draw(target, true);
  }
});

async function draw(element, again = false) {
  const drawing = drawings.get(element);
  if (!drawing || (drawing.width && !again) || !element.clientWidth) return;
  drawing.width = element.clientWidth;
  seen.unobserve(element);
  const say = (label) => element.setAttribute("aria-label", label);
  try {
    element.replaceChildren(...[await drawing.draw(drawing.width, say)].flat().filter(Boolean));
  } catch (error) {
    // the others are drawn all the same
    console.error(error);
    element.replaceChildren(missing("This chart could not be drawn; the browser’s console says why."));
  }
}

/** Charts that were never in view, one at a time when nothing else is to be done, so that printing shows them. */
function drawRest() {
  const next = [...drawings].find(([element, drawing]) => !drawing.width && element.clientWidth)?.[0];
  if (next) draw(next).then(() => whenIdle(drawRest));
}

const whenIdle = (task) =>
  "requestIdleCallback" in window ? requestIdleCallback(task, { timeout: 500 }) : setTimeout(task, 30);

/**
 * A chart: `label` says what it shows, with figures; `drawn(width, say)` returns the elements, or promises them, and
 * says more where figures are known only then.
 */
function chart({ label, height, drawn, className = "" }) {
  const element = h("div", {
    class: `chart ${className}`,
    role: "img",
    "aria-label": label,
    style: `min-height:${height}px`,
  });
  drawings.set(element, { draw: drawn });
  seen.observe(element);
  resized.observe(element);
  return element;
}

/** A chart under its title, or a sentence where there is nothing to draw. */
function figure(title, content, note, below) {
  return h(
    "figure",
    {},
    h("figcaption", {}, h("strong", {}, title), note && h("span", { class: "note" }, note)),
    content,
    below && h("p", { class: "note" }, below),
  );
}

const missing = (sentence) => h("p", { class: "missing" }, sentence);

/** A chart of Plot in the page's type; marks may be lists, or false where there is nothing to draw. */
function plotted(options) {
  const plot = Plot.plot({ className: "plot", style: AXES, ...options, marks: options.marks.flat(3).filter(Boolean) });
  plot.setAttribute("aria-hidden", "true"); // the element around it says what it shows
  return plot;
}

/** Options that all charts over time share, so that their axes are the same. */
function overTime(width, height, options = {}) {
  return {
    width,
    height,
    marginLeft: 62,
    marginRight: 12,
    marginTop: 8,
    marginBottom: 34,
    ...options,
    x: {
      domain: span,
      label: `Time (${clock.name})`,
      labelAnchor: "center",
      labelArrow: "none",
      tickSize: 4,
      ticks: width < 500 ? 5 : 10,
      ...options.x,
    },
    y: { labelArrow: "none", tickSize: 4, labelAnchor: "center", ...options.y },
  };
}

/** The same without the name of the axis: for charts over another with the same axis. */
const upper = { marginBottom: 22, x: { label: null } };

/** Where files or sessions were joined. */
const borders = () =>
  Plot.ruleX(
    (content.borders_s ?? []).map((s) => s / clock.s),
    { stroke: "var(--border)", strokeDasharray: "3,3" },
  );

/** Spans without spikes, shaded. */
function blankedSpans() {
  const { edges_s: edges = [], blanked_share: share = [] } = content.time ?? {};
  const spans = share
    .map((value, i) => ({ x1: edges[i] / clock.s, x2: edges[i + 1] / clock.s, value }))
    .filter((one) => one.value > 0.001);
  return Plot.rect(spans, { x1: "x1", x2: "x2", fill: "var(--blank)" });
}

/** The middle of each span of time, in the page's unit. */
const middles = (edges) => edges.slice(1).map((edge, i) => (edge + edges[i]) / 2 / clock.s);

/** At most `most` rows, evenly spaced: an estimate per batch has more points than a chart has pixels. */
function thinned(length, most = 1500) {
  const step = Math.max(1, Math.ceil(length / most));
  return Array.from({ length: Math.ceil(length / step) }, (_, i) => i * step);
}

/** Place an element in shares of the one around it, so that it still fits when a printer scales that. */
function place(element, left, top, width, height, ofWidth, ofHeight) {
  Object.assign(element.style, {
    left: `${(100 * left) / ofWidth}%`,
    top: `${(100 * top) / ofHeight}%`,
    width: `${(100 * width) / ofWidth}%`,
    height: `${(100 * height) / ofHeight}%`,
  });
}

/** What the pointer is nearest to in time: a line, and its figures. */
const hover = (rows, y, title) => [
  Plot.ruleX(rows, Plot.pointerX({ x: "x", stroke: "var(--axis)" })),
  Plot.tip(rows, Plot.pointerX({ x: "x", y, title, fontSize: 11 })),
];

/** Decades, and their doubles and halves where there are few, for axes of logarithms. */
function logTicks(low, high) {
  const decades = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    decades.push(10 ** power);
  const inside = (ticks) => ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  const few = inside(decades);
  if (few.length > 3) return few.filter((_, i) => i % 2 === few.length % 2);
  return few.length > 1 ? few : inside(decades.flatMap((decade) => [decade, 2 * decade, 5 * decade]));
}

/**
 * A picture of grey levels (uint8, row 0 lowest) under the axes of a Plot chart, on the same scales.
 * The canvas is black with varying opacity; style sheets invert it on a dark page.
 */
function raster({ data, shape: [rows, columns] }, extent, plotOptions) {
  const plot = plotted(plotOptions);
  const [x, y] = [plot.scale("x"), plot.scale("y")];
  const canvas = h("canvas", { width: columns, height: rows });
  const frame = h("div", { class: "picture" }, canvas);
  const image = new ImageData(columns, rows);
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      image.data[4 * ((rows - 1 - row) * columns + column) + 3] = data[row * columns + column];
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  const [[x0, x1], [y0, y1]] = [x.range, y.range];
  const [left, right, bottom, top] = [
    x.apply(extent.x[0]),
    x.apply(extent.x[1]),
    y.apply(extent.y[0]),
    y.apply(extent.y[1]),
  ];
  place(frame, x0, y1, x1 - x0, y0 - y1, plotOptions.width, plotOptions.height);
  place(canvas, left - x0, top - y1, right - left, bottom - top, x1 - x0, y0 - y1);
  canvas.style.imageRendering = columns < right - left && rows < bottom - top ? "pixelated" : "auto";
  return h("div", { class: "raster" }, frame, plot);
}

/** Bars that touch, for correlograms: one per bin, from `first` on. */
function bars(counts, first, bin, width, height, options = {}) {
  const rows = Array.from(counts, (value, i) => ({ x1: first + i * bin, x2: first + (i + 1) * bin, value }));
  return plotted({
    width,
    height,
    marginLeft: 36,
    marginRight: 6,
    marginTop: 6,
    marginBottom: 32,
    ...options,
    x: { label: "Lag (ms)", labelAnchor: "center", labelArrow: "none", tickSize: 4, ticks: 5, ...options.x },
    y: { label: null, ticks: 2, tickSize: 4, tickFormat: "~s", ...options.y },
    marks: [
      Plot.rectY(rows, { x1: "x1", x2: "x2", y: "value", fill: "var(--data)", insetLeft: 0.25, insetRight: 0.25 }),
      Plot.ruleY([0], { stroke: "var(--axis)" }),
      Plot.ruleX([0], { stroke: "var(--accent)", strokeOpacity: 0.7, strokeDasharray: "2,2" }),
    ],
  });
}
