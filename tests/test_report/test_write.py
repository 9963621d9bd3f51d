"""The page as a file: what is in it, and what is said of what is not."""
import re
from html.parser import HTMLParser

import pytest
from run_folder import DENSE, LOG, dense_and_moe, write_run

import rmoe.report.write as module
from rmoe.report import missing_packages, write_report

pytest.importorskip('plotly')


class Page(HTMLParser):
    """Tags, attributes and the text outside of scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self._open = [], '', []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if not {'script', 'style'} & set(self._open):
            self.text += ' ' + ' '.join(data.split())


def test_dense_beside_moe(tmp_path):
    folders = dense_and_moe(tmp_path)
    path = write_report(folders, tmp_path / 'new/two.html', images=0)
    page = Page(path)
    for words in ('moe, dense', 'Load of experts', 'stage 2 block 1',
                  '0:02:30 (1.50x)', 'no images were asked for',
                  'checkpoint of a mmseg Swin:', 'core, head', '2.9.0'):
        assert words in re.sub(' +', ' ', page.text), words
    # of scores, losses twice, seconds and the layer
    assert [tag for tag, attrs in page.tags
            if 'data-chart' in attrs] == ['div'] * 5
    # Nothing comes from elsewhere.
    assert not [attrs for tag, attrs in page.tags if any(
        str(attrs.get(key)).startswith(('http', '//', '/'))
        for key in ('src', 'href'))]
    assert path.stat().st_size < 8e6


def test_a_dense_run_says_nothing_of_experts(tmp_path):
    write_run(tmp_path, DENSE, '')
    path = write_report([tmp_path], images=0)
    assert path == tmp_path / 'report.html'
    text = Page(path).text
    assert 'Load of experts' not in text and 'on images' not in text
    assert 'There is no cost.json' in text and 'none in the work dir' in text


def test_nothing_was_logged(tmp_path):
    (tmp_path / 'swin.py').write_text('a = 1\n')
    text = Page(write_report([tmp_path], images=0)).text
    for words in ('No validation was logged', 'No iteration was logged',
                  'There is no cost.json', 'There is no log', 'a = 1'):
        assert words in text, words


def test_a_config_that_cannot_be_read_is_no_reason_to_fail(tmp_path):
    write_run(tmp_path, config='a = nothing_like_this\n')
    text = Page(write_report([tmp_path])).text
    assert 'the config cannot be read' in text
    assert 'nothing_like_this' in text


def test_what_comes_from_files_is_escaped(tmp_path):
    evil = '</script><script>alert(1)</script><img src=x onerror=alert(2)>'
    write_run(
        tmp_path, [{**line, evil: 1.} for line in DENSE],
        LOG.replace('2.9.0', evil).replace('mmseg Swin', evil).replace(
            'joint', evil), config=f'a = {evil!r}\n')
    page = Page(write_report([tmp_path], images=0))
    assert [tag for tag, _ in page.tags].count('script') == 3
    assert 'img' not in [tag for tag, _ in page.tags]
    assert page.text.count('alert(2)') >= 4


def test_dead_experts_are_those_of_the_runs_own_hook(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr('rmoe.report.page.render', lambda runs, found, dead: (
        limits.extend(dead) or ''))
    hook = "dict(type='rmoe.RoutingStatsHook'{})"
    for i, option in enumerate((', dead_below=0.2', '')):
        write_run(tmp_path / str(i), config=(
            f'custom_hooks = [{hook.format(option)}]\n'))
    write_report([tmp_path / '0', tmp_path / '1'], images=0)
    assert limits == [.2, .01]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'find_spec', lambda name: None)
    assert missing_packages().endswith(
        'python -m pip install plotly jinja2')
    with pytest.raises(ImportError, match='pip install plotly jinja2'):
        write_report(dense_and_moe(tmp_path))


@pytest.mark.parametrize('option', ['images', 'count_images'])
def test_negative_numbers(tmp_path, option):
    with pytest.raises(ValueError, match=f'{option}=-1 must not be negative'):
        write_report([tmp_path], **{option: -1})
