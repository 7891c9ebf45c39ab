// One unit, opened from the table, a chart or a link: its template, correlograms, and how it was over time.

const panel = document.getElementById("unit");
const details = (() => {
  let parsedOnce;
  return () => (parsedOnce ??= JSON.parse(document.getElementById("details").textContent));
})();
let returnTo = null; // what had the focus before a unit was opened
let drawnUnit = 0; // counts openings, so that what comes too late is not shown

const unitOfHash = () => {
  const found = /^#unit-(-?\d+)$/.exec(location.hash);
  return found && rowOf.has(Number(found[1])) ? Number(found[1]) : null;
};

/** Open a unit; the address then says which, so that it can be passed on. */
function openUnit(id) {
  if (openedUnit === null && document.activeElement !== document.body) returnTo = document.activeElement;
  history.replaceState(null, "", `#unit-${id}`);
  showUnit(id);
}

function closeUnit() {
  history.replaceState(null, "", location.pathname + location.search);
  showUnit(null);
}

function showUnit(id) {
  if (id === openedUnit) return;
  const wasOpen = openedUnit !== null;
  openedUnit = id;
  listeners.forEach((listener) => listener(id));
  document.documentElement.classList.toggle("with-unit", id !== null);
  panel.hidden = id === null;
  panel.querySelectorAll(".chart").forEach((element) => {
    drawings.delete(element);
    seen.unobserve(element);
    resized.unobserve(element);
  });
  if (id === null) {
    panel.replaceChildren();
    if (wasOpen && returnTo?.isConnected) returnTo.focus();
    returnTo = null;
    return;
  }
  const focused = document.activeElement?.id; // stays on "next" if that was pressed
  panel.replaceChildren(...unitParts(units[rowOf.get(id)]));
  panel.scrollTop = 0;
  const target = ["unit-next", "unit-previous"].includes(focused) ? document.getElementById(focused) : null;
  (target && !target.disabled ? target : document.getElementById("unit-title")).focus({ preventScroll: true });
  whenIdle(drawRest);
}

/** The units before and after one in the table as it is sorted and filtered. */
function neighbours(id) {
  const place = shown.findIndex((unit) => unit.id === id);
  return place < 0 ? [null, shown[0] ?? null] : [shown[place - 1] ?? null, shown[place + 1] ?? null];
}

panel.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const [previous, next] = neighbours(openedUnit);
  const target = { ArrowLeft: previous, ArrowRight: next, k: previous, j: next }[event.key];
  if (event.key === "Escape") closeUnit();
  else if (target) openUnit(target.id);
  else return;
  event.preventDefault();
});

function unitParts(unit) {
  const [previous, next] = neighbours(unit.id);
  const step = (name, text, target) =>
    h("button", { type: "button", id: `unit-${name}`, disabled: !target, click: () => openUnit(target.id) }, text);
  const facts = [
    isNumber(unit.y_um) ? `At ${number(unit.y_um)} µm` : "At an unknown place",
    hasShanks && `shank ${unit.shank}`,
    `channel ${unit.channel}`,
    `${short(unit.num_spikes)} spikes`,
  ]
    .filter(Boolean)
    .join(", ");
  drawnUnit += 1;
  return [
    h(
      "div",
      { class: "unit-bar" },
      h("h2", { id: "unit-title", tabindex: "-1" }, `Unit ${unit.id}`),
      h("span", { class: "label" }, symbol(unit.label), LABELS[unit.label] ?? unit.label),
      step("previous", "Previous", previous),
      step("next", "Next", next),
      h("button", { type: "button", id: "unit-close", click: closeUnit }, "Close"),
    ),
    h("p", { class: "lead" }, `${facts}.${unit.reason ? ` Not good: ${unit.reason}.` : ""}`),
    ...unitCharts(unit, drawnUnit),
    h("h3", {}, "Metrics"),
    h(
      "table",
      { class: "plain metrics" },
      h(
        "thead",
        { class: "hidden" },
        h(
          "tr",
          {},
          ["Metric", "Value", "Limit"].map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h(
        "tbody",
        {},
        metrics.map((metric) => {
          const value = unit[metric.name];
          const failed = fails(metric, value);
          return h(
            "tr",
            {},
            h("th", { scope: "row" }, metric.title, h("span", { class: "note" }, metric.help)),
            h(
              "td",
              { class: failed ? "n failed" : "n" },
              number(value, metric.digits),
              isNumber(value) && metric.unit && ` ${metric.unit}`,
            ),
            h("td", { class: "note" }, failed ? `beyond the limit, ${limit(metric)}` : limit(metric)),
          );
        }),
      ),
    ),
    h(
      "p",
      { class: "note" },
      "Keys: → or j next, ← or k previous, Esc close. They follow the table’s order and filter.",
    ),
  ];
}

function unitCharts(unit, opening) {
  const all = details();
  if (!all.template && !all.acg && !all.count) return [missing("Waveforms and correlograms were not kept.")];
  const edges = all.edges_s ?? [];
  const load = (...names) => Promise.all(names.map((name) => unpack(all[name])));
  const one = (title, note, height, label, drawn) => figure(title, chart({ height, label, drawn }), note);
  const template = () =>
    one("Template", "at the contacts’ positions", 300, `Mean waveform of unit ${unit.id}.`, async (width, say) =>
      templatePlot(unit, width, 300, say, ...(await load("template", "template_scale", "template_channels"))),
    );
  const acg = () =>
    one(
      "Auto-correlogram",
      "spike pairs per bin of lag",
      300,
      `Auto-correlogram of unit ${unit.id}.`,
      async (width, say) => acgPlot(unit, width, 300, say, ...(await load("acg"))),
    );
  const rate = () =>
    one("Firing rate", "grey: blanked", 110, `Firing rate of unit ${unit.id} over time.`, async (width, say) =>
      ratePlot(unit, edges, width, 110, say, ...(await load("count"))),
    );
  const band = (name, title, height, options) =>
    one(
      title,
      "median; band: 10 to 90 % of the spikes",
      height,
      `${title} of unit ${unit.id} over time.`,
      async (width, say) => bandPlot(unit, title, edges, width, height, say, options, ...(await load(name))),
    );
  const near = h("div", { class: "near" });
  if (all.nearest) {
    load("nearest", "similarity", "ccg").then((arrays) => {
      if (opening !== drawnUnit) return; // another unit was opened in the meantime
      near.replaceChildren(...nearUnits(unit, ...arrays));
      whenIdle(drawRest);
    });
  }
  return [
    h(
      "div",
      { class: "pair" },
      all.template && content.probe ? template() : missing("The template was not kept."),
      all.acg ? acg() : missing("The auto-correlogram was not kept."),
    ),
    all.count && rate(),
    all.amplitude &&
      band("amplitude", "Amplitude", 120, { ...upper, y: { label: recording.amplitude_unit, zero: true } }),
    all.depth_um && band("depth_um", "Depth", 136, { y: { label: "µm" } }),
    h("h3", {}, "Most similar units"),
    all.nearest ? near : missing("It was not kept which units are similar."),
  ].filter(Boolean);
}

function ratePlot(unit, edges, width, height, say, counts) {
  const ofUnit = part(counts, unit.row);
  const { observed_s: observed } = details();
  const rows = middles(edges).map((x, i) => {
    const seconds = observed?.[i] ?? edges[i + 1] - edges[i];
    return { x, value: seconds > 0 ? ofUnit[i] / seconds : NaN };
  });
  const rates = rows.map((row) => row.value).filter(Number.isFinite);
  say(
    `Firing rate of unit ${unit.id} over time: median ${figures(quantile(rates, 0.5))} Hz, ` +
      `from ${figures(Math.min(...rates))} to ${figures(Math.max(...rates))} Hz.`,
  );
  return plotted(
    overTime(width, height, {
      ...upper,
      y: { label: "Hz", ticks: 3, zero: true },
      marks: [
        blankedSpans(),
        borders(),
        Plot.areaY(rows, { x: "x", y: "value", fill: "var(--data)", fillOpacity: 0.15 }),
        Plot.line(rows, { x: "x", y: "value", stroke: "var(--data)" }),
        Plot.ruleY([0], { stroke: "var(--axis)" }),
      ],
    }),
  );
}

/** The mean waveforms at the contacts' positions; one unit of depth is as high on all, and a bar says how much. */
function templatePlot(unit, width, height, say, template, scale, channels) {
  const all = details();
  const [first, last] = [all.template_ms[0], all.template_ms.at(-1)];
  const traces = [];
  part(channels, unit.row).forEach((channel, j) => {
    if (channel >= 0)
      traces.push({
        channel,
        x: content.probe.x_um[channel],
        y: content.probe.y_um[channel],
        values: part(template, unit.row, j),
      });
  });
  if (!traces.length) return missing("The template has no channels.");
  const steps = (values) => {
    const sorted = [...new Set(values)].sort((a, b) => a - b);
    return sorted.slice(1).map((value, i) => value - sorted[i]);
  };
  const across = 0.86 * Math.min(...steps(traces.map((trace) => trace.x)), 60);
  const largest = (trace) => Math.max(...Array.from(trace.values, Math.abs), 1);
  const main = traces.reduce((best, trace) => (largest(trace) > largest(best) ? trace : best));
  const peak = largest(main);
  const rows = Math.min(...steps(traces.map((trace) => trace.y)), 40);
  const lift = (1.6 * rows) / peak; // µm of depth per step of the int8
  const points = traces.flatMap((trace) =>
    Array.from(trace.values, (value, i) => ({
      channel: trace.channel,
      x: trace.x + across * ((all.template_ms[i] - first) / (last - first || 1) - 0.5),
      y: trace.y + value * lift,
    })),
  );
  const scaleOf = part(scale, unit.row)[0] ?? 1;
  const size = [500, 200, 100, 50, 20, 10, 5, 2, 1].find((value) => value / scaleOf <= peak) ?? figures(peak * scaleOf);
  const [x0, y0] = [
    Math.min(...points.map((point) => point.x)),
    Math.min(...points.map((point) => point.y)) - 1.2 * rows,
  ];
  const perMs = across / (last - first || 1);
  const peakToPeak = (Math.max(...main.values) - Math.min(...main.values)) * scaleOf;
  say(
    `Mean waveform of unit ${unit.id} on ${count(traces.length, "channel")}, at the contacts' positions: ` +
      `${figures(peakToPeak)} ${recording.amplitude_unit} peak to peak where it is largest, at ${number(main.y)} µm.`,
  );
  return plotted({
    width,
    height,
    marginLeft: 40,
    marginRight: 4,
    marginTop: 6,
    marginBottom: 4,
    x: { axis: null, domain: [x0 - 0.06 * across, Math.max(...points.map((point) => point.x))] },
    y: { label: null, ticks: 5, tickSize: 4 },
    marks: [
      Plot.line(points, {
        x: "x",
        y: "y",
        z: "channel",
        stroke: (point) => (point.channel === main.channel ? "var(--good)" : "currentColor"),
        strokeWidth: 1.3,
      }),
      Plot.line(
        [
          { x: x0, y: y0 },
          { x: x0 + perMs, y: y0 },
        ],
        { x: "x", y: "y", stroke: "currentColor" },
      ),
      Plot.line(
        [
          { x: x0, y: y0 },
          { x: x0, y: y0 + (size / scaleOf) * lift },
        ],
        { x: "x", y: "y", stroke: "currentColor" },
      ),
      Plot.text([{ x: x0 + perMs, y: y0 }], {
        x: "x",
        y: "y",
        text: () => `1 ms, ${size} ${recording.amplitude_unit}`,
        textAnchor: "start",
        dx: 5,
        fill: "currentColor",
      }),
    ],
  });
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

function acgPlot(unit, width, height, say, acg) {
  const bin = details().acg_bin_ms ?? 1;
  const half = Array.from(part(acg, unit.row));
  // The bin of lag 0 has each pair twice, in both orders. Counts may be scaled, so only shares are told.
  const within = (bins) => half[0] / 2 + sum(half.slice(1, bins));
  say(
    `Auto-correlogram of unit ${unit.id}: of the pairs of spikes within ${figures((half.length - 0.5) * bin)} ms, ` +
      `${percent(within(half.length) ? within(2) / within(half.length) : 0)} are within ${figures(1.5 * bin)} ms.`,
  );
  const both = [...half.slice(1).reverse(), ...half];
  return bars(both, -(half.length - 0.5) * bin, bin, width, height);
}

function bandPlot(unit, title, edges, width, height, say, options, all) {
  const quantiles = part(all, unit.row);
  const n = edges.length - 1;
  const rows = middles(edges).map((x, i) => ({
    x,
    low: quantiles[i],
    middle: quantiles[n + i],
    high: quantiles[2 * n + i],
  }));
  const known = rows.filter((row) => Number.isFinite(row.middle));
  if (!known.length) return missing("There are no spikes.");
  say(
    `${title} of the spikes of unit ${unit.id} over time: the median goes from ${figures(known[0].middle)} to ` +
      `${figures(known.at(-1).middle)} ${options.y.label}.`,
  );
  return plotted(
    overTime(width, height, {
      ...options,
      y: { ticks: 3, ...options.y },
      marks: [
        borders(),
        Plot.areaY(rows, { x: "x", y1: "low", y2: "high", fill: "var(--data)", fillOpacity: 0.2 }),
        Plot.line(rows, { x: "x", y: "middle", stroke: "var(--data)", strokeWidth: 1.5 }),
        options.y.zero && Plot.ruleY([0], { stroke: "var(--axis)" }),
      ],
    }),
  );
}

function nearUnits(unit, nearest, similarity, ccg) {
  const near = Array.from(part(nearest, unit.row))
    .map((id, k) => ({ id, k }))
    .filter(({ id }) => rowOf.has(id));
  if (!near.length) return [missing("No other unit has a similar template.")];
  const bin = details().acg_bin_ms ?? 1;
  return near.map(({ id, k }) => {
    const other = units[rowOf.get(id)];
    const alike = similarity ? part(similarity, unit.row)[k] : null;
    const away = Math.hypot(other.x_um - unit.x_um, other.y_um - unit.y_um);
    const counts = ccg ? part(ccg, unit.row, k) : [];
    return h(
      "figure",
      {},
      h(
        "figcaption",
        {},
        h("a", { href: `#unit-${id}` }, symbol(other.label), `Unit ${id}`),
        h(
          "span",
          { class: "note" },
          [isNumber(alike) && `similarity ${number(alike, 2)}`, isNumber(unit.x_um) && isNumber(other.x_um) && `${number(away)} µm away`]
            .filter(Boolean)
            .join(", "),
        ),
      ),
      counts.length
        ? chart({
            height: 120,
            label: `Cross-correlogram of units ${unit.id} and ${id}: ${count(sum(counts), "pair")} of spikes, up to ${number(Math.max(...counts))} per bin of lag. At positive lags, unit ${id} fires after unit ${unit.id}.`,
            drawn: (width) =>
              bars(counts, (-counts.length / 2) * bin, bin, width, 120, { x: { ticks: 3 }, marginLeft: 30 }),
          })
        : missing("No cross-correlogram was kept."),
    );
  });
}
