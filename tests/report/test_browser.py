"""The report in a real browser."""

import shutil
from functools import partial
from itertools import pairwise

import pytest
from made import HOSTILE, make_run

from mtrain.report.html import write_report

pytest.importorskip("plotly", reason="needs the extra mtrain[report]")
sync = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

NAMES = [*HOSTILE, *(f"assay {t:04d}" for t in range(996))]
PATIENCE = 120_000  # milliseconds, on a busy machine
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of two runs with 1000 tasks."""
    folder = tmp_path_factory.mktemp("report")
    paths = [folder / "base", folder / "better"]
    for path, noise in zip(paths, (1.0, 0.6), strict=True):
        make_run(path, 1000, 60, names=NAMES, noise=noise, affinity=path.name == "base")
    write_report(paths, folder / "report.html", resamples=20)
    return folder / "report.html"


@pytest.fixture(scope="module")
def small_report(tmp_path_factory):
    """Of two runs with 24 tasks."""
    folder = tmp_path_factory.mktemp("small")
    paths = [folder / "base", folder / "better"]
    for path, noise in zip(paths, (1.0, 0.6), strict=True):
        make_run(path, 24, 60, names=NAMES[:24], noise=noise, affinity=path.name == "base")
    write_report(paths, folder / "report.html", resamples=20)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(report, watched_page):
    return partial(watched_page, report)


@pytest.fixture
def open_small(small_report, watched_page):
    return partial(watched_page, small_report)


@pytest.fixture
def watched_page(browser):
    """Opens a report; nothing may be said on the console, asked of a network, or alerted."""
    pages, wrong = [], []

    def open_page(report, size=DESKTOP, scheme="light"):
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or wrong.append(request.url))
        page.goto(report.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []


def wait_for_figures(page):
    """Until all are drawn, without scrolling to them."""
    page.wait_for_function("() => [...document.querySelectorAll('.plot')].every((e) => e.querySelector('.main-svg'))")


def column(page, place, label):
    """What a table shows under that label; None where it shows no such column."""
    return page.evaluate(
        """([place, label]) => {
          const heads = [...document.querySelectorAll(`${place} thead th`)];
          const at = heads.findIndex((head) => head.checkVisibility() && head.textContent === label);
          return at < 0 ? null : [...document.querySelectorAll(`${place} tbody tr`)].map((row) => row.children[at].textContent);
        }""",
        [place, label],
    )


@pytest.mark.slow
def test_it_is_small_and_opens_fast(report, browser):
    """Until tables can be read, in processor time, whatever else the machine does; figures come after."""
    assert report.stat().st_size < 8e6
    page = browser.new_page(viewport=DESKTOP)
    work = page.context.new_cdp_session(page)
    work.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(report.as_uri(), timeout=PATIENCE)
    spent = {each["name"]: each["value"] for each in work.send("Performance.getMetrics")["metrics"]}
    assert len(column(page, "#tasks-table", "Task")) == 100
    page.close()
    assert 0 < spent["TaskDuration"] < 3


def test_tasks_can_be_searched_and_sorted_with_the_keyboard_and_another_run_shown(open_page):
    page = open_page()
    before, cards = column(page, "#tasks-table", "Skill"), page.locator("#cards").inner_text()
    search = page.get_by_label("Search tasks").last
    search.fill("assay 000")
    assert sorted(column(page, "#tasks-table", "Task")) == [f"assay {t:04d}" for t in range(10)]
    assert page.locator("#tasks-table [role=status]").inner_text().startswith("10 of 1,000 tasks")
    search.fill("<SCRIPT>")
    assert column(page, "#tasks-table", "Task") == [HOSTILE[0]]
    search.fill("no such task")
    assert column(page, "#tasks-table", "Task") == []
    search.fill("")

    skills = [float(text.replace(",", "")) for text in column(page, "#tasks-table", "Skill")]
    assert skills == sorted(skills)
    assert len(skills) == 100  # the worst
    head = page.locator("#tasks-table th", has_text="Training labels")
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert page.locator("#tasks-table th[aria-sort]").count() == 1
    sizes = [int(text.replace(",", "")) for text in column(page, "#tasks-table", "Training labels")]
    assert sizes == sorted(sizes, reverse=True)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    page.locator("#tasks-table").get_by_role("button", name="Show all 1,000 tasks").click()
    assert len(column(page, "#tasks-table", "Task")) == 1000

    assert page.locator("#affinity .plot").count() == 1
    page.get_by_label("Run", exact=True).select_option("better")
    assert column(page, "#tasks-table", "Skill") != before
    assert page.locator("#cards").inner_text() != cards
    assert page.locator("#affinity").is_hidden()
    assert "Run better" in page.locator("#about").inner_text()
    assert "better against base" in page.locator("#sentence").inner_text()
    assert len(column(page, "#compare-table", "Task")) == 100


def test_the_usual_metric_is_named_and_sorted_by_number(open_small):
    page = open_small()
    page.locator("#tasks-table th", has_text="Usual metric").get_by_role("button").click()
    usual = column(page, "#tasks-table", "Usual metric")
    values = [float(text.split()[-1]) for text in usual]
    assert values == sorted(values, reverse=True)
    assert {text.split()[0] for text in usual} <= {"ROC-AUC", "accuracy", "R²"}
    kinds = column(page, "#tasks-table", "Kind")
    names = {"binary": "ROC-AUC", "multiclass": "accuracy", "regression": "R²", "poisson": "R²"}
    assert all(text.startswith(names[kind]) for kind, text in zip(kinds, usual, strict=True))
    assert len(set(kinds)) > 1


def test_a_column_that_is_the_same_for_all_tasks_is_said_in_a_line(open_small):
    page = open_small()
    assert column(page, "#tasks-table", "Expected share") is None
    assert column(page, "#tasks-table", "Weight") is not None
    assert page.locator("#tasks-same").inner_text() == "The same for all tasks: expected share 4.17 %."


@pytest.mark.slow
def test_a_phone_shows_it_without_scrolling_sideways(open_small):
    page = open_small(PHONE)
    wait_for_figures(page)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    for table in ("#tasks-table", "#compare-table"):
        assert page.locator(f"{table} .scroll").evaluate("e => e.scrollWidth === e.clientWidth")
    for shown in ("Task", "Skill", "Skill, 95 % interval", "Usual metric"):
        assert len(column(page, "#tasks-table", shown)) == 24
    for hidden in ("Kind", "Training labels", "Weight", "Best step"):
        assert column(page, "#tasks-table", hidden) is None
    assert column(page, "#compare-table", "Verdict") is not None


@pytest.mark.slow
def test_all_figures_are_drawn_without_scrolling_and_said_in_words(open_small):
    page = open_small()
    wait_for_figures(page)
    for plot in page.locator(".plot").all():
        assert plot.get_attribute("role") == "img"
        assert len(plot.get_attribute("aria-label")) > 40
    assert page.locator(".plot").count() == 8
    assert page.locator(".plot script, .plot img, td img, td b, th b").count() == 0
    last = page.locator("#speed").bounding_box()
    assert last["width"] == pytest.approx(page.locator("#affinity").bounding_box()["width"] / 2, abs=20)  # six before affinity
    page.evaluate("document.getElementById('weights').hidden = true")
    last = page.locator("#speed").bounding_box()
    assert last["width"] == page.locator("#affinity").bounding_box()["width"]


@pytest.mark.slow
def test_paper_has_all_figures_dark_on_light_and_of_its_width(open_small):
    page = open_small(scheme="dark")
    drawn = """() => [...document.querySelectorAll('.plot')].map((plot) => {
      const drawing = plot.querySelector('.main-svg');
      return [drawing && Number(drawing.getAttribute('width')), getComputedStyle(document.body).backgroundColor];
    })"""
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    figures = page.evaluate(drawn)
    assert len(figures) == 8
    assert all(width and 500 < width < 700 for width, _ in figures)
    assert {color for _, color in figures} == {"rgb(246, 247, 249)"}
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(drawn)[-1][0] > 700
    assert {color for _, color in page.evaluate(drawn)} == {"rgb(18, 22, 29)"}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(open_page, scheme):
    """Contrast of at least 4.5 (WCAG 2.1, success criterion 1.4.3)."""
    page = open_page(scheme=scheme)
    contrast = """(names) => {
      const style = getComputedStyle(document.documentElement);
      const light = (name) => {
        const hex = style.getPropertyValue(`--${name}`).trim().slice(1);
        const part = [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255);
        const [r, g, b] = part.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const [low, high] = names.map(light).sort((x, y) => x - y);
      return (high + 0.05) / (low + 0.05);
    }"""
    for ink in ("ink", "muted", "accent", "good", "bad"):
        for behind in ("page", "panel"):
            assert page.evaluate(contrast, [ink, behind]) >= 4.5, (ink, behind)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 29)"
    assert dark == (scheme == "dark")


@pytest.mark.slow
def test_figures_follow_a_change_to_dark_mode(open_page):
    page = open_page()
    wait_for_figures(page)
    title = page.locator("#skill-now .xtitle")
    before = title.evaluate("e => getComputedStyle(e).fill")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("(was) => getComputedStyle(document.querySelector('#skill-now .xtitle')).fill !== was", arg=before)


@pytest.mark.slow
def test_everything_has_a_name_for_a_screen_reader(open_page):
    page = open_page()
    assert (
        page.evaluate(
            """() => [...document.querySelectorAll('input, select, button, a[href], table, section, [role=region]')].filter(
             (e) =>              !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label')
               || e.getAttribute('aria-labelledby') || e.querySelector('caption'))).map((e) => e.outerHTML)"""
        )
        == []
    )
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the table of tasks"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "tasks"
