"""The HTML report in a real browser: it sorts, filters, copies and draws, without network and errors."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.report import html
from finetune.report.figures import make_figures

pytestmark = pytest.mark.browser
example = runpy.run_path(str(Path(__file__).with_name("comparison_example.py")))
FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
)

RESTORE = """
for (const open of document.querySelectorAll('.toggle[aria-expanded=true]')) open.click();
const filters = document.getElementById('filters');
for (const field of filters.querySelectorAll('input')) field.value = '';
for (const field of filters.querySelectorAll('select')) field.value = '*';
filters.dispatchEvent(new Event('input'));
const head = document.querySelectorAll('#rows thead button')[2];
while (head.closest('th').getAttribute('aria-sort') !== 'descending') head.click();
"""


@pytest.fixture(scope="module")
def comparison() -> dict[str, Any]:
    return example["comparison"]()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *FLAGS,
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
        "window-size=1400,900",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def opened(browser: Any, comparison: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the browser after it has opened and drawn the report."""
    file = tmp_path_factory.mktemp("report") / "report ünï.html"
    html.write_report(comparison, file)
    browser.get(file.as_uri())
    wait(browser, "return document.documentElement.dataset.drawn !== undefined")
    return browser


@pytest.fixture
def page(opened: Any) -> Iterator[Any]:
    """Return the report in the state in which it was opened, and check the browser's log afterwards."""
    yield opened
    assert opened.get_log("browser") == []
    opened.execute_script(RESTORE)


def wait(browser: Any, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda found: found.execute_script(condition))


def find(page: Any, query: str) -> Any:
    return page.find_element("css selector", query)


def labels(page: Any) -> list[str]:
    """Return the labels of the visible rows, from the top."""
    return page.execute_script(
        "const shown = [...document.querySelectorAll('#rows tbody')].filter(body => !body.hidden);"
        "return shown.map(body => body.rows[0].cells[0].dataset.value)"
    )


def expected(
    comparison: dict[str, Any], value: Callable[[dict[str, Any]], Any], down: bool = False
) -> list[Any]:
    known = sorted((v for row in comparison["rows"] if (v := value(row)) is not None), reverse=down)
    return known + [None] * (len(comparison["rows"]) - len(known))


def sort_by(page: Any, words: str) -> Any:
    """Click the button of the heading that begins with ``words``, and return the heading."""
    for head in page.find_elements("css selector", "#rows thead th"):
        if head.text.replace("\n", " ").startswith(words):
            head.find_element("tag name", "button").click()
            return head
    raise AssertionError(f"no column {words}")


@pytest.mark.parametrize(
    ("head", "key"),
    [
        ("trained", "trained"),
        ("stored", "stored_bytes"),
        ("time per step", "step_seconds"),
        ("peak memory", "peak_memory_bytes"),
    ],
)
def test_sorts_by_a_column_up_and_down(page: Any, comparison: dict[str, Any], head: str, key: str) -> None:
    by_label = {row["label"]: row[key] for row in comparison["rows"]}
    found = sort_by(page, head)
    assert found.get_attribute("aria-sort") == "ascending"
    assert [by_label[label] for label in labels(page)] == expected(comparison, lambda row: row[key])
    sort_by(page, head)
    assert found.get_attribute("aria-sort") == "descending"
    assert [by_label[label] for label in labels(page)] == expected(
        comparison, lambda row: row[key], down=True
    )
    assert len(page.find_elements("css selector", "[aria-sort]:not([aria-sort=none])")) == 1


def test_sorts_by_the_keyboard(page: Any, comparison: dict[str, Any]) -> None:
    by_label = {row["label"]: row["mean"] for row in comparison["rows"]}
    assert [by_label[label] for label in labels(page)] == expected(
        comparison, lambda row: row["mean"], down=True
    )
    button = find(page, "#rows th[aria-sort=descending] button")
    button.send_keys("\n")
    assert [by_label[label] for label in labels(page)] == expected(comparison, lambda row: row["mean"])
    button.send_keys(" ")
    assert [by_label[label] for label in labels(page)] == expected(
        comparison, lambda row: row["mean"], down=True
    )


def test_numbers_in_names_sort_by_size(page: Any, comparison: dict[str, Any]) -> None:
    sort_by(page, "row")
    found = labels(page)
    assert (
        found.index("spiel sparsity=0.9")
        < found.index("spiel sparsity=0.99")
        < found.index("spiel sparsity=0.999")
    )
    assert found[0] == "amt sparsity=0.9"
    assert sorted(found) == sorted(row["label"] for row in comparison["rows"])


def test_the_page_says_how_many_rows_a_filter_hides(page: Any, comparison: dict[str, Any]) -> None:
    count = find(page, "#count")
    assert count.text == "14 of 14 rows"
    find(page, "#find").send_keys("SPIEL 0.99")
    assert labels(page) == [
        row["label"]
        for row in comparison["rows"]
        if row["label"] in ("spiel sparsity=0.99", "spiel sparsity=0.999")
    ]
    assert count.text == "2 of 14 rows"
    find(page, "#find").send_keys(" nowhere")
    assert count.text == "0 of 14 rows"
    assert find(page, "#empty").is_displayed()
    find(page, "#clear").click()
    wait(page, "return document.getElementById('count').textContent === '14 of 14 rows'")
    assert not find(page, "#empty").is_displayed()


def test_choices_of_settings_filter_together(page: Any, comparison: dict[str, Any]) -> None:
    from selenium.webdriver.support.ui import Select

    method, sparsity = (Select(select) for select in page.find_elements("css selector", "#filters select"))
    assert [option.text for option in sparsity.options] == ["all", "0.9", "0.99", "0.999", "\u2013"]
    method.select_by_visible_text("snell")
    wait(page, "return document.getElementById('count').textContent === '3 of 14 rows'")
    sparsity.select_by_visible_text("0.99")
    wait(page, "return document.getElementById('count').textContent === '1 of 14 rows'")
    assert labels(page) == [example["HOSTILE"]]
    method.select_by_visible_text("all")
    sparsity.select_by_visible_text("\u2013")
    wait(
        page,
        "return document.querySelectorAll('#rows tbody:not([hidden])')[0].dataset.words.startsWith('lora')",
    )
    assert labels(page) == ["lora"]
    sort_by(page, "trained")
    assert labels(page) == ["lora"]


def test_values_can_be_read(page: Any, comparison: dict[str, Any]) -> None:
    for body, row in zip(page.find_elements("css selector", "#rows tbody"), comparison["rows"], strict=True):
        text = body.text
        assert row["label"] in text
        if row["mean"] is not None:
            assert f"{100 * row['mean']:.2f}" in text
            assert f"{row['trained']:,}" in text
        if row["low"] is not None:
            assert f"{100 * row['low']:.2f} to {100 * row['high']:.2f}" in text
    assert example["HOSTILE"] in page.find_element("tag name", "body").text


def test_details_open_and_stay_with_their_row(page: Any, comparison: dict[str, Any]) -> None:
    details = page.find_elements("css selector", ".more")
    assert not any(detail.is_displayed() for detail in details)
    button = find(page, "#rows tbody .toggle")
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    assert details[0].is_displayed()
    assert comparison["rows"][0]["command"] in details[0].text
    sort_by(page, "trained")
    owner = page.execute_script(
        "return document.querySelector('.more.open').parentElement.rows[0].cells[0].dataset.value"
    )
    assert owner == comparison["rows"][0]["label"]


def test_the_command_is_copied_exactly(page: Any, comparison: dict[str, Any]) -> None:
    page.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    button = find(page, "#rows tbody .copy")
    button.click()
    wait(page, "return document.querySelector('.copy').textContent === 'copied'")
    box = find(page, "#find")
    box.click()
    box.send_keys("\ue009v")  # control and v
    assert box.get_attribute("value") == comparison["rows"][0]["command"]


def test_the_command_is_copied_without_the_clipboard_interface(page: Any, comparison: dict[str, Any]) -> None:
    page.execute_script(
        "Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })"
    )
    button = page.find_elements("css selector", "#rows tbody .copy")[3]
    button.click()
    wait(page, "return document.querySelectorAll('.copy')[3].textContent === 'copied'")
    box = find(page, "#find")
    box.click()
    box.send_keys("\ue009v")
    assert box.get_attribute("value") == comparison["rows"][3]["command"]


def test_every_figure_is_drawn_with_its_points(page: Any, comparison: dict[str, Any]) -> None:
    made = make_figures(comparison)
    assert page.execute_script("return document.documentElement.dataset.drawn") == str(len(made))
    for figure in made:
        counts = page.execute_script(
            "const div = document.getElementById(arguments[0]);"
            "const count = (query) => div.querySelectorAll(query).length;"
            "return [count('svg.main-svg'), count('.scatterlayer .trace'), count('.points path'),"
            " div.clientWidth, div.querySelector('svg').clientWidth]",
            f"plot-{figure.key}",
        )
        marked = sum(len(trace["x"]) for trace in figure.data if "markers" in trace["mode"])
        assert counts[0] >= 1
        assert counts[1:3] == [len(figure.data), marked]
        assert counts[3] == counts[4] > 300
    ticks = page.execute_script(
        "return [...document.querySelectorAll('#plot-differences .ytick text')].map(t => t.textContent)"
    )
    assert "snell <script>\u2026 $5$ </script>" in ticks


def test_a_series_is_hidden_and_shown_in_all_figures(page: Any) -> None:
    paths = "#plot-pareto_trained .points path, #plot-by_sparsity .points path"
    query = f"return document.querySelectorAll('{paths}').length"
    before = page.execute_script(query)
    chip = find(page, ".chip[data-series=spiel]")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    wait(page, query.replace("return ", "return (").removesuffix(";") + f") === {before - 6}")
    chip.click()
    wait(page, query.replace("return ", "return (") + f") === {before}")


def test_no_request_was_sent(page: Any) -> None:
    asked = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in asked if not name.startswith(("data:", "blob:"))] == []
    refused = page.execute_async_script(
        "const done = arguments[0];"
        "fetch('https://example.org/').then(() => done('went'), () => done('refused'))"
    )
    assert refused == "refused"
    messages = [entry["message"] for entry in page.get_log("browser")]
    assert messages  # of the refusal, by the page's own policy
    assert all("Content Security Policy" in message for message in messages)


def test_light_and_dark(page: Any) -> None:
    colours = (
        "const tick = document.querySelector('.xtick text');"
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(tick).fill]"
    )
    light = page.execute_script(colours)
    find(page, "#theme").click()
    wait(page, "return document.documentElement.dataset.theme === 'dark'")
    dark = page.execute_script(colours)
    assert light == ["rgb(251, 250, 248)", "rgb(29, 33, 38)"]
    assert dark == ["rgb(20, 23, 27)", "rgb(231, 233, 236)"]
    find(page, "#theme").click()
    assert page.execute_script(colours) == light


def test_a_small_screen_shows_all_without_scrolling_sideways(page: Any) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        wait(
            page, "return innerWidth === 400 && document.querySelector('#plot-curves svg').clientWidth < 400"
        )
        assert page.execute_script("return document.documentElement.scrollWidth") == 400
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_titles_beside_axes_are_whole_above_a_long_legend(opened: Any, tmp_path: Path) -> None:
    comparison = example["comparison"]()
    comparison["metric"] |= {"name": "retention.accuracy", "words": "retention accuracy"}
    comparison["by"] = ["method", "sparsity", "method.rank"]
    for place, row in enumerate(comparison["rows"]):  # many lines, so a long legend
        row["by"]["method.rank"] = 4 << place % 3
    html.write_report(comparison, tmp_path / "report.html")
    first = opened.current_window_handle
    opened.switch_to.new_window("tab")
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        opened.get((tmp_path / "report.html").as_uri())
        wait(opened, "return document.documentElement.dataset.drawn !== undefined")
        clipped = opened.execute_script(
            "return [...document.querySelectorAll('.plot .infolayer .ytitle')].filter(title => {"
            " const a = title.getBoundingClientRect(), b = title.closest('svg').getBoundingClientRect();"
            " return Math.max(b.top - a.top, a.bottom - b.bottom, b.left - a.left) > 1"
            "}).map(title => title.textContent)"
        )
        assert clipped == []
    finally:
        opened.close()
        opened.switch_to.window(first)


def test_the_page_can_be_printed(page: Any) -> None:
    pdf = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True})[
        "data"
    ]
    assert len(pdf) > 50_000
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert find(page, ".more .command code").is_displayed()
        assert not find(page, ".copy").is_displayed()
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
