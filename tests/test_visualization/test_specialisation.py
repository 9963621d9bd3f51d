"""Numbers of the experts' specialisation, worked by hand or counted again."""
import math

import pytest
import torch

from rmoe.moe import Routing
from rmoe.moe.rows import Rows, order_by_token
from rmoe.visualization.routing_maps import expert_map, token_map
from rmoe.visualization.specialisation import (
    REARRANGEMENTS,
    Tally,
    entropy,
    expert_shares,
    mutual_information,
    patch_classes,
    places,
)

# H(1/4) = 2 - 3/4 log2(3)
QUARTER = 2 - .75 * math.log2(3)


def counts(*tables):
    return torch.tensor(tables, dtype=torch.float64)


def one_hot(experts_HW, num_experts):
    return torch.nn.functional.one_hot(torch.as_tensor(experts_HW),
                                       num_experts).double()


def routing(*experts_of_tokens, num_experts=3):
    """Tokens that each went to a tuple of experts."""
    rows = sorted((expert, token)
                  for token, experts in enumerate(experts_of_tokens)
                  for expert in experts)
    experts_N = torch.tensor([expert for expert, _ in rows])
    counts_E = torch.bincount(experts_N, minlength=num_experts)
    scores_TE = torch.zeros(len(experts_of_tokens), num_experts)
    token_ids_N = torch.tensor([token for _, token in rows])
    return Routing(
        Rows(token_ids_N, experts_N, counts_E, counts_E.cumsum(0), counts_E,
             len(experts_of_tokens), len(rows),
             by_token=order_by_token(token_ids_N, len(experts_of_tokens),
                                     None)),
        weights_N=torch.ones(len(rows)), logits_TE=scores_TE,
        scores_TE=scores_TE)


@pytest.mark.parametrize('table, bits', [
    ([1, 1], 1), ([5, 5, 5, 5], 2), ([7, 0], 0), ([0, 0], 0),
    ([3, 1], QUARTER)])
def test_entropy(table, bits):
    assert entropy(counts(*table), 1).item() == pytest.approx(bits)


@pytest.mark.parametrize('tables, known, bits, of_a, of_b', [
    # each class has its expert; 8 of 3 and 1; independent
    ([[[2, 0], [0, 2]]], 'nothing', 1, 1, 1),
    ([[[3, 1], [1, 3]]], 'nothing', 1 - QUARTER, 1, 1),
    ([[[1, 3], [2, 6]]], 'nothing', 0, math.log2(3) - 2 / 3, QUARTER),
    # two experts share a class
    ([[[1, 1, 0, 0], [0, 0, 1, 1]]], 'nothing', 1, 1, 2),
    # the sky is on top, and so are the tokens of expert 0
    ([[[4, 0], [0, 0]], [[0, 0], [0, 4]]], 'place', 0, 0, 0),
    # exclusive or: nothing alone, all together
    ([[[1, 0], [0, 1]], [[0, 1], [1, 0]]], 'place', 1, 1, 1),
    # a place with 6 of 8 tokens counts for 6
    ([[[3, 0], [0, 3]], [[1, 0], [1, 0]]], 'place', .75, 1, .75),
    ([[[0, 0], [0, 0]]], 'nothing', 0, 0, 0)])
def test_mutual_information(tables, known, bits, of_a, of_b):
    found = torch.stack(mutual_information(counts(*tables)))
    torch.testing.assert_close(found, counts(bits, of_a, of_b))
    if known == 'place' and of_a + bits < 2 and bits != 1:
        return
    plain = mutual_information(counts(*tables).sum(0, keepdim=True))[0]
    assert plain.item() == pytest.approx(0 if known == 'place' else bits)


def test_mutual_information_is_its_definition():
    table_RZAB = torch.rand(2, 3, 4, 5, dtype=torch.float64).pow(3)
    table_RZAB[0, 1, 2] = 0
    found_R = mutual_information(table_RZAB)[0]
    for table_ZAB, found in zip(table_RZAB, found_R):
        total = table_ZAB.sum().item()
        bits = sum(
            cell.item() / total * math.log2(
                cell * table_AB.sum()
                / (table_AB[a].sum() * table_AB[:, b].sum()))
            for table_AB in table_ZAB for a, row in enumerate(table_AB)
            for b, cell in enumerate(row) if cell)
        assert found.item() == pytest.approx(bits, abs=1e-12)


def test_each_kept_token_weighs_one():
    shares_TE = expert_shares(routing((0, ), (2, 0), (), (1, )))
    assert shares_TE.tolist() == [[1, 0, 0], [.5, 0, .5], [0, 0, 0],
                                  [0, 1, 0]]
    assert shares_TE.dtype == torch.float64


def test_the_class_that_covers_most_of_the_patch():
    labels = torch.tensor([
        [0, 0, 1, 2],
        [0, 2, 2, 1],     # a tie of 1 and 2: the first
        [255, 255, 255, 255],
        [255, 2, 255, 255]])  # one vote against three that are none
    assert patch_classes(labels, (2, 2), 2, (4, 4), 3).tolist() == [
        [0, 1], [2, -1]]
    # the same map over an image of another size than it has
    assert patch_classes(labels, (2, 2), 16, (32, 32), 3).tolist() == [
        [0, 1], [2, -1]]
    # rows 0 to 2 and 3, and columns alike: the last patches hang over the edge
    assert patch_classes(labels, (2, 2), 3, (4, 4), 3).tolist() == [
        [0, 1], [2, -1]]
    assert patch_classes(labels.flip(0), (2, 2), 3, (4, 4), 3).tolist() == [
        [2, 1], [0, 2]]
    # twice as wide as high: 8 pixels to 4 columns
    assert patch_classes(labels, (1, 2), 4, (4, 8), 3).tolist() == [[0, 1]]


def test_votes_follow_the_centres_of_pixels():
    # 3 pixels over 4: their centres are at 2/3, 2 and 10/3
    labels = torch.tensor([[0, 1, 2]])
    assert patch_classes(labels, (1, 4), 1, (1, 4), 3).tolist() == [
        [0, -1, 1, 2]]


@pytest.mark.parametrize('label', [3, -1, 254])
def test_unknown_classes(label):
    labels = torch.tensor([[0, label, 255]])
    with pytest.raises(ValueError, match=rf'{label}.*3 classes and 255'):
        patch_classes(labels, (1, 3), 1, (1, 3), 3)


def test_places():
    assert places((4, 6), (2, 3)).tolist() == [
        [0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    # centres of 3 in 2: at 1/3, 1 and 5/3; of 2 in 4: at 1 and 3
    assert places((3, 2), (2, 4)).tolist() == [[1, 3], [5, 7], [5, 7]]


@pytest.mark.parametrize('tokens, image_hw, found', [
    (16, (64, 64), (0, 4, 4, 16)),
    (17, (64, 64), (1, 4, 4, 16)),
    (23 * 30, (360, 480), (0, 23, 30, 16)),
    (16 * 16 + 1, (224, 224), (1, 16, 16, 14)),
])
def test_token_map(tokens, image_hw, found):
    assert token_map(tokens, image_hw) == found


def test_tokens_that_are_no_map():
    with pytest.raises(ValueError, match=r'18 tokens are no .* 64x64'):
        token_map(18, (64, 64))


def test_the_map_of_experts_has_no_class_token():
    chosen = routing((2, ), (0, ), (1, ), (), (2, ))
    assert expert_map(chosen, (32, 32)).tolist() == [[0, 1], [-1, 2]]


def test_tally():
    tally = Tally(num_classes=2, num_experts=3)
    # in the corners of the grid of places: 0 and 2 above, 8 and 10 below
    shares = torch.zeros(2, 2, 3, dtype=torch.float64)
    shares[0, 0, 0] = shares[1, 1, 2] = 1
    shares[0, 1, :2] = .5
    tally.add(shares, torch.tensor([[0, 1], [1, 1]]))
    tally.add(shares, torch.tensor([[0, -1], [-1, 0]]))
    assert (tally.tokens, tally.no_class, tally.no_expert) == (8, 2, 1)
    assert tally.counts_LE.tolist() == [[2, 0, 1], [.5, .5, 1]]
    corners = [int(place) for place in places((2, 2)).flatten()]
    assert tally.counts_PLE[corners].tolist() == [
        [[2, 0, 0], [0, 0, 0]], [[0, 0, 0], [.5, .5, 0]],
        [[0, 0, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 1]]]
    assert tally.counts_PLE.sum() == 5
    # by class: 3 and 2 of 5 tokens; by expert: 2.5, 0.5 and 2
    about = tally.measure()['class']
    of_class = entropy(counts(3, 2), 1).item()
    of_expert = entropy(counts(2.5, .5, 2), 1).item()
    bits = of_class + of_expert - entropy(counts(2, 1, .5, .5, 1), 1).item()
    assert about.bits == pytest.approx(bits)
    assert about.share_of_target == pytest.approx(bits / of_class)
    assert about.share_of_expert == pytest.approx(bits / of_expert)
    # by place: 2, 1 and 2 tokens, and the place tells the expert but for the
    # second one
    of_place = entropy(counts(2, 1, 2), 1).item()
    about = tally.measure()['place']
    assert about.bits == pytest.approx(of_expert - 1 / 5)
    assert about.share_of_target == pytest.approx(about.bits / of_place)
    # where the place is known, nobody tells more
    about = tally.measure()['class | place']
    assert about.bits == pytest.approx(0) and about.share_of_expert == 0
    assert about.share_of_target == pytest.approx(0)


def test_where_an_expert_is_drawn():
    tally = Tally(num_classes=1, num_experts=2)
    experts = torch.zeros(24, 32, dtype=torch.long)
    experts[:2, :2] = 1
    experts[22:, 30] = 1
    classes = torch.zeros(24, 32, dtype=torch.long)
    classes[10:12, 4:6] = -1
    tally.add(one_hot(experts, 2), classes)
    expected_HW = torch.zeros(12, 16, dtype=torch.float64)
    expected_HW[0, 0], expected_HW[11, 15] = 1, .5
    torch.testing.assert_close(tally.drawn_EHW[1], expected_HW)
    assert tally.drawn_EHW.sum(0)[5, 2] == 0
    assert tally.drawn_EHW.sum() == 12 * 16 - 1
    # a token of a small map fills several cells
    small = Tally(num_classes=1, num_experts=2)
    small.add(one_hot([[0, 1]], 2), torch.zeros(1, 2, dtype=torch.long))
    assert (small.drawn_EHW[1, :, 8:] == 1).all()
    assert (small.drawn_EHW[1, :, :8] == 0).all()


def blobs(num_ids, side=16, patch=4):
    """Random ids in patches of tokens, anywhere."""
    ids = torch.randint(num_ids, (side // patch, side // patch))
    return ids.repeat_interleave(patch, 0).repeat_interleave(
        patch, 1).roll(tuple(torch.randint(patch, (2, )).tolist()), (0, 1))


def test_chance_of_patches_is_more_than_that_of_tokens():
    experts, classes, images = 4, 5, 12
    tally = Tally(classes, experts)
    for _ in range(images):
        tally.add(one_hot(blobs(experts), experts), blobs(classes))
    # Miller and Madow: what independent tokens would have
    tokens = images * 16**2
    independent = (experts - 1) * (classes - 1) / (2 * math.log(2) * tokens)
    measured = tally.measure()
    assert independent < measured['class'].chance / 4
    for about in measured.values():
        assert about.chance == pytest.approx(about.bits, rel=.5)
        assert about.chance_max > about.chance


def test_what_experts_know_is_above_chance():
    tally = Tally(5, 5)
    for _ in range(12):
        classes = blobs(5)
        tally.add(one_hot(classes, 5), classes)
    measured = tally.measure()
    for about in (measured['class'], measured['class | place']):
        assert about.share_of_target == pytest.approx(1)
        assert about.share_of_expert == pytest.approx(1)
        assert about.bits > 2 * about.chance_max
    about = measured['place']
    assert about.bits == pytest.approx(about.chance, rel=.5)


def test_sky_on_top_is_no_specialisation_in_sky():
    tally = Tally(2, 2)
    # it ends inside a cell of the grid of places, which are 4 x 4 tokens
    top = (torch.arange(16)[:, None] < 6).expand(16, 16)
    for _ in range(80):
        # a quarter of the patches are what they usually are not
        experts, classes = ((blobs(4) == 0) ^ top for _ in range(2))
        tally.add(one_hot(experts.long(), 2), classes.long())
    measured = tally.measure()
    for about in (measured['class'], measured['place']):
        assert about.bits > 2 * about.chance_max
    about = measured['class | place']
    assert about.bits == pytest.approx(about.chance, rel=.3)
    assert about.bits < about.chance_max


def test_exchanged_expert_maps_are_stretched():
    tally = Tally(2, 2)
    wide, narrow = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 0]])
    tally.add(one_hot(wide, 2), wide)
    # alone, it is its own partner: nothing is above chance
    about = tally.measure()['class | place']
    assert about.bits == about.chance == about.chance_max
    tally.add(one_hot(narrow, 2), 1 - narrow)
    # classes 0 0 1 1 under experts 1 1 0 0, and classes 0 1 under 0 1
    exchanged_PLE, = tally._exchanged()
    assert exchanged_PLE.sum(0).tolist() == [[1, 2], [2, 1]]
    # a third image: two exchanges, and no image gets its own map
    tally.add(one_hot(wide, 2), torch.full((1, 4), -1))
    assert [table_PLE.sum(0).tolist() for table_PLE in tally._exchanged()] == [
        [[1, 2], [2, 1]], [[3, 0], [0, 3]]]


def test_maps_are_exchanged_with_images_near_and_far():
    # as in a video: the scene, class and expert, changes once
    tally = Tally(2, 2)
    for scene in torch.arange(160) // 80:
        tally.add(one_hot(scene.view(1, 1), 2), scene.view(1, 1))
    # a share x of all, from 0 to 1, is under the other scene's expert: the
    # integral of 1 - H(x) is 1 - 1 / (2 ln 2)
    assert tally.measure()['class | place'].chance == pytest.approx(
        1 - .5 / math.log(2), abs=.05)


def test_shifts_keep_counts_and_are_the_same_each_time():
    first, second = Tally(3, 2), Tally(3, 2)
    for tally in (first, second):
        torch.manual_seed(1)
        shares = one_hot(blobs(2), 2)
        torch.rand(int(tally is second))  # no one else's random numbers
        tally.add(shares, torch.zeros(16, 16, dtype=torch.long))
    assert len(first.shifted_RPLE) == REARRANGEMENTS
    assert torch.equal(first.shifted_RPLE, second.shifted_RPLE)
    for shifted_PLE in first.shifted_RPLE:
        torch.testing.assert_close(shifted_PLE.sum((0, 1)),
                                   first.counts_LE.sum(0))
    assert len(first.shifted_RPLE.sum(2).unique(dim=0)) > REARRANGEMENTS / 2
