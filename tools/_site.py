"""Makes pages of the documentation site that are not in docs/. mkdocs calls
these functions, because mkdocs.yml names this file under ``hooks``.

The notebook becomes a page. Other pages are made from docstrings: "Every
option" shows the classes that a config can name, which are found in the source
by their ``register_module``, and the API reference has a page for each package.
In docs/, links to files of the repository outside docs/ are relative, so that
they work on GitHub; on the site they lead to the repository.
"""
import ast
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = 'tutorial'
OUTSIDE = re.compile(r'\[([^\]]*)\]\((\.\./[^)\s#]*)(#[^)\s]*)?\)')
log = logging.getLogger('mkdocs.hooks.rmoe')

# Pages of "Every option": file, title, introduction, and the packages or
# modules whose registered classes they show.
OPTIONS = (
    ('layer', 'The layer: moe=dict(...)',
     'What `moe=dict(...)` of a backbone sets, besides `layers`: the '
     'arguments of the layer that takes the place of a dense FFN.',
     ('rmoe.moe', '!rmoe.moe.routers')),
    ('routers', 'Routers: router=dict(...)',
     'What `router=dict(...)` of a layer can be. What each router does, and '
     'which to take, is told in [Routers](../routers.md).',
     ('rmoe.moe.routers', )),
    ('backbones', 'Backbones and necks',
     'What `backbone=dict(...)` and `neck=dict(...)` of a model can be; see '
     '[Backbones](../backbones.md).', ('rmoe.backbones', )),
    ('hooks', 'Hooks, optimizers and wrappers',
     'What `custom_hooks`, `default_hooks`, `optim_wrapper` and '
     '`model_wrapper_cfg` of a config can name.', ('*', )),
    ('classification', 'Classification and data',
     'What the upstream stage of a [pipeline](../pipelines.md) is made of.',
     ('rmoe.classification', 'rmoe.datasets')),
)


def on_config(config: MkDocsConfig) -> None:
    """Add the pages that are made here to the navigation."""
    options = {'Every option': [{title: f'options/{name}.md'}
                                for name, title, _, _ in OPTIONS]}
    api = {'API reference': [{f'rmoe.{name}': f'api/{name}.md'}
                             for name in _packages()]}
    assert config.nav is not None
    at = next(i for i, entry in enumerate(config.nav)
              if 'inside.md' in entry.values())
    config.nav.insert(at, options)
    config.nav.append(api)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {f'options/{name}.md': _options_page(title, text, classes)
             for name, title, text, classes in _options()}
    pages |= {f'api/{name}.md': _package_page(name) for name in _packages()}
    pages[f'{NOTEBOOK}.md'] = _notebook_page()
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, page: Any,
                     files: Files) -> str:
    markdown = markdown.replace(f']({NOTEBOOK}.ipynb)', f']({NOTEBOOK}.md)')
    if page.file.generated_by:
        return markdown  # Such a page has only links to other pages.

    def lead_out(match: re.Match) -> str:
        text, target, anchor = match.groups()
        path = (ROOT / 'docs' / target).resolve()
        if not path.exists():
            log.warning('%s links to %s, which is not in the repository',
                        page.file.src_path, target)
        name = str(path.relative_to(ROOT))
        if config.repo_url:
            url = f'{config.repo_url.rstrip("/")}/blob/main/{name}'
            return f'[{text}]({url}{anchor or ""})'
        text_is_path = text.strip('`').rstrip('/') in (name, Path(name).name)
        return f'`{name}`' if text_is_path else f'{text} (`{name}`)'

    return OUTSIDE.sub(lead_out, markdown)


def on_page_content(html: str, page: Any, config: MkDocsConfig, files: Files
                    ) -> str:
    """Remove Sphinx's roles, such as the first part of :class:`Routing`, which
    docstrings have and mkdocs does not know."""
    return re.sub(r':(?:attr|class|func|meth|mod):(?=<code>)', '', html)


def _notebook_page() -> str:
    """The text and code of the notebook as Markdown, with a link to the
    notebook itself."""
    cells = json.loads((ROOT / f'docs/{NOTEBOOK}.ipynb').read_text())['cells']
    parts = []
    for cell in cells:
        text = ''.join(cell['source'])
        parts.append(text if cell['cell_type'] == 'markdown'
                     else f'```python\n{text}\n```')
    # The link stands below the title. It is raw HTML, which mkdocs does not
    # check for broken links.
    parts.insert(1, f'<a href="../{NOTEBOOK}.ipynb">Download this page as a '
                 'notebook.</a>')
    return '\n\n'.join(parts) + '\n'


def _packages() -> list[str]:
    return sorted(path.parent.name
                  for path in (ROOT / 'rmoe').glob('*/__init__.py'))


def _package_page(name: str) -> str:
    """The page of the API reference with every public name of a package, by
    module."""
    modules = '\n'.join(
        f'::: {module}\n' for module in _modules(f'rmoe.{name}'))
    return f'# rmoe.{name}\n\n{modules}'


def _modules(package: str) -> Iterator[str]:
    folder = ROOT / package.replace('.', '/')
    for path in sorted(folder.rglob('*.py')):
        parts = list(path.relative_to(ROOT).with_suffix('').parts)
        if parts[-1] == '__init__':
            parts.pop()
        if not any(part.startswith('_') for part in parts):
            yield '.'.join(parts)


def _options() -> Iterator[tuple[str, str, str, list[str]]]:
    """The name, title, introduction and classes of each page of "Every option".
    Each class is on the first page that asks for it, and the page that asks
    for all ('*') gets the rest."""
    left = dict(_registered())
    order = sorted(OPTIONS, key=lambda page: page[3] == ('*', ))
    found = {}
    for name, title, text, wanted in order:
        classes = [path for path in left if _is_wanted(left[path], wanted)]
        found[name] = (name, title, text, classes)
        for path in classes:
            del left[path]
    for name, *_ in OPTIONS:
        yield found[name]


def _is_wanted(module: str, wanted: tuple[str, ...]) -> bool:
    below = [part for part in wanted if part == '*' or
             f'{module}.'.startswith(f'{part.removeprefix("!")}.')]
    return bool(below) and not any(part.startswith('!') for part in below)


def _registered() -> Iterator[tuple[str, str]]:
    """The path and module of every class with a ``register_module``."""
    for module in _modules('rmoe'):
        path = ROOT / module.replace('.', '/')
        file = path.with_suffix('.py')
        tree = ast.parse((file if file.exists() else path / '__init__.py'
                          ).read_text())
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and any(
                    'register_module' in ast.unparse(decorator)
                    for decorator in node.decorator_list):
                yield f'{module}.{node.name}', module


def _options_page(title: str, text: str, classes: list[str]) -> str:
    shown = '\n'.join(
        f'::: {path}\n    options:\n      members: false\n'
        # The same classes are in the API reference, and links to them shall
        # lead there.
        '      skip_local_inventory: true\n'
        for path in classes)
    return (f'# {title}\n\n{text} In a config the type of a class is its '
            f"name with `rmoe.` before it, as in `type='rmoe."
            f"{classes[0].split('.')[-1]}'`.\n\n{shown}")
