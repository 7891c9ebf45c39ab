// The first screen: what came out, what to change, and how the tissue moved.

function section(id, title, lead, ...children) {
  return h(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    h("h2", { id: `${id}-title` }, title),
    lead && h("p", { class: "lead" }, lead),
    children,
  );
}

function fact(name, value, note) {
  return h(
    "div",
    {},
    h("dt", {}, name),
    h("dd", {}, h("span", { class: "figure" }, value), note && h("span", { class: "note" }, note)),
  );
}

const settingOf = (name) => (run.settings ?? []).find((setting) => setting.name === name);

/** A value of a setting as it is written in code, without quotes around words. */
const written = (value) =>
  value === null
    ? "none"
    : typeof value === "string"
      ? value
      : (JSON.stringify(value)?.replaceAll(",", ", ") ?? "none");

function settingLink(name) {
  return settingOf(name) ? h("a", { href: `#setting-${name}` }, h("code", {}, name)) : h("code", {}, name);
}

/** How far the tissue moved, and how well that is known. */
const driftFact = () => {
  if (verdict.drift_um == null) return fact("Drift", "–", content.drift ? "not measured" : "not estimated");
  return fact(
    "Drift",
    `${figures(verdict.drift_um)} µm`,
    verdict.drift_error_um == null
      ? content.drift?.given
        ? "as given"
        : "range"
      : `range; uncertain by about ${figures(verdict.drift_error_um)} µm`,
  );
};

function verdictSection() {
  const total = verdict.good + verdict.mua;
  const sentence = total
    ? `${count(verdict.good, "good unit")} in ${duration(recording.duration_s)} of ${count(recording.n_channels, "channel")}`
    : `No units in ${duration(recording.duration_s)} of ${count(recording.n_channels, "channel")}`;
  const warnings = verdict.warnings ?? [];
  const unsorted_s = recording.duration_s - (verdict.observed_s ?? recording.duration_s) - (verdict.blanked_s ?? 0);
  const isSampled = unsorted_s > 0.005 * recording.duration_s;
  return h(
    "section",
    { id: "verdict", "aria-labelledby": "title" },
    h("h1", { id: "title" }, h("span", { class: "name" }, recording.name), h("span", { class: "headline" }, sentence)),
    h(
      "dl",
      { class: "facts" },
      fact("Good units", number(verdict.good), total ? `${percent(verdict.good / total)} of all` : null),
      fact("Multi-unit", number(verdict.mua), total ? `${percent(verdict.mua / total)} of all` : null),
      fact("Left out", number(verdict.left_out), verdict.left_out == null ? "not known" : "clusters, not neurons"),
      fact(
        "Spikes",
        verdict.n_spikes >= 1e6 ? `${figures(verdict.n_spikes / 1e6)} M` : number(verdict.n_spikes),
        `${figures(verdict.n_spikes / Math.max(verdict.observed_s ?? recording.duration_s, 1e-9))} per second`,
      ),
      driftFact(),
      fact(
        "Blanked",
        percent(verdict.blanked_share),
        [
          verdict.blanked_s ? `${duration(verdict.blanked_s)} without spikes` : null,
          isSampled ? `${percent(verdict.observed_s / recording.duration_s)} of the time was sorted` : null,
        ]
          .filter(Boolean)
          .join("; ") || "spikes looked for everywhere",
      ),
    ),
    warnings.length
      ? h(
          "div",
          { class: "warnings" },
          h("h2", {}, count(warnings.length, "warning")),
          h(
            "ol",
            {},
            warnings.map((warning) =>
              h(
                "li",
                {},
                h("p", {}, warning.text),
                warning.setting && h("p", { class: "note" }, "To change: ", settingLink(warning.setting)),
              ),
            ),
          ),
        )
      : h("p", { class: "missing" }, "There were no warnings."),
  );
}

/** The sentences over the charts of drift. */
function driftLead() {
  const { drift } = content;
  if (!drift) {
    const blocks = settingOf("nblocks");
    return blocks && (blocks.value === 0 || blocks.value === "0")
      ? ["No drift was estimated, because ", settingLink("nblocks"), " is 0."]
      : "There is no estimate of drift. None is made on short or sparse probes, or from few spikes.";
  }
  if (verdict.drift_um === 0) return "No motion of the tissue was found, and nothing was corrected.";
  const range = verdict.drift_um == null ? "" : ` by ${figures(verdict.drift_um)} µm in all`;
  const error = verdict.drift_error_um == null ? "" : `, known to about ${figures(verdict.drift_error_um)} µm`;
  const from = drift.given
    ? "The displacement was given, not estimated."
    : `It was estimated in ${count(drift.centre_um.length, "segment")} along the probe.`;
  const pictures = (content.rasters ?? []).some((picture) => picture.before && picture.after)
    ? " Where the correction is right, the bands of the upper picture are level in the lower one."
    : "";
  return `The tissue moved${range}${error}. ${from}${pictures}`;
}

async function displacement() {
  const { drift } = content;
  if (!drift) return null;
  const [time, moved, error] = await Promise.all([
    unpack(drift.time_s),
    unpack(drift.displacement_um),
    unpack(drift.error_um),
  ]);
  const rows = thinned(time.data.length);
  const segments = drift.centre_um.length;
  return drift.centre_um.map((centre, segment) => ({
    centre,
    segment,
    shade: segments < 2 ? 0 : segment / (segments - 1),
    points: rows.map((row) => {
      const um = moved.data[row * segments + segment];
      const spread = error ? error.data[row * segments + segment] : 0;
      return { x: time.data[row] / clock.s, um, low: um - spread, high: um + spread };
    }),
  }));
}

/** From the lowest segment to the highest, from blue towards orange. */
const segmentColour = (segment) =>
  `color-mix(in oklab, var(--data) ${Math.round(100 - 65 * segment.shade)}%, var(--third))`;

function driftRaster(picture, which, height) {
  const extent = { x: [picture.t0_s / clock.s, picture.t1_s / clock.s], y: [picture.y0_um, picture.y1_um] };
  return async (width) => {
    const [image, segments] = await Promise.all([unpack(picture[which]), which === "before" ? displacement() : null]);
    const lines = (segments ?? []).map((segment) =>
      Plot.line(segment.points, {
        x: "x",
        y: (point) => segment.centre + point.um,
        stroke: "var(--third)",
        strokeWidth: 1.5,
        clip: true,
      }),
    );
    const depths = shownDepths ?? extent.y;
    return raster(
      image,
      extent,
      overTime(width, height, {
        ...(which === "before" && picture.after ? upper : {}),
        marginRight: driftMargin(width),
        y: { domain: depths, label: "Depth (µm)", ticks: 6 },
        marks: [Plot.frame({ stroke: "var(--rule)" }), borders(), lines],
      }),
    );
  };
}

/** Room for the names of segments, the same in all charts of drift, so that their times are in line. */
const driftMargin = (width) =>
  width > 500 && content.drift?.centre_um.length > 1 && content.drift.centre_um.length <= 12 ? 66 : 12;

let shownDepths = null; // all

/** Chooses a part of the probe for all rasters: a drift of tens of µm is not visible on a probe of millimetres. */
function depthChoice() {
  const rasters = content.rasters ?? [];
  const [low, high] = [
    Math.min(...rasters.map((picture) => picture.y0_um)),
    Math.max(...rasters.map((picture) => picture.y1_um)),
  ];
  if (!(high - low > 1000)) return null;
  const step = 500;
  const windows = Array.from({ length: Math.ceil((high - low) / step) }, (_, i) => [
    low + i * step,
    Math.min(high, low + (i + 1) * step),
  ]).reverse();
  const change = (event) => {
    shownDepths = windows[event.target.value] ?? null;
    document.querySelectorAll("#drift .chart").forEach((element) => drawings.get(element).width && draw(element, true));
  };
  return h(
    "p",
    { class: "filters" },
    h("label", { for: "depths" }, "Depths"),
    h(
      "select",
      { id: "depths", change },
      h("option", { value: "" }, "all of the probe"),
      windows.map(([from, to], i) => h("option", { value: i }, `${number(from)} to ${number(to)} µm`)),
    ),
  );
}

function driftCharts() {
  const { drift } = content;
  const parts = [];
  for (const picture of content.rasters ?? []) {
    const of = content.rasters.length > 1 ? `, shank ${picture.shank}` : "";
    const isMoved = drift && verdict.drift_um !== 0;
    const height = 300;
    const pair = [
      [
        "before",
        `As recorded${of}`,
        isMoved
          ? "peaks by depth; darker are more or larger. Orange: the estimate, at the depth of each segment"
          : "peaks by depth; darker are more or larger",
      ],
      isMoved
        ? ["after", `Corrected${of}`, "spikes of units, where they are after the correction"]
        : ["after", `Sorted${of}`, "spikes of units"],
    ].filter(([which]) => picture[which]);
    if (!pair.length) parts.push(missing(`There is no picture of the peaks${of}.`));
    for (const [which, title, note] of pair) {
      parts.push(
        figure(
          title,
          chart({
            height,
            label: `Raster of peaks ${which === "before" ? "as recorded" : "after correction"}${of}: time from ${at(picture.t0_s)} to ${at(picture.t1_s)}, depth from ${figures(picture.y0_um)} to ${figures(picture.y1_um)} µm.`,
            drawn: driftRaster(picture, which, height),
          }),
          note,
        ),
      );
    }
    if (pair.length === 1 && drift)
      parts.push(
        missing(
          pair[0][0] === "before"
            ? "There is no picture of the corrected peaks."
            : "There is no picture of the peaks as recorded.",
        ),
      );
  }
  if (!parts.length) parts.push(missing("No raster of peaks was kept."));
  if (drift && !(drift.centre_um.length && drift.time_s.shape[0]))
    parts.push(missing("The estimate of drift is empty."));
  else if (drift && verdict.drift_um !== 0) {
    const height = 200;
    parts.push(
      figure(
        "Displacement of the tissue",
        chart({
          height,
          label: `Displacement over time in ${count(drift.centre_um.length, "segment")} centred at ${drift.centre_um.map(figures).join(", ")} µm; range ${figures(verdict.drift_um)} µm${verdict.drift_error_um == null ? "" : `, error ${figures(verdict.drift_error_um)} µm`}.`,
          drawn: async (width) => {
            const segments = await displacement();
            const ends = segments
              .filter((segment) => segment.points.length)
              .map((segment) => ({ ...segment.points.at(-1), text: `${number(segment.centre)} µm`, segment }));
            ends.sort((a, b) => a.um - b.um);
            const all = segments.flatMap((segment) => segment.points.map((point) => point.um));
            const gap = ((Math.max(...all, 1) - Math.min(...all, 0)) * 13) / (height - 42);
            ends.forEach((end, i) => {
              end.label = i ? Math.max(end.um, ends[i - 1].label + gap) : end.um;
            });
            const points = segments.flatMap((segment) =>
              segment.points.map((point) => ({ ...point, centre: segment.centre })),
            );
            return plotted(
              overTime(width, height, {
                marginRight: driftMargin(width),
                y: { label: "Displacement (µm)", ticks: 5 },
                marks: [
                  Plot.gridY({ stroke: "var(--rule)", strokeOpacity: 1, ticks: 5 }),
                  borders(),
                  segments.map((segment) => [
                    drift.error_um &&
                      Plot.areaY(segment.points, {
                        x: "x",
                        y1: "low",
                        y2: "high",
                        fill: segmentColour(segment),
                        fillOpacity: 0.22,
                      }),
                    Plot.line(segment.points, { x: "x", y: "um", stroke: segmentColour(segment), strokeWidth: 1.5 }),
                  ]),
                  hover(
                    points,
                    "um",
                    (point) =>
                      `${figures(point.x)} ${clock.name}, segment at ${number(point.centre)} µm\n${number(point.um, 1)} µm${drift.error_um ? ` ± ${number(point.high - point.um, 1)}` : ""}`,
                  ),
                  driftMargin(width) > 12 &&
                    ends.map((end) =>
                      Plot.text([end], {
                        x: span[1],
                        y: "label",
                        text: "text",
                        fill: "currentColor",
                        textAnchor: "start",
                        dx: 6,
                      }),
                    ),
                ],
              }),
            );
          },
        }),
        `${drift.error_um ? "band: the difference between the two halves of the peaks; " : ""}positive is towards larger depth${drift.centre_um.length > 1 ? "; one line per segment, by the depth of its centre" : ""}`,
      ),
    );
  }
  return parts;
}

const driftSection = () => section("drift", "Drift", driftLead(), depthChoice(), driftCharts());
