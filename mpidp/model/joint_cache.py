"""Stores the key-value caches of several sequences of equal length in common tensors. Attention then computes these sequences
together. Pure torch.

With one CPU thread, the results of a sequence have the same bits as if it were computed alone. With several threads, the bits
can differ, because the number of sequences changes how matrix products are divided among the threads.
"""

from __future__ import annotations

import torch

from mpidp.model.cache import Cache, Kept, joined


def is_exact(device: torch.device) -> bool:
    """Return whether attention with joined caches gives each sequence the same bits as if it were computed alone. Pure."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def join(caches: list[Cache]) -> None:
    """Copy the keys and values of caches into common tensors. Do nothing if the caches have different numbers of positions, or
    are already joined. Independent.

    After a sequence has ended, call join() with the caches of the other sequences. It copies their keys and values to new
    common tensors.
    """
    length, counts, joint = caches[0].length, caches[0].counts, Kept()
    if len(caches) < 2 or any((c.length, c.counts) != (length, counts) for c in caches) or joined(caches):
        return
    for layer, (k, v) in caches[0].kept.items():
        room = (len(caches), k.shape[0], max(cache.kept[layer][0].shape[1] for cache in caches), k.shape[2])
        joint[layer] = k.new_empty(room), v.new_empty(room)
        for i, cache in enumerate(caches):
            for common, own in zip(joint[layer], cache.kept[layer], strict=True):
                common[i, :, : counts[layer]] = own[:, : counts[layer]]
            cache.kept[layer] = joint[layer][0][i], joint[layer][1][i]
    for i, cache in enumerate(caches):
        cache.joint, cache.row = joint, i
