"""In which order an epoch shows which images: a function of seed and epoch, for any number of processes the same."""

from collections.abc import Sequence

import torch

from vmamba.data.draws import ORDER, generator, permutation


def balanced(seed: int, epoch: int, labels: Sequence[int], length: int) -> list[int]:
    """`length` indices of `labels`, each class that there is as often as the others, but for one.

    An image comes again when all of its class have come as often: of a small class many times an epoch, of a large one
    once or not at all.  Which of a class come, which classes have one more and the order are drawn.
    """
    draw = generator(seed, ORDER, epoch, 1)  # another stream than the permutation's
    classes = torch.tensor(labels)
    members = classes.argsort(stable=True).split(classes.unique(return_counts=True)[1].tolist())
    order: list[int] = []
    for place, number in enumerate(torch.randperm(len(members), generator=draw).tolist()):
        images = members[number]
        wanted = length // len(members) + (place < length % len(members))
        passes = -(-wanted // len(images))
        shuffled = [images[torch.randperm(len(images), generator=draw)] for _ in range(passes)]
        order += torch.cat(shuffled)[:wanted].tolist()
    return [order[place] for place in permutation(seed, epoch, len(order)).tolist()]


def repeated(order: Sequence[int], times: int, length: int) -> list[int]:
    """Repeated augmentation (arXiv 1901.09335), as DeiT and timm's RepeatAugSampler: each index `times` in a row, cut
    to `length`, so that an epoch takes as long and shows a part of the images."""
    return [order[place // times] for place in range(length)]


def numbered(order: Sequence[int]) -> list[tuple[int, ...]]:
    """(index,), and where an index comes again (index, 1), (index, 2), ...: what tells its versions apart."""
    seen: dict[int, int] = {}
    keys = []
    for index in order:
        again = seen.get(index, 0)
        keys.append((index, again) if again else (index,))
        seen[index] = again + 1
    return keys
