"""index.html as a browser shows it: every run a point, words on hovering, no network."""

import json
import re
from urllib.parse import urlsplit

import browser
import made_up
import pytest

import dist_looksam
from dist_looksam.cli import main as cli
from dist_looksam.report.comparison import report

pytestmark = pytest.mark.slow

LABELS = ["adamw", "sam", "look_sam (natural)"]
READY = "document.body && document.body.dataset.drawn"
# What is drawn of a mark: its row and where its middle is on the screen.
MARKS = """[...document.querySelectorAll('#%s .%s path')].map(e => {
  const box = e.getBoundingClientRect(), row = e.__data__.datum;
  return {...JSON.parse(JSON.stringify(row)), px: box.x + box.width / 2, py: box.y + box.height / 2,
          opacity: +getComputedStyle(e).opacity}; })"""
TIP = "document.querySelector('#vg-tooltip-element.visible')"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Three methods, three batches, three seeds, of which one diverged; with its trials."""
    folder = tmp_path_factory.mktemp("sweep")
    made_up.sweep(folder, labels=LABELS, batches=(192, 768, 3072))
    point = {"method": "sam", "label": "sam", "stage": "final", "batch_size": 3072, "seed": 1,
             "flags": {"lr": 0.1, "rho": 0.5}}  # fmt: skip
    path = folder / "final" / "sam-3072-1"
    made_up.run(path, "sam", batch=3072, seed=1, top1=0.1, lost=True, gv_ratio=3.0, point=point)
    return folder


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory, needs):
    """The sweep's page, open in a browser."""
    needs("chromium")
    assert cli.main(["report", str(sweep)]) == 0
    with browser.Page(tmp_path_factory.mktemp("browser") / "profile") as found:
        found.open(sweep / "report" / "index.html", ready=READY)
        yield found


def marks(page, name: str, chart: str = "chart0") -> list[dict]:
    return page.js(MARKS % (chart, f"{name}_marks"))


def summaries(sweep) -> dict[tuple[str, int, int], dict]:
    found = {}
    for path in (sweep / "final").glob("*/summary.json"):
        point = json.loads(path.with_name("point.json").read_text())
        at = point["label"], point["batch_size"], point["seed"]
        found[at] = json.loads(path.read_text())
    return found


def test_every_seed_and_every_mean_is_a_point_at_its_height(page, sweep):
    truth = summaries(sweep)
    seeds, troubled, means = (marks(page, name) for name in ("seeds", "troubled", "means"))
    assert len(truth) == 27 and len(seeds) == 26 and len(troubled) == 1 and len(means) == 9
    drawn = {(m["method"], int(m["batch"].replace(",", "")), int(m["seed"])): m
             for m in seeds + troubled}  # fmt: skip
    assert set(drawn) == set(truth)
    order = sorted(truth, key=lambda at: truth[at]["top1"])
    heights = [drawn[at]["py"] for at in order]
    assert heights == sorted(heights, reverse=True)  # better is higher on the screen
    columns = {
        batch: [m["px"] for at, m in drawn.items() if at[1] == batch] for _, batch, _ in truth
    }
    assert max(columns[192]) < min(columns[768]) and max(columns[768]) < min(columns[3072])


def test_hovering_a_seed_tells_its_run(page, sweep):
    (mark,) = [
        m
        for m in marks(page, "seeds")
        if (m["method"], m["batch"], m["seed"]) == ("look_sam (natural)", "768", "2")
    ]
    page.hover(mark["px"], mark["py"])
    page.wait(TIP)
    told = page.js(
        f"[...{TIP}.firstChild.rows].map(row => [...row.cells].map(cell => cell.innerText))"
    )
    run = summaries(sweep)["look_sam (natural)", 768, 2]
    assert dict(told) == {
        "method": "look_sam (natural)",
        "batch": "768",
        "seed": "2",
        "top1": f"{100 * run['top1']:.2f} %",
        "lr": "0.002",
        "rho": "0.02",
        "seconds": f"{run['seconds']:,.1f}",
    }
    page.hover(2, 2)
    page.wait(f"!{TIP}")


def test_hovering_a_mean_tells_its_spread_and_lets_other_methods_stand_back(page):
    (mark,) = [m for m in marks(page, "means") if (m["method"], m["batch"]) == ("adamw", "192")]
    page.hover(mark["px"] + 4, mark["py"])  # its edge: one of its seeds may stand in the middle
    page.wait(TIP)
    told = page.js(f"{TIP}.innerText")
    assert "mean of 0, 1, 2" in told and re.search(r"top1\s*\d\d\.\d\d ± \d\.\d\d %", told)
    page.wait("document.querySelectorAll('#chart0 .means_marks path[opacity=\"0.12\"]').length")
    for name in ("means", "seeds"):
        assert {m["method"] for m in marks(page, name) if m["opacity"] > 0.5} == {"adamw"}
    page.hover(2, 2)
    page.wait(f"!{TIP}")
    assert {m["opacity"] for m in marks(page, "means")} == {1}


def test_a_diverged_run_is_a_cross_that_says_so(page):
    (mark,) = marks(page, "troubled")
    page.hover(mark["px"], mark["py"])
    page.wait(TIP)
    assert "10.00 % (its last loss was not finite)" in page.js(f"{TIP}.innerText")
    page.hover(2, 2)
    page.wait(f"!{TIP}")


def test_every_chart_is_drawn_and_says_what_was_run(page, sweep):
    assert page.js("document.querySelectorAll('svg.marks').length") == int(page.js(READY)) >= 4
    text = page.js("document.body.innerText")
    assert f"dist-looksam report {sweep}" in text
    for word in ("commit", "UTC", "dist_looksam 0.", "54 tuning trials", "3 seeds"):
        assert word in text, word
    assert page.js("document.querySelectorAll('h2').length") >= 5
    assert page.js("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_page_says_no_error_and_asks_the_network_for_nothing(page):
    """The last test of the page: hovering may load things, too."""
    assert page.errors == []
    assert page.requests
    assert {urlsplit(address).scheme for address in page.requests} <= {"file", "data", "blob"}


@pytest.mark.needs("chromium")
def test_the_browser_test_would_see_an_error_and_a_request(tmp_path):
    """What the test above relies on: a page that does both is caught."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<body><img src="http://127.0.0.1:9/x.png"><script>setTimeout(() => {'
        "document.body.dataset.drawn = 1; throw new Error('broken') })</script>"
    )
    with browser.Page(tmp_path / "profile") as found:
        found.open(bad, ready=READY)
        found.wait("performance.getEntriesByType('resource').length")
        assert any("broken" in error for error in found.errors)
        assert "http://127.0.0.1:9/x.png" in found.requests


@pytest.mark.needs("chromium")
def test_names_cannot_break_the_page(tmp_path):
    """Labels are a user's words: once in HTML, once inside a script element."""
    label = "</script><img src=x onerror=alert(1)>&amp;<b>|bold"
    point = {"method": "sam", "label": label, "stage": "final", "batch_size": 64, "seed": 0}
    for seed, batch in ((0, 64), (1, 64), (0, 128), (1, 128)):
        path = tmp_path / "runs" / f"{seed}-{batch}"
        here = point | {"seed": seed, "batch_size": batch}
        made_up.run(path, "sam", batch=batch, seed=seed, done=(seed, batch) != (1, 128), point=here)
    (tmp_path / "runs" / "sweep.yaml").write_text(f"# {label}")
    done = report([str(tmp_path / "runs")], out=tmp_path / "out")
    assert r"\|bold" in done.text
    with browser.Page(tmp_path / "profile") as found:
        found.open(tmp_path / "out" / "index.html", ready=READY)
        assert found.js("document.images.length") == 0 and not found.errors
        assert label in found.js("document.querySelector('tbody td').innerText")
        for where in (".notes", "pre"):
            assert label in found.js(f"document.querySelector('{where}').textContent"), where
        assert len(marks(found, "seeds")) == 2


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("label", ["<!--<script>", "<!-- <script >--><SCRIPT>"])
def test_a_label_cannot_swallow_the_scripts(label, tmp_path):
    """In a script element "<!--<script>" makes the next "</script>" one of its text: no chart was
    drawn."""
    point = {"method": "sam", "label": label, "stage": "final", "batch_size": 192, "seed": 0}
    made_up.run(tmp_path / "run", "sam", point=point)
    report([str(tmp_path / "run")], out=tmp_path / "out")
    with browser.Page(tmp_path / "profile") as found:
        found.open(tmp_path / "out" / "index.html", ready=READY, seconds=20)
        assert not found.errors
        assert label in found.js("document.querySelector('#chart0').textContent")


def test_a_page_says_which_commit_its_runs_were_made_with(tmp_path):
    """What stood there was the commit of the report, made weeks later from another checkout."""
    made_up.run(tmp_path / "runs" / "old", seed=9)
    for seed, commit in enumerate(("aaaa1111", "aaaa1111", "bbbb2222", None)):
        made_up.run(tmp_path / "runs" / str(seed), seed=seed)
        job = {"started": 1.0, "host": "node1", "version": "0.1.0", "commit": commit}
        (tmp_path / "runs" / str(seed) / "job.json").write_text(json.dumps(job))
    report([str(tmp_path / "runs")], out=tmp_path / "out")
    text = body(tmp_path / "out" / "index.html")
    told = "aaaa1111 (2 runs), bbbb2222 (1 run), dist_looksam 0.1.0 (1 run), not recorded (1 run)"
    assert f"<dt>commit of the runs</dt><dd>{told}</dd>" in text
    assert "<dt>page made by</dt><dd>dist_looksam 0." in text and "<dt>commit</dt>" not in text


def test_a_report_is_made_again_from_its_csv(sweep, tmp_path):
    """The pictures of docs/ are drawn from kept CSV files: the runs themselves are large."""
    first = report([str(sweep)], out=tmp_path / "a")
    (tmp_path / "a" / "choices.json").write_text((sweep / "choices.json").read_text())
    again = report([str(tmp_path / "a" / "report.csv")], out=tmp_path / "b")
    assert (tmp_path / "a/report.csv").read_text() == (tmp_path / "b/report.csv").read_text()
    assert "started" in (tmp_path / "a/report.csv").read_text().splitlines()[0]
    assert first.text == again.text
    assert {p.name for p in again.paths} == {p.name for p in first.paths}


def body(page) -> str:
    """What is to be read, without style and scripts."""
    return page.read_text().split("<body>")[1].split("<script")[0]


def test_figures_of_others_are_shown_on_request_only_and_marked(sweep, tmp_path, capsys):
    assert cli.main(["report", str(sweep), "--out", str(tmp_path / "a")]) == 0
    plain = capsys.readouterr().out + body(tmp_path / "a" / "index.html")
    assert "79.8" not in plain and "econd-hand" not in plain
    own = tmp_path / "own.yaml"
    own.write_text(
        "title: my lab\nsource: a poster\nfigures: [{method: sam, batch: 64, top1: 0.612}]\n"
    )
    flags = ["--paper", "--reference", str(own), "--out", str(tmp_path / "b")]
    assert cli.main(["report", str(sweep), *flags]) == 0
    text = capsys.readouterr().out
    assert "**Second-hand: ImageNet-1k, ViT-B/16" in text and "79.8" in text
    assert "**Second-hand: my lab.** Source: a poster." in text and "61.2" in text
    html = body(tmp_path / "b" / "index.html")
    assert html.count('<section class="second-hand">') == 2 and html.count("79.8") == 2


def test_before_any_final_run_the_trials_are_reported(sweep, tmp_path):
    (tmp_path / "tune").symlink_to(sweep / "tune")
    (tmp_path / "choices.json").write_text((sweep / "choices.json").read_text())
    done = report([str(tmp_path)], out=tmp_path / "out")
    assert done.text.startswith("- No final run has finished yet.")
    line = next(x for x in done.text.splitlines() if x.startswith("| look_sam (natural)"))
    assert [c.strip() for c in line.split("|")[2:4]] == [
        "6",
        "lr 0.001, 0.002, 0.004; rho 0.01, 0.02",
    ]
    assert len(re.findall(r"lr 0.00\d, rho 0.0\d\* \(\d\d\.\d\d\)", line)) == 3
    assert {p.name for p in done.paths} == {"tuning.png", "report.csv", "report.md", "index.html"}


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.parametrize("batches", [(768,), (768, 1536)])
def test_one_seed_and_one_batch_are_drawn(seeds, batches, tmp_path):
    made_up.sweep(tmp_path, labels=LABELS[:2], batches=batches, seeds=seeds, trials=False)
    done = report([str(tmp_path)], out=tmp_path / "out")
    assert (tmp_path / "out" / "scaling.png").stat().st_size > 20_000
    assert ("One seed, so no spread is known" in (tmp_path / "out/index.html").read_text()) == (
        len(seeds) == 1
    )
    assert "one seed, so no spread is known" in done.text or len(seeds) == 2


def test_runs_on_several_ranks_get_a_picture_of_their_speed_up(tmp_path):
    for ranks in (1, 2, 4):
        for method in ("lamb", "look_layer_sam"):
            path = tmp_path / f"{method}-{ranks}"
            made_up.run(path, method, ranks=ranks, seconds=10 / ranks**0.9, batch=1024)
    done = report([str(tmp_path)], out=tmp_path / "out")
    assert (tmp_path / "out" / "ranks.png").stat().st_size > 20_000
    assert "| look_layer_sam, batch 1,024 |     4 |" in done.text


def test_real_runs_make_a_report(tmp_path, capsys):
    """train.py's own files, not made-up ones."""
    for method, seed in (("adamw", 0), ("adamw", 1), ("look_sam", 0)):
        flags = ["--data", "digits", "--steps", "5", "--batch_size", "64", "--device", "cpu"]
        flags += ["--optimizer", method, "--seed", str(seed), "--k", "2"]
        assert cli.main(["train", *flags, "--out", str(tmp_path / f"{method}-{seed}")]) == 0
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    top1 = [json.loads((tmp_path / f"adamw-{s}/summary.json").read_text())["top1"] for s in (0, 1)]
    assert f"| adamw    | {50 * sum(top1):.2f} ± " in text
    assert "| look_sam |   1.60 |" in text and "| adamw    |   1.00 |" in text  # looks at 0 2 4
    assert (tmp_path / "report" / "scaling.png").exists()
    job = json.loads((tmp_path / "adamw-0" / "job.json").read_text())
    assert job["version"] == dist_looksam.__version__
    made_with = job["commit"] or f"dist_looksam {job['version']}"  # none of an installed package
    assert f"<dd>{made_with}</dd>" in (tmp_path / "report" / "index.html").read_text()
