"""The page of a sort: one safe, self-contained file, and what a person does with it in a browser."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
from page_content import METRICS, empty_page_content, page_content

from ks4stream.report import page as page_module
from ks4stream.report.page import SCRIPTS, write_page

CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
HERE = Path(page_module.__file__).parent
NASTY = "</script><script>alert(1)</script><!-- \u2028\u2029 \"'&amp;{{script}}\\ <b>.bin"


class Elements(HTMLParser):
    """The elements of a page, and the text in each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._is_open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.texts.append("")
        self._is_open = True

    def handle_endtag(self, tag: str) -> None:
        self._is_open = False

    def handle_data(self, data: str) -> None:
        if self._is_open:
            self.texts[-1] += data

    def text(self, wanted: str, **attributes: str) -> str:
        (found,) = (
            text
            for (tag, has), text in zip(self.found, self.texts, strict=True)
            if tag == wanted and attributes.items() <= has.items()
        )
        return found


def written(tmp_path: Path, content: dict[str, Any]) -> str:
    return write_page(content, tmp_path / "report.html").read_text(encoding="utf-8")


def unpacked(packed: dict[str, Any]) -> Any:
    raw = zlib.decompress(base64.b64decode(packed["base64"]))
    return np.frombuffer(raw, np.dtype(packed["dtype"]).newbyteorder("<")).reshape(packed["shape"])


def json_of(text: str, name: str) -> Any:
    return json.loads(Elements(text).text("script", id=name))


def test_the_file_is_complete_and_refers_to_nothing_elsewhere(tmp_path):
    text = written(tmp_path, page_content(5, n_parts=8))
    for tag, attributes in Elements(text).found:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            address = attributes.get(name) or ""
            assert not address or address.startswith(("#", "data:,")), f"<{tag} {name}={address}>"
    own = "".join((HERE / name).read_text("utf-8") for name in (*SCRIPTS, "page.css", "page.html"))
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|innerHTML|eval\(", own)
    in_library = set(re.findall(r"https?://[\w./]+", (HERE / "vendor" / "plot.js").read_text("utf-8")))
    assert all(address.startswith("http://www.w3.org/") for address in in_library)  # names of XML, not addresses


def test_the_policy_allows_these_scripts_and_no_request(tmp_path):
    elements = Elements(written(tmp_path, empty_page_content()))
    (policy,) = (has["content"] for _, has in elements.found if has.get("http-equiv") == "Content-Security-Policy")
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == allowed["base-uri"] == allowed["form-action"] == "'none'"
    scripts = [
        text
        for (tag, has), text in zip(elements.found, elements.texts, strict=True)
        if tag == "script" and "type" not in has
    ]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(hashes) == 2
    assert allowed["script-src"].split() == [f"'sha256-{one}'" for one in hashes]


def test_arrays_and_columns_arrive_as_they_were_given(tmp_path):
    content = page_content(7, n_parts=9)
    text = written(tmp_path, content)
    details, rest = json_of(text, "details"), json_of(text, "content")
    for name in ("template", "template_channels", "acg", "nearest", "ccg", "count", "similarity"):
        np.testing.assert_array_equal(unpacked(details[name]), content["details"][name])
        assert unpacked(details[name]).dtype == content["details"][name].dtype
    for name in ("amplitude", "depth_um"):
        np.testing.assert_allclose(unpacked(details[name]), content["details"][name], rtol=2**-14)
    np.testing.assert_array_equal(unpacked(rest["drift"]["displacement_um"]), content["drift"]["displacement_um"])
    np.testing.assert_array_equal(unpacked(rest["rasters"][0]["before"]), content["rasters"][0]["before"])
    assert rest["units"] == content["units"]
    assert rest["metrics"] == METRICS


def test_arrays_of_another_byte_order_memory_layout_and_of_flags(tmp_path):
    content = page_content(2, n_parts=4)
    image = np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    content["rasters"][0]["before"] = image
    content["drift"]["time_s"] = np.arange(3, dtype=">f4")
    content["time"]["noise"] = np.array([[True, False]])
    rest = json_of(written(tmp_path, content), "content")
    np.testing.assert_array_equal(unpacked(rest["rasters"][0]["before"]), image)
    np.testing.assert_array_equal(unpacked(rest["drift"]["time_s"]), [0, 1, 2])
    np.testing.assert_array_equal(unpacked(rest["time"]["noise"]), [[1, 0]])


def test_numbers_that_json_lacks_are_none_and_those_of_numpy_are_numbers(tmp_path):
    content = page_content(2, n_parts=4)
    content["units"]["snr"] = [float("nan"), np.float32(2.5)]
    content["verdict"]["drift_um"] = np.inf
    content["run"]["files"] = [Path("a.bin")]
    rest = json_of(written(tmp_path, content), "content")
    assert rest["units"]["snr"] == [None, 2.5]
    assert rest["verdict"]["drift_um"] is None
    assert rest["run"]["files"] == ["a.bin"]


def test_arrays_that_a_browser_has_no_type_for_are_refused(tmp_path):
    content = page_content(2, n_parts=4)
    content["drift"]["time_s"] = np.zeros(3, complex)
    with pytest.raises(TypeError, match=r"takes arrays of float32.* got one of complex128"):
        write_page(content, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_no_text_ends_its_element(tmp_path):
    content = page_content(3, n_parts=4)
    plain = Elements(written(tmp_path, content))
    content["recording"]["name"] = NASTY
    content["units"]["reason"] = [NASTY, "", NASTY]
    content["run"]["files"] = [NASTY, "name with bytes \udcff.bin"]
    content["verdict"]["warnings"] = [{"text": NASTY, "setting": NASTY}]
    text = written(tmp_path, content)
    elements = Elements(text)
    assert [tag for tag, _ in elements.found] == [tag for tag, _ in plain.found]
    assert NASTY in elements.text("title")
    assert json_of(text, "content")["units"]["reason"] == [NASTY, "", NASTY]
    data = Elements(text).text("script", id="content")
    assert data.isascii()
    assert not set(data) & set("<>&")


@pytest.mark.slow
def test_a_thousand_units_take_less_than_five_megabytes(tmp_path):
    assert write_page(page_content(1000), tmp_path / "report.html").stat().st_size < 5e6


def test_the_vendored_library_is_the_one_that_its_readme_describes():
    readme = (HERE / "vendor" / "README.md").read_text("utf-8")
    library = (HERE / "vendor" / "plot.js").read_bytes()
    assert hashlib.sha256(library).hexdigest() in readme
    assert b"</script" not in library.lower()
    assert b"<!--" not in library
    package = json.loads((HERE / "vendor" / "package.json").read_text("utf-8"))
    for name, version in {**package["dependencies"], **package["devDependencies"]}.items():
        assert f"{name} {version}" in readme


def test_every_file_of_the_page_is_used_or_explained(tmp_path):
    text = written(tmp_path, empty_page_content())
    for path in sorted(HERE.glob("*.js")):
        assert path.name in SCRIPTS
        assert path.read_text("utf-8") in text


# --- In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    nasty = page_content(4, n_parts=6, n_channels=32)
    nasty["recording"]["name"] = NASTY
    nasty["units"]["reason"] = [NASTY] * 4
    nasty["run"]["settings"][0]["value"] = NASTY
    bare = page_content(6, n_parts=6, n_channels=32)
    bare.update(details=None, drift=None, rasters=[], probe=None, compare=None, time={}, funnel=[], left_out=[], run={})
    odd = page_content(3, n_parts=1, n_channels=4, duration_s=0.5)
    for metric in METRICS[1:]:
        odd["units"][metric["name"]] = [None] * 3
    odd["units"]["x_um"] = odd["units"]["y_um"] = [None] * 3
    odd["drift"].update(
        time_s=np.zeros(0, np.float32), displacement_um=np.zeros((0, 0), np.float32), error_um=None, centre_um=[]
    )
    odd["rasters"] = [{**odd["rasters"][0], "before": None}, {**odd["rasters"][0], "before": None, "after": None}]
    odd["time"].update(noise=np.zeros((4, 1), np.float32), explained=[None], blanked_share=[1.0])
    odd["details"].update(ccg=None, similarity=None, acg=None, count=np.zeros((3, 1), np.uint16))
    odd["details"]["template_channels"][:] = -1
    odd["compare"].update(rows=[], gained=[], lost=[])
    still = page_content(3, n_parts=6, n_channels=16)
    still["drift"]["displacement_um"][:] = 0
    still["verdict"]["drift_um"] = 0.0
    pages = {
        "odd": odd,
        "still": still,
        "full": page_content(60, n_parts=40, n_channels=96),
        "deep": page_content(4, n_parts=6, n_channels=200),
        "shanks": page_content(20, n_parts=10, n_channels=64, n_shanks=4),
        "one": page_content(1, n_parts=3, n_channels=4),
        "none": page_content(0, n_parts=3, n_channels=4),
        "empty": empty_page_content(),
        "nasty": nasty,
        "bare": bare,
    }
    return {name: write_page(content, folder / f"{name}.html") for name, content in pages.items()}


class Visit:
    """A page in a browser, and all it complained about and asked for."""

    def __init__(self, browser: Any, file: Path, fragment: str = "", **options: Any) -> None:
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri() + fragment)

    def all_drawn(self) -> None:
        """Wait until charts that are not in view are drawn, too."""
        self.wait_for("[...drawings].every(([chart]) => !chart.clientWidth || chart.childElementCount)")

    def open(self, row: int) -> None:
        """Click on the unit in a row of the table; the address changes first, then the unit opens."""
        link = self.page.locator("table.units tbody a").nth(row)
        link.click()
        self.wait_for(f"document.activeElement.textContent === 'Unit {link.inner_text()}'")

    def wait_for(self, condition: str) -> None:
        """Playwright's own function evaluates text in the page, which its policy forbids."""
        for _ in range(500):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"never true: {condition}")

    def column(self, number: int) -> list[str]:
        return self.page.locator(f"table.units tbody tr > :nth-child({number})").all_inner_texts()


@pytest.fixture
def visit(browser: Any, files: dict[str, Path]) -> Iterator[Any]:
    opened = []

    def go(name: str, fragment: str = "", **options: Any) -> Visit:
        opened.append(Visit(browser, files[name], fragment, **options))
        return opened[-1]

    yield go
    for one in opened:
        one.page.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "shanks", "one", "none", "empty", "nasty", "bare", "odd", "still"])
def test_a_page_opens_without_a_complaint_and_asks_for_nothing(visit, files, name):
    seen = visit(name)
    seen.all_drawn()
    for row in range(min(3, seen.page.locator("table.units tbody a").count())):
        seen.open(row)
        seen.all_drawn()
    assert seen.complaints == []
    assert seen.requests == [files[name].as_uri()]
    assert seen.page.get_by_text("could not be drawn").count() == 0
    said = seen.page.evaluate(
        "document.body.innerText + [...document.querySelectorAll('[aria-label]')].map(one => one.ariaLabel)"
    )
    assert not re.search(r"NaN|undefined|\bnull\b|Infinity|\[object|∞", said)


@pytest.mark.slow
def test_every_chart_says_what_it_shows_with_figures(visit):
    seen = visit("full", "#unit-3")
    seen.all_drawn()
    said = seen.page.locator(".chart").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert len(said) > 25
    assert [label for label in said if not re.search(r"\d", label)] == []
    assert not any(re.search(r"NaN|undefined|null|Infinity", label) for label in said)
    assert "of spikes within" in next(label for label in said if label.startswith("Auto-correlogram"))


@pytest.mark.slow
def test_rasters_show_a_part_of_the_probe_when_one_is_chosen(visit):
    seen = visit("deep")
    seen.all_drawn()
    depths = "document.querySelector('#drift .raster svg').scale('y').domain"
    low, high = seen.page.evaluate(depths)
    seen.page.select_option("#depths", "0")  # the uppermost
    seen.wait_for(f"{depths}[0] > {low}")
    assert seen.page.evaluate(depths)[1] == high
    clip, picture = (
        seen.page.locator(f"#drift {name}").first.bounding_box()["height"] for name in (".picture", ".picture canvas")
    )
    assert picture > 2 * clip


@pytest.mark.slow
def test_text_with_markup_is_shown_as_text(visit):
    seen = visit("nasty")
    assert NASTY.strip() in seen.page.locator("h1 .name").text_content()
    assert seen.page.locator("td b").count() == 0


@pytest.mark.slow
def test_missing_parts_are_sentences(visit):
    seen = visit("bare")
    bare = seen.page
    for sentence in (
        "There is no estimate of drift.",
        "No raster of peaks was kept.",
        "There are no spikes",
        "Nothing was blanked.",
    ):
        assert bare.get_by_text(sentence).count()
    seen.open(0)
    assert bare.get_by_text("Waveforms and correlograms were not kept.").is_visible()
    assert visit("empty").page.get_by_text("because nblocks is 0").is_visible()


@pytest.mark.slow
def test_contamination_that_cannot_be_excluded_is_beyond_the_limit(visit, files):
    page = visit("full").page
    violations = json_of(files["full"].read_text("utf-8"), "content")["units"]["sliding_rp_violation"]
    none = violations.index(None)
    row = page.locator(f"tr[data-unit='{none}']")
    assert row.locator("td.failed", has_text="> 0.35").count() == 1
    beyond = [i for i, value in enumerate(violations) if value is None or value > 0.1]
    assert page.get_by_text(f"at most 0.1; {len(beyond)} units beyond it").count()


@pytest.mark.slow
def test_tissue_that_did_not_move_was_not_corrected(visit):
    still = visit("still").page
    assert still.get_by_text("No motion of the tissue was found").is_visible()
    assert not still.get_by_text("Displacement of the tissue").count()
    assert still.get_by_text("Sorted", exact=True).count() and not still.get_by_text("Corrected", exact=True).count()


@pytest.mark.slow
def test_the_table_is_sorted_by_mouse_and_keyboard(visit):
    seen = visit("full")
    header = seen.page.locator("table.units thead th", has_text="Spikes")
    header.get_by_role("button").click()
    place = seen.page.locator("table.units thead th").all_inner_texts().index(header.inner_text()) + 1
    numbers = [int(text.split()[0].replace(",", "")) for text in seen.column(place)]
    assert numbers == sorted(numbers)
    assert header.get_attribute("aria-sort") == "ascending"
    header.get_by_role("button").press("Enter")
    assert [int(text.split()[0].replace(",", "")) for text in seen.column(place)] == numbers[::-1]
    assert header.get_attribute("aria-sort") == "descending"
    assert seen.page.locator('table.units [aria-sort]:not([aria-sort="none"])').count() == 1


@pytest.mark.slow
def test_values_that_are_not_defined_come_last_in_both_directions(visit):
    seen = visit("full")
    button = seen.page.locator("table.units thead th", has_text="Amplitude cutoff").get_by_role("button")
    names = [" ".join(name.split()) for name in seen.page.locator("table.units thead th").all_inner_texts()]
    place = names.index("Amplitude cutoff")
    for _ in range(2):
        button.click()
        is_known = [text.strip() != "–" for text in seen.column(place + 1)]
        assert not all(is_known)
        assert is_known == sorted(is_known, reverse=True)


@pytest.mark.slow
def test_the_table_is_filtered_by_words_conditions_and_label(visit, files):
    seen = visit("full")
    units = json_of(files["full"].read_text("utf-8"), "content")["units"]
    rows = range(len(units["id"]))

    def shown(text: str, label: str = "") -> list[int]:
        seen.page.fill("#filter", text)
        seen.page.select_option("#label", label)
        return [int(one) for one in seen.column(1)]

    assert shown("snr > 6 depth<=400") == [i for i in rows if units["snr"][i] > 6 and units["y_um"][i] <= 400] != []
    assert shown("", "good") == [i for i in rows if units["label"][i] == "good"]
    assert shown("refractory") == [i for i in rows if "refractory" in units["reason"][i]]
    assert shown("missing < 3") == list(rows)
    assert "no column missing" in seen.page.locator("#shown").inner_text()
    assert shown("amplitude_cutoff >= 0") == [i for i in rows if units["amplitude_cutoff"][i] is not None]
    violations = units["sliding_rp_violation"]
    assert shown("sliding_rp_violation > 0.3") == [i for i in rows if violations[i] is None or violations[i] > 0.3]


@pytest.mark.slow
def test_the_csv_has_the_rows_that_are_shown_in_their_order(visit, files, tmp_path):
    seen = visit("full")
    units = json_of(files["full"].read_text("utf-8"), "content")["units"]
    seen.page.select_option("#label", "good")
    seen.page.locator("table.units thead th", has_text="Depth").get_by_role("button").click()
    with seen.page.expect_download() as waiting:
        seen.page.click("#csv")
    assert waiting.value.suggested_filename.endswith(".csv")
    waiting.value.save_as(tmp_path / "units.csv")
    with open(tmp_path / "units.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    good = [i for i, label in enumerate(units["label"]) if label == "good"]
    assert [int(row["id"]) for row in rows] == sorted(good, key=lambda i: units["y_um"][i])
    for row in rows:
        for metric in METRICS:
            value = units[metric["name"]][int(row["id"])]
            assert row[metric["name"]] == "" if value is None else float(row[metric["name"]]) == value
    assert seen.requests == [files["full"].as_uri()]


IN_TABLE = ("tr[aria-current=true]", "#units .scroll")


@pytest.mark.slow
def test_a_unit_is_opened_by_fragment_link_row_and_key(visit):
    seen = visit("full", "#unit-12")
    page, title = seen.page, seen.page.locator("#unit-title")
    assert title.inner_text() == "Unit 12"
    page.keyboard.press("ArrowRight")
    assert title.inner_text() == "Unit 13"
    assert page.evaluate("location.hash") == "#unit-13"
    page.click("#unit-next")
    assert title.inner_text() == "Unit 14"
    assert page.evaluate("document.activeElement.id") == "unit-next"
    page.keyboard.press("k")
    page.keyboard.press("Escape")
    assert page.locator("#unit").is_hidden()
    assert page.evaluate("location.hash") == ""
    link = page.locator("table.units tbody a").nth(3)
    link.focus()
    link.press("Enter")
    seen.wait_for("document.activeElement.id === 'unit-title'")
    assert title.inner_text() == "Unit 3"
    assert page.evaluate("document.activeElement.id") == "unit-title"
    assert page.locator("tr[aria-current=true]").get_attribute("data-unit") == "3"
    page.locator("#unit").press("Escape")
    assert link.evaluate("link => link === document.activeElement")
    page.locator("table.units tbody tr").nth(5).locator("td").first.click()
    assert title.inner_text() == "Unit 5"
    page.keyboard.press("Escape")
    page.evaluate("location.hash = '#unit-57'")
    seen.wait_for("document.getElementById('unit-title').textContent === 'Unit 57'")
    row, box = (f"document.querySelector('{name}').getBoundingClientRect()" for name in IN_TABLE)
    seen.wait_for(f"{box}.top < {row}.top && {row}.bottom <= {box}.bottom")  # the table followed
    page.go_back()
    seen.wait_for("document.getElementById('unit').hidden")
    assert seen.complaints == []


@pytest.mark.slow
def test_a_unit_is_opened_from_the_probe_map(visit):
    seen = visit("full")
    chart = seen.page.locator("#probe .chart").first
    chart.scroll_into_view_if_needed()
    seen.all_drawn()
    box = chart.locator("svg.opens").bounding_box()
    x, y = seen.page.evaluate(
        "() => { const svg = document.querySelector('#probe svg.opens');"
        "return [svg.scale('x').apply(units[20].x_um), svg.scale('y').apply(units[20].y_um)]; }"
    )
    seen.page.mouse.move(box["x"] + x - 1, box["y"] + y)
    seen.page.mouse.move(box["x"] + x, box["y"] + y)
    seen.page.mouse.click(box["x"] + x, box["y"] + y)
    assert seen.page.locator("#unit-title").inner_text() == "Unit 20"


@pytest.mark.slow
def test_next_and_previous_follow_the_table(visit):
    seen = visit("full")
    seen.page.select_option("#label", "mua")
    shown = seen.column(1)
    seen.open(0)
    for number in shown[1:4]:
        seen.page.keyboard.press("j")
        assert seen.page.locator("#unit-title").inner_text() == f"Unit {number}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "empty", "shanks"])
def test_a_narrow_page_does_not_scroll_sideways(visit, name):
    seen = visit(name, viewport={"width": 390, "height": 844})
    seen.all_drawn()
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
    if name != "empty":
        seen.open(0)
        seen.all_drawn()
        assert seen.page.evaluate("document.getElementById('unit').scrollWidth") <= 390


@pytest.mark.slow
def test_the_theme_follows_the_system_and_the_button(visit):
    def paper(page: Any) -> list[int]:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return [int(part) for part in re.findall(r"\d+", colour)[:3]]

    assert min(paper(visit("full").page)) > 200
    dark = visit("full", color_scheme="dark").page
    assert max(paper(dark)) < 60
    dark.click("#theme")
    assert min(paper(dark)) > 200
    dark.reload()
    assert min(paper(dark)) > 200


@pytest.mark.slow
def test_what_is_folded_is_printed_and_controls_are_not(visit):
    seen = visit("full")
    seen.all_drawn()
    seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    seen.page.emulate_media(media="print")
    assert seen.page.locator("details:not([open])").count() == 0
    assert seen.page.locator("#setting-nblocks").is_visible()
    assert seen.page.locator(".bar").is_hidden()
    seen.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert seen.page.locator("details[open]").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "fragment"), [("full", ""), ("full", "#unit-3"), ("empty", ""), ("bare", "")])
def test_accessibility(visit, name, fragment, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    seen = visit(name, fragment, color_scheme=scheme)
    seen.all_drawn()
    found = axe.Axe().run(seen.page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []
    headings = seen.page.locator("main :is(h1, h2, h3)").evaluate_all("all => all.map(one => Number(one.tagName[1]))")
    assert headings[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(headings))
