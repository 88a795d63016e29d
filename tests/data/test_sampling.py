"""Orders of an epoch's images: balanced classes, repeated augmentation as timm's, for any number of processes."""

from collections import Counter

import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from vmamba.classification import data
from vmamba.classification.data import build_train_loader
from vmamba.classification.source import Source
from vmamba.config import get_config
from vmamba.data.draws import permutation
from vmamba.data.loaders import TrainingBatches
from vmamba.data.sampling import balanced, numbered, repeated
from vmamba.errors import UserError

from ..classification.tiny import tiny_config


def test_a_balanced_epoch_has_as_many_of_each_class():
    labels = [0] * 50 + [1] * 7 + [4] * 3 + [0] * 3  # of 63 images 21 a class
    order = balanced(5, 0, labels, len(labels))
    assert Counter(labels[index] for index in order) == {0: 21, 1: 21, 4: 21}
    counts = Counter(order)
    assert {counts[index] for index, label in enumerate(labels) if label == 1} == {3}
    assert {counts[index] for index, label in enumerate(labels) if label == 4} == {7}
    assert {counts[index] for index, label in enumerate(labels) if label == 0} == {0, 1}
    assert Counter(Counter(labels[index] for index in balanced(0, 0, labels[:62], 62)).values()) == {21: 2, 20: 1}
    assert len({tuple(balanced(seed, epoch, labels, len(labels))) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert balanced(5, 0, labels, len(labels)) == order and order[:21] != sorted(order[:21])
    first = order[:21]  # mixed, not class by class
    assert len({labels[index] for index in first}) == 3
    assert numbered([3, 5, 3, 3]) == [(3,), (5,), (3, 1), (3, 2)]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (4, 1), (2, 2)])
def test_repeats_are_timms(world, accumulation):
    """Each process gets the images of timm's sampler, told apart by number; three steps, and from the second on."""
    images, micro = 48 * world * accumulation // 4, 4
    config = get_config(None, ["DATA.BATCH_SIZE", micro, "TRAIN.ACCUMULATION_STEPS", accumulation])
    shuffled = permutation(config.SEED, 2, images).tolist()
    seen = []
    for rank in range(world):
        batches = TrainingBatches(
            config, images, rank, world, None, lambda _: repeated(shuffled, 3, len(shuffled)), deal=True
        )
        batches.epoch = 2
        mine = [*batches]
        batches.start = 1
        assert [*batches] == mine[accumulation:]
        peer = RepeatAugSampler(range(images), world, rank, shuffle=False, num_repeats=3, selected_round=0)
        assert [key[1] for batch in mine for key in batch] == [shuffled[place] for place in peer]
        seen += [key for batch in mine for key in batch]
    assert len(set(seen)) == len(seen) == images and {key[0] for key in seen} == {2}
    assert Counter(key[1] for key in seen) == dict.fromkeys(shuffled[: images // 3], 3)


@pytest.mark.parametrize("opts", [("DATA.SAMPLER", "balanced"), ("AUG.REPEATS", 3)])
def test_steps_are_the_same_for_every_number_of_processes(opts, tmp_path):
    """The images of a step, their augmentation too: what comes again looks different."""
    steps = {}
    for world, micro in ((1, 6), (2, 3), (3, 2)):
        config = tiny_config(tmp_path, *opts, "DATA.BATCH_SIZE", micro, "AUG.MIXUP", 0, "AUG.CUTMIX", 0)
        (tmp_path / "images" / "train" / "class0" / "0.png").unlink(missing_ok=True)  # classes of two sizes
        loaders = [build_train_loader(config, rank=rank, world_size=world) for rank in range(world)]
        batches = [[loader.finish(batch) for batch in loader] for loader in loaders]
        steps[world] = [torch.cat([images for images, _ in step]) for step in zip(*batches, strict=True)]
    for world in (2, 3):
        for one, other in zip(steps[1], steps[world], strict=True):
            pairs = (one[:, None] == other[None]).flatten(2).all(2)
            assert pairs.sum(0).tolist() == pairs.sum(1).tolist() == [1] * 6


def test_a_balanced_sampler_needs_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "open_dataset", lambda *_, **__: Source(range(30), place="hfds/any"))
    with pytest.raises(UserError, match="SAMPLER is balanced, and DATA.DATASET 'imagenet' tells labels with images"):
        build_train_loader(tiny_config(tmp_path, "DATA.SAMPLER", "balanced"), rank=0, world_size=1)


def test_what_repeats_is_balanced_too():
    """Of ten classes of twelve images, each shown ten times: all classes, as often as each other."""
    labels = [index % 10 for index in range(120)]
    order = repeated(balanced(0, 0, labels, 12), 10, 120)
    counts = Counter(labels[index] for index in order)
    assert len(order) == 120 and len(counts) == 10 and set(counts.values()) <= {10, 20}
