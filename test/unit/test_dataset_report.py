"""The report of a data set: what it finds, what it shows, and the page in a browser."""

import base64
import io
import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from browser import PROGRAM, Browser, columns_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data import captions, findings
from library.data.captions import Rules
from library.data.dataset import Data, Dropped
from library.data.specs import Buckets, Fixed, Origin, Spec
from library.data.table import Text, build, flatten, join
from library.validation import dataset_report, report

NASTY = "</script><script>document.title='x'</script> & \"quoted\" <img src=http://example.com/a.png> %data% שלום 🐈"
in_browser = pytest.mark.skipif(PROGRAM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")


class Source:
    """A source of pictures in memory."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.names = files, np.array(list(files), Text)

    def read(self, row: int) -> bytes:
        return self.files[str(self.names[row])]


def encoded(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def table_of(spec: Spec, sizes: list[tuple[int, int]], texts: list[list[str]], contents: list[str] | None = None, names=None):
    records = np.zeros(len(sizes), [("width", "i4"), ("height", "i4"), ("content", "S32")])
    records["width"], records["height"] = np.array(sizes).reshape(-1, 2).T
    records["content"] = contents or [f"{row:016x}{row:016x}" for row in range(len(sizes))]
    names = np.array(names or [f"{row}.png" for row in range(len(sizes))], Text)
    return build(spec, records, names, *flatten(texts))[0]


def spec_of(name: str = "cats", size=None, **changes) -> Spec:
    return Spec(name, Origin("folder", f"data/{name}"), size or Buckets((64, 64), 32, 128, 16), **changes)


def data_of(*tables, dropped=(), files=()) -> Data:
    return Data([Source(each) for each in files] or [Source({}) for _ in tables], [None for _ in tables], join(list(tables)), [],
                list(dropped))


# findings

SIDES = st.tuples(st.integers(8, 400), st.integers(8, 400))
TEXTS = st.lists(st.sampled_from(["a cat", "", "  ", "\n", "dog"]), max_size=3)


@given(st.lists(st.tuples(SIDES, TEXTS, st.sampled_from("abcdefgh")), min_size=1, max_size=12), st.booleans())
def test_what_is_found_of_each_image(images, fixed):
    sizes, texts, contents = zip(*images, strict=True)
    spec = spec_of(size=Fixed((64, 48)) if fixed else None)
    data = data_of(table_of(spec, list(sizes), list(texts), list(contents)))
    found, table = findings.find(data), data.table
    for row, (size, words, content) in enumerate(images):
        (width, height), (bucket_w, bucket_h) = table.resized[row].tolist(), table.buckets[table.bucket_of[row]]
        expected = {
            "uncaptioned": not words, "empty": any(not text.strip() for text in words), "long": False,
            "duplicate": contents.count(content) > 1, "enlarged": width > size[0] or height > size[1],
            "cropped": 3 * bucket_w * bucket_h < 2 * width * height}
        assert {kind: row in rows for kind, rows in found.rows.items()} == expected
        assert found.twin[row] == (contents.index(content) if contents.count(content) > 1 else -1)


def test_the_table_may_be_a_part_of_another():
    data = data_of(table_of(spec_of(), [(64, 64)] * 4, [["a"], [""], [], ["b", " "]]))
    data.table = data.table.select(np.array([1, 2, 3]))
    rows = findings.find(data).rows
    assert rows["empty"].tolist() == [0, 2] and rows["uncaptioned"].tolist() == [1]


def test_the_same_file_is_not_said_to_look_the_same_as_well():
    data = data_of(table_of(spec_of(), [(64, 64)] * 5, [["a"]] * 5, ["a", "a", "b", "c", "d"]))
    rows = findings.find(data, near=np.array([0, 0, 0, -1, -1])).rows
    assert rows["duplicate"].tolist() == [0, 1] and rows["near"].tolist() == [2]
    assert "near" not in findings.find(data).rows


@pytest.fixture(scope="module")
def tokenizers(tiny_model):
    from transformers import CLIPTokenizer
    return [CLIPTokenizer.from_pretrained(tiny_model / name) for name in ("tokenizer", "tokenizer_2")]


def test_what_of_a_caption_is_cut_off(tokenizers):
    words = "red cat blue dog house a of red cat dog a".split()    # a token each
    texts = [["red cat"], [" ".join(words)], [], ["a", " ".join(words[:7])], [" ".join(words[:6])], ["Red   Cat\n" * 5]]
    table = table_of(spec_of(), [(64, 64)] * 6, texts)
    long = findings.measure_captions(table, tokenizers, 6)
    assert {row: (tokens, read.split(), cut.split()) for row, (tokens, read, cut) in long.items()} == {
        1: (11, words[:6], words[6:]), 3: (7, words[:6], words[6:7]), 5: (10, ["Red", "Cat"] * 3, ["Red", "Cat"] * 2)}
    assert all(f"{read}{cut}" == texts[row][-1] for row, (_, read, cut) in long.items())    # as written: nothing is lost
    assert findings.measure_captions(table, tokenizers, 11).keys() == set()


def test_the_longest_of_several_captions_counts_and_prefix_and_suffix_do(tokenizers):
    rules = Rules(prefix="a of", suffix="house", empty=1.0, tag_dropout=1.0, empty_every=1)
    one = table_of(spec_of(text=rules), [(64, 64)] * 2, [["red", "red cat", "cat"], ["red"]])
    other = table_of(spec_of("dogs"), [(64, 64)], [["red cat red cat red"]])
    long = findings.measure_captions(join([one, other]), tokenizers, 5)
    assert long == {}
    assert findings.measure_captions(join([one, other]), tokenizers, 4) == {
        0: (5, "a of red cat ", "house"), 2: (5, "red cat red cat ", "red")}
    assert findings.measure_captions(join([one, other]), tokenizers, 3).keys() == {0, 1, 2}


def test_of_two_tokenizers_the_one_that_reads_less_counts():
    def by(size):    # a token each `size` characters
        def tokenizer(prompts, **_):
            offsets = [[(start, min(start + size, len(text))) for start in range(0, len(text), size)] for text in prompts]
            return {"input_ids": [[0] * len(each) for each in offsets], "offset_mapping": offsets}
        return tokenizer

    table = table_of(spec_of(), [(64, 64)], [["abcdefghij"]])
    for tokenizers in ([by(2), by(3)], [by(3), by(2)]):
        assert findings.measure_captions(table, tokenizers, 3) == {0: (5, "abcdef", "ghij")}
        assert findings.measure_captions(table, tokenizers, 4) == {0: (5, "abcdefgh", "ij")}
        assert findings.measure_captions(table, tokenizers, 5) == {}


def test_every_caption_of_more_than_a_batch_is_measured(tokenizers):
    texts = [["red cat"] if row % 700 else ["red cat house dog"] for row in range(2500)]
    texts[1500] = ["red cat house " + "a " * 1500]
    assert findings.measure_captions(table_of(spec_of(), [(64, 64)] * 2500, texts), tokenizers, 3).keys() == {
        0, 700, 1400, 1500, 2100}


# the summary

def test_the_summary_is_what_the_table_says():
    cats = table_of(spec_of(), [(64, 64)] * 3 + [(300, 60)], [["a"]] * 4, ["a", "a", "b", "c"])
    dogs = table_of(spec_of("dogs", Fixed((64, 64)), rate=2.5), [(20, 20)], [[]])
    gone = [Dropped("cats", "bad.png", "no image"), Dropped("cats", "worse.png", "no image"), Dropped("dogs", NASTY, NASTY)]
    data = data_of(cats, dogs, dropped=gone)
    facts = dataset_report.Facts([("Steps", "7", NASTY)], faults=[NASTY])
    page = dataset_report.summary_html(data, findings.find(data), facts)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    for words in ("Images 5 of 8 found; 3 are left out", "Left out 3", "Same file twice 2", "Enlarged 1", "No caption 1",
                  "no image 2", "cats: bad.png: no image", "dogs 1 1 2.5", "64 × 64 4", "Training would not start"):
        assert words in text, words
    assert "<script" not in page and "<img" not in page and "<a " not in page
    assert "<a " in dataset_report.summary_html(data, findings.find(data), links=True)


def test_the_summary_fits_into_the_page_of_a_run():
    data = data_of(table_of(spec_of(), [(64, 64)], [["a"]]))
    for name in re.findall(r"var\(--(\w+)", dataset_report.STYLE):
        assert f"--{name}:" in report.CSS
    page = dataset_report.summary_html(data, findings.find(data))
    assert page.count("<div") == page.count("</div>") and page.count("<section") == page.count("</section>")
    assert "Pictures were not compared" in page and "captions were not measured" in page


# the page

def shapes() -> tuple[Data, int]:
    """Two data sets: what the cut of an image keeps is red, all else is blue; and one image left out."""
    files, others = {}, {}
    fixed = spec_of("cats", Fixed((64, 64), "random"), flip=True, text=Rules(prefix="drawing of"))
    even = spec_of("dogs", Buckets((128, 128), 64, 256, 32), flip=True)
    wide = table_of(fixed, [(256, 64), (64, 256), (200, 100), (64, 64), (640, 320), (256, 64)],
                    [["a cat"], ["a dog", "a pet"], [], [NASTY], ["red"], ["a cat"]],
                    [f"{row:016x}" for row in (1, 2, 3, 4, 5, 1)], [f"{row} {NASTY}"[:60] for row in range(6)])
    tall = table_of(even, [(130, 300), (333, 200), (100, 100)], [["Mouse"], [""], ["a cat"]], names=["x.png", "y.png", "z.png"])
    for table, kept in ((wide, files), (tall, others)):
        for row in range(len(table)):
            (width, height), (bucket_w, bucket_h) = table.resized[row].tolist(), table.buckets[table.bucket_of[row]]
            cut = table.cut(row, 0)
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[..., 2] = 255
            pixels[cut.top:cut.top + bucket_h, cut.left:cut.left + bucket_w] = (255, 0, 0)
            image = Image.fromarray(pixels[:, ::-1] if cut.flip else pixels)
            kept[str(table.name[row])] = encoded(image.resize(tuple(table.size[row].tolist()), Image.Resampling.NEAREST))
    others["gone.png"] = encoded(Image.new("RGB", (80, 40), "green"))
    gone = [Dropped("dogs", "gone.png", "smaller than minimum_image_size"), Dropped("cats", "void.png", "the file is empty")]
    return data_of(wide, tall, dropped=gone, files=(files, others)), 7


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    data, seed = shapes()
    found = findings.find(data, near=np.array([-1, 1, -1, -1, 1, -1, -1, -1, -1]), long={3: (9, NASTY[:20], NASTY[20:])})
    path = dataset_report.write_report(tmp_path_factory.mktemp("page") / "dataset_report.html", data, found,
                                       dataset_report.Facts(notes=[NASTY], command=NASTY), title=NASTY, seed=seed)
    return SimpleNamespace(path=path, data=data, found=found, seed=seed, columns=columns_of(path))


@pytest.fixture(scope="module")
def browser():
    opened = Browser()
    yield opened
    opened.close()


@pytest.fixture
def view(browser, page):
    """`view(fragment)`: the page, opened at this state."""
    def view(fragment: str = "", width: int = 1400, height: int = 1000, dark: bool = False) -> Browser:
        browser.resize(width, height, dark)
        browser.open(f"{page.path.as_uri()}#{fragment}")
        return browser
    return view


def rows_shown(browser: Browser) -> list[int]:
    return browser.run("[...document.querySelectorAll('.item')].map(each => +each.dataset.row)")


def test_the_columns_are_the_tables(page):
    table, columns = page.data.table, page.columns
    assert len(columns["name"]) == len(table) + 2
    for row in range(len(table)):
        assert columns["name"][row] == table.name[row] and columns["size"][row] == table.size[row].tolist()
        assert columns["prompt"][row] == captions.pick(table.texts(row), table.spec(row).text, page.seed, row, 0, 4)
        cuts = [table.cut(row, number) for number in range(table.variants(row, 4))]
        assert columns["cuts"][row] == [[cut.left, cut.top, int(cut.flip)] for cut in cuts]
        written = columns["captions"][row]
        assert ([columns["prompt"][row]] if written is None else written) == table.texts(row)
        width, height = Image.open(io.BytesIO(base64.b64decode(columns["thumb"][row]))).size
        assert max(width, height) <= 256 and abs(width / height / (table.size[row][0] / table.size[row][1]) - 1) < 0.05
    assert columns["reason"][-2:] == ["smaller than minimum_image_size", "the file is empty"]
    assert columns["size"][-2:] == [[80, 40], None] and columns["thumb"][-2] and not columns["thumb"][-1]


def test_pictures_are_limited_and_the_page_says_so(page, tmp_path):
    path = dataset_report.write_report(tmp_path / "few.html", page.data, page.found, dataset_report.Facts(), title="few", seed=0,
                                       pictures=2)
    found = {int(row) for rows in page.found.rows.values() for row in rows}
    drawn = {row for row, thumb in enumerate(columns_of(path)["thumb"][:len(page.data.table)]) if thumb}
    assert drawn >= {0, 8} and len(drawn & found) >= 2 and len(drawn) <= 4
    assert f"{len(drawn)} with their picture: 2 spread evenly and 2 of {len(found)} with a finding" in path.read_text()


def test_of_very_many_only_those_with_a_picture_are_listed(page, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_report, "LISTED", 5)
    path = dataset_report.write_report(tmp_path / "few.html", page.data, page.found, dataset_report.Facts(), title="few", seed=0,
                                       pictures=2)
    columns = columns_of(path)
    assert all(columns["thumb"][:-2]) and len(columns["name"]) <= 6
    assert f"{len(columns['name']) - 2} of 9 images and 2 of 2 that are left out are listed" in path.read_text()


def test_an_image_that_is_gone_meanwhile_is_noted(page, tmp_path):
    data = replace(page.data, sources=[Source({}), page.data.sources[1]])
    data.sources[0].read = lambda row: (_ for _ in ()).throw(FileNotFoundError(2, "No such file"))
    path = dataset_report.write_report(tmp_path / "x.html", data, page.found, dataset_report.Facts(), title="x", seed=0)
    assert path.read_text().count("cannot be drawn: [Errno 2] No such file") == 6


@in_browser
def test_nothing_is_fetched_and_nothing_in_it_runs(view, page):
    browser = view()
    browser.until("document.querySelectorAll('.item').length", 11)
    asked = {event["params"]["request"]["url"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"}
    asked -= {"about:blank"}
    assert all(url.startswith((page.path.as_uri(), "data:image/webp;base64,")) for url in asked) and len(asked) > 5
    links = browser.run("[...document.querySelectorAll('*')].flatMap(e => ['src', 'href', 'srcset', 'action', 'data']"
                        ".map(a => e.getAttribute(a)).filter(Boolean))")
    assert links and all(link.startswith(("#", "data:image/webp;base64,")) for link in links)
    assert browser.run("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    problems = [event for event in browser.events if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not problems
    assert browser.run("document.title") == NASTY and NASTY in browser.run("document.querySelector('[data-row=\"3\"]').innerText")
    # and what would be put into it is not loaded
    browser.run("document.body.append(Object.assign(new Image(), {src: 'http://example.com/x.png'}))")
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert "Content Security Policy" in json.dumps(browser.events)


@in_browser
def test_the_boxes_are_where_the_numbers_say(view, page):
    browser, table = view(), page.data.table
    drawn = browser.run("""[...document.querySelectorAll('.item')].map(item => {
        const number = (e, ...names) => names.map(name => +e.getAttribute(name)), svg = item.querySelector('svg');
        const screen = e => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; };
        const [image, cut] = [svg.querySelector('image'), svg.querySelector('.cut')];
        return {row: +item.dataset.row, view: svg.getAttribute('viewBox'), image: image && number(image, 'width', 'height'),
          cut: cut && number(cut, 'x', 'y', 'width', 'height'),
          others: [...svg.querySelectorAll('.other')].map(e => number(e, 'x', 'y')),
          whole: image && screen(image), part: cut && screen(cut)}; })""")
    for each in drawn[:-2]:
        row = each["row"]
        (width, height), bucket = table.resized[row].tolist(), table.buckets[table.bucket_of[row]]
        first, *others = (table.cut(row, number) for number in range(table.variants(row, 4)))
        assert each["view"] == f"0 0 {width} {height}" and each["image"] == [width, height]
        assert each["cut"] == [first.left, first.top, *bucket]
        mirrored = [width - cut.left - bucket[0] if cut.flip != first.flip else cut.left for cut in others]
        assert each["others"] == [[left, cut.top] for left, cut in zip(mirrored, others, strict=True)]
        x, y, *size = each["whole"]
        scale = size[0] / width
        assert size[1] == pytest.approx(height * scale, abs=0.1)
        expected = [x + first.left * scale, y + first.top * scale, bucket[0] * scale, bucket[1] * scale]
        assert each["part"] == pytest.approx(expected, abs=0.1)
    assert [each["cut"] for each in drawn[-2:]] == [None, None]


@in_browser
def test_what_the_box_holds_on_the_screen_is_what_training_sees(view, page):
    """The cuts are red and all else is blue, mirrored ones included: the pixels just inside and outside of each box say so."""
    mirrored = [page.data.table.cut(row, 0).flip for row in range(len(page.data.table))]
    assert any(mirrored) and not all(mirrored)
    for row in range(len(page.data.table)):
        browser = view(f"image={row}")
        browser.until("document.querySelector('#view image') !== null")
        whole, part = browser.run("""['#view image', '#view .cut'].map(name => {
            const r = document.querySelector(name).getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; })""")
        screen = np.asarray(browser.screenshot()).astype(int)
        inside = [(part[0] + 9, part[1] + 9), (part[2] - 9, part[1] + 9), (part[0] + 9, part[3] - 9), (part[2] - 9, part[3] - 9)]
        outside = [(x, y) for x, y in ((part[0] - 12, part[1] + 12), (part[2] + 12, part[1] + 12), (part[0] + 12, part[1] - 12),
                   (part[0] + 12, part[3] + 12)) if whole[0] < x < whole[2] and whole[1] < y < whole[3]]
        for x, y in inside:
            red, _, blue = screen[int(y), int(x)]
            assert red > 200 and blue < 60, (row, x, y)
        for x, y in outside:
            red, _, blue = screen[int(y), int(x)]
            assert blue > red + 10, (row, x, y)


@in_browser
def test_filters_by_address(view, page):
    table, columns = page.data.table, page.columns
    found = {kind: set(rows.tolist()) for kind, rows in page.found.rows.items()} | {"dropped": {9, 10}}
    everything = set(range(11))
    for kind in findings.KINDS:
        assert set(rows_shown(view(f"reason={kind}"))) == found[kind], kind
    for width, height in set(table.buckets):
        rows = {row for row in range(9) if table.buckets[table.bucket_of[row]] == (width, height)}
        assert set(rows_shown(view(f"bucket={width}x{height}"))) == rows
    for text in ("a cat", "CAT", "pet", "gone", "minimum", "drawing of", "nowhere", "%3C/script%3E", "%D7%A9%D7%9C%D7%95%D7%9D"):
        from urllib.parse import unquote
        wanted = unquote(text).lower()
        rows = {row for row in everything if any(wanted in part.lower() for part in (
            columns["name"][row], columns["prompt"][row], columns["reason"][row], *(columns["captions"][row] or [])))}
        assert set(rows_shown(view(f"text={text}"))) == rows, text
    assert set(rows_shown(view("set=dogs"))) == {6, 7, 8, 9}
    assert set(rows_shown(view("set=dogs&text=a%20cat&reason=enlarged"))) == found["enlarged"] & {8}
    assert view("text=nowhere").run("document.querySelector('#count').textContent") == "0 of 11 images"
    assert len(rows_shown(view("reason=nonsense&page=77"))) == 0 or len(rows_shown(view("page=77"))) == 11


@in_browser
def test_filters_by_hand(view):
    browser = view()
    browser.press("/")
    assert browser.run("document.activeElement.id") == "text"
    browser.type("mouse")
    browser.until("document.querySelectorAll('.item').length", 1)
    assert "text=mouse" in browser.run("location.hash") and rows_shown(browser) == [6]
    browser.run("document.querySelector('#clear').click()")
    assert len(rows_shown(browser)) == 11 and browser.run("document.querySelector('#text').value") == ""
    browser.run("{ const s = document.querySelector('#reason'); s.value = 'dropped'; s.dispatchEvent(new Event('change')); }")
    assert rows_shown(browser) == [9, 10]
    browser.run("document.querySelector('#data-findings a[href=\"#reason=duplicate\"]').click()")
    browser.until("document.querySelectorAll('.item').length", 2)
    assert rows_shown(browser) == [0, 5] and browser.run("document.querySelector('#reason').value") == "duplicate"


@in_browser
def test_the_keyboard_opens_an_image_and_walks_on(view, page):
    browser = view("set=dogs")
    browser.run("document.querySelector('#clear').focus()")
    browser.press("Tab")
    assert browser.run("document.activeElement.dataset.row") == "6"
    browser.press("Enter")
    browser.until("document.querySelector('#view').open")
    name = "document.querySelector('#view-name').textContent"
    assert browser.run(name) == "x.png"
    browser.press("ArrowRight")
    assert browser.run(name) == "y.png" and "the empty prompt" in browser.run("document.querySelector('#view').innerText")
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")    # the first of the filter: stays
    assert browser.run(name) == "x.png"
    browser.press("Escape")
    browser.until("document.querySelector('#view').open", False)
    browser.until("document.activeElement.dataset.row", "6")
    assert browser.run("location.hash") == "#set=dogs"


@in_browser
def test_an_image_tells_everything_about_itself(view):
    told = view("image=0").run("document.querySelector('#view-facts').innerText")
    for words in ("256 × 64", "64 × 64; 75.0% of the resized image is cut off", "drawing of a cat", "as written", "mirrored"):
        assert words in told, words
    assert view("image=0").run("document.querySelector('#view-facts button').textContent").startswith("5 ")
    browser = view("image=3")
    assert "9 tokens" in browser.run("document.querySelector('#view-facts').innerText")
    assert browser.run("document.querySelector('#view-facts del').textContent") == NASTY[20:]
    assert "the file is empty" in view("image=10").run("document.querySelector('#view-facts').innerText")


@in_browser
def test_light_dark_and_phone(view):
    def luminance(x, y, browser):
        return sum(browser.screenshot().getpixel((x, y)))
    assert luminance(5, 5, view()) > 700 > 150 > luminance(5, 5, view(dark=True))
    for width in (320, 400, 760, 1000, 1400):
        for fragment in ("", "image=3"):
            browser = view(fragment, width, 900)
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run("document.querySelector('#view').scrollWidth <= document.querySelector('#view').clientWidth + 1")


@in_browser
def test_ten_thousand_images_are_quick(browser, tmp_path):
    count = 10_000
    draw = np.random.default_rng(0)
    sizes = [tuple(pair) for pair in draw.integers(40, 400, (count, 2)).tolist()]
    table = table_of(spec_of(flip=True), sizes, [[f"a cat of number {row}"] for row in range(count)])
    data = data_of(table)
    data.read = None    # no picture is asked for
    path = dataset_report.write_report(tmp_path / "many.html", data, findings.find(data), dataset_report.Facts(), title="many",
                                       seed=0, pictures=0)
    browser.resize(1400, 1000)
    start = time.perf_counter()
    browser.open(path.as_uri())
    assert browser.run("document.querySelector('#count').textContent") == "10,000 of 10,000 images"
    assert time.perf_counter() - start < 5
    assert browser.run("document.querySelectorAll('*').length") < 4000
    spent = browser.run("{ const start = performance.now(); go({ text: 'number 77' }); performance.now() - start }")
    assert spent < 1000
    rows = [row for row in range(count) if str(row).startswith("77")]
    assert browser.run("document.querySelector('#page').textContent") == "Page 1 of 2" and rows_shown(browser) == rows[:60]
    browser.run("document.querySelector('#after').click()")
    assert rows_shown(browser) == rows[60:] and browser.run("document.querySelector('#after').disabled")
    assert "page=2" in browser.run("location.hash")
    browser.run("go({ reason: 'enlarged' })")    # another filter starts at its first page
    assert "page" not in browser.run("location.hash")
