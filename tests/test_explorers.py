"""Explorers: the pictures of the book that move."""

import base64
import functools
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from pnpda_nb.plotting import explore

VOID = {"img", "input"}


class Page(HTMLParser):
    """Every tag with its attributes and its text; nothing may be left open or close what is not open."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.text:
            self.text[-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def draw(height, colour="green"):
    figure, ax = plt.subplots(figsize=(3, 2))
    ax.plot(np.sin(np.linspace(0, 6, 50)) * height, color=colour)
    ax.set(ylim=(-4, 4))
    return figure


@functools.cache
def one() -> str:
    return explore(draw, alt="One", height=[1, 2, 3]).data


@functools.cache
def two(**options) -> str:
    return drawn_anew(**options)


def drawn_anew(**options) -> str:
    return explore(draw, **({"alt": "A sine"} | options), height=[0.5, 1.0, 3.0], colour=["green", "black"]).data


def frames_of(html: str) -> list[tuple[str, str]]:
    """(description, address) of every frame in order: the first from the page, the others from its script."""
    image = Page(html).all("img")[0]
    return [(image["alt"], image["src"])] + [tuple(f) for f in json.loads(re.search(r"const others = (.*);", html)[1])]


def test_that_the_page_of_an_explorer_is_well_formed_and_fetches_nothing():
    page = Page(two())
    assert [tag for tag, _ in page.tags].count("figure") == 1 and page.tags[0][0] == "figure"
    assert all(a["src"].startswith("data:image/") for _, a in page.tags if "src" in a)
    assert not any("href" in a or "id" in a for _, a in page.tags)
    assert "http" not in re.sub(r"base64,[\w+/=]*", "", two()) and "@import" not in two()


def test_that_every_setting_has_a_labelled_slider_that_says_its_value():
    page = Page(drawn_anew(labels={"height": "height <of> the wave"}))
    height, colour = page.all("input")
    assert height["type"] == colour["type"] == "range"
    assert (height["max"], colour["max"]) == ("2", "1") and height["aria-valuetext"] == "0.5"
    assert json.loads(height["data-values"]) == ["0.5", "1", "3"] and json.loads(colour["data-values"]) == ["green", "black"]
    tags = [tag for tag, _ in page.tags]
    first = tags.index("input")
    assert tags[first - 2 : first + 2] == ["label", "span", "input", "output"]
    assert page.text[first - 1] == "height <of> the wave" and page.text[first + 1] == "0.5"


def test_that_there_is_a_frame_with_its_own_description_for_every_combination_in_the_order_of_the_sliders():
    frames = frames_of(two())
    wanted = [f"A sine: height {h}, colour {c}" for h, c in itertools.product(["0.5", "1", "3"], ["green", "black"])]
    assert [alt for alt, _ in frames] == wanted
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(a.partition(",")[2]))).convert("RGB")) for _, a in frames]
    assert all(
        p.shape == pictures[0].shape == (round(2 * plt.rcParams["figure.dpi"]), round(3 * plt.rcParams["figure.dpi"]), 3)
        for p in pictures
    )

    def green(p):
        red, green, blue = p.astype(int).transpose(2, 0, 1)
        return ((green > red + 60) & (green > blue + 60)).any(1)

    assert [bool(green(p).any()) for p in pictures] == 3 * [True, False]
    tall = [green(p).nonzero()[0] for p in pictures[::2]]
    extents = [rows[-1] - rows[0] for rows in tall]
    assert extents[0] < extents[1] < extents[2]


def test_that_a_description_may_be_a_function_of_the_choice_and_is_escaped():
    html = explore(draw, alt=lambda height: f'"{height}" </script> & more', height=[1, 2]).data
    assert [alt for alt, _ in frames_of(html)] == ['"1" </script> & more', '"2" </script> & more']
    assert html.count("</script>") == 1


def test_that_the_same_explorer_has_the_same_bytes_and_another_one_another_key():
    key = re.compile(r'data-explorer="(\w+)"')
    assert two() == drawn_anew()
    assert key.search(two())[1] != key.search(two(alt="Another sine"))[1]


def test_that_the_first_frame_is_there_and_the_sliders_are_not_where_no_script_runs():
    page = Page(two())
    assert page.all("img")[0]["src"].startswith("data:image/")
    assert [("hidden" in a) for a in page.all("div") if a.get("class") == "settings"] == [True]


def test_that_one_setting_can_be_played_and_several_cannot():
    assert len(Page(one()).all("button")) == 1
    assert not Page(two()).all("button")


def test_that_a_colour_of_a_few_pixels_survives_in_a_small_palette():
    def dots(count):
        figure, ax = plt.subplots(figsize=(4, 3))
        ax.plot(np.random.default_rng(1).standard_normal(2000), lw=0.7, color="#009E73")
        ax.plot([1000], [0], "s", color="#D55E00", ms=count)
        return figure

    (_, address), *_ = frames_of(explore(dots, alt="dots", count=[4]).data)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")).astype(int)
    assert (abs(picture - np.array([0xD5, 0x5E, 0])).max(-1) < 24).sum() > 4


def test_that_too_many_combinations_and_empty_choices_are_refused():
    with pytest.raises(ValueError, match=r"choices: expected at most 24 combinations, got 25 \(5 × 5\)"):
        explore(draw, alt="", height=range(5), colour=range(5))
    with pytest.raises(ValueError, match="choices: expected at least one value for every setting"):
        explore(draw, alt="", height=[])
    with pytest.raises(ValueError, match="choices: expected at least one value for every setting"):
        explore(draw, alt="")


def test_that_figures_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match="draw: expected figures of one size"):
        explore(lambda width: plt.figure(figsize=(width, 2)), alt="", width=[2, 3])


def test_that_no_figure_is_left_open():
    before = plt.get_fignums()
    drawn_anew()
    assert plt.get_fignums() == before


def test_that_a_live_kernel_gets_sliders_that_draw_anew(monkeypatch):
    import IPython
    from ipywidgets import SelectionSlider

    class Shell:
        kernel = object()

    drawn, shown = [], []

    def noted(height, colour):
        drawn.append((height, colour))
        return draw(height, colour)

    monkeypatch.setattr(IPython, "get_ipython", lambda: Shell())
    monkeypatch.setattr("IPython.display.display", shown.append)
    box = explore(noted, alt="A sine", height=[0.5, 1.0, 3.0], colour=["green", "black"])
    height, colour = (w for w in box.children if isinstance(w, SelectionSlider))
    assert drawn == [(0.5, "green")]  # and not all six
    height.value = 3.0
    colour.value = "black"
    assert drawn[1:] == [(3.0, "green"), (3.0, "black")]
    assert 'alt="A sine: height 3, colour black"' in shown[-1].data


def test_that_moving_a_slider_in_a_browser_changes_the_picture(tmp_path):
    """Twice the same explorer and another one on a page, without a network."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no browser")
    page_file = tmp_path / "page.html"
    page_file.write_text(f"<!doctype html><meta charset=utf-8><title>t</title><body>{two()}{one()}{one()}</body>")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        problems = []
        page.on("pageerror", lambda error: problems.append(error))
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else problems.append(request.url))
        page.goto(page_file.as_uri())
        figures = page.locator("figure.explorer").all()
        shown = [f.locator("img").get_attribute("src") for f in figures]
        by_choice = dict(frames_of(two()))
        for height, colour in (("End", "End"), ("ArrowLeft", "ArrowLeft"), ("Home", "End")):  # the keyboard
            figures[0].locator("input").nth(0).press(height)
            figures[0].locator("input").nth(1).press(colour)
            image, words = (figures[0].locator("img"), figures[0].locator("output").all_text_contents())
            assert image.get_attribute("alt") == f"A sine: height {words[0]}, colour {words[1]}"
            assert image.get_attribute("src") == by_choice[image.get_attribute("alt")]
            assert figures[0].locator("input").nth(0).get_attribute("aria-valuetext") == words[0]
        assert [f.locator("img").get_attribute("src") for f in figures[1:]] == shown[1:]
        figures[2].locator("button").click()  # play: on to the last frame, and then it stops
        figures[2].get_by_text("Pause").wait_for(timeout=3000)
        figures[2].get_by_text("Play").wait_for(timeout=5000)
        assert figures[2].locator("img").get_attribute("alt") == "One: height 3"
        assert figures[1].locator("img").get_attribute("alt") == "One: height 1"
        browser.close()
    assert not problems
