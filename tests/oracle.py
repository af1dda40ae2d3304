"""The objective once more, as plain float64 loops over b, t and k: what the tests compare with.

Written from the mathematics, sharing no code with `wmtp.objective`. Arguments are nested lists
(or anything indexed alike); `None` is an entry that is not predicted.
"""

from __future__ import annotations

import math
from typing import Any


def labels(x: Any, heads: int, document: Any, pad: Any) -> list[list[list[int | None]]]:
    out: list[list[list[int | None]]] = []
    for b in range(len(x)):
        row: list[list[int | None]] = []
        for t in range(len(x[b])):
            entry: list[int | None] = []
            for k in range(heads):
                j = t + k + 1
                usable = j < len(x[b]) and not pad[b][t] and not pad[b][j] and document[b][t] == document[b][j]
                entry.append(int(x[b][j]) if usable else None)
            row.append(entry)
        out.append(row)
    return out


def cross_entropy(logits: Any, label: int) -> float:
    values = [float(v) for v in logits]
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values)) - values[label]


def position_weights(scores: list[float], temperature: float, low: float, high: float, mix: float) -> list[float]:
    """Weights of the valid heads of one position."""
    n = len(scores)
    if n == 0:
        return []
    top = max(scores)
    powers = [math.exp((s - top) / temperature) for s in scores]
    clipped = [min(max(p / math.fsum(powers) * n, low), high) for p in powers]
    mean = math.fsum(clipped) / n
    return [1 + mix * (c / mean - 1) for c in clipped]


def weights(score: Any, mask: Any, temperature: float, low: float, high: float, mix: float) -> list[list[list[float]]]:
    out = []
    for b in range(len(mask)):
        row = []
        for t in range(len(mask[b])):
            valid = [k for k in range(len(mask[b][t])) if mask[b][t][k]]
            ws = position_weights([float(score[b][t][k]) for k in valid], temperature, low, high, mix)
            row.append([ws[valid.index(k)] if k in valid else 0.0 for k in range(len(mask[b][t]))])
        out.append(row)
    return out


def token_skip(score: Any, mask: Any, percentile: float, mix: float) -> list[list[list[float]]]:
    where = [
        (b, t, k)
        for b in range(len(mask))
        for t in range(len(mask[b]))
        for k in range(len(mask[b][t]))
        if mask[b][t][k]
    ]
    out = [[[0.0 for _ in heads] for heads in row] for row in mask]
    if not where:
        return out
    ranked = sorted((float(score[b][t][k]) for b, t, k in where), reverse=True)
    last = ranked[max(1, round((1 - percentile) * len(where))) - 1]
    kept = sum(s >= last for s in ranked)
    for b, t, k in where:
        raw = len(where) / kept if float(score[b][t][k]) >= last else 0.0
        out[b][t][k] = 1 + mix * (raw - 1)
    return out


def gae(reward: Any, value: Any, document: Any, pad: Any, gamma: float, lam: float) -> list[list[float]]:
    """Targets by the sum over l, not by the recursion."""
    out = []
    for b in range(len(value)):
        length = len(value[b])
        row = []
        for t in range(length):
            if pad[b][t]:
                row.append(0.0)
                continue
            end = t
            while end + 1 < length and not pad[b][end + 1] and document[b][end + 1] == document[b][t]:
                end += 1
            total = 0.0
            for j in range(t, end + 1):
                ahead = float(value[b][j + 1]) if j < end else 0.0
                td = float(reward[b][j]) + gamma * ahead - float(value[b][j])
                total += (gamma * lam) ** (j - t) * td
            row.append(total + float(value[b][t]))
        out.append(row)
    return out


def loss_and_gradient(logits: Any, labels_bsh: Any, w: Any) -> tuple[float, list[list[list[list[float]]]]]:
    """`sum(w * ce) / N` and its gradient with respect to the logits, `w` held fixed."""
    n = max(1, sum(label is not None for row in labels_bsh for entry in row for label in entry))
    total = 0.0
    gradient = []
    for b, row in enumerate(labels_bsh):
        g_row = []
        for t, entry in enumerate(row):
            g_entry = []
            for k, label in enumerate(entry):
                values = [float(v) for v in logits[b][t][k]]
                if label is None:
                    g_entry.append([0.0] * len(values))
                    continue
                total += w[b][t][k] * cross_entropy(values, label)
                top = max(values)
                powers = [math.exp(v - top) for v in values]
                g_entry.append([w[b][t][k] / n * (p / math.fsum(powers) - (v == label)) for v, p in enumerate(powers)])
            g_row.append(g_entry)
        gradient.append(g_row)
    return total / n, gradient
