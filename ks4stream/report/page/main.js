// Puts the sections together, and follows the address, the theme and the printer.

const SECTIONS = [
  ["verdict", "Verdict", verdictSection],
  ["drift", "Drift", driftSection],
  ["probe", "Probe", probeSection],
  ["units", "Units", unitsSection],
  ["metrics", "Quality", metricsSection],
  ["time", "Over time", timeSection],
  ["steps", "Steps", funnelSection],
  ["run", "Run", runSection],
  ["compare", "Compared", compareSection],
].filter(([id]) => id !== "compare" || content.compare);

document.getElementById("main").replaceChildren(...SECTIONS.map(([, , make]) => make()));
document
  .getElementById("sections")
  .replaceChildren(...SECTIONS.map(([id, name]) => h("li", {}, h("a", { href: `#${id}` }, name))));
document
  .getElementById("footer")
  .replaceChildren(
    h(
      "p",
      {},
      `Written by ks4stream${run.versions?.ks4stream ? ` ${run.versions.ks4stream}` : ""}${run.written ? ` on ${run.written}` : ""}. This file is complete: it loads nothing from elsewhere. Charts are drawn with Observable Plot.`,
    ),
  );

// Links within the page: units open, settings are shown even if they are folded away.
function follow() {
  const id = unitOfHash();
  if (id !== null) {
    if (openedUnit === null) returnTo = document.activeElement === document.body ? null : document.activeElement;
    showUnit(id);
  } else if (openedUnit !== null && (location.hash === "" || location.hash.startsWith("#unit-"))) showUnit(null);
  if (location.hash.startsWith("#setting-")) {
    const row = document.getElementById(location.hash.slice(1));
    row?.closest("details")?.setAttribute("open", "");
    row?.scrollIntoView({ block: "center" });
  }
}
window.addEventListener("hashchange", follow);
follow();

const theme = document.getElementById("theme");
const isDark = () =>
  (document.documentElement.dataset.theme ??
    (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const stored = {
  get() {
    try {
      return localStorage.getItem("ks4stream-theme");
    } catch {
      return null;
    }
  },
  set(value) {
    try {
      localStorage.setItem("ks4stream-theme", value);
    } catch {
      /* files have no storage in some browsers */
    }
  },
};
function showTheme() {
  theme.textContent = isDark() ? "Light colours" : "Dark colours";
}
if (["dark", "light"].includes(stored.get())) document.documentElement.dataset.theme = stored.get();
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  stored.set(document.documentElement.dataset.theme);
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
showTheme();

let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((element) => element.setAttribute("open", ""));
});
window.addEventListener("afterprint", () => folded.forEach((element) => element.removeAttribute("open")));

whenIdle(drawRest);
