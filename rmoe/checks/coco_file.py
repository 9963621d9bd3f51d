"""Reads COCO annotation files. The error for a file that cannot be read says
where in the file the problem is."""
import gc
import json
from pathlib import Path
from typing import Any

LISTS = ('images', 'annotations', 'categories')


def read_coco(path: Path, annotated: bool = True) -> dict[str, list[dict]]:
    """Parse a COCO json file.

    Masks are not kept, because their polygons are most of such a file:
    ``segmentation`` becomes a bool that says whether there is one.

    Args:
        path: the file.
        annotated: whether the file must have annotations. That of a test set
            has none.

    Returns:
        The lists 'images', 'annotations' and 'categories'.

    Raises:
        ValueError: if the file is empty, cut short, no JSON, or JSON of
            another kind; names the file and the place of the mistake.
    """
    content = _parse(path)
    kind = type(content).__name__
    wrong = ([f'it is a {kind}'] if not isinstance(content, dict) else
             [f'it has no list {key!r}' for key in LISTS
              if not isinstance(content.get(key), list)
              and (annotated or key != 'annotations')])
    if wrong:
        keys = f'; its keys are {list(content)[:8]}' if isinstance(
            content, dict) else ''
        raise ValueError(f'{path} is JSON but no COCO annotation file: '
                         f'{", ".join(wrong)}{keys}')
    return {key: content.get(key, []) for key in LISTS}


def _parse(path: Path) -> Any:
    data = path.read_bytes()
    if not data:
        raise ValueError(f'{path} is empty (0 bytes)')
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is no JSON: byte {error.start} of '
                         f'{len(data)} is no UTF-8') from None
    del data
    # Parsing makes millions of small objects that all stay in use. The garbage
    # collector would look through them again and again, which doubles the
    # time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text, object_hook=_without_masks)
    except json.JSONDecodeError as error:
        raise ValueError(_where_it_breaks(path, text, error)) from None
    finally:
        if collecting:
            gc.enable()


def _without_masks(item: dict) -> dict:
    if 'segmentation' in item:
        item['segmentation'] = bool(item['segmentation'])
    return item


def _where_it_breaks(path: Path, text: str,
                     error: json.JSONDecodeError) -> str:
    body = text.rstrip()
    where = (f'at character {error.pos} of {len(text)} (line {error.lineno}, '
             f'column {error.colno}): {error.msg}, after '
             f'{text[max(error.pos - 40, 0):error.pos]!r}')
    # A whole COCO file is one object, so it ends with a brace.
    if body.startswith('{') and (error.pos >= len(body)
                                 or not body.endswith('}')):
        return (f'{path} looks cut short: it breaks {where}. Copy or download '
                'it again')
    return f'{path} is no JSON: it breaks {where}'
