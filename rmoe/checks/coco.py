"""Checks COCO annotations for what mmdet's CocoDataset makes of them.

mmdet silently drops annotations that it cannot use, and numbers labels by the
order of the categories in the file. The rules here are those of mmdet 3.3
(``CocoDataset.load_data_list``, ``parse_data_info``, ``filter_data``) and of
pycocotools (``getCatIds``).
"""
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rmoe.checks.findings import Findings, some


@dataclass(frozen=True)
class CocoUse:
    """How a config uses an annotation file.

    Attributes:
        name: the name of the file, for messages.
        option: the option that holds the data set in the config, for
            messages.
        classes: the classes in the order of the config.
        filter_cfg: says which images mmdet leaves out; None outside training.
        with_mask: whether the pipeline loads masks.
        needs_boxes: False for a test set without ground truth.
    """
    name: str
    option: str
    classes: Sequence[str]
    filter_cfg: Mapping | None = None
    with_mask: bool = False
    needs_boxes: bool = True


def check_coco(content: dict[str, list[dict]], use: CocoUse) -> Findings:
    """Check the categories, boxes and images of one file.

    Args:
        content: the lists that :func:`rmoe.checks.coco_file.read_coco`
            returns.
        use: how the config uses the file.
    """
    findings = Findings()
    if isinstance(use.classes, str):
        findings.errors.append(
            f'{use.option}.metainfo.classes={use.classes!r} is one string, '
            'whose letters would be the classes: write '
            f'classes=({use.classes!r}, )')
        return findings
    for part in ('categories', 'images', 'annotations'):
        findings.errors += _missing_fields(content[part], part, use)
    if not findings.errors:
        findings.errors += _check_categories(content['categories'], use)
    if not findings.errors:
        _check_boxes(content, use, findings)
    return findings


FIELDS = dict(categories=('id', 'name'),
              images=('id', 'file_name', 'height', 'width'),
              annotations=('id', 'image_id', 'category_id', 'bbox', 'area'))


def _missing_fields(items: list[dict], part: str, use: CocoUse) -> list[str]:
    """Name the first entry without a field that mmdet needs. mmdet would stop
    with a KeyError that does not name the entry."""
    if not items and part != 'annotations':
        return [f'{use.name} has no {part}']
    needed = set(FIELDS[part])
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            return [f'{part}[{index}] of {use.name} is {item!r} and not a JSON '
                    'object']
        if not needed <= item.keys():
            lacking = [key for key in FIELDS[part] if key not in item]
            return [f'{part}[{index}] of {use.name} (id {item.get("id")!r}) '
                    f'has no {" and no ".join(map(repr, lacking))}, which '
                    'mmdet needs']
    return []


def _check_categories(categories: list[dict], use: CocoUse) -> list[str]:
    for key in ('id', 'name'):
        twice = [value for value, count in Counter(
            category[key] for category in categories).items() if count > 1]
        if twice:
            return [f'{use.name} has several categories with the {key} '
                    f'{some(twice)}']
    names = [category['name'] for category in categories]
    missing = [name for name in use.classes if name not in names]
    if missing:
        return [f'{use.name} has no category {some(missing)}, which '
                f'{use.option}.metainfo.classes names: every label after it '
                f'would be shifted. The file has {some(names, 80)}; name '
                'those in metainfo=dict(classes=(...))']
    order = [name for name in names if name in set(use.classes)]
    if order != list(use.classes):
        return [f'{use.option}.metainfo.classes is {tuple(use.classes)}, and '
                f'the categories of {use.name} stand in the order '
                f'{tuple(order)}. mmdet numbers labels by the order of the '
                'file, so every printed name would be wrong: write '
                f'metainfo=dict(classes={tuple(order)})']
    return []


def _check_boxes(content: dict[str, list[dict]], use: CocoUse,
                 findings: Findings) -> None:
    sizes = {image['id']: (image['width'], image['height'])
             for image in content['images']}
    names = {category['id']: category['name']
             for category in content['categories']}
    used = {key for key, name in names.items() if name in set(use.classes)}
    lost: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    unknown: Counter[int] = Counter()
    in_class, crowded = set(), 0
    kept = overhanging = without_mask = 0
    for ann in content['annotations']:
        category, image = ann['category_id'], ann['image_id']
        if category not in names:
            unknown[category] += 1
            continue
        if image not in sizes:
            lost['of images that it does not list'] += 1
            continue
        if category in used:
            # For filter_empty_gt mmdet counts an image as annotated if it has
            # any annotation of the classes, even one that is dropped below.
            in_class.add(image)
        if ann.get('ignore'):
            lost['marked "ignore"'] += 1
            continue
        reason, over = _judge_box(ann, *sizes[image])
        if reason == BROKEN:
            findings.errors.append(
                f'annotation {ann["id"]} of {use.name} has the bbox '
                f'{ann["bbox"]!r} and the area {ann["area"]!r}. They must be '
                'x, y, width and height, and an area, in finite numbers')
            return
        if reason:
            lost[reason] += 1
        elif category not in used:
            unused[names[category]] += 1
        else:
            if ann.get('iscrowd'):
                crowded += 1
            else:
                kept += 1
            overhanging += over
            without_mask += not ann.get('segmentation')
    if unknown:
        findings.errors.append(
            f'{use.name} has {sum(unknown.values())} annotations with the '
            f'category_id {some(sorted(unknown, key=str))}, and its '
            f'categories have the ids {some(sorted(names), 80)}. mmdet drops '
            'them silently: add the category, or remove them')
    if use.with_mask and without_mask:
        findings.errors.append(
            f'{without_mask} annotations of {use.name} have no segmentation, '
            'and the pipeline loads masks: mmdet stops at the first of them '
            'with KeyError: \'mask\'. Remove them, or set with_mask=False '
            'and leave out the mask head')
    _report_boxes(use, findings, kept, crowded, lost, unused, overhanging,
                  len(content['annotations']))
    _report_images(content['images'], in_class, use, findings)


BROKEN = 'broken'


def _judge_box(ann: dict, width: float, height: float) -> tuple[str, bool]:
    """Find out if mmdet drops a box.

    Returns:
        The reason, or '' if it keeps the box; and whether the box reaches
        more than a pixel beyond its image.
    """
    try:
        x, y, w, h = ann['bbox']
        area = ann['area']
        total = x + y + w + h + area
        if total - total != 0:  # nan or inf
            return BROKEN, False
        inside_w = max(0, min(x + w, width) - max(x, 0))
        inside_h = max(0, min(y + h, height) - max(y, 0))
        if inside_w * inside_h == 0:
            # A box without a width or height does not overlap the image
            # either, but the reason is another.
            return ('without area' if w <= 0 or h <= 0 else
                    'outside their image'), False
        if area <= 0 or w < 1 or h < 1:
            return 'without area', False
        return '', (x < -1 or y < -1 or x + w > width + 1
                    or y + h > height + 1)
    except (TypeError, ValueError):
        return BROKEN, False


def _report_boxes(use: CocoUse, findings: Findings, kept: int, crowded: int,
                  lost: Counter[str], unused: Counter[str], overhanging: int,
                  total: int) -> None:
    drops = [f'{count} {reason}' for reason, count in lost.most_common()]
    if unused:
        drops.append(
            f'{sum(unused.values())} of categories that are not in '
            f'metainfo.classes ('
            + ', '.join(f'{name}: {count}' for name, count
                        in unused.most_common(8))
            + (', ...' if len(unused) > 8 else '') + ')')
    what = '; '.join(drops)
    # A training file without any annotation is no mistake: its images serve as
    # background.
    if not kept and use.needs_boxes and (total or use.filter_cfg is None):
        findings.errors.append(
            f'no box of {use.name} is left for {use.option}: of {total} '
            'annotations mmdet drops ' +
            (what or 'none') + (f', and {crowded} are crowds' if crowded
                                else ''))
        return
    if drops:
        findings.notes.append(
            f'{use.name}: mmdet drops {sum(lost.values()) + unused.total()} '
            f'of {total} annotations silently: {what}')
    if overhanging:
        findings.notes.append(
            f'{use.name}: {overhanging} boxes reach more than a pixel beyond '
            "their image (mmdet's Resize clips them to it)")


def _report_images(images: list[dict], in_class: set, use: CocoUse,
                   findings: Findings) -> None:
    if use.filter_cfg is None:
        return
    empty = [image for image in images if image['id'] not in in_class]
    drop_empty = use.filter_cfg.get('filter_empty_gt', False)
    min_size = use.filter_cfg.get('min_size', 0)
    small = sum(min(image['width'], image['height']) < min_size
                for image in images
                if not (drop_empty and image['id'] not in in_class))
    left = len(images) - small - (len(empty) if drop_empty else 0)
    what = []
    if empty:
        what.append(f'{len(empty)} images have no box of the classes, and '
                    + ('filter_empty_gt=True leaves them out' if drop_empty
                       else 'train as background'))
    if small:
        what.append(f'{small} are smaller than min_size={min_size} and are '
                    'left out')
    if not left:
        findings.errors.append(
            f'{use.option}.filter_cfg leaves none of the {len(images)} images '
            f'of {use.name}: {"; ".join(what)}')
    elif what:
        findings.notes.append(f'{use.name}: of {len(images)} images '
                              + '; '.join(what))
