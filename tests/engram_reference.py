"""Engram written from its equations (arXiv 2601.07372, section 2) in float64 numpy, position by position; imports nothing of the library.

Legend: B batch, L length, M branches, D model, H heads of all orders, R rows, d row width, K taps.
"""

import numpy as np


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def head_sizes(layers, longest, heads, base):
    """Sizes of the heads of every layer: per order, the next primes from `base` that nobody has."""
    used, sizes = set(), []
    for _ in range(layers):
        own = []
        for _ in range(2, longest + 1):
            n = base
            for _ in range(heads):
                while not is_prime(n) or n in used:
                    n += 1
                used.add(n)
                own.append(n)
        sizes.append(own)
    return sizes


def ngram_rows(classes_BL, segments_BL, pad, multipliers, sizes, heads, longest):
    """Rows of every position by Python's own unbounded integers, wrapped to signed 64 bits."""
    batch, length = classes_BL.shape
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    out = np.zeros((batch, length, len(sizes)), np.int64)
    for b in range(batch):
        for t in range(length):
            for n in range(2, longest + 1):
                mix = 0
                for k in range(n):
                    inside = t - k >= 0 and segments_BL[b, t - k] == segments_BL[b, t]
                    mix ^= (int(classes_BL[b, t - k]) if inside else pad) * int(multipliers[k])
                mix = (mix + 2**63) % 2**64 - 2**63
                for j in range(heads):
                    h = (n - 2) * heads + j
                    out[b, t, h] = mix % sizes[h] + starts[h]
    return out


def rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def engram(hidden_BLMD, rows_BLHd, segments_BL, weights, longest, epsilon, signed_root):
    """What the layer adds to each branch.

    weights: value [X, D], value_bias [D], key [M, X, D], key_bias [M, D], key_norm, hidden_norm, taps_norm [M, D], taps [K, M, D].
    """
    batch, length, branches, d_model = hidden_BLMD.shape
    embedded = rows_BLHd.reshape(batch, length, -1).astype(np.float64)
    v = np.zeros(hidden_BLMD.shape)
    for m in range(branches):
        key = embedded @ weights["key"][m] + weights["key_bias"][m]
        key = rms_norm(key, weights["key_norm"][m], epsilon)
        query = rms_norm(hidden_BLMD[:, :, m].astype(np.float64), weights["hidden_norm"][m], epsilon)
        score = (key * query).sum(-1) / np.sqrt(d_model)
        if signed_root:
            score = np.sign(score) * np.sqrt(np.maximum(np.abs(score), 1e-6))
        v[:, :, m] = sigmoid(score)[..., None] * (embedded @ weights["value"] + weights["value_bias"])
    out = v.copy()
    taps = weights["taps"].shape[0]
    for m in range(branches):
        normed = rms_norm(v[:, :, m], weights["taps_norm"][m], epsilon)
        for b in range(batch):
            for t in range(length):
                total = np.zeros(d_model)
                for i in range(taps):
                    s = t - i * longest
                    if s >= 0 and segments_BL[b, s] == segments_BL[b, t]:
                        total += weights["taps"][taps - 1 - i, m] * normed[b, s]
                out[b, t, m] += total * sigmoid(total)
    return out
