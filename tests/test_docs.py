"""Every block of code in README.md and docs/ is run, or says why it is not.

A comment before a block says what becomes of it:

    <!-- needs: WHAT -->      not run, for want of data, hardware or a network
    <!-- config -->           a part of a config: names, arguments are checked
    <!-- runs as: COMMAND --> COMMAND is run instead: the same at a small size
    (none)                    run, in an empty folder, after those before it

A ```text block after a block that is run is what it prints. Of commands only
words and order are compared, of Python every digit.
"""
import argparse
import ast
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from mmengine.registry import Registry

import rmoe.registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
FENCE = re.compile(r'^( *)```(\w*)\s*$')
MARKER = re.compile(r'^\s*<!-- (needs|config|runs as)(?:: (.*))? -->\s*$')
# Pages of which no block is run, and what it would take.
NEEDS = {'results.md': 'the data of the experiments, and hours'}
OWN_TEST = {'anywhere.md': 'tests/test_anywhere/test_docs.py'}
# Commands that are not the project's.
OTHERS = {'cd', 'export', 'git', 'pip', 'pytest', 'torchrun', 'printf', 'cat',
          'chmod', 'source', 'ls', 'mkdir', 'true'}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``kind`` is '' where there is no marker."""
    page: Path
    line: int
    language: str
    code: str
    kind: str
    why: str

    @property
    def where(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'


def read_blocks(page: Path) -> list[Block]:
    blocks = []
    lines = iter(enumerate(page.read_text().splitlines(), 1))
    before = ''
    for number, line in lines:
        if not (fence := FENCE.match(line)):
            before = line
            continue
        indent, language = fence.groups()
        body = []
        for _, inner in lines:
            if inner.strip() == '```':
                break
            body.append(inner.removeprefix(indent))
        marker = MARKER.match(before)
        kind, why = marker.groups('') if marker else ('', '')
        if page.name in NEEDS:
            kind, why = 'needs', NEEDS[page.name]
        blocks.append(Block(page, number, language, '\n'.join(body) + '\n',
                            kind, why))
        before = ''
    return blocks


BLOCKS = {page: read_blocks(page) for page in PAGES}
CODE = [block for blocks in BLOCKS.values() for block in blocks
        if block.language in ('bash', 'python')]
# Pages whose blocks are run here, those without a marker too.
RUNNING = [ROOT / 'docs' / name for name in (
    'first_run.md', 'my_checkpoint.md', 'inside.md')]


def of(block):
    return block.where


@pytest.mark.parametrize('block', CODE, ids=of)
def test_blocks_are_run_or_say_why_not(block):
    assert block.why or block.kind not in ('needs', 'runs as')
    assert block.kind or block.page in RUNNING or (
        block.page.name in OWN_TEST), (
        f'{block.where}: put a comment before the block, see the head of '
        'tests/test_docs.py')
    if block.language == 'python':
        ast.parse(block.code.replace(', ...', ''))


@pytest.mark.parametrize('page', OWN_TEST)
def test_pages_with_a_test_of_their_own(page):
    assert page in (ROOT / OWN_TEST[page]).read_text()


# Commands: flags and paths, without running them ---------------------------


class Parsed(Exception):
    """Carries a tool out of its main() when its flags are read."""


def commands_of(code: str) -> list[list[str]]:
    """The words of each command, without assignments before it."""
    code = re.sub(r"<<'?EOF'?.*?^EOF$", '', code, flags=re.S | re.M)
    found = []
    for line in code.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r'[A-Z_]+=', words[0]):
            del words[0]
        # What is optional stands in brackets.
        words = [word.strip('[]') if re.search(r'^\[--|^[^=]+\]$', word)
                 else word for word in words]
        if words:
            found.append(words)
    return found


def own(path: str) -> Path:
    return ROOT / path.removeprefix('$RMOE/')


def parse(tool: Path, args: list[str], monkeypatch) -> None:
    """Let a tool read the flags, and stop it there."""
    assert tool.exists(), f'there is no {tool}'
    if 'ArgumentParser' not in tool.read_text():
        assert not args, f'{tool} takes no flags'
        return
    spec = importlib.util.spec_from_file_location(f'docs_{tool.stem}', tool)
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for it.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    original = argparse.ArgumentParser.parse_args

    def read_and_stop(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', read_and_stop)
    monkeypatch.setattr(sys, 'argv', [str(tool), *args])
    with pytest.raises(Parsed):
        module.main()


@pytest.mark.parametrize(
    'block', [block for block in CODE if block.language == 'bash'], ids=of)
def test_commands_exist(block, monkeypatch, capsys):
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
    for words in commands_of(block.code):
        for word in words:
            for config in re.findall(r'configs/[\w./-]+\.py', word):
                assert (ROOT / config).exists(), f'there is no {config}'
        name, *args = words
        name = name.removeprefix('.venv/bin/')
        with monkeypatch.context() as patch:
            if name == 'make':
                assert args[0] in targets or '-C' in args
            elif name == 'bash' and args[0].endswith('.sh'):
                script = own(args[0])
                assert script.exists()
                tool = 'train' if 'train' in script.name else 'test'
                # PARTITION JOB CONFIG ..., or CONFIG [CHECKPOINT] GPUS ...
                if script.name.startswith('slurm'):
                    args = args[3:]
                else:
                    del args[2 if tool == 'train' else 3]
                    args = args[1:]
                parse(ROOT / f'tools/{tool}.py', args, patch)
            elif name == 'python' and args[0] == '-m':
                if args[1].startswith('rmoe.'):
                    parse(ROOT / args[1].replace('.', '/') / '__main__.py',
                          args[2:], patch)
            elif name == 'python' and args[0] not in ('-', '-c'):
                parse(own(args[0]), args[1:], patch)
            else:
                assert name in (*OTHERS, 'python', 'bash'), (
                    f'{name}: neither a tool of the project nor one of '
                    f'{sorted(OTHERS)}')


# Parts of configs ----------------------------------------------------------


REGISTRIES = [value for value in vars(rmoe.registry).values()
              if isinstance(value, Registry) and value.scope == 'rmoe']


def registered(name: str) -> type | None:
    for registry in REGISTRIES:
        with registry.switch_scope_and_registry(None):
            registry.import_from_location()
        if name in registry.module_dict:
            return registry.module_dict[name]
    return None


def arguments(cls: type) -> set[str] | None:
    """Names of what its constructor takes; None for anything."""
    if not inspect.isclass(cls):
        return {*inspect.signature(cls).parameters}
    names: set[str] = set()
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        names |= {one.name for one in parameters}
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            return names
    return None


@pytest.mark.parametrize(
    'block', [block for block in CODE if block.kind == 'config'], ids=of)
def test_parts_of_configs_are_right(block):
    assert block.language == 'python'
    tree = ast.parse(re.sub(r', \.\.\.(?=[,)])', '', block.code))
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        given = {one.arg: one.value for one in call.keywords if one.arg}
        if not isinstance(given.get('type'), ast.Constant):
            continue
        name = given['type'].value
        cls = registered(name.removeprefix('rmoe.'))
        if cls is None:
            assert not name.startswith('rmoe.'), f'{name} is not registered'
            continue
        if (taken := arguments(cls)) is not None:
            unknown = set(given) - taken - {'type'}
            assert not unknown, f'{name} takes no {sorted(unknown)}'


# What is run ---------------------------------------------------------------


def plain(line: str) -> str:
    """Without numbers, bars of progress and widths of columns."""
    line = re.sub(r'\[[# ]*\]|(?<=dead )\[[\d, ]*\]', '[]', line)
    line = re.sub(r'[-+]?\d[\d.,]*(e[+-]\d+)?', '#', line)
    return re.sub(r'\s+', ' ', line).strip()


def check_output(shown: str, real: str, exact: bool) -> None:
    """Each line that is shown was printed, in this order; dots stand for
    what is left out, lines or a part of one."""
    clean = str.rstrip if exact else plain
    printed = [clean(line) for line in real.splitlines()]
    at = 0
    for line in shown.splitlines():
        if line.strip() in ('', '...'):
            continue
        wanted = re.compile('.*'.join(
            re.escape(clean(part)) for part in line.split('...')))
        found = [i for i in range(at, len(printed))
                 if wanted.fullmatch(printed[i])]
        assert found, f'the page shows\n  {line}\nwhat was printed is\n{real}'
        at = found[0] + 1


def with_output(blocks: list[Block]) -> list[tuple[Block, str]]:
    """The blocks that are run, and what the page shows of their output."""
    pairs = []
    for block, after in zip(blocks, [*blocks[1:], None]):
        if block.language in ('bash', 'python') and block.kind in (
                '', 'runs as'):
            shown = (after.code if after and after.language == 'text' else '')
            pairs.append((block, shown))
    return pairs


def run(command: list[str], folder: Path) -> str:
    env = dict(
        os.environ, RMOE=str(ROOT), PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1',
        PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    done = subprocess.run(command, cwd=folder, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f'{command[-1]}\n{done.stdout[-5000:]}'
    return done.stdout


def params():
    for page in RUNNING:
        shell = any(block.language == 'bash'
                    for block, _ in with_output(BLOCKS[page]))
        yield pytest.param(page, id=page.name, marks=[
            pytest.mark.slow, pytest.mark.timeout(3600)] if shell else [])


@pytest.mark.parametrize('page', params())
def test_pages_do_what_they_show(page, tmp_path):
    pairs = with_output(BLOCKS[page])
    # Blocks of Python on one page are one program.
    cells = [block.code for block, _ in pairs if block.language == 'python']
    mark = '---- the next block ----'
    printed = iter(run([sys.executable, '-c',
                        f'\nprint({mark!r})\n'.join(cells)],
                       tmp_path).split(f'{mark}\n')) if cells else iter(())
    for block, shown in pairs:
        if block.language == 'python':
            check_output(shown, next(printed), exact=True)
        else:
            real = run(['bash', '-ec', block.why or block.code], tmp_path)
            check_output(shown, real, exact=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip('nbformat')
    nbclient = pytest.importorskip('nbclient')
    for folder in ('camvid', 'vit_tiny'):
        if not (ROOT / 'data' / folder).is_dir():
            pytest.skip(f'needs data/{folder}, see docs/segmentation.md')
    monkeypatch.setenv('RMOE', str(ROOT))
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    notebook = nbformat.read(ROOT / 'docs/tutorial.ipynb', 4)
    nbclient.NotebookClient(
        notebook, timeout=3000, kernel_name='python3',
        resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    assert any(output.get('data', {}).get('image/png')
               for cell in notebook.cells if cell.cell_type == 'code'
               for output in cell.outputs), 'no picture of the routing'


# Links ---------------------------------------------------------------------


@pytest.mark.parametrize(
    'page', [*PAGES, ROOT / 'CONTRIBUTING.md'],
    ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
    for target in re.findall(r'\]\(([^)\s#]+)', text):
        # Pages that `make docs` makes from docstrings.
        if not re.match(r'https?:|mailto:|(api|options)/|tutorial.md', target):
            assert (page.parent / target).exists(), target


def test_pages_are_in_the_navigation():
    config = (ROOT / 'mkdocs.yml').read_text()
    for page in (ROOT / 'docs').glob('*.md'):
        assert f': {page.name}\n' in config, f'mkdocs.yml: nav lacks {page}'
