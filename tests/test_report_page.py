"""The page of sequential-editing runs: what it says, what it refuses, how it looks."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from unified_edit import cli_report
from unified_edit.errors import UnifiedEditError
from unified_edit.evaluate import charts
from unified_edit.evaluate.report import write_report

pytest.importorskip("matplotlib")
CHROMIUM = shutil.which("chromium")
HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>&amp;\"$x^2$\ud800"
EDITS = range(0, 401, 20)
COLLAPSE, FORGETTING = 300, 100


def metrics(value: float) -> dict[str, list[float]]:
    names = ("s", "es", "ns", "rewrite_accuracy")
    return {name: [value, value - 0.05, value + 0.02] for name in names}


def checkpoint(edits: int) -> dict[str, Any]:
    """Of a run that forgets from 100 edits on and collapses at 300."""
    left = 0.97 - 0.002 * max(0, edits - FORGETTING)
    well = 1.0 if edits < COLLAPSE else 0.1
    return {
        "edits": edits,
        "step": edits,
        "seconds": 0.5 * edits,
        "current": metrics(0.95) if edits else None,
        "earlier": metrics(left if edits < COLLAPSE else 0.2) if edits else None,
        "same_subject": [left, left - 0.1, left + 0.02],
        "unrelated": [well, well - 0.05, well],
        "skills": {"addition": well, "copying": 0.9 * well},
        "perplexity": 10 / well,
        "entropy": None,
        "drift": {"0": 0.001 * edits, "1": 0.002 * edits},
        "guard": {"accepted": edits, "refused": 0, "warned": 0, "shrunk": 0},
    }


def brief(names: Sequence[str] = ("unrelated",)) -> list[dict[str, Any]]:
    """A run's checkpoints with little in them, for a page with few charts."""
    return [{n: checkpoint(e)[n] for n in ("edits", *names)} for e in EDITS]


def step(number: int, **changes: Any) -> dict[str, Any]:
    edit = {"prompt": "{} lives in", "subject": f"Ada {number}", "target": "Rome"}
    return {
        "step": number,
        "edits": [edit],
        "decision": "accepted",
        "reasons": [],
        "scale": 1.0,
        "seconds": {"targets": 0.3, "solve": 0.1},
        **changes,
    }


def make_run(folder: Path, **changes: Any) -> Path:
    """A run's folder; `changes` are of run.json, but for `lines` and `steps`."""
    folder.mkdir(parents=True)
    lines = changes.pop("lines", None) or [checkpoint(edits) for edits in EDITS]
    steps = changes.pop("steps", None) or [
        *(step(number) for number in range(1, 5)),
        step(5, decision="refused", reasons=["leverage 812 is above 500"]),
    ]
    settings = {
        "format": "unified-edit/run/1",
        "name": "memit, one at a time",
        "model": "examples/tinyworld/gpt2",
        "base_fingerprint": "a81c1f0e",
        "recipe": {"name": "memit", "layers": [0, 1], "preservation_weight": 15000.0},
        "statistics": {"0": "f00d"},
        "records": {"file": "records.json", "sha256": "ab" * 32, "count": 400},
        "batch_size": 1,
        "edits": 400,
        "guard": {"leverage": 500.0, "on_limit": "refuse"},
        "seed": 0,
        "version": "0.1.0",
        "versions": "Python 3.12, torch 2.13.0, transformers 5.23",
        "machine": "a machine, 2 threads",
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(settings))
    for name, rows in (("checkpoints", lines), ("steps", steps)):
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and the
    rows of the tables as texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self._into: Callable[[str], None] | None = None
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._into = self._cell
        elif tag == "figcaption":
            self.captions.append("")
            self._into = self._caption
        elif tag in ("small", "br"):
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "figcaption"):
            self._into = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._into:
            self._into(data)

    def _cell(self, data: str) -> None:
        self.tables[-1][-1][-1] += data

    def _caption(self, data: str) -> None:
        self.captions[-1] += data

    def headline(self, row: int = 0) -> dict[str, str]:
        return dict(zip(self.tables[0][0], self.tables[0][1 + row], strict=True))


def page_of(folder: Path) -> Page:
    return Page(write_report(folder, folder.parent / "page.html", force=True))


def test_the_headline_says_what_the_run_did(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert page.headline() == {
        "run": "memit, one at a time memit",
        "batch size": "1",
        "edits": "400",
        "held at S ≥ 0.8": "180",
        "forgetting from": "100",
        "collapse at": "300",
        **{name: "0.20 0.15–0.22" for name in ("S", "ES", "NS")},
        "PS": "–",
        "skills before → after": "0.95 → 0.10",
        "unrelated before → after": "1.00 → 0.10",
        "drift": "0.8",
        "refused edits": "1",
    }
    assert page.captions == [
        "S, all edits so far",
        "Rewrite accuracy, all edits so far",
        "Neighbourhood score, NS",
        "Other facts of edited subjects",
        "Unrelated facts",
        "Skills, mean",
        "Perplexity (log scale)",
        "Drift ‖W−W₀‖/‖W₀‖, largest layer",
    ]
    assert ["memit, one at a time", "4", "0", "0", "1"] in page.tables[2]
    event = ["5", "refused", "leverage 812 is above 500", "Ada 5 lives in → Rome"]
    assert ["memit, one at a time", *event] in page.tables[3]
    assert page.tables[4] == [
        ["run", "", "all", "targets", "solve"],
        ["memit, one at a time", "", "0.400", "0.300", "0.100"],
    ]
    for told in ("a81c1f0e", "a machine, 2 threads", "15000.0", "by 0.2 or more"):
        assert told in page.text


def test_a_run_that_holds_says_so(tmp_path: Path) -> None:
    lines = [
        {"edits": n, "unrelated": 1.0, "earlier": metrics(0.97) if n else None}
        for n in EDITS
    ]
    page = page_of(make_run(tmp_path / "run", lines=lines, guard=None))
    found = page.headline()
    assert found["held at S ≥ 0.8"] == "≥ 400"
    assert found["forgetting from"] == found["collapse at"] == "none"
    assert found["refused edits"] == "–"
    few = page_of(make_run(tmp_path / "few", lines=lines[:3], edits=40)).headline()
    assert few["forgetting from"] == few["collapse at"] == "too few points"


def test_runs_of_a_folder_are_compared(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for size in (1, 10, 100):
        make_run(runs / f"b{size}", batch_size=size, name="memit")
    make_run(runs / "other", recipe={"name": "rome"}, name="rome", seed=7)
    (runs / "notes").mkdir()
    page = page_of(runs)
    names = [row[0] for row in page.tables[0][1:]]
    assert names == [*(f"memit (b{n}) memit" for n in (1, 10, 100)), "rome rome"]
    assert page.captions[-3:] == ["S", "ES", "NS"]  # the sweep; PS was not measured
    assert "memit, 400 edits" in page.text
    differing = next(t for t in page.tables if "seed" in t[0])
    recipe = ("recipe.name", "recipe.layers", "recipe.preservation_weight")
    assert differing[0] == ["run", *recipe, "batch_size", "seed"]
    assert differing[-1] == ["rome", "rome", "", "", "1", "7"]
    assert "S, newest edits" in page.captions  # of its own beyond three runs


def test_runs_that_differ_in_more_than_batch_size_are_no_sweep(tmp_path: Path) -> None:
    for size in (1, 10):
        make_run(tmp_path / "runs" / f"b{size}", batch_size=size, seed=size)
    page = page_of(tmp_path / "runs")
    assert "Batch size" not in page.text and "ES" not in page.captions


def test_what_files_say_is_never_markup(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    lines = [
        {**line, "skills": {HOSTILE: 1.0}, "drift": {HOSTILE: 0.1}}
        for line in brief(["earlier"])
    ]
    edit = {"prompt": f"{{}} {HOSTILE}", "subject": HOSTILE, "target": HOSTILE}
    steps = [step(1, edits=[edit], decision=HOSTILE, reasons=[HOSTILE])]
    steps[0]["seconds"] = {HOSTILE: 1.0}
    told = {name: HOSTILE for name in ("name", "model", "machine", "versions")}
    for size in (1, 10):
        changes: dict[str, Any] = {**told, "base_fingerprint": HOSTILE}
        changes |= {"version": HOSTILE, "recipe": {"name": HOSTILE, HOSTILE: size}}
        make_run(
            runs / f"r{size}", lines=lines, steps=steps, batch_size=size, **changes
        )
    page = page_of(runs)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "link", "object", "foreignobject"}
    assert not any(n.startswith("on") for _, given in page.elements for n in given)
    shown = HOSTILE.replace("\ud800", "?")
    assert page.text.count(shown) > 20
    assert page.headline()["run"].startswith(shown)


@pytest.mark.parametrize("several", [False, True])
def test_a_page_needs_nothing_else(tmp_path: Path, several: bool) -> None:
    folder = tmp_path / "runs"
    make_run(folder / "a", lines=brief(["perplexity", "same_subject"]))
    make_run(folder / "b", name="b")
    page = page_of(folder if several else folder / "a")
    plain = page.source.replace("http-equiv", "")
    assert not re.search(r"https?:|//|\bsrc=|@import|@font-face|data:", plain)
    assert all(each.startswith("#") for each in re.findall(r"url\(([^)]*)\)", plain))
    links = [given["href"] or "" for _, given in page.elements if "href" in given]
    names = [given["id"] or "" for _, given in page.elements if "id" in given]
    # Charts do not take each other's marks, and find their own.
    assert len(names) == len(set(names)) and names
    assert {link.removeprefix("#") for link in links} <= set(names)
    assert all(link.startswith("#") for link in links)


def test_same_runs_same_bytes_wherever_they_are(tmp_path: Path) -> None:
    pages = []
    for place in ("one", "two"):
        lines = brief(["perplexity", "same_subject"])
        make_run(tmp_path / place / "runs" / "a", lines=lines)
        make_run(tmp_path / place / "runs" / "b", name="b", lines=lines)
        pages.append(page_of(tmp_path / place / "runs").source)
    assert pages[0] == pages[1]
    assert str(tmp_path) not in pages[0]


def test_a_line_that_a_crash_cut_off_is_left_out_and_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", lines=brief())
    whole = page_of(folder)
    assert "incomplete" not in whole.text and "unfinished" not in whole.text
    path = folder / "checkpoints.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 6, "edits": [{"pro')
    page = page_of(folder)
    assert f"checkpoints.jsonl: line {len(EDITS)} is incomplete and left" in page.text
    assert "steps.jsonl: line 6 is incomplete and left out" in page.text
    assert "unfinished: 380 of 400 edits" in page.text
    assert page.headline()["edits"] == "380"
    # A last line that lacks its newline alone is whole.
    path.write_bytes(path.read_bytes().rpartition(b"\n")[0])
    assert "checkpoints.jsonl: line" not in page_of(folder).text


def test_checkpoints_between_which_all_was_refused_are_one(tmp_path: Path) -> None:
    lines = [*brief(), {"edits": EDITS[-1], "step": 500, "unrelated": 0.05}]
    refused = [step(number, decision="refused") for number in range(1, 11)]
    folder = make_run(tmp_path / "run", lines=lines, steps=refused, edits=410)
    page = page_of(folder)
    found = page.headline()
    assert (found["edits"], found["refused edits"]) == ("400", "10")
    assert found["unrelated before → after"] == "1.00 → 0.05"
    assert "unfinished" not in page.text  # 400 made and 10 refused are all 410


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def change_line(path: Path, number: int, **changes: Any) -> None:
    lines = lines_of(path)
    row = {**json.loads(lines[number - 1]), **changes}
    lines[number - 1] = json.dumps(row).encode() + b"\n"
    path.write_bytes(b"".join(lines))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (lambda f: shutil.rmtree(f), "run: no such folder"),
    "an empty folder": (
        lambda f: [each.unlink() for each in f.iterdir()],
        "run: no run.json here, nor one folder below",
    ),
    "no settings": (
        lambda f: (f / "run.json").unlink(),
        "run.json: cannot be read: No such file or directory",
    ),
    "no steps": (
        lambda f: (f / "steps.jsonl").unlink(),
        "steps.jsonl: cannot be read: No such file or directory",
    ),
    "another format": (
        lambda f: (f / "run.json").write_text('{"format": "unified-edit/run/9"}'),
        "run.json: its format is not 'unified-edit/run/1'",
    ),
    "settings no JSON": (
        lambda f: (f / "run.json").write_text("{"),
        "run.json: not JSON",
    ),
    "settings no object": (
        lambda f: (f / "run.json").write_text("[1]"),
        "run.json: an object is expected",
    ),
    "nothing measured": (
        lambda f: (f / "checkpoints.jsonl").write_text('{"edits": 0'),
        "checkpoints.jsonl: no complete line",
    ),
    "a broken line": (
        lambda f: (f / "checkpoints.jsonl").write_bytes(
            b"".join(lines_of(f / "checkpoints.jsonl")).replace(b"120,", b"120", 1)
        ),
        "checkpoints.jsonl:7: not JSON",
    ),
    "an empty line": (
        lambda f: (f / "steps.jsonl").write_text("\n"),
        "steps.jsonl:1: not JSON",
    ),
    "no UTF-8": (
        lambda f: (f / "steps.jsonl").write_bytes(b"\xff\n"),
        "steps.jsonl:1: not JSON",
    ),
    "too deep": (
        lambda f: (f / "steps.jsonl").write_bytes(b"[" * 10**5 + b"\n"),
        "steps.jsonl:1: not JSON",
    ),
    "edits that do not ascend": (
        lambda f: change_line(f / "checkpoints.jsonl", 4, edits=20),
        "checkpoints.jsonl:4: edits is a count from 40 on, not '20'",
    ),
    "no edits": (
        lambda f: change_line(f / "checkpoints.jsonl", 3, edits=None),
        "checkpoints.jsonl:3: edits is a count",
    ),
    "a text for a number": (
        lambda f: change_line(f / "checkpoints.jsonl", 2, perplexity="12"),
        "checkpoints.jsonl:2: perplexity is a number or three, not '12'",
    ),
    "half an interval": (
        lambda f: change_line(f / "checkpoints.jsonl", 2, earlier={"s": [1, 2]}),
        "checkpoints.jsonl:2: earlier.s is a number or three",
    ),
    "edits of a step no list": (
        lambda f: change_line(f / "steps.jsonl", 2, edits="x"),
        "steps.jsonl:2: edits is a list",
    ),
    "seconds no object": (
        lambda f: change_line(f / "steps.jsonl", 2, seconds=[1]),
        "steps.jsonl:2: seconds is an object",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_run_is_refused_by_file_and_line(tmp_path: Path, name: str) -> None:
    spoil, message = BAD[name]
    folder = make_run(tmp_path / "run")
    spoil(folder)
    out = tmp_path / "page.html"
    with pytest.raises(UnifiedEditError) as caught:
        write_report(folder, out)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not out.exists()


def test_gaps_of_any_kind_are_no_crash(tmp_path: Path) -> None:
    nothing = [math.nan, None, math.inf]
    gone = {"s": nothing, "es": None, "rewrite_accuracy": [0.5, None, None]}
    gap = {
        **{name: None for name in ("current", "earlier", "same_subject", "skills")},
        **{name: None for name in ("unrelated", "perplexity", "drift", "guard")},
    }
    lines = [checkpoint(edits) for edits in EDITS]
    lines[3] |= gap
    lines[5] |= {"earlier": gone, "perplexity": math.nan, "skills": {"addition": None}}
    lines[6] |= {"perplexity": -1.0, "drift": {"0": math.inf}, "seconds": 10**400}
    lines[8] = {"edits": lines[8]["edits"]}
    page = page_of(make_run(tmp_path / "run", lines=lines))
    assert page.headline()["collapse at"] == "300"
    assert not re.search(r"\b(nan|inf)\b", page.source, re.IGNORECASE)
    for edits in (1, 4):  # nothing measured at all
        empty = [{"edits": 20 * n, **gap} for n in range(edits)]
        page = page_of(make_run(tmp_path / f"empty{edits}", lines=empty))
        assert page.captions == []
        assert page.headline()["held at S ≥ 0.8"] == page.headline()["S"] == "–"


def test_colours_follow_the_page_and_series_stay_apart() -> None:
    chart = charts.Chart("c", [charts.Line(n, [0, 1], [0, n / 20]) for n in range(20)])
    drawn = charts.svg(chart, 1)
    assert not re.search(r"#[0-9a-f]{6}", drawn.replace("#c1-", ""))
    keys = [charts.swatch(n) for n in range(16)]
    assert len(set(keys)) == len(keys)


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnifiedEditError, match=r"pip install 'unified-edit\[plots\]'"):
        write_report(folder, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_file_is_replaced_only_when_asked_and_only_by_a_whole_page(
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path / "run", lines=brief())
    out = tmp_path / "page.html"
    out.write_text("mine")
    with pytest.raises(UnifiedEditError, match="exists already"):
        write_report(folder, out)
    change_line(folder / "steps.jsonl", 2, edits="x")
    with pytest.raises(UnifiedEditError, match=r"steps\.jsonl:2"):
        write_report(folder, out, force=True)
    assert out.read_text() == "mine"
    change_line(folder / "steps.jsonl", 2, edits=[])
    assert write_report(folder, out, force=True) == out
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["page.html", "run"]


def test_the_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    cli_report.add_to(app)
    folder = str(make_run(tmp_path / "run", lines=brief()))
    out = str(tmp_path / "page.html")
    done = CliRunner().invoke(app, ["report", folder, "-o", out])
    assert (done.exit_code, done.stdout) == (0, f"wrote {out}\n")
    again = CliRunner().invoke(app, ["report", folder, "-o", out])
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.startswith("error: ") and "--force" in again.stderr
    options = ["--out", out, "--force", "--json"]
    forced = CliRunner().invoke(app, ["report", folder, *options])
    assert json.loads(forced.stdout) == {"report": out}


# --- in a browser --------------------------------------------------------------------

PROBE = """<pre id="probe"></pre><script>
console.log("probing");
const box = e => { const b = e.getBoundingClientRect();
  return [b.left, b.top, b.right, b.bottom]; };
const charts = [...document.querySelectorAll("figure > svg")].map(s => ({
  box: box(s), texts: [...s.querySelectorAll("text")].map(t => [t.textContent, box(t)]),
  lines: [...s.querySelectorAll("path")].map(p => getComputedStyle(p).stroke) }));
document.getElementById("probe").textContent = JSON.stringify({ charts,
  tables: [...document.querySelectorAll("table")].map(box),
  seen: document.documentElement.clientWidth,
  width: document.documentElement.scrollWidth });
</script>"""


def browse(folder: Path, page: Path, *options: str) -> tuple[str, list[str]]:
    """What headless Chromium, which reaches no host, prints and logs of a page."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout, [n for n in done.stderr.splitlines() if "CONSOLE" in n]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A folder to work in, and the page of nine runs."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH")
    folder = tmp_path_factory.mktemp("seen")
    for number in range(9):
        make_run(
            folder / "runs" / f"r{number}",
            batch_size=10 ** (number % 3),
            name=f"a run with a long name, number {number}",
            lines=[
                {**checkpoint(edits), "unrelated": 1 - number / 20, "perplexity": 25.0}
                for edits in EDITS
            ],
        )
    make_run(folder / "runs" / "s", name=HOSTILE, lines=brief(["current"]))
    yield folder, write_report(folder / "runs", folder / "page.html")


def test_it_is_laid_out_on_a_narrow_screen(seen: tuple[Path, Path]) -> None:
    folder, page = seen
    probed = folder / "probed.html"
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", text)
    probed.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    dom, logged = browse(folder, probed, "--dump-dom", "--window-size=500,900")
    assert len(logged) == 1 and "probing" in logged[0]
    found = json.loads(dom.partition('id="probe">')[2].partition("</pre>")[0])
    assert len(found["charts"]) == dom.count("<figure>") > 10
    assert found["width"] <= found["seen"] == 500  # tables scroll, the page does not
    assert len(found["tables"]) > 3
    assert all(right - left > 100 for left, _, right, _ in found["tables"][:2])
    for chart in found["charts"]:
        left, top, right, bottom = chart["box"]
        assert 400 < right - left <= 500 and bottom - top > 200
        assert "rgb(0, 114, 178)" in chart["lines"]  # the first run's colour
        boxes = [box for text, box in chart["texts"] if text.strip()]
        assert len(boxes) > 5
        for number, one in enumerate(boxes):
            assert left <= one[0] < one[2] <= right and top <= one[1] < one[3] <= bottom
            for other in boxes[number + 1 :]:
                apart = one[2] <= other[0] or other[2] <= one[0]
                assert apart or one[3] <= other[1] + 2 or other[3] <= one[1] + 2


def test_it_is_drawn_without_a_complaint(seen: tuple[Path, Path]) -> None:
    from matplotlib.image import imread

    folder, page = seen
    picture = folder / "page.png"
    shot = f"--screenshot={picture}"
    _, logged = browse(folder, page, shot, "--window-size=1280,3000")
    assert logged == []
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)
    assert pixels.shape == (3000, 1280, 3)
    assert (pixels[0, 0] == 255).all()
    for color in ((0, 114, 178), (213, 94, 0), (0, 135, 95)):
        assert (abs(pixels - color).max(axis=-1) < 24).sum() > 300
    # No half of it is empty.
    for half in (pixels[:1500], pixels[1500:]):
        assert (half.min(axis=-1) < 200).mean() > 0.005
