"""Reports in a browser: order, filters, switching runs, any text, a phone, print, and accessibility by axe-core."""

import io
import shutil
import subprocess
import tarfile

import pytest
from reporting_cases import HOSTILE, example, hop, hops_records, retrieved_records, write_hops, write_training

from utils.files import write_jsonl
from utils.reporting.folder import read_folder
from utils.reporting.report import write_page

selenium = pytest.importorskip("selenium", reason="selenium is missing: pip install -r requirements-dev.txt")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium or chromedriver is missing: apt-get install chromium chromium-driver"
)
FLAGS = ("headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
         "disable-component-update disable-sync disable-dev-shm-usage")  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    except selenium.common.exceptions.WebDriverException as error:
        pytest.skip(f"chromium does not start here: {str(error).splitlines()[0]}")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a run with hops, of a run of a retriever, of two runs, and of one with any text: {name: path}."""
    folder = tmp_path_factory.mktemp("pages")
    runs = {"hops": write_hops(folder / "hops"), "retriever": write_training(folder / "retriever")}
    write_jsonl(runs["retriever"] / "retrieved.validation.jsonl", retrieved_records())
    texts = list(HOSTILE.values())
    records = [example(number, passages=[text, *texts], prediction=f"{text} words.", query=text, summary=text,
                       evidence=[1], hops=[hop(text, [0]), hop(text, [0, 1])], doc_id=text)
               for number, text in enumerate(texts)]  # fmt: skip
    runs["any"] = write_hops(folder / "any text", records, prompt_template=HOSTILE["script"])
    second = hops_records()
    second[1]["prediction"] = "Wooden fences cracked in the cellar."
    other = write_hops(folder / "other", second, num_hops=3)
    made = {}
    for name, run in runs.items():
        made[name] = run / "report.html"
        write_page([read_folder(run)], made[name])
    made["two runs"] = folder / "both.html"
    write_page([read_folder(runs["hops"]), read_folder(other)], made["two runs"])
    return made


@pytest.fixture
def look(browser, pages):
    """Opens a page at a width, light or dark; afterwards, nothing was wrong or fetched."""

    def at(name, width=1400, *, scheme="light", media=""):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        browser.get(pages[name].as_uri())
        return browser

    yield at
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return window.broken") is None


# texts that end beyond the right edge, but for those in tables, which scroll
TOO_WIDE = """
    const named = "h1, h2, h3, h4, p, li, .text, .badge, .chip, pre, dd, select, button";
    const edge = document.documentElement.clientWidth;
    const right = (text) => {
        const range = document.createRange();
        range.selectNodeContents(text);
        return Math.max(range.getBoundingClientRect().right, text.getBoundingClientRect().right);
    };
    const texts = [...document.querySelectorAll(named)].filter((text) => !text.closest(".scroll"));
    const seen = texts.filter((text) => right(text) > edge + 1);
    if (document.documentElement.scrollWidth > edge) seen.push(document.body);
    return seen.map((text) => text.outerHTML.slice(0, 200));
"""


def choose(browser, name: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("css selector", f"select[name={name}]")).select_by_value(value)


def shown(browser) -> list[str]:
    """The questions that are shown, in their order."""
    return [item.text for item in browser.find_elements("css selector", ".example:not([hidden]) h3")]


SAME = ["What was reported?", "What cracked?", "What was sold?"]  # as in the file


def test_order(look):
    browser = look("hops")
    assert shown(browser) == SAME
    choose(browser, "order", "worst")
    assert shown(browser)[0] == "What cracked?"
    choose(browser, "order", "helped")
    assert shown(browser) == SAME
    choose(browser, "order", "hurt")  # one hop, which nothing is known of, comes last
    assert shown(browser) == [SAME[1], SAME[0], SAME[2]]
    choose(browser, "order", "unsupported")
    assert shown(browser)[0] == "What was sold?"
    choose(browser, "order", "file")
    assert shown(browser) == SAME


def test_filters_search_and_the_count_that_is_read_aloud(look):
    browser = look("hops")
    for value, question in (("helped", SAME[0]), ("hurt", SAME[1]), ("missed", SAME[1]), ("unsupported", SAME[2])):
        choose(browser, "filter", value)
        assert shown(browser) == [question]
    count = browser.find_element("css selector", ".controls output")
    assert count.text == "1 of 3 examples" and count.get_attribute("aria-live") == "polite"
    choose(browser, "filter", "")
    search = browser.find_element("css selector", "input[type=search]")
    search.send_keys("ELEPHANTS")
    assert shown(browser) == [SAME[2]]
    search.clear()
    search.send_keys(" ")
    assert len(shown(browser)) == 3 and count.text == "3 examples"


def test_an_example_opens_by_click_and_key_and_links_lead_to_its_passages(look):
    browser = look("hops")
    first, second = browser.find_elements("css selector", ".example summary")[:2]
    first.click()
    passage = browser.find_element("css selector", ".example .passages .evidence")
    assert passage.is_displayed() and "Wooden fences cracked" in browser.find_element("css selector", ".example").text
    second.send_keys("\ue007")  # Enter
    assert "missed evidence" in browser.find_elements("css selector", ".example")[1].text
    link = browser.find_element("css selector", ".sentences a.chip")
    link.click()
    target = browser.switch_to.active_element.get_attribute("id") or browser.current_url.partition("#")[2]
    assert target == link.get_attribute("href").partition("#")[2]
    button = browser.find_element("css selector", "button[name=open]")
    button.click()
    assert browser.execute_script("return document.querySelectorAll('.example details[open]').length") == 3
    assert button.text == "Close all"


def test_a_link_into_a_closed_example_opens_it(look):
    browser = look("hops")
    browser.execute_script("location.hash = document.querySelectorAll('.passages > li')[4].id")
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    assert browser.execute_script("return document.querySelectorAll('.passages > li')[4].closest('details').open")


def test_runs_are_switched(look):
    browser = look("two runs")
    browser.find_element("css selector", ".example:nth-child(2) summary").click()

    def headings():
        found = browser.find_elements("css selector", ".example:nth-child(2) .side-by-side h4")
        return [heading.text for heading in found if heading.is_displayed()]

    assert headings() == ["hops", "other"]
    browser.find_element("css selector", "input[name=run][value='2']").click()
    assert headings() == ["other"]
    browser.find_element("css selector", "input[name=run][value='1']").click()
    assert headings() == ["hops"]
    browser.find_element("css selector", "input[name=run][value='']").click()
    assert headings() == ["hops", "other"]
    choose(browser, "order", "gained")
    assert shown(browser) == [SAME[1], SAME[0], SAME[2]]
    choose(browser, "filter", "gained")
    assert shown(browser) == [SAME[1]]


def test_any_text_is_text_and_fits_a_phone(look):
    browser = look("any", 390)
    browser.find_element("css selector", "button[name=open]").click()
    questions = [heading.text for heading in browser.find_elements("css selector", ".example h3")]
    assert questions[0] == HOSTILE["script"] and "before␀after" in questions[5] and "👩‍👩‍👧‍👦" in questions[4]
    assert browser.execute_script("return document.querySelectorAll('.example img, .example script').length") == 0
    assert browser.execute_script(TOO_WIDE) == []
    direction = (
        "return [...document.querySelectorAll('.example')].map(e => getComputedStyle(e.querySelector('h3')).direction)"
    )
    assert browser.execute_script(direction)[3] == "rtl"


@pytest.mark.parametrize("name", ["hops", "retriever", "two runs"])
def test_no_page_is_wider_than_a_phone(look, name):
    browser = look(name, 390)
    browser.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    assert browser.execute_script(TOO_WIDE) == []


def test_print_leaves_out_what_only_a_screen_needs(look):
    browser = look("hops", media="print")
    assert not browser.find_element("css selector", ".controls").is_displayed()
    assert browser.find_element("css selector", ".example h3").is_displayed()


def test_dark_where_the_reader_has_it(look):
    background = "return getComputedStyle(document.documentElement).backgroundColor"
    light = look("hops").execute_script(background)
    assert look("hops", scheme="dark").execute_script(background) != light


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The source of axe-core, fetched from the npm registry."""
    if not shutil.which("npm"):
        pytest.skip("npm is missing, which fetches axe-core")
    folder = tmp_path_factory.mktemp("axe")
    try:
        command = ["npm", "pack", "axe-core@4", "--silent", "--fetch-retries=0"]
        packed = subprocess.run(command, cwd=folder, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        packed = None
    archives = list(folder.glob("axe-core-*.tgz"))
    if packed is None or packed.returncode or not archives:
        pytest.skip("axe-core could not be fetched from the npm registry")
    with tarfile.open(fileobj=io.BytesIO(archives[0].read_bytes())) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["hops", "retriever", "two runs", "any"])
def test_accessibility(look, axe, name, scheme):
    browser = look(name, scheme=scheme)
    browser.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    browser.execute_script(axe)
    checked, found = browser.execute_async_script("""
        const done = arguments[arguments.length - 1];
        const told = (violation) => [violation.impact, violation.id,
                                     violation.nodes.slice(0, 5).map((node) => node.html + node.failureSummary)];
        axe.run(document, {resultTypes: ["violations"]}).then(
          (results) => done([results.passes.length, results.violations.map(told)]),
          (error) => done([0, [["critical", String(error), []]]]));
    """)
    assert checked > 20  # rules that apply to the page
    assert [finding for finding in found if finding[0] in ("serious", "critical")] == []
