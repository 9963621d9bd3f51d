"""COCO annotation files: what is in one, or where it breaks."""
import gc
import json
from pathlib import Path
from typing import Any

LISTS = ('images', 'annotations', 'categories')


def read_coco(path: Path, annotated: bool = True) -> dict[str, list[dict]]:
    """Parse a COCO json file.

    Of a mask only whether there is one is kept (``segmentation`` becomes a
    bool): the polygons are most of such a file.

    Args:
        path: the file.
        annotated: whether it must have annotations; that of a test set has
            none.

    Returns:
        The lists 'images', 'annotations' and 'categories'.

    Raises:
        ValueError: if the file is empty, cut short, no JSON, or JSON of
            another kind; names the file and where it breaks.
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
    # Millions of small objects, none of them garbage: looking for some
    # doubles the time.
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
    # Such a file is one object.
    if body.startswith('{') and (error.pos >= len(body)
                                 or not body.endswith('}')):
        return (f'{path} looks cut short: it breaks {where}. Copy or download '
                'it again')
    return f'{path} is no JSON: it breaks {where}'
