"""Measures of what experts specialise in: classes, or places of the image.

They are the mutual information in bits (Shannon; Cover and Thomas, chapter 2)
between the expert that takes a token, the class that the token's patch shows,
and the place of the token in the image. Counts and results are float64.

Axis letters besides those of rmoe/moe/routing.py: L classes, P places (cells
of a coarse grid over the image), R rearrangements, H and W the rows and
columns of a token map. In this module X stands for either L or P, and Z for
the values of what is known already.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rmoe.moe import Routing

IGNORED = 255
NO_CLASS = -1
# Rows and columns of the grid of places, and of the maps that are drawn.
PLACES_HW = (4, 4)
DRAWN_HW = (12, 16)
# A measure that is larger than that of all 19 rearrangements has a p-value of
# about 0.05.
REARRANGEMENTS = 19


@dataclass(frozen=True)
class Information:
    """The mutual information between the expert of a token and a target, which
    is the class or the place of the token.

    Attributes:
        bits: the mutual information.
        chance: its mean over the rearrangements of :class:`Tally`, in bits.
        chance_max: its largest value over them, in bits.
        share_of_target: ``bits`` divided by the entropy of the target. This
            is the share of what there is to know about the target that one
            knows from the expert; 0 where there is nothing to know.
        share_of_expert: ``bits`` divided by the entropy of the expert.
    """
    bits: float
    chance: float
    chance_max: float
    share_of_target: float
    share_of_expert: float


def expert_shares(routing: Routing) -> Tensor:
    """(T, E) weights in float64, on the CPU: 1 / n for each of the n experts
    that kept a token, so that the weights of a token sum to one; zeros for a
    token that no expert kept."""
    kept_TE = torch.zeros(routing.num_tokens, routing.num_experts,
                          dtype=torch.float64)
    routing = routing.served()
    kept_TE[routing.token_ids_N.cpu(), routing.expert_ids_N.cpu()] = 1
    return kept_TE / kept_TE.sum(1, keepdim=True).clamp_min(1)


def patch_classes(labels: Tensor, map_hw: tuple[int, int], stride: int,
                  image_hw: tuple[int, int], num_classes: int) -> Tensor:
    """The class that covers most of each token's patch.

    Each labelled pixel votes for its class in the patch that its centre lies
    in; ignored pixels do not vote. Of classes with the same number of votes
    the first one wins.

    Args:
        labels: (height, width) class ids, 255 for ignored. They may have any
            size, and are laid over the whole image.
        map_hw: rows and columns of the token map.
        stride: pixels of the image from token to token.
        image_hw: height and width of the image without padding, in pixels.
        num_classes: L.

    Returns:
        (H, W) int64; -1 where no pixel voted.

    Raises:
        ValueError: for a class id that is neither one of the L nor 255.
    """
    labels = labels.long().cpu()
    voting = labels != IGNORED
    ids = labels[voting]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_classes:
        raise ValueError(
            f'the segmentation map has the class ids {ids.unique().tolist()}, '
            f'but the data set has {num_classes} classes and 255 for '
            "'ignored': set its metainfo, label_map or reduce_zero_label")
    # The centre of pixel i is at (i + 1/2) * side / count. This computes its
    # patch in whole numbers.
    rows, columns = (
        (2 * torch.arange(count) + 1) * side // (2 * count * stride)
        for count, side in zip(labels.shape, image_hw))
    patches = (rows[:, None] * map_hw[1] + columns)[voting]
    votes_TL = torch.bincount(
        patches * num_classes + ids,
        minlength=map_hw[0] * map_hw[1] * num_classes).view(-1, num_classes)
    most_T, classes_T = votes_TL.max(1)
    return classes_T.masked_fill(most_T == 0, NO_CLASS).view(map_hw)


def places(map_hw: tuple[int, int], grid_hw: tuple[int, int] = PLACES_HW
           ) -> Tensor:
    """For each token (H, W) the cell of the grid that it lies in, int64. Cells
    are numbered row by row."""
    rows, columns = _nearest(map_hw, grid_hw)
    return rows[:, None] * grid_hw[1] + columns


def _nearest(to_hw: tuple[int, int], from_hw: tuple[int, int]
             ) -> list[Tensor]:
    """For each row and column of ``to_hw`` the row or column of ``from_hw``
    that lies at the same place."""
    return [(2 * torch.arange(count) + 1) * cells // (2 * count)
            for count, cells in zip(to_hw, from_hw)]


def entropy(counts: Tensor, num_axes: int) -> Tensor:
    """Entropy of tables of counts.

    Args:
        counts: (..., table), not negative, float64.
        num_axes: number of axes of a table, which are the last ones.

    Returns:
        (...) bits; 0 for an empty table.
    """
    counts = counts.flatten(-num_axes)
    total = counts.sum(-1, keepdim=True)
    shares = counts / total.masked_fill(total == 0, 1)
    return torch.special.entr(shares).sum(-1) / math.log(2)


def mutual_information(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mutual information of A and B where Z is known, from joint counts.

    Args:
        counts: (..., Z, A, B) float64. If Z has one value, the result is the
            plain mutual information.

    Returns:
        (...) bits each: I(A; B | Z), H(A | Z) and H(B | Z).
    """
    both_Z = entropy(counts.sum((-2, -1)), 1)
    a = entropy(counts.sum(-1), 2) - both_Z
    b = entropy(counts.sum(-2), 2) - both_Z
    joint = entropy(counts, 3) - both_Z
    # Rounding may give a value such as -1e-16 instead of zero.
    return (a + b - joint).clamp_min(0), a.clamp_min(0), b.clamp_min(0)


class Tally:
    """Counts, over images, of the tokens that each expert of a MoE layer took,
    by class and place.

    Tokens whose patch has no class, and tokens that no expert kept, are left
    out of every count: the former say nothing about classes, and whether a
    token is kept at all is another question than which expert keeps it.
    ``tokens``, ``no_class`` and ``no_expert`` say how many there were.

    **Chance levels.** With finitely many tokens a mutual information is
    positive even where experts know nothing about class or place.
    Neighbouring tokens show the same class and go to the same expert, so a
    map of h w tokens holds far fewer than h w independent ones. Permuting
    tokens, or the Miller-Madow correction, would put the chance level too
    low, because both count each token as an independent sample. So whole
    expert maps are rearranged, and everything is counted again:

    - For class and for place, the expert map of each image is shifted by
      random rows and columns, with wrap-around. Its regions keep their sizes
      and its experts their loads, but the map no longer fits the image
      underneath. Information about the image as a whole stays (an expert for
      night scenes gets the classes of the night), so it counts as chance: it
      does not depend on what a single patch shows. The seed is fixed.
    - For the class where the place is known, each image gets the expert map
      of another one. This keeps everything that experts and classes owe to
      the common layout of the images, also within a cell of the coarse grid:
      the sky, for instance, begins somewhere inside of a cell. Images that
      resemble each other (frames of a video) share more than the layout, so
      for them the chance level is rather too high. With one image there is no
      other, and the chance level is all of the information.

    Attributes:
        counts_PLE: (P, L, E) float64 numbers of tokens.
        shifted_RPLE: (R, P, L, E) the same numbers with shifted expert maps.
        drawn_EHW: (E, 12, 16) float64 numbers of tokens of each expert, by
            cells of a finer grid; each image adds its mean densities.
        tokens: number of all tokens, without padding and class tokens.
        no_class: number of tokens whose patch has only ignored pixels.
        no_expert: number of tokens with a class that no expert kept.

    Args:
        num_classes: L.
        num_experts: E.
    """

    def __init__(self, num_classes: int, num_experts: int) -> None:
        num_places = PLACES_HW[0] * PLACES_HW[1]
        self.counts_PLE = torch.zeros(
            num_places, num_classes, num_experts, dtype=torch.float64)
        self.shifted_RPLE = self.counts_PLE.repeat(REARRANGEMENTS, 1, 1, 1)
        self.drawn_EHW = torch.zeros(num_experts, *DRAWN_HW,
                                     dtype=torch.float64)
        self.tokens = self.no_class = self.no_expert = 0
        self._maps: list[tuple[Tensor, Tensor]] = []
        self._generator = torch.Generator().manual_seed(0)

    def add(self, shares_HWE: Tensor, classes_HW: Tensor) -> None:
        """Count one image.

        Args:
            shares_HWE: result of :func:`expert_shares`, without class tokens
                and without the rows and columns that are all padding.
            classes_HW: result of :func:`patch_classes` for the same tokens.
        """
        _count(self.counts_PLE, shares_HWE, classes_HW)
        for shifted_PLE in self.shifted_RPLE:
            steps = tuple(
                int(torch.randint(side, (), generator=self._generator))
                for side in classes_HW.shape)
            _count(shifted_PLE, shares_HWE.roll(steps, (0, 1)), classes_HW)
        self._maps.append((shares_HWE.float(), classes_HW))
        labelled_HW = classes_HW != NO_CLASS
        # This grid may be finer than the map; a token then fills several
        # cells.
        counted_HWE = shares_HWE * labelled_HW[..., None]
        self.drawn_EHW += F.adaptive_avg_pool2d(counted_HWE.permute(2, 0, 1),
                                                DRAWN_HW)
        self.tokens += classes_HW.numel()
        self.no_class += int((~labelled_HW).sum())
        self.no_expert += int((shares_HWE[labelled_HW].sum(1) == 0).sum())

    @property
    def counts_LE(self) -> Tensor:
        """(L, E) float64 numbers of tokens of each class at each expert."""
        return self.counts_PLE.sum(0)

    def measure(self) -> dict[str, Information]:
        """The information of the expert about the 'class', about the 'place',
        and about the class where the place is known: 'class | place'."""
        return {
            'class': _information(self.counts_PLE.sum(0, keepdim=True),
                                  self.shifted_RPLE.sum(1, keepdim=True)),
            'place': _information(self.counts_PLE.sum(1)[None],
                                  self.shifted_RPLE.sum(2)[:, None]),
            'class | place': _information(self.counts_PLE, self._exchanged())}

    def _exchanged(self) -> Tensor:
        """(R, P, L, E) counts of each image's classes with the expert map of
        another image, which is stretched to the size of the first."""
        images = len(self._maps)
        others = max(min(REARRANGEMENTS, images - 1), 1)
        counts_RPLE = self.counts_PLE.new_zeros(others,
                                                *self.counts_PLE.shape)
        for i, counts_PLE in enumerate(counts_RPLE, 1):
            step = i * images // (others + 1)
            for j, (_, classes_HW) in enumerate(self._maps):
                shares_HWE = self._maps[(j + step) % images][0].double()
                rows, columns = _nearest(_hw(classes_HW), _hw(shares_HWE))
                _count(counts_PLE, shares_HWE[rows[:, None], columns],
                       classes_HW)
        return counts_RPLE


def _hw(map_HW: Tensor) -> tuple[int, int]:
    return map_HW.shape[0], map_HW.shape[1]


def _count(counts_PLE: Tensor, shares_HWE: Tensor, classes_HW: Tensor
           ) -> None:
    labelled_HW = classes_HW != NO_CLASS
    rows_HW = places(_hw(classes_HW)) * counts_PLE.shape[1] + classes_HW
    counts_PLE.flatten(0, 1).index_add_(0, rows_HW[labelled_HW],
                                        shares_HWE[labelled_HW])


def _information(counts_ZXE: Tensor, chance_RZXE: Tensor) -> Information:
    bits, of_target, of_expert = (
        float(value) for value in mutual_information(counts_ZXE))
    chance_R = mutual_information(chance_RZXE)[0]
    return Information(
        bits, float(chance_R.mean()), float(chance_R.max()),
        bits / of_target if of_target else 0.,
        bits / of_expert if of_expert else 0.)
