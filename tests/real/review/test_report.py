"""`labtrain report`: the page, opened in a real Chromium, and what it is made of."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labtrain.base import exact_json
from labtrain.base.errors import DamagedError
from labtrain.record import receipt
from labtrain.record.trail import HISTORY, TRAIL
from labtrain.review.report import write_report
from labtrain.review.report.charts import AROUND, AT_MOST, curves_of, machine_of, reduced
from labtrain.review.report.data import label_of, read_history, read_runs
from labtrain.review.report.page import verdict_of
from labtrain.review.verdicts import VERIFIED
from tests.conftest import LABTRAIN, ROOT, need, skip_or_fail
from tests.support.exact import Runner, configure

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = (
    "</script><img src=x onerror=\"window.hit=1\"><b>{{ 7 * 7 }}</b>&lt;a href='javascript:window.hit=1'&gt;\u202e"
)
STARTED = 1_800_000_000.0  # 2027-01-15T08:00:00Z


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run; nothing changes it."""
    found = Runner(tmp_path_factory.mktemp("run")).run(configure("mlp", "even"))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of another seed."""
    found = Runner(tmp_path_factory.mktemp("other")).run(configure("mlp", "even", seed=7))
    assert found is not None
    return found


def crafted(
    run_dir: Path,
    folder: Path,
    *,
    losses: list[Any] | None = None,
    lines: list[dict[str, Any]] | None = None,
    parts_at: int | None = None,
    segments: list[dict[str, Any]] | None = None,
    change: Callable[[dict[str, Any]], Any] = lambda _: None,
) -> Path:
    """Return a copy of a run that has another trail, history, segments or receipt."""
    shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns(".lock", "checkpoints"))
    found = receipt.read(folder)
    assert found is not None
    if losses is not None:
        trail = [
            {
                "step": step,
                "epoch": 0,
                "loss": loss,
                "batch": "b",
                "gradients": "0a" * 8,
                "weights": f"{step >= (parts_at or math.inf):01x}{step:015x}",
            }
            for step, loss in enumerate(losses, 1)
        ]
        (folder / TRAIL).write_text("".join(json.dumps(line) + "\n" for line in trail))
        found["trail"]["sha256"] = sha256((folder / TRAIL).read_bytes()).hexdigest()
    if lines is not None:
        (folder / HISTORY).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if segments is not None:
        found["segments"] = [{**found["segments"][0], **segment} for segment in segments]
        found["results"]["steps"] = found["segments"][-1]["to_step"]
    change(found)
    receipt.write(folder, found)
    return folder


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"time": STARTED + step, "step": step, "samples_per_s": 100.5, "memory_bytes": 10**9 + step,
            "gpu_memory_bytes": None, "lr": [0.1 / step], "metrics": {}, **more}  # fmt: skip


@pytest.fixture(scope="module")
def runs(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: one, one that parts from it at step 30 after a kill, and one with names that mean harm."""
    folder = tmp_path_factory.mktemp("runs")
    losses = [1 / step for step in range(1, 61)]
    lines = [line(step, metrics={"val/loss": 2 / step, HOSTILE: step}) for step in range(10, 61, 10)]
    killed = [
        {"started": "2027-01-15T08:00:00+00:00", "ended": "2027-01-15T08:00:25+00:00", "status": "killed", "to_step": 25},
        {"started": "2027-01-15T08:00:30+00:00", "ended": "2027-01-15T08:01:00+00:00", "from_step": 20, "to_step": 60,
         "changed": [{"key": HOSTILE, "before": 1, "now": HOSTILE}]},
    ]  # fmt: skip

    def harm(found: dict[str, Any]) -> None:
        found["command"] = [HOSTILE]
        found["results"]["metrics"][HOSTILE] = 0.1 + 0.2
        found["determinism"]["notes"] = [HOSTILE]
        found["hardware"]["cpu"] = HOSTILE

    made = [
        crafted(run_dir, folder / "a", losses=losses, lines=lines, segments=[{**killed[1], "started": killed[0]["started"], "from_step": 0}]),
        crafted(run_dir, folder / "b", losses=[loss + (step > 30) for step, loss in enumerate(losses, 1)],
                lines=lines, parts_at=30, segments=killed),
        crafted(run_dir, folder / "c", losses=losses, lines=lines, change=harm),
    ]  # fmt: skip
    (made[2] / VERIFIED).write_text(json.dumps(verification(made[2], found=HOSTILE, by=HOSTILE)) + "\n")
    return made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A real browser."""
    need("chromium", "chromium")
    sys.path.insert(0, str(ROOT / ".servers"))
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        skip_or_fail("playwright is not installed: make servers")
    finally:
        sys.path.remove(str(ROOT / ".servers"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the three runs."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    write_report(runs, output)
    return output


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open a page; at the end, no error was met and no request was made but for the page."""
    contexts, wrong = [], []

    def open_page(output: Path, *, width: int = 1440, **options: Any) -> Any:
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("dialog", lambda dialog: wrong.append("dialog"))
        page.on("request", lambda request: wrong.append(f"request: {request.url}")
                if request.url != output.as_uri() and not request.url.startswith(("data:", "blob:")) else None)  # fmt: skip
        page.goto(output.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-charts=drawn]", timeout=30_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def rows_of(page: Any, selector: str) -> dict[str, list[str]]:
    """Return a table's cells by what stands at the beginning of their row, as the page has them."""
    found = page.eval_on_selector_all(
        f"{selector} tbody tr",
        """rows => rows.map(row => [
        row.querySelector("th").textContent.trim(),
        [...row.querySelectorAll("td")].map(cell => (cell.querySelector(".whole") ?? cell).textContent.trim())])""",
    )
    return dict(found)


# In the browser


def test_the_numbers_on_the_page_are_those_of_the_receipts_and_trails(
    opened: Any, written: Path, runs: list[Path]
) -> None:
    page = opened(written)
    facts, receipts = rows_of(page, ".facts"), [receipt.read(run) or {} for run in runs]
    for name in {name for found in receipts for name in found["results"]["metrics"]}:
        wanted = [
            repr(found["results"]["metrics"][name]) if name in found["results"]["metrics"] else "none"
            for found in receipts
        ]
        assert facts[name] == wanted, name
    assert facts["Run"] == [found["run_id"] for found in receipts]
    assert facts["Steps"] == [str(found["results"]["steps"]) for found in receipts]
    assert facts["Weights"] == [found["results"]["weights_digest"] for found in receipts]
    assert facts["Seed"] == [str(found["determinism"]["seed"]) for found in receipts]
    numbers = rows_of(page, "figure:has(#plot-1)")
    for label, run in zip("ABC", runs, strict=True):
        losses = {entry["loss"]: entry["step"] for entry in map(json.loads, (run / TRAIL).read_text().splitlines())}
        values = list(losses)
        wanted = [f"{value!r} {losses[value]}" for value in (values[0], values[-1], min(values), max(values))]
        assert numbers[label] == [*wanted, str(len(values))]
    for place, found in enumerate(receipts):
        text = page.locator(f"#receipt-{place}").text_content()
        assert text == (runs[place] / receipt.FILE).read_text()
        assert exact_json.digest_of(json.loads(text)) == found["digest"]


def test_what_no_verification_covers_is_said_beside_the_curves(run_dir: Path, tmp_path: Path) -> None:
    """No digest is over history.jsonl, and a page may say "Verified"."""
    write_report([run_dir], tmp_path / "report.html")
    curves = (tmp_path / "report.html").read_text().partition('<section id="curves"')[2].partition("</section>")[0]
    assert "Verification covers only the training loss. Other curves and timings come from history.jsonl" in curves


def test_a_receipt_is_downloaded_as_it_lies_in_the_run(opened: Any, written: Path, runs: list[Path]) -> None:
    page = opened(written)
    page.locator(".receipt summary").first.click()
    with page.expect_download() as download:
        page.locator("a.download").first.click()
    assert Path(download.value.path()).read_bytes() == (runs[0] / receipt.FILE).read_bytes()


def test_each_chart_has_a_curve_of_each_run_and_marks_where_they_part(
    opened: Any, written: Path, runs: list[Path]
) -> None:
    page = opened(written)
    read = read_runs(runs)
    counts = page.eval_on_selector_all(".plot:not(#plot-0)", "all => all.map(plot => plot.data.length)")
    assert counts == [len(runs)] * (len(curves_of(read)) + len(machine_of(read)))
    assert page.evaluate("document.getElementById('plot-1').layout.shapes.map(shape => shape.x0)") == [30]
    assert page.evaluate("document.getElementById('plot-1').layout.annotations[0].text") == "B differs from A"
    assert page.evaluate("new Set(document.getElementById('plot-1').data.map(trace => trace.line.dash)).size") == len(
        runs
    )
    assert page.evaluate("document.getElementById('plot-0').data.map(trace => trace.name)") == ["complete", "killed"]
    assert (
        page.evaluate("new Set(document.getElementById('plot-0').data.map(trace => trace.marker.pattern.shape)).size")
        == 2
    )
    drawn = page.evaluate("document.getElementById('plot-1').data[0].y")
    assert drawn == [float(f"{1 / step:.7g}") for step in range(1, 61)]
    throughput = page.evaluate(
        "[...document.querySelectorAll('.plot')].map(plot => plot.data).flat().filter(trace => trace.y?.[0] === 100.5)"
    )
    assert [trace["y"].count(None) for trace in throughput] == [0, 1, 0]  # nothing is drawn across the kill


def test_a_chart_is_zoomed_and_made_logarithmic_by_the_keyboard(opened: Any, written: Path) -> None:
    page = opened(written)
    state = "JSON.stringify([1, 2].map(number => document.getElementById(`plot-${number}`).layout).map(it => [it.xaxis.range, it.yaxis.type]))"
    figure = page.locator("figure:has(#plot-1)")
    (whole, _), _ = json.loads(page.evaluate(state))
    button = figure.get_by_role("button", name="Log scale")
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert [kind for _, kind in json.loads(page.evaluate(state))] == ["log", "linear"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_timeout(100)
    zoomed, followed = (ends for ends, _ in json.loads(page.evaluate(state)))
    assert zoomed == followed
    assert zoomed[1] - zoomed[0] == pytest.approx((whole[1] - whole[0]) / 2)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    figure.get_by_role("button", name="Reset").press("Enter")
    button.press(" ")
    page.wait_for_timeout(100)
    assert json.loads(page.evaluate(state)) == [[whole, "linear"], [whole, "linear"]]


def test_a_run_is_hidden_in_all_charts_and_a_point_is_told(opened: Any, written: Path) -> None:
    page = opened(written)
    page.locator(".legend input").nth(1).press(" ")
    assert page.evaluate("document.getElementById('plot-1').data.map(trace => trace.visible)") == [True, False, True]
    box = page.locator("#plot-1").bounding_box()
    page.locator("#plot-1").hover(position={"x": box["width"] / 2, "y": box["height"] / 2})
    assert "step " in page.locator("#plot-1 .hoverlayer").text_content(timeout=5000)


def test_hostile_texts_are_texts(opened: Any, written: Path) -> None:
    page = opened(written)
    page.locator("#plot-1").hover(position={"x": 300, "y": 200})
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit") is None
    assert page.locator("img, iframe, object, [onerror], a[href^=javascript]").count() == 0
    assert HOSTILE in rows_of(page, ".facts")
    assert HOSTILE in page.locator("h3").all_text_contents()
    assert "step" in page.locator("#plot-1 .hoverlayer").text_content()
    assert page.locator("script").count() == 3
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_no_size_scrolls_sideways(opened: Any, written: Path, width: int) -> None:
    page = opened(written, width=width, has_touch=width < 1000)
    for details in page.locator("details").all():
        details.evaluate("details => details.open = true")
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg').getBoundingClientRect().right <= innerWidth)"
    )


CONTRAST = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = node => {
    for (let each = node; each; each = each.parentElement) {
      const found = parse(getComputedStyle(each).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
  };
  const low = [];
  let count = 0;
  for (const node of document.querySelectorAll("body *:not(script):not(style):not(noscript)")) {
    if (![...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim())) continue;
    if (!node.getClientRects().length || (node instanceof SVGElement && node.tagName !== "text" && node.tagName !== "tspan")) continue;
    const style = getComputedStyle(node);
    const one = light(parse(node instanceof SVGElement ? style.fill : style.color)), other = light(behind(node));
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    count += 1;
    if (ratio < 4.5) low.push([node.textContent.trim().slice(0, 40), ratio]);
  }
  return [count, low, parse(getComputedStyle(document.body).backgroundColor), document.getElementById("plot-1").layout.paper_bgcolor];
}"""


def test_text_can_be_read_in_light_and_in_dark_and_the_charts_go_with_it(opened: Any, written: Path) -> None:
    page, papers = opened(written, color_scheme="light"), []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(200)
        count, low, paper, of_charts = page.evaluate(CONTRAST)
        assert count > 100
        assert low == []
        assert [int(of_charts[place : place + 2], 16) for place in (1, 3, 5)] == paper
        papers.append(sum(paper))
    assert papers[0] > 700 > 100 > papers[1]


def test_a_screen_reader_finds_its_way(opened: Any, written: Path) -> None:
    """Language, landmarks, headings in order, a name for each chart, group and table, a scope for each head of one."""
    page = opened(written)
    assert page.get_attribute("html", "lang") == "en"
    assert [page.locator(name).count() for name in ("main", "body > header", "nav", "footer", "h1")] == [1] * 5
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(each => Number(each.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.locator("h2").all_text_contents()[0] == "Verdict"
    for label in page.eval_on_selector_all(
        ".plot", "all => all.map(each => [each.getAttribute('role'), each.getAttribute('aria-label')])"
    ):
        assert label[0] == "img"
        assert len(label[1]) > 40
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    names = "[aria-label]:not([aria-label='']), [aria-labelledby]"
    assert page.eval_on_selector_all(
        "figure, section, nav, [role=region], [role=group]", f"all => all.every(each => each.matches(`{names}`))"
    )
    assert page.eval_on_selector_all(
        "[aria-labelledby]", "all => all.every(each => document.getElementById(each.getAttribute('aria-labelledby')))"
    )
    assert page.eval_on_selector_all(".scroll", "all => all.every(each => each.tabIndex === 0)")
    assert page.eval_on_selector_all("[id]", "all => new Set(all.map(each => each.id)).size === all.length")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    loss = page.get_attribute("#plot-1", "aria-label")
    assert "A: first 1 at step 1, last 0.01667 at step 60" in loss
    assert "B differs from A at step 30" in loss


def test_without_javascript_everything_but_the_charts_is_there(opened: Any, written: Path) -> None:
    page = opened(written, java_script_enabled=False)
    assert page.locator("noscript").first.is_visible()
    assert page.locator(".facts td").first.is_visible()
    assert not page.locator(".plot, .tools, .legend").first.is_visible()
    page.locator("figure:has(#plot-1) summary").click()
    assert page.locator("figure:has(#plot-1) td").first.is_visible()


def test_it_is_printed_in_light_colours_with_all_numbers(opened: Any, written: Path) -> None:
    page = opened(written, color_scheme="dark")
    page.evaluate("""addEventListener("beforeprint", () => window.printed = [
        document.getElementById("plot-1").layout.width, document.querySelectorAll("details:not(.receipt):not([open])").length])""")
    box = page.locator("#plot-1 .main-svg").first.bounding_box()
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF-")
    assert page.evaluate("window.printed") == [680, 0]
    assert page.locator("#plot-1 .main-svg").first.bounding_box() == box
    assert page.locator("figure details[open]").count() == 0
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


ODD: dict[str, Callable[[Path, Path], list[Path]]] = {
    "one run as it was trained": lambda run, folder: [run],
    "running, without a trail and a history": lambda run, folder: [
        without(crafted(run, folder / "a", change=as_running), TRAIL, HISTORY)
    ],
    "interrupted and failed": lambda run, folder: [
        crafted(run, folder / "a", segments=[{"status": "interrupted", "why": "SIGTERM"}],
                change=lambda found: found.update(status="interrupted", results={})),
        crafted(run, folder / "b", segments=[{"status": "failed", "why": "ValueError: loss"}],
                change=lambda found: found.update(status="failed", results={})),
    ],
    "no finite loss": lambda run, folder: [
        crafted(run, folder / "a", losses=[1.0, "nan", "inf", 0.5]),
        crafted(run, folder / "b", losses=["nan"] * 4),
        crafted(run, folder / "c", change=lambda found: found["results"]["metrics"].update(nan=math.nan)),
    ],
    "a step": lambda run, folder: [crafted(run, folder / "a", losses=[-0.0], lines=[line(1, lr=[0.1, 0.2])])],
    "twelve": lambda run, folder: [
        crafted(run, folder / str(number), losses=[float(number)] * 20, parts_at=number) for number in range(1, 13)
    ],
}  # fmt: skip


def without(run: Path, *names: str) -> Path:
    for name in names:
        (run / name).unlink(missing_ok=True)
    return run


def as_running(found: dict[str, Any]) -> None:
    found |= {"status": "running", "results": {}}
    found["segments"][-1] |= {"status": "running", "ended": None, "to_step": None}


@pytest.mark.parametrize("kind", ODD)
def test_runs_of_every_kind_have_a_page(opened: Any, run_dir: Path, tmp_path: Path, kind: str) -> None:
    runs = ODD[kind](run_dir, tmp_path)
    write_report(runs, tmp_path / "report.html")
    page = opened(tmp_path / "report.html", width=360)
    assert len(page.locator(".facts thead th").all()) == len(runs)
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    text = page.inner_text("main")
    assert {"running, without a trail and a history": "running, or killed and not resumed",
            "interrupted and failed": "failed: ValueError: loss", "twelve": "L against A"}.get(kind, "Verdict") in text  # fmt: skip
    if kind == "no finite loss":
        page.locator("figure:has(#plot-1) summary").click()
        said = page.inner_text("figure:has(#plot-1)")
        assert "2 values are not finite, first at step 2: a gap." in said
        assert page.evaluate("document.getElementById('plot-1').data[0].y") == [1, None, None, 0.5]


# What it is made of


def test_a_reduced_curve_keeps_its_ends_its_spikes_its_gaps_and_where_runs_part() -> None:
    draw = np.random.default_rng(0)
    for count in (1, AT_MOST, AT_MOST + 1, 100_000, 99_991):
        y = draw.standard_normal(count)
        spikes = draw.choice(count, size=min(count, 5), replace=False)
        y[spikes] = [1e6, -1e6, 2e6, -2e6, math.nan][: len(spikes)]
        keep = range(count // 2 - AROUND, count // 2 + AROUND + 1)
        chosen = reduced(y, keep=keep)
        assert chosen == sorted(set(chosen))
        assert {0, count - 1, *map(int, spikes)} <= set(chosen)
        assert {place for place in keep if 0 <= place < count} <= set(chosen) or count <= AT_MOST
        assert len(chosen) <= AT_MOST + len(keep) + 1
        stretch = -(-count // ((AT_MOST - 2) // 2))
        for begin in range(0, count if count > AT_MOST else 0, stretch * 97):
            of_it = y[begin : begin + stretch]
            assert {np.nanmin(of_it), np.nanmax(of_it)} <= set(
                y[[place for place in chosen if begin <= place < begin + stretch]]
            )
    assert len(reduced(np.full(10_000, math.nan))) < AT_MOST


def test_a_long_curve_says_that_it_is_reduced_and_its_numbers_are_of_all_of_it(run_dir: Path, tmp_path: Path) -> None:
    losses = [1.0 + 1e-9 * step for step in range(1, 20_001)]
    losses[12_344] = 7.123456789012345
    run = crafted(run_dir, tmp_path / "a", losses=losses, lines=[])
    chart = curves_of(read_runs([run]))[0]
    drawn = chart.drawn["traces"][0]["y"]
    assert f"{len(drawn):,} of 20,000 points are drawn." in chart.summary[0]
    assert AT_MOST * 0.8 < len(drawn) <= AT_MOST
    assert chart.lines[0].greatest == ("12345", "7.123456789012345")
    assert chart.lines[0].count == 20_000
    assert 7.123457 in drawn


def test_a_history_is_read_around_what_a_crash_left(tmp_path: Path) -> None:
    """A later line of the same step counts; no curve goes on across a start; lines that were cut are left out."""
    lines = [json.dumps(line(step, metrics={"acc": step / 10})) for step in (1, 2, 3, 4)]
    again = [json.dumps({**line(step, metrics={"acc": step / 5}), "time": STARTED + 100 + step}) for step in (3, 5)]
    (tmp_path / HISTORY).write_text("\n".join([*lines[:3], lines[3][:40], "", "", *again, '{"time": 1']))
    found = read_history(tmp_path, [STARTED, STARTED + 99])
    assert found.metrics["acc"].x.tolist() == [1, 2, 3, 5]
    assert found.metrics["acc"].y.tolist() == [0.1, 0.2, 0.6, 1.0]
    assert np.isnan(found.throughput.y).tolist() == [False, False, False, True, False, False]
    assert len(found.gpu_memory.x) == 0
    assert found.rates[0].x.tolist() == [1, 2, 3, 5]
    (tmp_path / HISTORY).write_text('{"time": "soon"}\n')
    with pytest.raises(DamagedError, match=r"history.jsonl is broken"):
        read_history(tmp_path)


def test_flops_are_drawn_beside_the_throughput_where_they_are_known(run_dir: Path, tmp_path: Path) -> None:
    """In a unit that can be read, and in percent of a peak; a history without them, or of an earlier version, has none."""
    flops = [{"flops_per_s": 390_000_000_000_000 + step, "peak_flops_per_s": 1_978_800_000_000_000} for step in (1, 2)]
    known = [line(step, **more) for step, more in enumerate(flops, 1)]
    no_peak = [line(step, **{**more, "peak_flops_per_s": None}) for step, more in enumerate(flops, 1)]
    unknown = [line(step, flops_per_s=None, peak_flops_per_s=10**12) for step in (1, 2)]
    runs = {
        name: crafted(run_dir, tmp_path / name, lines=lines)
        for name, lines in {
            "known": known,
            "no peak": no_peak,
            "unknown": unknown,
            "earlier": [line(1), line(2)],
        }.items()
    }
    titles = {name: [chart.title for chart in machine_of(read_runs([run]))] for name, run in runs.items()}
    rest = ["Memory of the process", "Learning rate"]
    assert titles["known"] == ["Throughput", "FLOP/s", "Model FLOPs utilisation", *rest]
    assert titles["no peak"] == ["Throughput", "FLOP/s", *rest]
    assert titles["unknown"] == titles["earlier"] == ["Throughput", *rest]
    _, rate, utilisation, *_ = machine_of(read_runs(list(runs.values())))
    assert [each.run for each in rate.lines] == ["A", "B"]
    assert (rate.drawn["unit"], rate.drawn["traces"][0]["y"]) == ("TFLOP/s", [390, 390])
    assert [each[1] for each in (rate.lines[0].first, rate.lines[0].last) if each] == [
        "390000000000001",
        "390000000000002",
    ]
    assert "first 390 TFLOP/s at" in rate.summary[0]
    assert [each.run for each in utilisation.lines] == ["A"]
    assert (utilisation.drawn["unit"], utilisation.drawn["traces"][0]["y"]) == ("%", [19.7089, 19.7089])


def verification(run: Path, **more: Any) -> dict[str, Any]:
    found = receipt.read(run)
    assert found is not None
    return {"when": "2027-01-16T12:00:00+02:00", "by": "ada", "host": "ws2", "cpu": "A CPU", "gpus": ["A GPU", "A GPU"],
            "labtrain": "0.1.0", "receipt": found["digest"], "from_step": 0, "to_step": 15, "whole": True, "same": True,
            "found": "the same", **more}  # fmt: skip


EARLIER = {"receipt": "0" * 64}


@pytest.mark.parametrize(
    ("entries", "mark", "words"),
    [
        ([], "none", ["No rerun of this receipt is recorded"]),
        ([{}], "none", ["claims: A rerun to the end, steps 1 to 15, gave", "By ada on ws2 (A CPU, 2 \u00d7 A GPU), 2027-01-16 10:00:00 UTC"]),
        ([{"whole": False, "to_step": 7}], "none", ["steps 1 to 7, not to the end"]),
        ([{"same": False, "found": "step 3 differs."}], "none", ["A rerun differed: step 3 differs. By ada"]),
        ([{}, {"same": False, "when": "2027-01-15T12:00:00+02:00"}], "none", ["Of 2 verifications of this receipt, 1 differed."]),
        ([EARLIER], "none", ["A verification is about an earlier state of this receipt"]),
        ([{}, EARLIER, EARLIER], "none", ["2 verifications are about an earlier state"]),
        ([{"same": None}], "none", ["No rerun"]),
    ],
)  # fmt: skip
def test_the_verdict_is_of_this_very_receipt(
    run_dir: Path, tmp_path: Path, entries: list[dict[str, Any]], mark: str, words: list[str]
) -> None:
    run = crafted(run_dir, tmp_path / "a")
    if entries:
        (run / VERIFIED).write_text("".join(json.dumps(verification(run, **entry)) + "\n" for entry in entries))
    found = verdict_of(read_runs([run])[0])
    assert found.mark == mark
    assert all(each in found.text for each in words), found.text
    assert found.command.startswith("labtrain verify ")


def test_the_same_runs_give_the_same_page_and_no_torch_is_imported(
    run_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    code = "import sys; from labtrain.cli import main; main(standalone_mode=False); assert not {'torch', 'lightning'} & set(sys.modules)"
    pages = []
    for name in ("a.html", "b.html"):
        command = [sys.executable, "-c", code, "report", str(run_dir), str(other_dir / receipt.FILE), "-o", name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]
    assert "first at step 1, in the batch" in pages[0].decode()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.html", "b.html"]


def test_what_cannot_be_reported_is_refused(run_dir: Path, tmp_path: Path) -> None:
    broken = crafted(run_dir, tmp_path / "broken")
    (broken / VERIFIED).write_text('{"when": "yesterday"}\n')
    changed = crafted(run_dir, tmp_path / "changed")
    (changed / TRAIL).write_text((changed / TRAIL).read_text()[:-20] + "\n")
    (tmp_path / "folder.html").mkdir()
    for arguments, words in (
        ([tmp_path], "is not a run: looked for receipt.json"),
        ([run_dir, run_dir / receipt.FILE], "is named twice"),
        ([run_dir, "-o", "page"], "the name must end in .html"),
        ([run_dir, "-o", run_dir / receipt.FILE], "the name must end in .html"),
        ([run_dir, "-o", "folder.html"], "is a folder"),
        ([run_dir, "-o", "nowhere/page.html"], "folder nowhere does not exist"),
        ([broken], "verified.jsonl is broken"),
        ([changed], "trail.jsonl was changed after it was written"),
    ):
        command = [LABTRAIN, "report", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert words in done.stderr
        assert "hint: " in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_runs_are_called_by_letters() -> None:
    assert [label_of(place) for place in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]


def test_the_run_that_it_began_from_is_named(run_dir: Path, tmp_path: Path) -> None:
    """A new run that goes on from another's checkpoint says which, in a row; beside it a run that began by itself."""
    origin = {
        "run_id": "0123456789ab",
        "checkpoint": "step-0000000005",
        "step": 5,
        "digest": "d" * 64,
        "url": "runs/x",
    }
    begun = crafted(run_dir, tmp_path / "begun", segments=[{"from_step": 5, "origin": origin}, {"from_step": 10}])
    write_report([begun, run_dir], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    (row,) = [line for line in page.splitlines() if "Begins from" in line]
    assert "step-0000000005 of the run 0123456789ab" in row
    assert "d" * 64 in row
    assert "nothing" in row
    write_report([run_dir], tmp_path / "page.html")
    assert "Begins from" not in (tmp_path / "page.html").read_text()
