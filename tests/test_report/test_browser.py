"""A report in a real browser: no network, controls, light, dark, a phone."""
import os
import shutil

import numpy as np
import pytest
from run_folder import dense_and_moe

pytest.importorskip('plotly')
sync_api = pytest.importorskip('playwright.sync_api')
from rmoe.report.experts import ExpertMap, Experts, Overlay  # noqa: E402
from rmoe.report.page import render  # noqa: E402
from rmoe.report.work_dir import read_runs  # noqa: E402

# Of a machine that is busy with other things.
pytestmark = pytest.mark.timeout(900)
PATIENCE = 240_000  # milliseconds
NAMES = ('chromium', 'chromium-browser', 'google-chrome')
PHONE = dict(viewport=dict(width=390, height=844), is_mobile=True,
             has_touch=True)
# Two patches side by side, of 32 pixels; expert 1 is orange.
LEFT, RIGHT = (16, 16), (48, 16)


def overlay(*experts):
    image = np.full((32, 64, 3), 255, np.uint8)
    image[..., 1] = 0
    return Overlay('image.png', image, [
        ExpertMap(np.array([each]), 32) for each in experts])


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp('report')
    runs = read_runs(dense_and_moe(root))
    counts = np.array([[6., 2.], [0., 4.]])
    found = Experts(
        num_experts={'first': 2, 'second': 2}, classes=('a', 'b'), images=3,
        overlays=[overlay([0, 1], [1, -1])],
        tokens_LE={'first': counts, 'second': counts[::-1]})
    path = root / 'report.html'
    path.write_text(render(runs, [found, Experts()], [.01, .01]))
    return path


@pytest.fixture(scope='module')
def browser():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f'there is none of {", ".join(NAMES)}')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=['--no-sandbox'] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def opened(report, browser):
    """Open the report offline; it must say nothing and ask for nothing."""
    said, contexts = [], []

    def start(**options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on('console', lambda message: said.append(message.text))
        page.on('pageerror', lambda error: said.append(str(error)))
        page.on('request', lambda request: request.url.startswith(
            ('file:', 'data:', 'blob:')) or said.append(request.url))
        page.goto(report.as_uri())
        page.wait_for_selector('[data-ready=yes]')
        return page

    yield start
    for context in contexts:
        context.close()
    assert not said


def pixel(page, place):
    # Of a copy: the browser would complain of how often it is read.
    return page.evaluate('''([x, y]) => {
        const copy = document.createElement('canvas').getContext('2d');
        copy.drawImage(document.querySelector('canvas'), 0, 0);
        return [...copy.getImageData(x, y, 1, 1).data].slice(0, 3);
    }''', place)


def tinted(colour):
    """Over purple, which is grey 70 + 510 * 185 / 765."""
    grey = 70 + 510 * 185 / 765
    return pytest.approx([.6 * part + .4 * grey for part in colour], abs=3)


BLUE, ORANGE, BLACK = (31, 119, 180), (255, 127, 14), (0, 0, 0)


def test_slider_and_toggles(opened):
    page = opened()
    assert pixel(page, LEFT) == tinted(BLUE)
    assert pixel(page, RIGHT) == tinted(ORANGE)
    page.locator('input[type=range]').press('ArrowRight')
    assert page.locator('output').inner_text() == 'second'
    assert page.locator('.current').inner_text() == 'second'
    assert pixel(page, LEFT) == tinted(ORANGE)
    assert pixel(page, RIGHT) == tinted(BLACK)
    shown = page.evaluate('''[...document.querySelectorAll('.experts .chart')]
        .map((div) => div.data.map((trace) => trace.visible))''')
    assert shown == [[False, True]]
    # Without expert 1, the left patch is grey; with nothing, in colour.
    page.locator('.chip', has_text='1').click()
    assert pixel(page, LEFT) == pytest.approx([193] * 3, abs=3)
    assert pixel(page, RIGHT) == tinted(BLACK)
    page.get_by_role('button', name='none').click()
    assert pixel(page, LEFT) == pytest.approx([255, 0, 255], abs=3)
    page.get_by_role('button', name='all').click()
    assert pixel(page, LEFT) == tinted(ORANGE)


def test_every_chart_is_drawn(opened):
    page = opened()
    for details in page.locator('details').all():
        details.locator('summary').click()
    sizes = page.evaluate('''[...document.querySelectorAll('.chart')].map(
        (div) => [div.querySelectorAll('.main-svg').length,
                  div.clientWidth, div.querySelector('svg').clientWidth])''')
    # scores, losses, every loss, seconds, a layer, classes
    assert len(sizes) == 6
    for drawn, width, svg in sizes:
        assert drawn and width == svg > 300


def test_light_and_dark(opened):
    def colours(page):
        return page.evaluate('''[getComputedStyle(document.body),
            getComputedStyle(document.querySelector('.xtick text'))].map(
            (style, i) => i ? style.fill : style.backgroundColor)''')

    page = opened(color_scheme='light')
    assert colours(page) == ['rgb(255, 255, 255)', 'rgb(28, 33, 38)']
    page.emulate_media(color_scheme='dark')
    page.wait_for_timeout(300)
    dark = ['rgb(20, 23, 26)', 'rgb(228, 231, 234)']
    assert colours(page) == dark
    assert colours(opened(color_scheme='dark')) == dark


def test_a_phone(opened):
    page = opened(**PHONE)
    assert page.evaluate('document.documentElement.scrollWidth') == 390
    for element in page.locator('.chart:visible, canvas, .controls').all():
        box = element.bounding_box()
        assert box['x'] >= 0 and box['x'] + box['width'] <= 390
        assert box['width'] > 300
    # big enough for a finger
    for chip in page.locator('.chip').all():
        assert chip.bounding_box()['height'] >= 32
    page.locator('.chip', has_text='1').tap()
    assert pixel(page, RIGHT) == pytest.approx([193] * 3, abs=3)
