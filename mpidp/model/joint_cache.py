"""Stores the key-value caches of several sequences of equal length in common tensors. Attention then computes them together. Pure
torch.

With one CPU thread, the attention of a sequence has the same bits alone and together with other sequences. With several threads,
the number of sequences changes how matrix products are divided among the threads, so the bits can differ.
"""

from __future__ import annotations

import torch

from mpidp.model.cache import Cache, Kept, joined


def is_exact(device: torch.device) -> bool:
    """Return whether attention of several sequences together has the same bits as attention of each sequence alone. Pure."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def join(caches: list[Cache]) -> None:
    """Copy the keys and values of caches into common tensors. Do nothing if the caches have different positions or are already
    joined. Independent.

    When a sequence ends, call join() for the caches of the other sequences. This copies them again.
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
