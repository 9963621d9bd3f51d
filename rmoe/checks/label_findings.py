"""Judges whether a decode head can learn from the labels of a data set, and
says which mistake is the likely cause if it cannot."""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rmoe.checks.findings import Findings, some
from rmoe.checks.label_maps import LabelCount

# There is a warning if more than this share of the pixels is ignored.
MOSTLY = .5
# Heads that predict a mask per class. They learn with a single class too,
# because the pixels outside of its mask are negative examples.
MASK_HEADS = ('MaskFormerHead', 'Mask2FormerHead', 'SideAdapterCLIPHead')
DOCS = 'docs/check_config.md says how to rewrite label maps'


@dataclass(frozen=True)
class Classes:
    """The classes of a decode head.

    Attributes:
        number: the num_classes of the head.
        ignore_index: the label of pixels that are left out of the loss.
        names: the names of the classes in the data set; may be empty.
        by_pixel: whether the head classifies each pixel. Others classify
            masks.
    """
    number: int
    ignore_index: int | None = 255
    names: Sequence[str] = ()
    by_pixel: bool = True

    def seen(self, labels: Iterable[int]) -> list[int]:
        """The labels among ``labels`` that are classes and not ignored."""
        return [label for label in sorted(labels) if
                0 <= label < self.number and label != self.ignore_index]

    def name(self, label: int) -> str:
        return (f'{label} ({self.names[label]})'
                if label < len(self.names) else str(label))


def judge_labels(counts: Sequence[LabelCount], classes: Classes, total: int,
                 trains: bool = True) -> Findings:
    """Check that the labels fit the head, and that it can learn from them.

    Args:
        counts: the labels of each data set.
        classes: the classes of the head.
        total: number of label maps of all data sets, whether they were read
            or not.
        trains: False for the data of validation and test, where a single
            class is no mistake.
    """
    findings = Findings()
    for count in counts:
        found = _judge_values(count, classes)
        # A transform of the user may change labels after they are loaded, in
        # a way that is not known here. So these errors are only notes.
        if found.errors and count.converters:
            findings.notes += [
                f'{error} (unless {some(list(count.converters))}, after '
                'LoadAnnotations, changes these labels)'
                for error in found.errors]
        else:
            findings.extend(found)
    if findings.errors or any(count.converters for count in counts):
        return findings
    whole = LabelCount()
    for count in counts:
        whole.add(count)
    if whole.maps:
        _judge_all(whole, counts, classes, total, trains, findings)
    return findings


def _judge_values(count: LabelCount, classes: Classes) -> Findings:
    """Find the labels of one data set that the head cannot have, and label
    maps in colour."""
    if count.coloured:
        return Findings([_coloured(count)])
    wrong = [label for label in sorted(count.pixels) if
             label != classes.ignore_index and
             not 0 <= label < classes.number]
    if not wrong:
        return Findings()
    return Findings([
        f'{count.files[wrong[0]]} has the label {wrong[0]}; in all, the '
        f'labels {some(wrong)} are no classes: the decode head has '
        f'num_classes={classes.number} (0 to {classes.number - 1}) and '
        f'ignore_index={classes.ignore_index}. ' +
        (_cause(count, classes) or
         f'Set decode_head.num_classes={_largest(count, classes) + 1}, '
         'decode_head.ignore_index if a label means "not labelled", or '
         'reduce_zero_label=True of the data set if 0 does')])


def _judge_all(whole: LabelCount, counts: Sequence[LabelCount],
               classes: Classes, total: int, trains: bool,
               findings: Findings) -> None:
    seen = classes.seen(whole.pixels)
    read = (f'the {whole.maps} label maps' if whole.maps >= total else
            f'the {whole.maps} label maps that were read of {total}')
    causes = ' '.join(filter(None, dict.fromkeys(
        _cause(count, classes) for count in counts if count.maps)))
    after = f'. {causes}' if causes else ''
    two_colours = any(map(_black_and_white, counts))
    if classes.by_pixel and len(seen) < 2 and (trains or two_colours):
        what = (f'only class {classes.name(seen[0])}' if seen else
                'nothing but ignored pixels')
        text = (f'{read}, the first is {next(iter(whole.files.values()))}, '
                f'have {what}: nothing can be learnt from them{after}')
        # If not all maps were read, another class may be in the rest.
        if whole.maps >= total or not seen or two_colours:
            findings.errors.append(text)
            return
        findings.notes.append(text)
    missing = [classes.name(label) for label in range(classes.number)
               if label not in seen and label != classes.ignore_index]
    if missing and len(seen) != 1:
        findings.notes.append(
            f'{len(missing)} of {classes.number} classes never occur in '
            f'{read}: {some(missing)}; they are not learnt, and where '
            f'validation has none either, their IoU is nan{after}')
    share = ignored_share(whole, classes)
    empty = (0 if classes.ignore_index is None else
             whole.uniform[classes.ignore_index])
    if share > MOSTLY or empty:
        findings.notes.append(
            f'{100 * share:.1f} % of the pixels of {read} are ignored '
            f'(label {classes.ignore_index})' +
            (f', and {empty} maps have no other pixel' if empty else '') +
            ('; reduce_zero_label=True makes 0 ignored'
             if any(count.reduced for count in counts) else ''))


def ignored_share(count: LabelCount, classes: Classes) -> float:
    """The share of ignored pixels among all pixels that were read."""
    return (count.pixels[classes.ignore_index] / max(count.pixels.total(), 1)
            if classes.ignore_index is not None else 0.)


def _coloured(count: LabelCount) -> str:
    path, shape = count.coloured[0]
    return (
        f'{len(count.coloured)} of {count.maps} label maps are pictures in '
        f'colour, the first is {path} with the shape {shape}: a label map '
        'has one channel with the number of the class. Write the number of '
        f'each colour into a PNG of one channel ({DOCS}); or, if these are '
        "PNGs with a palette, set imdecode_backend='pillow' in "
        'LoadAnnotations')


def _black_and_white(count: LabelCount) -> bool:
    return set(count.stored) == {0, 255}


def _largest(count: LabelCount, classes: Classes) -> int:
    return max(label for label in count.pixels
               if label != classes.ignore_index)


def _cause(count: LabelCount, classes: Classes) -> str:
    """The likely reason for wrong labels, with the fix; empty if none is
    known."""
    values = sorted(set(count.stored) - {classes.ignore_index})
    first, last = (values[0], values[-1]) if values else (0, 0)
    if _black_and_white(count):
        ignored = ', and 255 is ignored' * (classes.ignore_index == 255)
        return (
            'The label maps hold 0 and 255 alone, as black and white '
            f'pictures do{ignored}. Store two classes as 0 and 1 ({DOCS})')
    if classes.number == 1 and classes.by_pixel:
        return ('num_classes=1 leaves nothing to choose from: background is a '
                'class of its own. Set num_classes=2, with labels 0 and 1')
    if count.files and any(path.lower().endswith(('.jpg', '.jpeg'))
                           for path in count.files.values()):
        return ('Some are JPEG files, which do not keep values exactly. '
                f'Write PNGs of the original labels ({DOCS})')
    if count.reduced:
        if 0 in count.stored and last == classes.number - 1 > 0:
            return (
                'reduce_zero_label=True makes the stored label 0 ignored and '
                f'lowers the others by one; the largest stored label is '
                f'{last}, so that class {classes.name(last)} has no pixel. '
                'If the stored 0 is class '
                f'{classes.name(0)}, set reduce_zero_label=False in the data '
                f'set; if 0 means "other", num_classes={last} and leave out '
                'its name')
        return ''
    if first == 1 and last in (classes.number - 1, classes.number):
        return (
            f'The labels run from 1 to {last}, and classes count from 0. If '
            'the first class is stored as 1, set reduce_zero_label=True in '
            'the data set (it lowers labels by one)')
    if last < classes.number:
        return ''
    if len(values) > max(32, 2 * classes.number):
        return (f'{len(values)} different values are those of a photograph '
                'or of a map that was resized smoothly. Store class numbers, '
                f'resize with nearest neighbour ({DOCS})')
    if len(values) <= classes.number + 1 and last > 2 * classes.number:
        return (f'The values {some(values)} look like grey levels or colours '
                f'of classes. Write their numbers, 0 to '
                f'{classes.number - 1}, instead ({DOCS})')
    return ''

