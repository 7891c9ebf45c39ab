// Where units are on the probe, how their metrics are distributed, and how the recording was over time.

const listeners = new Map(); // by part of the page; called with the number of the unit that is opened, or null
let openedUnit = null;

const depthDomain = (() => {
  const depths = [...(content.probe?.y_um ?? []), ...units.map((unit) => unit.y_um)].filter(isNumber);
  if (!depths.length) return [0, 1];
  const [low, high] = [Math.min(...depths), Math.max(...depths)];
  const margin = Math.max(20, (high - low) / 40);
  return [low - margin, high + margin];
})();

const unitTitle = (unit) =>
  [
    `Unit ${unit.id}, ${LABELS[unit.label] ?? unit.label}`,
    `${number(unit.y_um)} µm, channel ${unit.channel}`,
    `${number(unit.num_spikes)} spikes`,
    ...(unit.reason ? [unit.reason] : []),
  ].join("\n");

/** Units as discs (good) and diamonds (multi-unit); the nearest to the pointer says what it is, and opens on click. */
function unitDots(x, extra = []) {
  const rows = units.filter((unit) => isNumber(x(unit)) && isNumber(unit.y_um));
  const dots = (label, symbolName, paint) =>
    Plot.dot(
      rows.filter((unit) => unit.label === label),
      { x, y: "y_um", r: units.length > 400 ? 2.8 : 3.6, symbol: symbolName, ...paint },
    );
  return [
    ...extra,
    dots("mua", "diamond", { stroke: "var(--mua)", fill: "var(--paper)", strokeWidth: 1.4 }),
    dots("good", "circle", { fill: "var(--good)", fillOpacity: 0.85, stroke: "var(--paper)", strokeWidth: 0.6 }),
    Plot.dot(rows, Plot.pointer({ x, y: "y_um", r: 6, stroke: "currentColor", strokeWidth: 1.5, maxRadius: 24 })),
    Plot.tip(rows, Plot.pointer({ x, y: "y_um", title: unitTitle, maxRadius: 24, fontSize: 11 })),
  ];
}

/** What makes a chart of units one that units are opened from, and in which the open one is marked. */
function opening(title, plot, x) {
  plot.classList.add("opens");
  plot.addEventListener("click", () => plot.value && openUnit(plot.value.id));
  const ring = document.createElementNS(plot.namespaceURI, "circle");
  Object.entries({ r: 8, fill: "none", stroke: "var(--accent)", "stroke-width": 2.5 }).forEach(([name, value]) =>
    ring.setAttribute(name, value),
  );
  plot.append(ring);
  const mark = (id) => {
    const unit = id == null ? null : units[rowOf.get(id)];
    const place = unit && isNumber(x(unit)) && isNumber(unit.y_um);
    ring.setAttribute("visibility", place ? "visible" : "hidden");
    if (!place) return;
    ring.setAttribute("cx", plot.scale("x").apply(x(unit)));
    ring.setAttribute("cy", plot.scale("y").apply(unit.y_um));
  };
  mark(openedUnit);
  listeners.set(title, mark);
  return plot;
}

function byDepth(title, x, options, height, isFirst = false) {
  return figure(
    title,
    chart({
      height,
      className: "narrow",
      label: options.says,
      drawn: (width) =>
        opening(
          title,
          plotted({
            width,
            height,
            marginLeft: isFirst ? 62 : 44,
            marginRight: 14,
            marginTop: 8,
            marginBottom: 36,
            x: { labelAnchor: "center", labelArrow: "none", tickSize: 4, ticks: 4, ...options.x },
            y: {
              domain: depthDomain,
              label: isFirst ? "Depth (µm)" : null,
              labelArrow: "none",
              labelAnchor: "center",
              tickSize: 4,
            },
            marks: unitDots(x, options.extra),
          }),
          x,
        ),
    }),
    options.note,
  );
}

function probeSection() {
  const { probe } = content;
  const bad = (probe?.bad ?? []).flatMap((isBad, channel) => (isBad ? [channel] : []));
  const good = units.filter((unit) => unit.label === "good");
  const middle = quantile(good.map((unit) => unit.y_um).filter(isNumber), 0.5);
  const median = (name) => figures(quantile(units.map((unit) => unit[name]).filter(isNumber), 0.5));
  const channels = bad.length
    ? `${count(bad.length, "channel")} without signal, marked ×.`
    : "All channels have signal.";
  const lead = [
    isNumber(middle) && `Half of the good units are above ${number(middle)} µm.`,
    units.length === 0 && "There are no units.",
    probe ? channels : "The layout of the probe is not known.",
  ];
  const height = 540;
  const contacts = probe
    ? [
        Plot.dot(
          probe.x_um.map((x, c) => ({ x, y: probe.y_um[c] })).filter((_, c) => !probe.bad[c]),
          { x: "x", y: "y", r: 1.6, symbol: "square", fill: "var(--contact)" },
        ),
        Plot.dot(
          bad.map((c) => ({ x: probe.x_um[c], y: probe.y_um[c] })),
          { x: "x", y: "y", r: 4, symbol: "times", stroke: "var(--bad)", strokeWidth: 2 },
        ),
      ]
    : [];
  const xs = [...(probe?.x_um ?? []), ...units.map((unit) => unit.x_um)].filter(isNumber);
  const xDomain = xs.length ? [Math.min(...xs) - 15, Math.max(...xs) + 15] : [0, 1];
  const charts =
    units.length || probe
      ? h(
          "div",
          { class: "by-depth" },
          byDepth(
            "Position",
            (unit) => unit.x_um,
            {
              x: { label: "Across (µm)", domain: xDomain, ticks: 5 },
              extra: contacts,
              says:
                `Map of ${probe ? count(probe.x_um.length, "contact") : "no contacts"} and ${count(units.length, "unit")}: ` +
                `${number(good.length)} good, ${number(units.length - good.length)} multi-unit. The table lists them.`,
            },
            height,
            true,
          ),
          units.length > 0 &&
            byDepth(
              "Firing rate",
              (unit) => (unit.firing_rate > 0 ? unit.firing_rate : null),
              {
                x: logAxis(
                  units.map((unit) => unit.firing_rate).filter((rate) => rate > 0),
                  "Hz",
                ),
                says: `Firing rate of each unit by depth; median ${median("firing_rate")} Hz.`,
              },
              height,
            ),
          units.length > 0 &&
            byDepth(
              "Amplitude",
              (unit) => unit.amplitude_median,
              {
                x: { label: recording.amplitude_unit, zero: true },
                says: `Median amplitude of each unit by depth; median ${median("amplitude_median")} ${recording.amplitude_unit}.`,
              },
              height,
            ),
        )
      : null;
  return section("probe", "On the probe", lead.filter(Boolean).join(" "), units.length > 0 && key(), charts);
}

/** Names of the ticks of counts. */
const whole = (value) => (Number.isInteger(value) ? number(value) : "");

const key = () =>
  h(
    "p",
    { class: "key" },
    h("span", {}, symbol("good"), "good"),
    h("span", {}, symbol("mua"), "multi-unit"),
    h("span", { class: "note" }, "Choose a unit in a chart or in the table to open it."),
  );

/** Log scale where values are positive and span more than two orders of magnitude. */
function isLog(values) {
  const low = quantile(values, 0.02);
  return Math.min(...values) > 0 && low > 0 && quantile(values, 0.98) / low > 50;
}

const logAxis = (values, label) => ({
  label,
  type: "log",
  ticks: values.length ? logTicks(Math.min(...values), Math.max(...values)) : 2,
  tickFormat: figures,
});

/** Equal bins over all values, in the scale's own distances; the last includes its end. */
function binned(values, log, bins = 28) {
  const to = log ? Math.log10 : (value) => value;
  const from = log ? (value) => 10 ** value : (value) => value;
  let [low, high] = [to(Math.min(...values)), to(Math.max(...values))];
  if (high <= low) [low, high] = [low - 0.5, high + 0.5];
  const step = (high - low) / bins;
  return {
    of: (value) => Math.min(bins - 1, Math.max(0, Math.floor((to(value) - low) / step))),
    edge: (i) => from(low + i * step),
    bins,
  };
}

function distribution(metric) {
  const known = units.filter((unit) => isNumber(unit[metric.name]));
  const title = withUnit(metric.title, metric.unit && `(${metric.unit})`);
  if (!known.length) return figure(title, missing("Not defined for any unit."), null, metric.help);
  const values = known.map((unit) => unit[metric.name]);
  const beyond = units.filter((unit) => fails(metric, unit[metric.name]));
  const good = beyond.filter((unit) => unit.label === "good").length;
  const middle = quantile(
    known.filter((unit) => unit.label === "good").map((unit) => unit[metric.name]),
    0.5,
  );
  const undefinedFor = units.length - known.length;
  const summary = [
    middle == null
      ? null
      : `Median of good units ${number(middle, metric.digits)}${metric.unit ? ` ${metric.unit}` : ""}.`,
    limit(metric)
      ? `Limit: ${limit(metric)}; ${beyond.length ? `${count(beyond.length, "unit")} beyond it, of which ${number(good)} ${good === 1 ? "is" : "are"} good` : "all units meet it"}.`
      : null,
    undefinedFor ? `${metric.undefined ? `${metric.undefined}: ` : "Not defined for "}${number(undefinedFor)}.` : null,
  ]
    .filter(Boolean)
    .join(" ");
  return figure(
    title,
    chart({
      height: 130,
      label: `Histogram of ${metric.title} of ${count(known.length, "unit")}, from ${figures(Math.min(...values))} to ${figures(Math.max(...values))}. ${summary}`,
      drawn: (width) => {
        const log = isLog(values);
        const isShown = metric.threshold != null && (!log || metric.threshold > 0);
        const bin = binned(isShown ? [...values, metric.threshold] : values, log); // so that no bar is too narrow
        const rows = [];
        for (let i = 0; i < bin.bins; i += 1) {
          const inside = known.filter((unit) => bin.of(unit[metric.name]) === i);
          const good = inside.filter((unit) => unit.label === "good").length;
          if (good) rows.push({ x1: bin.edge(i), x2: bin.edge(i + 1), y1: 0, y2: good, fill: "var(--good)" });
          if (inside.length > good)
            rows.push({ x1: bin.edge(i), x2: bin.edge(i + 1), y1: good, y2: inside.length, fill: "var(--mua)" });
        }
        return plotted({
          width,
          height: 130,
          marginLeft: 30,
          marginRight: 8,
          marginTop: 8,
          marginBottom: 22,
          x: {
            tickSize: 4,
            ...(log ? logAxis([...values, ...(isShown ? [metric.threshold] : [])], null) : { label: null, ticks: 4 }),
          },
          y: { label: null, ticks: 2, tickSize: 4, tickFormat: whole },
          marks: [
            Plot.rectY(rows, {
              x1: "x1",
              x2: "x2",
              y1: "y1",
              y2: "y2",
              fill: (row) => row.fill,
              insetLeft: 0.5,
              insetRight: 0.5,
            }),
            Plot.ruleY([0], { stroke: "var(--axis)" }),
            isShown &&
              Plot.ruleX([metric.threshold], { stroke: "currentColor", strokeWidth: 1.5, strokeDasharray: "4,2" }),
          ],
        });
      },
    }),
    null,
    `${summary} ${metric.help}`,
  );
}

function metricsSection() {
  const lead = units.length
    ? "Good units are drawn below multi-units in each bar; a dashed line is a limit in common use, on which labels do not depend."
    : "There are no units, so there is nothing to distribute.";
  const reasons = new Map();
  units.forEach((unit) => unit.reason && reasons.set(unit.reason, (reasons.get(unit.reason) ?? 0) + 1));
  const sorted = [...reasons].sort((a, b) => b[1] - a[1]);
  const most = sorted[0]?.[1] ?? 1;
  return section(
    "metrics",
    "Quality of units",
    lead,
    units.length > 0 && h("div", { class: "multiples" }, metrics.map(distribution)),
    units.length > 0 && h("h3", {}, "Why units are not good"),
    units.length > 0 &&
      (sorted.length
        ? h(
            "table",
            { class: "plain" },
            h(
              "thead",
              {},
              h(
                "tr",
                {},
                h("th", { scope: "col" }, "Criterion"),
                h("th", { scope: "col", class: "n" }, "Units"),
                h("th", { scope: "col", class: "n" }, "Share"),
                h("td", {}),
              ),
            ),
            h(
              "tbody",
              {},
              sorted.map(([reason, n]) =>
                h(
                  "tr",
                  {},
                  h("th", { scope: "row" }, reason),
                  h("td", { class: "n" }, number(n)),
                  h("td", { class: "n" }, percent(n / units.length)),
                  barCell(n / most),
                ),
              ),
            ),
          )
        : missing("All units are good.")),
  );
}

/** A bar as long as a share of its cell, for tables; the figure is in the cell before it. */
function barCell(share) {
  const bar = h("span", { class: "bar-of", "aria-hidden": "true" });
  bar.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  return h("td", { class: "bar-cell" }, bar);
}

function timeSection() {
  const time = content.time ?? {};
  const edges = time.edges_s ?? [];
  const parts = [];
  const x = edges.length > 1 ? middles(edges) : [];
  const series = (values) => x.map((when, i) => ({ x: when, value: values[i] ?? NaN }));
  const rates = (time.rate_hz ?? []).filter(isNumber);
  const strip = (title, label, height, note, options, marks, isLast = false) =>
    parts.push(
      figure(
        title,
        chart({
          height,
          label,
          drawn: (width) => plotted(overTime(width, height, { ...(isLast ? {} : upper), ...options, marks: marks() })),
        }),
        note,
      ),
    );

  if (rates.some((rate) => rate > 0)) {
    strip(
      "Population rate",
      `Spikes of all units per second over time: median ${figures(quantile(rates, 0.5))} Hz, from ${figures(Math.min(...rates))} to ${figures(Math.max(...rates))} Hz.`,
      150,
      "all units; grey: blanked",
      { y: { label: "Spikes per s", ticks: 4, tickFormat: "~s", zero: true } },
      () => [
        blankedSpans(),
        borders(),
        Plot.areaY(series(time.rate_hz), { x: "x", y: "value", fill: "var(--data)", fillOpacity: 0.15 }),
        Plot.line(series(time.rate_hz), { x: "x", y: "value", stroke: "var(--data)", strokeWidth: 1.5 }),
        Plot.ruleY([0], { stroke: "var(--axis)" }),
        hover(
          series(time.rate_hz),
          "value",
          (row) => `${figures(row.x)} ${clock.name}: ${figures(row.value)} spikes per s`,
        ),
      ],
    );
  } else parts.push(missing("There are no spikes, so there is no rate to draw."));

  const blanked = time.blanked_share ?? [];
  if (blanked.some((share) => share > 0)) {
    const worst = blanked.indexOf(Math.max(...blanked));
    strip(
      "Blanked",
      `Share of each span that was blanked: ${percent(verdict.blanked_share)} in all, at most ${percent(blanked[worst])} at ${at(edges[worst])}.`,
      96,
      "share of time in which no spikes were looked for, because of artifacts, dead time or loud noise",
      { y: { label: "Share", percent: true, ticks: 3, domain: [0, 100 * Math.max(0.05, ...blanked)] } },
      () => [
        borders(),
        Plot.rectY(
          blanked
            .map((share, i) => ({ x1: edges[i] / clock.s, x2: edges[i + 1] / clock.s, share }))
            .filter((one) => one.share > 0),
          { x1: "x1", x2: "x2", y: "share", fill: "var(--third)" },
        ),
        Plot.ruleY([0], { stroke: "var(--axis)" }),
      ],
    );
  } else parts.push(missing("Nothing was blanked."));

  const explained = (time.explained ?? []).filter(isNumber);
  if (explained.length) {
    strip(
      "Explained by matching",
      `Share of the energy of the whitened traces, noise included, that the matched spikes explain: median ${percent(quantile(explained, 0.5))}, from ${percent(Math.min(...explained))} to ${percent(Math.max(...explained))}.`,
      130,
      "share of the energy of the whitened traces, noise included, that spikes explain; it falls with the firing rate, too",
      { y: { label: "Share (%)", percent: true, ticks: 4, zero: true } },
      () => [
        borders(),
        Plot.line(series(time.explained), { x: "x", y: "value", stroke: "var(--data)", strokeWidth: 1.5 }),
        Plot.ruleY([0], { stroke: "var(--axis)" }),
      ],
      !time.noise,
    );
  } else parts.push(missing("How much of the signal matching explains was not measured."));

  if (time.noise && edges.length > 1) parts.push(noiseChart(time, edges));
  else parts.push(missing("The noise of the channels over time was not kept."));

  const lead = rates.some((rate) => rate > 0)
    ? `${figures(quantile(rates, 0.5))} spikes per second (median); ${percent(verdict.blanked_share)} of the recording was blanked${content.borders_s?.length ? `; dashed lines are where ${count(content.borders_s.length + 1, "file")} were joined` : ""}.`
    : null;
  return section("time", "Over time", lead, parts);
}

function noiseChart(time, edges) {
  const height = 220;
  const [channels] = time.noise.shape;
  const unit = recording.amplitude_unit;
  const order = Array.from({ length: channels }, (_, c) => c);
  const depth = content.probe?.y_um;
  if (depth?.length === channels) order.sort((a, b) => depth[a] - depth[b] || a - b);
  return figure(
    "Noise of channels",
    chart({
      height,
      label: `Standard deviation of the noise of ${count(channels, "channel")} over time, by depth; darker is louder.`,
      drawn: async (width) => {
        const { data, shape } = await unpack(time.noise);
        const known = data.filter((value) => Number.isFinite(value));
        if (!known.length) return [missing("The noise of the channels is not known.")];
        const middle = quantile(known, 0.5) || 1;
        const [low, high] = [0.7 * middle, Math.max(2 * middle, quantile(known, 0.995) ?? 0)]; // white, black
        const grey = new Uint8Array(data.length);
        order.forEach((channel, row) => {
          for (let t = 0; t < shape[1]; t += 1)
            grey[row * shape[1] + t] =
              255 * Math.min(1, Math.max(0, (data[channel * shape[1] + t] - low) / (high - low))) || 0;
        });
        const extent = { x: [edges[0] / clock.s, edges.at(-1) / clock.s], y: [0, channels] };
        return [
          raster(
            { data: grey, shape },
            extent,
            overTime(width, height, {
              y: { domain: extent.y, label: "Channel, by depth", ticks: 5 },
              marks: [Plot.frame({ stroke: "var(--rule)" }), borders()],
            }),
          ),
          h(
            "p",
            { class: "scale note" },
            `${figures(low)} ${unit} and less`,
            h("span", { class: "ramp" }),
            `${figures(high)} ${unit} and more; median ${figures(middle)} ${unit}${known.length < data.length ? "; also white where it is not known" : ""}`,
          ),
        ];
      },
    }),
    "standard deviation; darker is louder",
  );
}
