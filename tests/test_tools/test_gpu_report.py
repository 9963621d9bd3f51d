"""The report of a GPU: parts that fail or hang do not end it, their results
are kept, and wheels are installed only from a folder."""
import json
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import gpu_report
import pytest
from _parts import Outcome, Part, run_part

ROOT = Path(gpu_report.ROOT)


def python(code: str, name: str = 'part', seconds: float = 30.) -> Part:
    return Part(name, (sys.executable, '-c', code), seconds)


def run(part: Part, tmp_path: Path, left: float = 60.) -> tuple[Outcome, str]:
    log = tmp_path / 'log'
    outcome = run_part(part, log, {}, tmp_path, left)
    return outcome, log.read_text() if log.exists() else ''


@pytest.mark.parametrize('code, status', [
    ('print("hello")', 'ok'),
    ('print("hello"); raise SystemExit(3)', 'failed, exit status 3')])
def test_a_part(tmp_path, code, status):
    outcome, said = run(python(code), tmp_path)
    assert outcome.status == status and outcome.ok == (status == 'ok')
    assert said.startswith('\n===== part: ') and said.endswith('hello\n')


def test_a_command_that_is_not_there(tmp_path):
    outcome, _ = run(Part('a', (str(tmp_path / 'nothing'), ), 9.), tmp_path)
    assert outcome.status.startswith('failed, ') and not outcome.ok


@pytest.mark.parametrize('ignored', [False, True])
def test_a_part_that_hangs_is_stopped_and_may_say_so(tmp_path, request,
                                                     ignored):
    """``ignored``: as in a shell's background job."""
    if ignored:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        request.addfinalizer(partial(signal.signal, signal.SIGINT, before))
    begin = time.monotonic()
    outcome, said = run(python(
        'import time\n'
        'print("begun", flush=True)\n'
        'try:\n    time.sleep(60)\n'
        'except KeyboardInterrupt:\n    print("kept")', seconds=1.), tmp_path)
    assert outcome.status == 'stopped after 1 s'
    assert said.endswith('begun\nkept\n')
    assert time.monotonic() - begin < 20


def test_a_part_that_does_not_listen_is_killed_with_its_children(
        tmp_path, monkeypatch):
    import _parts
    monkeypatch.setattr(_parts, 'GRACE_SECONDS', .3)
    outcome, said = run(python(
        'import signal, subprocess, sys, time\n'
        'signal.signal(signal.SIGINT, signal.SIG_IGN)\n'
        'child = subprocess.Popen(["sleep", "60"])\n'
        'print(child.pid, flush=True)\n'
        'time.sleep(60)', seconds=1.), tmp_path)
    assert outcome.status == 'stopped after 1 s'
    child = Path(f'/proc/{said.split()[-1]}/stat')
    for _ in range(50):  # dead, if not yet forgotten by its new parent
        if not child.exists() or ') Z ' in child.read_text():
            return
        time.sleep(.1)
    raise AssertionError('the child lives')


def test_a_part_for_which_no_time_is_left(tmp_path):
    outcome, said = run(python('print(1)'), tmp_path, left=0.)
    assert outcome.status.startswith('left out') and not said
    begin = time.monotonic()
    outcome, _ = run(python('import time; time.sleep(60)'), tmp_path, left=1.)
    assert outcome.status == 'stopped after 1 s'
    assert time.monotonic() - begin < 20


TABLE = dict(machine='a machine', tables=[[{'precision': 'bf16', 'ms': 3}]])
CASES = ('<testsuites><testsuite><testcase classname="a" name="b"/>'
         '<testcase classname="a" name="c"><failure/></testcase>'
         '<testcase classname="a" name="d"><skipped/></testcase>'
         '</testsuite></testsuites>')


def report(tmp_path, monkeypatch, *parts) -> tuple[int, dict, str]:
    """Return the exit status and the files of a report with these parts."""
    monkeypatch.setattr(gpu_report, 'parts', lambda args, scratch: [
        Part(part.name, tuple(word.replace('SCRATCH', str(scratch))
                              for word in part.command), part.seconds)
        for part in parts])
    monkeypatch.setattr(sys, 'argv', ['gpu_report.py', '--out',
                                      str(tmp_path / 'out'), '--device',
                                      'cpu'])
    status = gpu_report.main()
    out = tmp_path / 'out'
    assert {path.name for path in out.iterdir()} == {
        'report.json', 'report.txt', 'report.log'}
    return (status, json.loads((out / 'report.json').read_text()),
            (out / 'report.txt').read_text())


def test_report_goes_on_after_failures(tmp_path, monkeypatch, capsys):
    write = 'open("SCRATCH/{}", "w").write({!r})'
    status, found, text = report(
        tmp_path, monkeypatch,
        # One table had been written before the error.
        python(write.format('layer.json', json.dumps(TABLE)) +
               '; raise SystemExit(1)', 'layer'),
        python('import time; time.sleep(60)', 'memory', 1.),
        python(write.format('tests.xml', CASES), 'tests'))
    assert status == 1
    assert [part['status'] for part in found['parts']] == [
        'failed, exit status 1', 'stopped after 1 s', 'ok']
    assert found['tables'] == {'layer': TABLE}
    assert found['tests'] == dict(passed=1, failed=1, skipped=1,
                                  failing=['a::c'])
    assert 'bf16       3' in text
    for said in (text, capsys.readouterr().out):
        assert 'layer: failed, exit status 1\nmemory: stopped' in said
        assert '  a::c' in said


def test_report_of_what_went_well(tmp_path, monkeypatch, capsys):
    status, found, text = report(tmp_path, monkeypatch,
                                 python('print(1)', 'layer'))
    assert status == 0 and found['parts'][0]['status'] == 'ok'
    assert 'Every part went well.' in text
    assert 'Every part went well.' in capsys.readouterr().out


def arguments(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['gpu_report.py', *map(str, args)])
    return gpu_report.parse_args()


def test_parts_fit_into_the_time(tmp_path, monkeypatch):
    (tmp_path / 'a-1-py3-none-any.whl').touch()
    args = arguments(monkeypatch, '--out', 'x', '--wheels', tmp_path)
    *others, tests = gpu_report.parts(args, tmp_path)
    assert tests.name == 'tests'
    assert [part.name for part in others] == [
        'install', 'machine', *gpu_report.TABLES]
    # Even if all of them were stopped at their limits, time would be left for
    # the tests.
    assert sum(part.seconds for part in others) <= .9 * 8 * 60
    one, = (part for part in gpu_report.parts(arguments(
        monkeypatch, '--out', 'x', '--only', 'memory'), tmp_path)
        if part.name != 'machine')
    assert one.name == 'memory'


@pytest.mark.parametrize('small', [False, True])
def test_the_tables_are_options_of_the_benchmark(tmp_path, monkeypatch,
                                                 small):
    import benchmark
    args = arguments(monkeypatch, '--out', 'x', *['--small'] * small)
    seen = 0
    for part in gpu_report.parts(args, tmp_path):
        if gpu_report.BENCHMARK in part.command:
            at = part.command.index(gpu_report.BENCHMARK)
            monkeypatch.setattr(sys, 'argv', list(part.command[at:]))
            assert benchmark.parse_args().json.endswith(f'{part.name}.json')
            seen += 1
    assert seen == 6


def test_wheels_are_installed_without_an_index(tmp_path, monkeypatch):
    wheel = tmp_path / 'wheels/tiny-1.0-py3-none-any.whl'
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, 'w') as file:
        file.writestr('tiny.py', 'ANSWER = 42\n')
        # Its requirements are not installed.
        file.writestr('tiny-1.0.dist-info/METADATA',
                      'Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n'
                      'Requires-Dist: there-is-no-such-thing\n')
        file.writestr('tiny-1.0.dist-info/WHEEL',
                      'Wheel-Version: 1.0\nGenerator: me\n'
                      'Root-Is-Purelib: true\nTag: py3-none-any\n')
        file.writestr('tiny-1.0.dist-info/RECORD', '')
    args = arguments(monkeypatch, '--out', 'x', '--wheels', wheel.parent,
                     '--device', 'cpu')
    environment = gpu_report.environment(args, tmp_path)
    subprocess.run(gpu_report.install(wheel.parent, tmp_path), check=True,
                   env=environment)
    assert environment['CUDA_VISIBLE_DEVICES'] == ''
    said = subprocess.run(
        [sys.executable, '-c', 'import tiny; print(tiny.ANSWER)'],
        env=environment, check=True, capture_output=True, text=True).stdout
    assert said == '42\n'


@pytest.mark.parametrize('args, message', [
    (('--minutes', 0), '--minutes 0.0 must be positive'),
    (('--wheels', '/nowhere'), '--wheels /nowhere has no wheel')])
def test_what_cannot_be(monkeypatch, capsys, args, message):
    with pytest.raises(SystemExit):
        arguments(monkeypatch, '--out', 'x', *args)
    assert message in capsys.readouterr().err


def test_a_folder_with_something_in_it(tmp_path, monkeypatch):
    (tmp_path / 'kept').touch()
    monkeypatch.setattr(sys, 'argv', ['gpu_report.py', '--out',
                                      str(tmp_path)])
    with pytest.raises(ValueError, match='is not empty'):
        gpu_report.main()
