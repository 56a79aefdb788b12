"""The page: whole, on its own, harmless whatever run files hold, and drawn by a real browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from moe.compare import compare
from moe.errors import CompareError

ATTACK = "</script><img src=x onerror=\"document.title='owned'\"><!--"
FOLDER = "<b onclick=alert(1)>&amp;'\"%{x}<script>"


class Outline(HTMLParser):
    """Elements and visible text of a page, as a browser's parser sees them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.text, self.title, self._open = [], [], "", "", ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open == "script":
            self.scripts.append(data)
        elif self._open == "title":
            self.title += data
        elif self._open != "style":
            self.text += data


def named(outline, tag):
    return [attributes for name, attributes in outline.tags if name == tag]


@pytest.fixture
def hostile(make_run, steps):
    """A comparison in which everything a run directory can say is an attack."""
    environment = {"device_name": ATTACK, "commit": ATTACK, "versions": {"torch": ATTACK}}
    moe = make_run(FOLDER, steps(4, 3, 2, error=0.02), environment=environment, validation=ATTACK, tokenizer=ATTACK)
    dense = make_run("dense", steps(5, 4, 3, error=0.02), environment={"device_name": "plain"})
    return compare([moe], [dense])


@pytest.fixture
def plain(make_run, steps):
    """An MoE against one dense run, measured on the same device."""
    moe, dense = make_run("moe", steps(4, 3, 2, error=0.02)), make_run("dense", steps(5, 4, 3, error=0.02))
    return compare([moe], [dense])


@pytest.fixture
def browse(tmp_path):
    """Opens a page in headless Chromium and returns the document after its scripts ran."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("runs on a machine with chromium (apt-get install chromium), which opens the page")

    def open_page(page):
        command = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0, result.stderr
        return Outline(result.stdout)

    return open_page


def test_page_loads_nothing_from_elsewhere(plain, tmp_path):
    plain.write_html(tmp_path / "page.html")
    outline = Outline((tmp_path / "page.html").read_text())
    assert not [attributes for _, attributes in outline.tags if {"src", "href"} & set(attributes)]
    policy = next(meta["content"] for meta in named(outline, "meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert any("plotly.js" in script[:100] for script in outline.scripts)


def test_page_holds_verdict_table_facts_and_method(plain, tmp_path):
    plain.write_html(tmp_path / "page.html")
    text = " ".join(Outline((tmp_path / "page.html").read_text()).text.split())
    for note in plain.notes:
        assert note in text
    for words in ("Test GPU", "Validation text", "counter, scope gpu", "Declared band", "Coverage", "fp32"):
        assert words in text
    assert "One run a side, so seed-to-seed variation is not included." in text


def test_what_run_files_say_stays_text(hostile, tmp_path):
    hostile.write_html(tmp_path / "page.html")
    outline = Outline((tmp_path / "page.html").read_text())
    assert ATTACK in outline.text
    assert FOLDER in outline.text
    assert not named(outline, "img")
    assert not named(outline, "b")
    assert len(named(outline, "script")) == 3
    assert not [attributes for _, attributes in outline.tags if {"onerror", "onclick"} & set(attributes)]


def test_data_for_the_script_cannot_end_its_element_and_names_are_not_markup_in_charts(hostile, tmp_path):
    hostile.write_html(tmp_path / "page.html")
    data = Outline((tmp_path / "page.html").read_text()).scripts[1]
    assert "<" not in data
    curve = json.loads(data)[0]["data"][1]
    assert curve["name"].startswith("&lt;b onclick")
    assert curve["hovertemplate"].endswith(f"<extra>{curve['name']}</extra>")
    assert "&#37;{x}" in curve["name"]


def test_writing_replaces_a_whole_page_and_leaves_nothing_beside_it(plain, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "page.html").write_text("old")
    plain.write_html(folder / "page.html")
    assert [path.name for path in folder.iterdir()] == ["page.html"]
    assert (folder / "page.html").stat().st_size > 1_000_000


def test_a_page_that_cannot_be_renamed_leaves_nothing_behind(plain, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()

    def refuse(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(CompareError, match="No space left on device"):
        plain.write_html(folder / "page.html")
    assert list(folder.iterdir()) == []


def test_every_measured_axis_has_a_chart_with_both_crossings(plain, tmp_path, browse):
    plain.write_html(tmp_path / "page.html")
    outline = browse(tmp_path / "page.html")
    plots = [
        attributes["id"] for attributes in named(outline, "div") if "js-plotly-plot" in attributes.get("class", "")
    ]
    assert plots == ["tokens-plot", "device_hours-plot", "energy-plot"]
    traces = [g for g in named(outline, "g") if re.match(r"trace scatter", g.get("class", ""))]
    assert len(traces) == 3 * 2 * 3  # axes x runs x (standard error, curve, crossing)
    lines = [path for path in named(outline, "path") if path.get("class") == "js-line"]
    assert any("rgb(11, 122, 112)" in line["style"] for line in lines), "the style sheet's --s0 did not reach the chart"
    assert len([path for path in named(outline, "path") if "xerror" in path.get("class", "")]) == 3 * 2


def test_an_estimate_has_no_energy_chart(make_run, steps, tmp_path, browse):
    run = make_run("moe", steps(4, 3, 2), source="estimate:tdp", scope="node")
    compare([run]).write_html(tmp_path / "page.html")
    outline = browse(tmp_path / "page.html")
    plots = [
        attributes["id"] for attributes in named(outline, "div") if "js-plotly-plot" in attributes.get("class", "")
    ]
    assert plots == ["tokens-plot", "device_hours-plot"]
    assert "energy is time x declared power" in outline.text


def test_an_attack_does_nothing_in_a_browser(hostile, tmp_path, browse):
    hostile.write_html(tmp_path / "page.html")
    outline = browse(tmp_path / "page.html")
    assert not named(outline, "img")
    assert outline.title.startswith("Cost to reach")
    assert ATTACK in outline.text
    assert len([d for d in named(outline, "div") if "js-plotly-plot" in d.get("class", "")]) == 3
