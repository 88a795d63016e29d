"""Anchors, offsets, assignment, sampling, regions and pasted masks, against torchvision's and straightforward loops."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, roi_align

from vmamba.detection import boxes as rules
from vmamba.detection.boxes import BOX_STDS, RPN_STDS, anchors, assign, cut, decode, encode, sample
from vmamba.detection.roi_heads import RoIHead, _mask_targets, paste_masks, read_regions
from vmamba.detection.rpn import ProposalSettings, RPNHead, _best, _inside, _suppress

CPU = torch.device("cpu")


def random_boxes(count, side=100.0, least=1.0):
    corner, sides = torch.rand(count, 2) * side, torch.rand(count, 2) * side / 2 + least
    return torch.cat([corner, corner + sides], 1)


def test_anchors_by_hand():
    found = anchors((2, 3), 4, CPU).reshape(2, 3, 3, 4)
    for row, column, (place, ratio) in [(r, c, p) for r in range(2) for c in range(3) for p in enumerate((0.5, 1, 2))]:
        x1, y1, x2, y2 = found[row, column, place].tolist()
        assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx((4 * column, 4 * row), abs=1e-5)
        assert (x2 - x1) * (y2 - y1) == pytest.approx(32**2, rel=1e-5)  # 8 strides square
        assert (y2 - y1) / (x2 - x1) == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize("stds", [RPN_STDS, BOX_STDS])
def test_offsets_are_torchvisions_and_decoding_undoes_them(stds):
    torch.manual_seed(0)
    boxes, targets = random_boxes(50), random_boxes(50)
    offsets = encode(boxes, targets, stds)
    coder = BoxCoder([1 / stds[0]] * 2 + [1 / stds[1]] * 2)
    torch.testing.assert_close(offsets, coder.encode_single(targets, boxes))
    torch.testing.assert_close(decode(boxes, offsets, stds), targets, rtol=1e-4, atol=1e-4)
    several = torch.randn(50, 3, 4)
    expected = coder.decode_single(several.flatten(1), boxes).unflatten(1, (3, 4))
    torch.testing.assert_close(decode(boxes[:, None], several, stds), expected, rtol=1e-4, atol=1e-3)


def test_growth_is_bounded_and_boxes_are_cut_at_the_image():
    box = torch.tensor([[10.0, 20.0, 20.0, 30.0]])
    grown = decode(box, torch.tensor([[0.0, 0.0, 90.0, -90.0]]), RPN_STDS)
    assert (grown[0, 2] - grown[0, 0]).item() == pytest.approx(10 * 1000 / 16, rel=1e-4)
    assert (grown[0, 3] - grown[0, 1]).item() == pytest.approx(10 * 16 / 1000, rel=1e-2)
    assert cut(torch.tensor([[-3.0, 5.0, 70.0, 90.0]]), (40, 60)).tolist() == [[0, 5, 60, 40]]


def assign_slowly(boxes, truths, above, below, least):
    found = [-1] * len(boxes)
    if not len(truths):
        return found
    overlaps = box_iou(truths, boxes).tolist()
    for box in range(len(boxes)):
        column = [row[box] for row in overlaps]
        most = max(column)
        found[box] = column.index(most) if most >= above else -1 if most < below else -2
    for truth, row in enumerate(overlaps):
        for box, overlap in enumerate(row):
            if overlap == max(row) and overlap >= least:
                found[box] = truth
    return found


@pytest.mark.parametrize("pairs", [1 << 22, 100])  # at once, and a few truths at a time
@pytest.mark.parametrize(("above", "below", "least"), [(0.7, 0.3, 0.3), (0.5, 0.5, 0.5)])
def test_assignment_is_the_loops(monkeypatch, above, below, least, pairs):
    monkeypatch.setattr(rules, "_PAIRS", pairs)
    torch.manual_seed(0)
    for count in (0, 1, 12):
        truths = random_boxes(count, 60, 10)
        boxes = torch.cat([random_boxes(40, 60, 10), truths, truths[:3], truths + 4])
        truths = torch.cat([truths, truths[:2]])  # some twice: the first is the nearest, the last the low match
        found = assign(boxes, truths, above, below, least)
        assert found.tolist() == assign_slowly(boxes, truths, above, below, least)
        counts = torch.rand(len(boxes)) < 0.7
        of_these = assign(boxes, truths, above, below, least, counts)
        assert of_these[counts].tolist() == assign_slowly(boxes[counts], truths, above, below, least)
        assert (of_these[~counts] == -2).all()
    assert assign(boxes[:0], truths, above, below, least).shape == (0,)


def test_three_hundred_truths_take_little_memory(monkeypatch):
    """The IoU of 300 truths and 270,000 anchors at once is 324 MB, several times."""
    largest = []

    def watched(truths, boxes):
        largest.append(len(truths) * len(boxes))
        return box_iou(truths[:1], boxes).expand(len(truths), -1) if len(truths) else box_iou(truths, boxes)

    monkeypatch.setattr(rules, "box_iou", watched)
    assign(random_boxes(270_000, 1000), random_boxes(300, 1000), 0.7, 0.3, 0.3)
    assert max(largest) <= 1 << 22 and sum(largest) == 300 * 270_000


def test_a_sample_is_drawn_of_each_kind_and_background_fills_it():
    assigned = [torch.tensor([-1] * 50 + [0, 1] * 20 + [-2] * 30), torch.tensor([-1, 3, -2]), torch.zeros(0).long()]
    torch.manual_seed(0)
    draws = [sample(assigned, 16, 0.5) for _ in range(200)]
    for (positive, negative), (few, others), (none, neither) in draws:
        assert len(positive) == len(set(positive.tolist())) == 8 and (assigned[0][positive] >= 0).all()
        assert len(negative) == len(set(negative.tolist())) == 8 and (assigned[0][negative] == -1).all()
        assert (few.tolist(), others.tolist(), len(none), len(neither)) == ([1], [0], 0, 0)
    counts = torch.stack([torch.bincount(positive, minlength=120) for ((positive, _), *_) in draws]).sum(0)[50:90]
    assert counts.min() > 15 and counts.max() < 75  # 40 expected of each
    ((positive, negative), *_) = sample(assigned[:1], 80, 0.25)
    assert (len(positive), len(negative)) == (20, 50)


def test_the_best_are_those_of_a_stable_sort():
    torch.manual_seed(0)
    chances = torch.randint(0, 40, (3, 200)) / 40
    expected = chances.sort(dim=1, descending=True, stable=True)
    for count in (200, 500):
        values, indices = _best(chances, count)
        assert torch.equal(indices, expected.indices) and torch.equal(values, expected.values)
    values, indices = _best(chances, 30)
    assert torch.equal(values, expected.values[:, :30]) and torch.equal(chances.gather(1, indices), values)
    assert all(len(set(row.tolist())) == 30 for row in indices)


def test_anchors_of_the_batchs_padding_do_not_count():
    sizes = [(-(-64 // stride), -(-96 // stride)) for stride in (4, 8, 16, 32, 64)]
    inside = _inside(sizes, (32, 64), CPU).split([3 * rows * columns for rows, columns in sizes])
    for found, (rows, columns), stride in zip(inside, sizes, (4, 8, 16, 32, 64), strict=True):
        found = found.reshape(rows, columns, 3)
        expected = torch.zeros_like(found)
        expected[: -(-32 // stride), : -(-64 // stride)] = True
        assert torch.equal(found, expected)


def test_proposals_are_the_best_and_as_many_as_asked_for():
    torch.manual_seed(0)
    head, maps, sizes = RPNHead(3), pyramid(128), [(128, 128), (100, 128)]
    nn.init.normal_(head.rpn_cls.weight)
    with torch.no_grad():
        scores, offsets = head(maps)
    every = head.proposals(scores, offsets, sizes, ProposalSettings(nms_pre=40, max_per_img=10_000, rpn_nms=1.0))
    most = 4 * 40 + 12  # the last level has 2 x 2 x 3 anchors; those outside of the image are none
    for few, (boxes, chances) in zip(
        head.proposals(scores, offsets, sizes, ProposalSettings(nms_pre=40, max_per_img=7, rpn_nms=1.0)),
        every,
        strict=True,
    ):
        assert most - 10 < len(boxes) <= most and torch.equal(chances, chances.sort(descending=True).values)
        assert torch.equal(few[0], boxes[:7]) and torch.equal(few[1], chances[:7])


def pyramid(side=256):
    return [torch.randn(2, 3, side // stride, side // stride) for stride in (4, 8, 16, 32, 64)]


def test_regions_are_read_from_torchvisions_levels(monkeypatch):
    torch.manual_seed(0)
    maps = pyramid(512)
    boxes = [cut(random_boxes(30, 400, 30), (512, 512)), cut(random_boxes(20, 200, 2), (512, 512))]
    boxes[0][0] = torch.tensor([0.0, 0.0, 510.0, 510.0])
    # torchvision's has no aligned; without it, and with its number of samples, both do the same.
    align = lambda *args, **options: roi_align(*args, **options | {"aligned": False, "sampling_ratio": 2})  # noqa: E731
    monkeypatch.setattr("vmamba.detection.roi_heads.roi_align", align)
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    named = OrderedDict((str(level), each) for level, each in enumerate(maps))
    torch.testing.assert_close(read_regions(maps, boxes, 7), theirs(named, boxes, [(512, 512)] * 2))


def test_regions_are_aligned_and_sampled_adaptively():
    torch.manual_seed(0)
    maps = pyramid()
    box = torch.tensor([[10.0, 20.0, 90.0, 80.0]])
    expected = roi_align(maps[0], [box[:0], box], 14, 1 / 4, sampling_ratio=0, aligned=True)
    torch.testing.assert_close(read_regions(maps, [box[:0], box], 14), expected)
    assert read_regions(maps, [box[:0], box[:0]], 14).shape == (0, 3, 14, 14)


def test_mask_targets_are_the_truths_mask_in_the_box():
    masks = torch.zeros(2, 40, 60, dtype=torch.uint8)
    masks[0, 10:20, 10:30] = masks[1, 5:40, 20:60] = 1
    boxes = torch.tensor([[10.0, 10.0, 30.0, 20.0], [0.0, 10.0, 20.0, 20.0], [20.0, 5.0, 60.0, 40.0]])
    found = _mask_targets(masks, boxes, torch.tensor([0, 0, 1]), 28)
    assert (found[0] == 1).all() and (found[2] == 1).all()
    assert (found[1, :, :14] == 0).all() and (found[1, :, 14:] == 1).all()


@pytest.mark.parametrize("pixels", [1, 3 * 40 * 60, 1 << 25])  # a mask at a time, three, all
def test_mask_targets_are_the_same_however_many_masks_are_read_at_a_time(monkeypatch, pixels):
    torch.manual_seed(0)
    masks = (torch.rand(10, 40, 60) < 0.5).byte()
    boxes = torch.cat([random_boxes(30, 40, 3), torch.tensor([[5.0, 5.0, 5.0, 9.0], [70.0, 50.0, 90.0, 60.0]])])
    stands_for = torch.randint(10, (32,))
    monkeypatch.setattr("vmamba.detection.roi_heads._PIXELS", pixels)
    regions = roi_align(masks.float()[stands_for][:, None], list(cut(boxes, (40, 60)).split(1)), 28, aligned=True)
    assert torch.equal(_mask_targets(masks, boxes, stands_for, 28), (regions[:, 0] >= 0.5).float())
    assert _mask_targets(masks[:0], boxes[:0], stands_for[:0], 28).shape == (0, 28, 28)


def test_mask_targets_of_three_hundred_truths_take_little_memory(monkeypatch):
    """In float32 their masks at once are 1.3 GB."""
    largest = []

    def watched(masks, *args, **options):
        largest.append(masks.numel())
        return roi_align(masks, *args, **options)

    monkeypatch.setattr("vmamba.detection.roi_heads.roi_align", watched)
    masks = torch.ones(1, 800, 1344, dtype=torch.uint8).expand(300, -1, -1)
    targets = _mask_targets(masks, random_boxes(128, 500), torch.randint(300, (128,)), 28)
    assert (targets == 1).all()
    assert max(largest) <= 1 << 25 and sum(largest) == masks.numel()


def test_pasted_masks_are_the_boxes_part_of_the_image(monkeypatch):
    torch.manual_seed(0)
    size, boxes = (50, 70), torch.tensor([[10.0, 12.0, 38.0, 40.0], [-5.0, -5.0, 200.0, 90.0], [3.2, 4.9, 3.9, 9.0]])
    logits = torch.randn(3, 28, 28)
    found = paste_masks(logits, boxes, size, 0.5)
    assert torch.equal(found[0, 12:40, 10:38], logits[0] >= 0)  # 28 pixels: nothing is interpolated
    found[0, 12:40, 10:38] = False
    assert not found[0].any()
    expected = F.interpolate(logits[None, 1:2].sigmoid(), (95, 205), mode="bilinear")[0, 0, 5:55, 5:75] >= 0.5
    assert (found[1] != expected).float().mean() < 1e-3
    assert not found[2, :, 4:].any() and not found[2, :, :3].any()
    monkeypatch.setattr("vmamba.detection.roi_heads._PIXELS", 1)  # one at a time
    assert torch.equal(paste_masks(logits, boxes, size, 0.5)[1:], found[1:])
    assert paste_masks(logits[:0], boxes[:0], size, 0.5).shape == (0, *size)
    without_area = torch.tensor([[10.5, 12.0, 10.5, 40.0], [70.0, 50.0, 70.0, 50.0], [0.0, 0.0, 0.0, 0.0]])
    assert not paste_masks(logits.abs(), without_area, size, 0.5).any()


def test_losses_of_the_second_stage_by_hand():
    """Every box is sampled; each loss from its formula."""
    torch.manual_seed(0)
    head, maps = RoIHead(3, 8, 4, samples=1000), pyramid(128)
    truths = [random_boxes(2, 60, 20), random_boxes(1, 60, 20)]
    proposals = [torch.cat([each + 1, random_boxes(10, 60, 20)]) for each in truths]
    masks = [torch.rand(len(each), 128, 128) < 0.5 for each in truths]
    labels = [torch.tensor([3, 1]), torch.tensor([0])]
    names = ("boxes", "labels", "masks")
    targets = [dict(zip(names, each, strict=True)) for each in zip(truths, labels, masks, strict=True)]
    losses = head.losses(maps, proposals, targets)
    classification, regression, mask_losses, right, count = 0.0, 0.0, [], 0, 0
    for image, (truth, proposed) in enumerate(zip(truths, proposals, strict=True)):
        boxes = torch.cat([truth, proposed])
        assigned = [*range(len(truth)), *assign_slowly(proposed, truth, 0.5, 0.5, 0.5)]
        one_image = [boxes if image == 0 else boxes[:0], boxes if image == 1 else boxes[:0]]
        scores, offsets = head.bbox_head(read_regions(maps, one_image, 7))
        logits = head.mask_head(read_regions(maps, one_image, 14))
        for place, stands_for in enumerate(assigned):
            label = 4 if stands_for < 0 else labels[image][stands_for].item()
            classification -= scores[place].log_softmax(0)[label]
            right, count = right + (scores[place].argmax() == label).item(), count + 1
            if stands_for >= 0:
                target = encode(boxes[[place]], truth[[stands_for]], BOX_STDS)[0]
                regression += (offsets[place, label] - target).abs().sum()
                wanted = _mask_targets(masks[image], boxes[[place]], torch.tensor([stands_for]), 28)[0]
                mask_losses.append(F.binary_cross_entropy_with_logits(logits[place, label], wanted))
    expected = {"loss_cls": classification / count, "loss_bbox": regression / count}
    expected |= {"loss_mask": torch.stack(mask_losses).mean(), "acc": torch.tensor(100 * right / count)}
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)
    assert np.isfinite([value.item() for value in losses.values()]).all()


def test_proposals_are_suppressed_as_torchvision_does_by_level():
    torch.manual_seed(0)
    levels = []
    for count in (300, 200, 50, 7, 0):
        centres, sides = torch.rand(count, 2) * 200, torch.rand(count, 2) * 60
        sides[::17] = 0  # boxes without area are left out
        boxes = torch.cat([centres - sides / 2, centres + sides / 2], 1).clamp(0, 200)
        levels.append((boxes, (torch.rand(count) * 50).round() / 50))  # many of the same score
    boxes, scores = (torch.cat(each) for each in zip(*levels, strict=True))
    which = torch.cat([torch.full((len(box),), level) for level, (box, _) in enumerate(levels)])
    real = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1).nonzero()[:, 0]
    for most in (100, 1000):
        kept = real[batched_nms(boxes[real], scores[real], which[real], 0.7)][:most]
        ours = _suppress(levels, ProposalSettings(1000, most, 0.7))
        assert torch.equal(ours[0], boxes[kept]) and torch.equal(ours[1], scores[kept])
