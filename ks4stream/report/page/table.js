// The table of units: sorted by any column, filtered by words and by conditions, saved as CSV.

const columns = [
  { name: "id", title: "Unit", digits: 0, help: "Number of the unit, as in Phy." },
  {
    name: "label",
    title: "Label",
    isText: true,
    help: "Good: fires like one neuron. Multi-unit: does not, for the reason given.",
  },
  { name: "reason", title: "Not good because", isText: true, help: "The first criterion that the unit does not meet." },
  {
    name: "y_um",
    title: "Depth",
    unit: "µm",
    digits: 0,
    help: "Position along the probe, as the probe file counts it: usually from the tip.",
  },
  ...(hasShanks ? [{ name: "shank", title: "Shank", digits: 0, help: "Shank of the probe." }] : []),
  { name: "channel", title: "Channel", digits: 0, help: "Channel of the file on which the unit is largest." },
  ...metrics.filter((metric) => metric.name in (content.units ?? {})),
  { name: "similar", title: "Most similar", digits: 0, help: "Unit with the most similar template." },
  { name: "similarity", title: "Similarity", digits: 2, help: "Correlation of the two templates, at the best lag." },
];

let shown = units; // in the order of the table; next and previous unit follow it
const sortedBy = { column: columns[0], isDescending: false };

function cell(column, unit) {
  const value = unit[column.name];
  if (column.name === "id")
    return h(
      "th",
      { scope: "row", class: "n" },
      h("a", { href: `#unit-${unit.id}`, "aria-label": `Unit ${unit.id}` }, String(unit.id)),
    );
  if (column.name === "label") return h("td", {}, symbol(value), LABELS[value] ?? value);
  if (column.isText) return h("td", {}, value);
  const failed = fails(column, value);
  return h(
    "td",
    { class: failed ? "n failed" : "n", title: failed && `Limit: ${limit(column)}` },
    value == null && column.undefined ? column.undefined : number(value, column.digits),
    failed && h("span", { class: "hidden" }, " (beyond the limit)"),
  );
}

const rowElements = new Map();

function rowElement(unit) {
  if (!rowElements.has(unit.id)) {
    rowElements.set(
      unit.id,
      h(
        "tr",
        { "data-unit": unit.id },
        columns.map((column) => cell(column, unit)),
      ),
    );
  }
  return rowElements.get(unit.id);
}

/** Order of values: numbers and text upwards, what is not defined always last. */
function compare(a, b) {
  const {
    column: { name },
    isDescending,
  } = sortedBy;
  const [one, other] = [a[name], b[name]];
  if (one == null || one === "" || other == null || other === "")
    return (one == null || one === "") - (other == null || other === "") || a.row - b.row;
  const order = typeof one === "string" ? one.localeCompare(other) : one - other;
  return (isDescending ? -order : order) || a.row - b.row;
}

const CONDITION = /^([\p{L}_]+)(<=|>=|<|>|=)(-?\d*\.?\d+)$/u;
const NAMES = new Map([
  ["depth", "y_um"],
  ["unit", "id"],
  ["rate", "firing_rate"],
  ["amplitude", "amplitude_median"],
  ["spikes", "num_spikes"],
  ["contamination", "rp_contamination"],
  ["presence", "presence_ratio"],
]);
const COMPARE = {
  "<": (a, b) => a < b,
  ">": (a, b) => a > b,
  "<=": (a, b) => a <= b,
  ">=": (a, b) => a >= b,
  "=": (a, b) => a === b,
};

/** The filter as functions of a unit, and the names in it that no column has. */
function parsed(text) {
  const tests = [];
  const unknown = [];
  for (const word of text
    .replace(/\s*(<=|>=|<|>|=)\s*/g, "$1")
    .split(/\s+/)
    .filter(Boolean)) {
    const condition = CONDITION.exec(word);
    if (!condition) {
      const needle = word.toLowerCase();
      tests.push(
        (unit) =>
          String(unit.id) === needle ||
          `${LABELS[unit.label] ?? unit.label} ${unit.label} ${unit.reason}`.toLowerCase().includes(needle),
      );
      continue;
    }
    const name = condition[1] in (content.units ?? {}) ? condition[1] : NAMES.get(condition[1]);
    if (!(name in (content.units ?? {}))) unknown.push(condition[1]);
    else {
      const beyond = metrics.some((metric) => metric.name === name && metric.undefined) ? Infinity : null;
      tests.push((unit) => {
        const value = unit[name] ?? beyond;
        return value != null && COMPARE[condition[2]](value, Number(condition[3]));
      });
    }
  }
  return { tests, unknown };
}

function csv(rows) {
  const names = columns.map((column) => column.name);
  const quoted = (value) =>
    value == null ? "" : /[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value);
  return (
    [names, ...rows.map((unit) => names.map((name) => unit[name]))]
      .map((line) => line.map(quoted).join(","))
      .join("\r\n") + "\r\n"
  );
}

function save(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

function unitsSection() {
  if (!units.length) return section("units", "Units", "No units were found.");
  const body = h("tbody", {
    click: (event) => !event.target.closest("a") && openUnit(Number(event.target.closest("tr").dataset.unit)),
  });
  const headers = columns.map((column) =>
    h(
      "th",
      { scope: "col", class: column.isText ? null : "n", "aria-sort": "none" },
      h(
        "button",
        {
          type: "button",
          title: [column.help, limit(column) && `Limit: ${limit(column)}.`].filter(Boolean).join(" "),
          click: () => sortBy(column),
        },
        column.title,
        column.unit && h("span", { class: "unit" }, ` ${column.unit}`),
        h("span", { class: "arrow", "aria-hidden": "true" }),
      ),
    ),
  );
  const filter = h("input", {
    type: "search",
    id: "filter",
    autocomplete: "off",
    spellcheck: "false",
    placeholder: "for example: snr > 5 depth < 1200",
    "aria-describedby": "filter-help",
    input: update,
  });
  const label = h(
    "select",
    { id: "label", change: update },
    h("option", { value: "" }, "all"),
    h("option", { value: "good" }, "good"),
    h("option", { value: "mua" }, "multi-unit"),
  );
  const status = h("p", { class: "note", id: "shown", role: "status" });
  const download = h(
    "button",
    { type: "button", id: "csv", click: () => save(`${recording.name}.units.csv`, csv(shown), "text/csv") },
    "Save as CSV",
  );

  function update() {
    const { tests, unknown } = parsed(filter.value);
    shown = units
      .filter((unit) => (!label.value || unit.label === label.value) && tests.every((test) => test(unit)))
      .sort(compare);
    body.replaceChildren(...shown.map(rowElement));
    status.textContent = unknown.length
      ? `There is no column ${unknown.join(", ")}; it is ignored. Columns: ${columns.map((column) => column.name).join(", ")}.`
      : shown.length === units.length
        ? `All ${number(units.length)} units.`
        : `${number(shown.length)} of ${number(units.length)} units.`;
  }

  function sortBy(column) {
    sortedBy.isDescending = sortedBy.column === column && !sortedBy.isDescending;
    sortedBy.column = column;
    headers.forEach((header, i) =>
      header.setAttribute(
        "aria-sort",
        columns[i] !== column ? "none" : sortedBy.isDescending ? "descending" : "ascending",
      ),
    );
    update();
  }

  headers[0].setAttribute("aria-sort", "ascending");
  update();
  const box = h(
    "div",
    { class: "scroll", role: "region", "aria-label": "Table of units", tabindex: "0" },
    h(
      "table",
      { class: "units" },
      h("caption", { class: "hidden" }, "Units; the buttons in the head sort by a column"),
      h("thead", {}, h("tr", {}, headers)),
      body,
    ),
  );
  let current = null;
  listeners.set("table", (id) => {
    current?.removeAttribute("aria-current");
    current = rowElements.get(id) ?? null;
    current?.setAttribute("aria-current", "true");
    if (!current?.isConnected) return;
    const head = headers[0].offsetHeight;
    const [above, below] = [current.offsetTop - head, current.offsetTop + current.offsetHeight - box.clientHeight];
    if (box.scrollTop > above || box.scrollTop < below) box.scrollTop = (above + below) / 2;
  });
  return section(
    "units",
    "Units",
    null,
    h(
      "form",
      { class: "filters", submit: (event) => event.preventDefault() },
      h("label", { for: "filter" }, "Filter"),
      filter,
      h("label", { for: "label" }, "Label"),
      label,
      download,
    ),
    h(
      "p",
      { class: "note", id: "filter-help" },
      "Words of label or reason, unit numbers, and conditions with a column’s name: snr > 5, rate <= 0.5, depth < 1200. " +
        "All must hold. Values beyond a limit are underlined.",
    ),
    status,
    box,
    h(
      "details",
      {},
      h("summary", {}, "What the columns mean"),
      h(
        "dl",
        { class: "meanings" },
        columns.map((column) => [
          h("dt", {}, withUnit(column.title, column.unit && `(${column.unit})`), " ", h("code", {}, column.name)),
          h("dd", {}, column.help, limit(column) && ` Limit: ${limit(column)}.`),
        ]),
      ),
    ),
  );
}
