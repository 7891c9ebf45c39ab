// From peaks to units, the run, and what another sort had found.

function funnelSection() {
  const funnel = content.funnel ?? [];
  const leftOut = content.left_out ?? [];
  const head = (...names) =>
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        names.map((name, i) =>
          h("th", { scope: "col", class: i && i < 3 && names.length > 2 && name !== "Note" ? "n" : null }, name),
        ),
      ),
    );
  return section(
    "steps",
    "From peaks to units",
    null,
    funnel.length
      ? h(
          "div",
          { class: "scroll", role: "region", "aria-label": "Counts of each step", tabindex: "0" },
          h(
            "table",
            { class: "plain" },
            head("Step", "Count", "Note"),
            h(
              "tbody",
              {},
              funnel.map((one) =>
                h(
                  "tr",
                  {},
                  h("th", { scope: "row" }, one.step),
                  h("td", { class: "n" }, number(one.count)),
                  h("td", { class: "note" }, one.note),
                ),
              ),
            ),
          ),
        )
      : missing("The counts of the steps were not kept."),
    h("h3", {}, "Left out"),
    leftOut.length
      ? h(
          "table",
          { class: "plain" },
          head("Reason", "Units", "Spikes"),
          h(
            "tbody",
            {},
            leftOut.map((one) =>
              h(
                "tr",
                {},
                h("th", { scope: "row" }, one.reason),
                h("td", { class: "n" }, number(one.units)),
                h("td", { class: "n" }, number(one.spikes)),
              ),
            ),
          ),
        )
      : missing(
          verdict.left_out == null ? "It is not known which clusters were left out." : "No clusters were left out.",
        ),
  );
}

function settingRow(setting) {
  return h(
    "tr",
    { id: `setting-${setting.name}`, class: setting.changed ? "changed" : null },
    h("th", { scope: "row" }, h("code", {}, setting.name), setting.changed && h("span", { class: "note" }, " changed")),
    h("td", {}, h("code", {}, written(setting.value))),
    h("td", {}, h("code", {}, written(setting.default))),
    h("td", { class: "note" }, setting.help),
  );
}

function settingsTable(settings, label) {
  return h(
    "div",
    { class: "scroll", role: "region", "aria-label": label, tabindex: "0" },
    h(
      "table",
      { class: "plain settings" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ["Setting", "Value", "Default", "Meaning"].map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h("tbody", {}, settings.map(settingRow)),
    ),
  );
}

/** How long a run took relative to the recording. */
const speed = (ratio) =>
  ratio < 1 ? `${percent(ratio)} of the recording's length` : `${figures(ratio)} times the recording's length`;

function runSection() {
  const settings = run.settings ?? [];
  const changed = settings.filter((setting) => setting.changed);
  const rest = settings.filter((setting) => !setting.changed);
  const seconds = Object.entries(run.seconds ?? {});
  const total = seconds.reduce((sum, [, value]) => sum + value, 0);
  const longest = Math.max(...seconds.map(([, value]) => value), 1e-9);
  const resumed = Object.entries(run.resumed ?? {}).filter(([, [known]]) => known > 0);
  const versions = Object.entries(run.versions ?? {});
  const facts = [
    ["Written", run.written],
    ["Device", run.device],
    ["Workers", run.workers == null ? null : number(run.workers)],
    [
      "Memory",
      run.memory_bytes == null
        ? null
        : `${figures(run.memory_bytes / 1e9)} GB, the peaks of this process and of the workers it started added`,
    ],
    ["Versions", versions.map(([name, version]) => `${name} ${version}`).join(", ")],
    ["Digest", run.digest && h("code", {}, run.digest)],
    [
      "Continued",
      resumed.length
        ? `an earlier run had finished ${resumed.map(([stage, [known, all]]) => `${number(known)} of ${number(all)} tasks of ${stage}`).join(", ")}`
        : null,
    ],
    [
      "Files",
      (run.files ?? []).length
        ? h(
            "ul",
            {},
            run.files.map((file) => h("li", {}, h("code", {}, file))),
          )
        : null,
    ],
  ].filter(([, value]) => value);
  return section(
    "run",
    "The run",
    total ? `${resumed.length ? "This run" : "It"} took ${duration(total)}, ${speed(total / recording.duration_s)}.` : null,
    h(
      "dl",
      { class: "pairs" },
      facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
    ),
    h("h3", {}, "Time of each stage"),
    seconds.length
      ? h(
          "table",
          { class: "plain" },
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              h("th", { scope: "col" }, "Stage"),
              h("th", { scope: "col", class: "n" }, "Time"),
              h("th", { scope: "col", class: "n" }, "Share"),
              h("td", {}),
            ),
          ),
          h(
            "tbody",
            {},
            seconds.map(([stage, value]) =>
              h(
                "tr",
                {},
                h("th", { scope: "row" }, stage),
                h("td", { class: "n" }, duration(value)),
                h("td", { class: "n" }, percent(value / total)),
                barCell(value / longest),
              ),
            ),
          ),
        )
      : missing("The times of the stages were not kept."),
    h("h3", {}, "Settings"),
    changed.length ? settingsTable(changed, "Changed settings") : missing("All settings have their defaults."),
    rest.length > 0 &&
      h(
        "details",
        { id: "other-settings" },
        h(
          "summary",
          {},
          `${count(rest.length, "setting")} with ${rest.length === 1 ? "its default" : "their defaults"}`,
        ),
        settingsTable(rest, "Settings with their defaults"),
      ),
    h("h3", {}, "For the methods section"),
    run.methods ? methods() : missing("There is no text for the methods section."),
  );
}

function methods() {
  const citations = run.citations ?? [];
  const text = [run.methods, ...citations].join("\n\n");
  const said = h("span", { class: "note", role: "status" });
  const quote = h(
    "blockquote",
    {},
    h("p", {}, run.methods),
    citations.length > 0 &&
      h(
        "ul",
        {},
        citations.map((citation) => h("li", {}, citation)),
      ),
  );
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      said.textContent = "Copied.";
    } catch {
      // some browsers give files no clipboard
      getSelection().selectAllChildren(quote);
      said.textContent = "Selected; press Ctrl+C or ⌘C.";
    }
  };
  return h("div", {}, quote, h("p", {}, h("button", { type: "button", id: "copy", click: copy }, "Copy"), " ", said));
}

function compareSection() {
  const { compare } = content;
  if (!compare)
    return section(
      "compare",
      "Compared with another sort",
      "No other sort of this recording was given to compare with.",
    );
  const rows = [...(compare.rows ?? [])].sort((a, b) => a.agreement - b.agreement);
  const close = rows.filter((row) => row.agreement >= 0.8).length;
  const height = 150;
  const link = (id) => (rowOf.has(id) ? h("a", { href: `#unit-${id}` }, String(id)) : String(id));
  const list = (ids, linked) => ids.flatMap((id, i) => [i ? ", " : "", linked ? link(id) : String(id)]);
  const rowsOf = (some) =>
    h(
      "div",
      { class: "scroll", role: "region", "aria-label": "Matched units", tabindex: "0" },
      h(
        "table",
        { class: "plain" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ["Unit", "Other unit", "Agreement"].map((name) => h("th", { scope: "col", class: "n" }, name)),
          ),
        ),
        h(
          "tbody",
          {},
          some.map((row) =>
            h(
              "tr",
              {},
              h("th", { scope: "row", class: "n" }, link(row.unit)),
              h("td", { class: "n" }, row.other),
              h("td", { class: "n" }, number(row.agreement, 2)),
            ),
          ),
        ),
      ),
    );
  return section(
    "compare",
    "Compared with another sort",
    `${compare.name}: ${count(rows.length, "unit")} ${rows.length === 1 ? "has" : "have"} a counterpart, ${number(close)} of them with an agreement of 0.8 or more.${compare.sampled ? " A sample of the spikes was compared." : ""}${compare.not_compared ? ` ${count(compare.not_compared, "unit")} of both had no spikes in the time that was compared.` : ""}`,
    rows.length > 0 &&
      figure(
        "Agreement of matched units",
        chart({
          height,
          label: `Histogram of the agreement of ${count(rows.length, "pair")} of units; median ${number(
            quantile(
              rows.map((row) => row.agreement),
              0.5,
            ),
            2,
          )}.`,
          drawn: (width) => {
            const bins = Array.from({ length: 20 }, (_, i) => ({
              x1: i / 20,
              x2: (i + 1) / 20,
              n: rows.filter((row) => Math.min(19, Math.floor(row.agreement * 20)) === i).length,
            }));
            return plotted({
              width,
              height,
              marginLeft: 40,
              marginTop: 8,
              marginBottom: 34,
              x: {
                domain: [0, 1],
                label: "Agreement",
                labelAnchor: "center",
                labelArrow: "none",
                tickSize: 4,
                ticks: 5,
              },
              y: { label: null, ticks: 3, tickSize: 4, tickFormat: whole },
              marks: [
                Plot.rectY(bins, { x1: "x1", x2: "x2", y: "n", fill: "var(--data)", insetLeft: 0.5, insetRight: 0.5 }),
                Plot.ruleY([0], { stroke: "var(--axis)" }),
              ],
            });
          },
        }),
        "spikes of both, relative to the spikes of either",
      ),
    h(
      "dl",
      { class: "pairs" },
      h("dt", {}, "Only in this sort"),
      h("dd", {}, compare.gained?.length ? [`${number(compare.gained.length)}: `, list(compare.gained, true)] : "none"),
      h("dt", {}, "Only in the other"),
      h("dd", {}, compare.lost?.length ? [`${number(compare.lost.length)}: `, list(compare.lost, false)] : "none"),
    ),
    rows.length > 0 && h("details", {}, h("summary", {}, "All matched units, least agreement first"), rowsOf(rows)),
  );
}
