"""The page as a reader meets it: what stands where, order, keys, contrast, and nothing of a rollout ever runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from views import HOSTILE, example, group, many, rollout, view, write

PICTURES = os.environ.get("ACPO_PICTURES")  # a folder: keep a picture of every page that is opened


FRAMES = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def until(tab, condition: str) -> None:
    """Waits for the condition; the page's policy lets no predicate of playwright's run in it."""
    for _ in range(200):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(f"not within ten seconds: {condition}")


@pytest.fixture
def open_page(browser, tmp_path, request):
    """Opens a view; at the end nothing may have been said on the console, asked of the network or thrown."""
    said, asked, tabs = [], [], []

    def opened(what, scheme: str = "light", size: tuple[int, int] = (1360, 860)):
        tab = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda r: asked.append(r.url))
        tab.goto(write(what, tmp_path).as_uri())
        tab.wait_for_selector("#columns > *")
        tab.evaluate(FRAMES)
        until(tab, "waiting.length === 0")
        tabs.append(tab)
        return tab

    yield opened
    for i, tab in enumerate(tabs):
        if PICTURES:
            tab.screenshot(path=Path(PICTURES) / f"{re.sub('[^a-z0-9]+', '-', request.node.name)}-{i}.png")
        tab.close()
    assert said == [] and len(asked) == len(tabs) and all(url.startswith("file:") for url in asked)


def texts(tab, selector: str) -> list[str]:
    return tab.locator(selector).all_inner_texts()


def numbers(tab) -> list[str]:
    return tab.eval_on_selector_all(".rollout", "all => all.map((x) => x.dataset.number)")


def focused(tab) -> tuple[str, str]:
    return tuple(tab.evaluate("[document.activeElement.closest('.rollout')?.dataset.number, document.activeElement.dataset.k]"))


def test_what_stands_where(open_page):
    tab = open_page(example())
    assert tab.title() == "run · acpo inspect" and tab.inner_text("#summary").startswith(
        "step 3 · 3 problems · 7 rollouts: 2 right, 4 wrong, 1 without"
    )
    assert numbers(tab) == ["3", "1", "2", "4"] and texts(tab, ".rollout h2 > span:not(.given)")[:2] == ["✗ wrong", "✓ right"]
    first = tab.locator(".rollout").first
    assert "A +1.00 · surprise 0.25\n30 tokens · 3 steps · tree 0.50" in re.sub(r"\s*\n\s*", "\n", tab.inner_text(".rollout:nth-child(2) header"))
    assert "A −1.00 · surprise 0.56" in first.inner_text() and texts(tab, ".rollout:first-child .gutter b") == ["+2.00", "−1.00", "+0.25", "−1.00"]
    assert texts(tab, ".rollout:first-child .text") == ["step 1.", "step 2.", "step 3.", "step 4."]
    assert texts(tab, ".rollout:nth-child(2) li.answer .text") == ["step 3."]
    assert tab.locator(".rollout:nth-child(4)").get_attribute("aria-label").startswith("rollout 4, left out: verifier timed out, surprise 0.00")
    label = tab.locator(".rollout:first-child li").nth(1).get_attribute("aria-label")
    assert label == "step 2 of 4, credit −1.00, ends with the end of a line: step 2."
    assert "surprise: credit per token that pulls against the verdict" in tab.inner_text("#legend")
    right = tab.inner_text("#question")
    assert "How many?" in right and "33 % of 3" in right


def test_sign_and_size_without_colour(open_page):
    """The bar from the middle line: its ends in per cent, for the credits 1, -0.5 and 1 of a full scale of 2."""
    tab = open_page(example())
    bars = tab.eval_on_selector_all(
        ".rollout:nth-child(2) .gauge", "all => all.map((x) => [x.style.getPropertyValue('--from'), x.style.getPropertyValue('--to')])"
    )
    assert bars == [["50%", "75%"], ["37.5%", "50%"], ["50%", "75%"]]
    assert tab.locator(".rollout:nth-child(2) header path").count() == 2  # up and down


def test_orders(open_page):
    tab = open_page(example())
    for order, expected in (
        ("outcome", ["2", "3", "1", "4"]),
        ("length", ["2", "3", "1", "4"]),
        ("sampled", ["1", "2", "3", "4"]),
        ("surprise", ["3", "1", "2", "4"]),
    ):
        tab.select_option("#order", order)
        assert numbers(tab) == expected, order  # the same problem stays in view
    tab.keyboard.press("Escape")
    tab.locator("body").press("s")
    assert tab.input_value("#order") == "outcome" and texts(tab, "nav .name") == ["p2", "p1", "p3"]


def test_keys(open_page):
    tab = open_page(example())
    tab.keyboard.press("ArrowDown")
    assert focused(tab) == ("3", "0")
    tab.keyboard.press("j")
    detail = tab.inner_text("#detail")
    assert focused(tab) == ("3", "1") and "#3 wrong, step 2 of 4 · 10 tokens · ends with the end of a line" in detail and "own part" in detail
    for key, place in (
        ("ArrowRight", ("1", "1")),
        ("l", ("2", "1")),
        ("h", ("1", "1")),
        ("End", ("1", "2")),
        ("Home", ("1", "0")),
        ("ArrowUp", ("1", "0")),
        ("ArrowLeft", ("3", "0")),
    ):
        tab.keyboard.press(key)
        assert focused(tab) == place, key
    tab.keyboard.press("ArrowRight")
    assert re.search(
        r"advantage\s*\+1.00\s*credit\s*\+1.00\s*own part\s*0.00\s*phi\s*\+0.25\s*information\s*−0.50 nats\s*hindsight\s*\+1.50 nats\s*"
        r"V\s*0.75\s*weight\s*1.00\s*entropy\s*0.33 nats\s*log-prob\s*−0.44 nats",
        tab.inner_text("#detail"),
    )
    tab.keyboard.press("c")
    assert (
        tab.input_value("#shade") == "own"
        and focused(tab) == ("1", "0")
        and texts(tab, ".rollout:nth-child(2) .gutter b") == ["0.00", "−1.50", "0.00"]
    )
    tab.keyboard.press("f")
    assert focused(tab) == ("1", "0") and "φ +0.25" in " ".join(tab.inner_text(".rollout:nth-child(2) li").split())
    tab.keyboard.press("]")
    assert "p2" in tab.inner_text("nav [aria-current=true]") and len(numbers(tab)) == 2
    tab.keyboard.press("]"), tab.keyboard.press("]"), tab.keyboard.press("[")
    assert "p2" in tab.inner_text("nav [aria-current=true]")
    tab.keyboard.press("?")
    about = tab.inner_text("#about")
    assert tab.evaluate("document.getElementById('about').open") and "sum n_k max(0, -s c_k) / sum n_k" in about and "a blank line" in about
    tab.keyboard.press("Escape")
    assert not tab.evaluate("document.getElementById('about').open")
    assert tab.evaluate("document.querySelectorAll('.rollout li[tabindex=\"0\"]').length") <= 1


def test_rollouts_with_the_same_text(open_page):
    tab = open_page(view(group([rollout(1, [0.5], 1.0), rollout(2, [0.5, 1.0], 1.0), rollout(3, [0.1], 1.0)])))
    assert [h.split(" ✓")[0].split("✓")[0].strip() for h in texts(tab, ".rollout h2")] == ["#1", "#2", "#3 = #1"]


def test_pointer(open_page):
    tab = open_page(example())
    tab.hover(".rollout:first-child li:nth-child(2) .text")
    assert "#3 wrong, step 2 of 4" in tab.inner_text("#detail")
    tab.click(".rollout:first-child li:nth-child(3) .text")
    tab.hover("header h1")
    assert "#3 wrong, step 3 of 4" in tab.inner_text("#detail")  # back to the step of the keyboard
    tab.click("nav ol button >> nth=2")
    assert focused(tab) == ("2", "0")
    tab.click("nav > button >> nth=0")
    assert "p2" in tab.inner_text("nav [aria-current=true]") and "p2" in tab.evaluate("document.activeElement.innerText")  # the focus stays


def test_tab_comes_in_at_the_first_step(open_page):
    tab = open_page(example())
    tab.focus("#question pre")
    for _ in range(3):  # some browsers stop at the scrolling area itself
        tab.keyboard.press("Tab")
        if focused(tab)[0]:
            break
    assert focused(tab) == ("3", "0")


def test_nothing_of_a_rollout_runs(open_page):
    bad = rollout(1, [0.5, -0.5], 1.0, texts=[HOSTILE + "\n", HOSTILE], given=HOSTILE)
    tab = open_page(view(group([bad], problem=HOSTILE, prompt=HOSTILE, answer=HOSTILE), title=HOSTILE, notes=(HOSTILE,)))
    assert tab.evaluate("[window.hit, document.images.length, document.scripts.length]") == [None, 0, 2]
    shown = tab.evaluate("document.querySelector('.rollout .text').textContent")
    for part in (
        "<script>window.hit = 1</script></script>",
        "⟨U+0000⟩ ⟨U+001B⟩[31mred⟨U+001B⟩[0m ⟨U+0007⟩ ⟨U+202E⟩right to left⟨U+202C⟩ ⟨U+2066⟩ ⟨U+200B⟩hidden ⟨U+2028⟩",
        "&lt;b&gt;",
        "{data} {script}",
        "😀",
    ):
        assert part in shown
    for place in ("#title", "#question pre", "#question dd", "nav .name", ".given", "#legend", ".rollout .text"):
        text = tab.evaluate("(s) => document.querySelector(s).textContent", place)
        assert "</script></script>" in text or "</script></script>" in tab.evaluate(
            "(s) => document.querySelector(s).parentElement.textContent", place
        ), place
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\u2028]", text), place


def test_the_policy_holds(browser, tmp_path):
    """A script, a handler, a style and a picture that come later are refused."""
    tab = browser.new_page()
    refused = []
    tab.on("console", lambda message: refused.append(message.text))
    tab.goto(write(example(), tmp_path).as_uri())
    tab.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.hit = 1";
      document.body.append(script);
      const button = document.createElement("button");
      button.setAttribute("onclick", "window.hit = 2");
      document.body.append(button);
      button.click();
      const image = document.createElement("img");
      image.src = "https://example.invalid/x.png";
      document.body.append(image);
      const style = document.createElement("style");
      style.textContent = "body { display: none !important }";
      document.body.append(style);
    }""")
    assert tab.evaluate("[window.hit, getComputedStyle(document.body).display]") == [None, "grid"]
    assert len(refused) == 4 and all("Content Security Policy" in text for text in refused)
    tab.close()


RGB = """(css) => {
  const canvas = document.createElement("canvas").getContext("2d");
  canvas.fillStyle = css;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}"""

# Of every element with text of its own: colour against the nearest background that is not transparent, as the screen mixes them.
CONTRAST = f"""() => {{
  const rgb = {RGB}, known = new Map();
  const colour = (css) => known.get(css) || known.set(css, rgb(css)).get(css);
  const linear = (x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = (c) => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const found = [];
  for (const node of document.querySelectorAll("body *")) {{
    if (!node.checkVisibility() || node.closest("noscript, option")) continue;
    if (![...node.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim())) continue;
    let under = node;
    while (under && colour(getComputedStyle(under).backgroundColor)[3] === 0) under = under.parentElement;
    const pair = [getComputedStyle(node).color, getComputedStyle(under || document.body).backgroundColor].map((c) => light(colour(c)) + 0.05);
    found.push([Math.max(...pair) / Math.min(...pair), node.tagName + "." + node.className + ": " + node.textContent.slice(0, 30)]);
  }}
  return found;
}}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_page, scheme):
    """At least 4.5 for every text: on every shade, from none to full, and elsewhere."""
    shades = [x / 10 for x in range(-20, 21)]
    numbers = {"entropy": 1.0, "phi": 0.5}
    tab = open_page(view(group([rollout(1, shades, 1.0, numbers=numbers), rollout(2, [1.0], 0.0), rollout(3, [0.1], None)])), scheme, (1360, 2000))
    for _ in range(4):
        tab.keyboard.press("c")
        tab.keyboard.press("j")
        tab.evaluate(FRAMES)
        until(tab, "waiting.length === 0")
        worst = sorted(map(tuple, tab.evaluate(CONTRAST)))
        assert len(worst) > 60 and worst[0][0] >= 4.5, worst[:5]
    tab.keyboard.press("?")
    assert min(tab.evaluate(CONTRAST))[0] >= 4.5


def test_shades(open_page):
    """Against is red, for is blue, nothing is paper; as strong as they are large; in the light and in the dark."""
    for scheme in ("light", "dark"):
        tab = open_page(view(group([rollout(1, [-2.0, -1.0, 0.0, 1.0, 2.0], 1.0)])), scheme)
        shade = f"[...document.querySelectorAll('.rollout .text')].map((x) => ({RGB})(getComputedStyle(x).backgroundColor))"
        red, pale, none, light, blue = tab.evaluate(shade)
        warmth = [c[0] - c[2] for c in (red, pale, none, light, blue)]
        assert warmth == sorted(warmth, reverse=True) and warmth[0] > 50 and warmth[1] > 15 and warmth[3] < -15 and warmth[4] < -50, (scheme, warmth)


def test_theme(open_page):
    tab = open_page(example(), "dark")
    page = "getComputedStyle(document.body).backgroundColor"
    dark = tab.evaluate(page)
    tab.click("#theme")
    assert tab.inner_text("#theme") == "theme: light" and tab.evaluate(page) != dark
    tab.locator("body").press("t")
    assert tab.inner_text("#theme") == "theme: dark" and tab.evaluate(page) == dark


def test_long_groups_are_drawn_as_one_comes_near(open_page):
    tab = open_page(many(64, 1024, 64))
    drawn = "document.querySelectorAll('.rollout li').length"
    assert tab.locator(".rollout").count() == 64 and 0 < tab.evaluate(drawn) < 64 * 16 / 3
    tab.evaluate("document.getElementById('columns').scrollTo(1e9, 0)")
    until(tab, "document.querySelectorAll('.rollout:last-child li').length === 16")
    tab.evaluate("document.getElementById('columns').scrollTo(0, 0)")
    for _ in range(20):
        tab.keyboard.press("ArrowRight")
    tab.keyboard.press("End")
    where = tab.evaluate("""() => {
      const a = document.activeElement.getBoundingClientRect(), b = document.getElementById("columns").getBoundingClientRect();
      const head = document.activeElement.closest(".rollout").querySelector("header").getBoundingClientRect();
      return [a.left >= b.left, a.right <= b.right, a.bottom <= b.bottom + 1, a.top >= head.bottom - 1];
    }""")
    assert focused(tab)[1] == "15" and where == [True] * 4  # what the keyboard is on is in view


@pytest.mark.parametrize("size", [(1360, 860), (390, 800)])
def test_it_fits(open_page, size):
    tab = open_page(example(), size=size)
    assert tab.evaluate("(d => [d.scrollWidth <= innerWidth, d.scrollHeight <= innerHeight])(document.documentElement)") == [True, True]
    tab.keyboard.press("j")
    assert tab.evaluate("document.activeElement.getBoundingClientRect().bottom < document.getElementById('detail').getBoundingClientRect().top + 1")


EDGES = {
    "no group": (view(), "There is no rollout to show."),
    "one rollout": (view(group([rollout(1, [0.5], 1.0)])), "step 1."),
    "an empty response": (view(group([rollout(1, [], 0.0)])), "an empty response"),
    "no credit": (view(group([rollout(1, [None, None], None, None)])), "step 2."),
    "all wrong": (view(group([rollout(n, [0.0], 0.0) for n in (1, 2, 3)])), "step 1."),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(open_page, name):
    what, text = EDGES[name]
    tab = open_page(what)
    assert text in tab.inner_text("#columns")
    for key in ("j", "l", "k", "h", "c", "s", "f", "]", "[", "End", "t"):
        tab.keyboard.press(key)
