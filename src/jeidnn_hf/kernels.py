"""An exit on the CPU as one kernel (numba), or as two around a matrix product: its look at the feature map, its answer,
and who leaves.

The equations are those of `backbones.pooling`, `heads`, `exits` and `gates`, for one sample at a time. Numbers that do
not change are in one array, ``weights``, and a row of ``plan`` per exit says where; those that a sample takes from exit
to exit are in its row of ``carry``: remaining mass, scaled log lambda, hidden state (H), boosted logits (K, where exits
are boosted), and K sums for each answer still to come. All are float32 in C order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .gates import SMALLEST_DOUBT

CLASS_TOKEN, AVERAGE, MAXIMUM = range(3)
"""Kinds of statistics."""
MIN, CUMULATIVE, STICK = range(3)
"""Gate forms, in the order of ``exits.GATE_FORMS``."""

PLAN = (
    "width", "classes", "gate_width", "feature", "recurs", "form", "median", "ensemble_size", "answer_at", "boosted_at",
    "weight", "bias", "low", "high", "output", "share", "ensemble", "threshold", "gate", "gate_bias", "first",
    "of_exit", "of_lam", "second", "second_bias", "last", "statistics",
)  # fmt: skip
"""Columns of ``plan``: sizes and choices; places in ``weights``; from the last on, kind and grid of each statistic."""
(
    WIDTH, CLASSES, GATE_WIDTH, FEATURE, RECURS, FORM, MEDIAN, ENSEMBLE_SIZE, ANSWER_AT, BOOSTED_AT,
    WEIGHT, BIAS, LOW, HIGH, OUTPUT, SHARE, ENSEMBLE, THRESHOLD, GATE, GATE_BIAS, FIRST,
    OF_EXIT, OF_LAM, SECOND, SECOND_BIAS, LAST, STATISTICS,
) = range(len(PLAN))  # fmt: skip
REMAINING, LOG_LAM, HIDDEN = range(3)
"""Columns of ``carry``."""

_SMALLEST, _MIDDLE = np.float32(SMALLEST_DOUBT), np.float32(np.log(SMALLEST_DOUBT) / 2)

_OPTIONS = {"cache": True, "nogil": True, "fastmath": {"contract", "reassoc", "arcp", "nsz", "afn"}}
"""Sums may be taken in any order; NaN and infinity stay what they are."""


@njit(**_OPTIONS)
def _pool(rows, class_token, weights, plan, carry, band, cell, feature):
    """Pooled statistics of one map, clipped, and behind them the hidden state, into ``feature``.

    rows: a map of W columns and C channels, ``(H, W C)``; class_token: ``(C,)``. Of a statistic the cells come first
    and the channels last. band and cell: room for W C and C numbers.
    """
    height, length = rows.shape
    channels = len(cell)
    width = length // channels
    low, high = weights[plan[LOW] :], weights[plan[HIGH] :]
    at = 0
    for number in range((len(plan) - STATISTICS) // 2):
        kind, grid = plan[STATISTICS + 2 * number], plan[STATISTICS + 2 * number + 1]
        for i in range(grid):
            top, bottom = i * height // grid, -(-(i + 1) * height // grid)
            if kind != CLASS_TOKEN:
                for n in range(length):
                    band[n] = rows[top, n]
            if kind == AVERAGE:
                for h in range(top + 1, bottom):
                    for n in range(length):
                        band[n] += rows[h, n]
            elif kind == MAXIMUM:
                for h in range(top + 1, bottom):
                    for n in range(length):
                        band[n] = max(band[n], rows[h, n])
            for j in range(grid):
                left, right = j * width // grid, -(-(j + 1) * width // grid)
                if kind == CLASS_TOKEN:
                    for c in range(channels):
                        cell[c] = class_token[c]
                else:
                    for c in range(channels):
                        cell[c] = band[left * channels + c]
                if kind == AVERAGE:
                    for w in range(left + 1, right):
                        for c in range(channels):
                            cell[c] += band[w * channels + c]
                    share = np.float32(1 / ((bottom - top) * (right - left)))
                    for c in range(channels):
                        cell[c] *= share
                elif kind == MAXIMUM:
                    for w in range(left + 1, right):
                        for c in range(channels):
                            cell[c] = max(cell[c], band[w * channels + c])
                for c in range(channels):
                    feature[at + c] = min(max(cell[c], low[at + c]), high[at + c])
                at += channels
    if plan[RECURS]:
        for n in range(plan[WIDTH]):
            feature[at + n] = carry[HIDDEN + n]


@njit(**_OPTIONS)
def _answer(read, weights, plan, carry):
    """A head behind its product with the feature, ``read (H + K,)``, and what it adds to its ensemble, into ``carry``::

        hidden = relu(read[:H]),    boosted = logits = read[H:] + hidden output + share boosted,
        sums[m] += ensemble[m] log softmax(logits)

    H is 0 for linear heads; ``boosted_at`` is 0 where nothing is boosted. Without an ensemble the answer is the logits.
    """
    width, classes = plan[WIDTH], plan[CLASSES]
    output, ensemble = weights[plan[OUTPUT] :], weights[plan[ENSEMBLE] :]
    logits = read[width : width + classes]
    for n in range(width):
        value = max(read[n], np.float32(0))
        carry[HIDDEN + n] = value
        if value > 0:
            for k in range(classes):
                logits[k] += value * output[n * classes + k]
    if plan[BOOSTED_AT] > 0:
        boosted, share = carry[plan[BOOSTED_AT] :], weights[plan[SHARE]]
        for k in range(classes):
            logits[k] += share * boosted[k]
            boosted[k] = logits[k]
    answer = carry[plan[ANSWER_AT] :]
    if plan[ENSEMBLE_SIZE] == 0:
        answer[:classes] = logits
        return
    top, total = logits.max(), np.float32(0)
    for k in range(classes):
        total += np.exp(logits[k] - top)
    shift = top + np.log(total)
    for m in range(plan[ENSEMBLE_SIZE]):
        for k in range(classes):
            answer[m * classes + k] += ensemble[m] * (logits[k] - shift)


@njit(**_OPTIONS)
def _log_certainty(doubt):
    """As `gates.log_certainty`, of a statistic's distance from that of a certain answer."""
    return _MIDDLE - np.log(max(doubt, np.float32(0)) + _SMALLEST)


@njit(**_OPTIONS)
def _leaves(weights, plan, carry, state):
    """Whether a sample leaves: statistics of its answer, gate, P(G=l) and rule; takes P(G=l) off its remaining mass.

    A linear gate is w . m + b, with a width of 0. A shared one, with t the scaled log lambda, is
    ``(w + u t) . s(m) + a + c t + q t^2 + last . relu(second relu(first m + of_exit + of_lam t) + second_bias)``; its
    weights are w and u, its biases a, c and q. state: room for the width.
    """
    classes, width = plan[CLASSES], plan[GATE_WIDTH]
    answer = carry[plan[ANSWER_AT] :]
    top, runner_up = np.float32(-np.inf), np.float32(-np.inf)
    for k in range(classes):
        if answer[k] > top:
            top, runner_up = answer[k], top
        elif answer[k] > runner_up:
            runner_up = answer[k]
    total = surprise = squares = power_surprise = np.float32(0)
    for k in range(classes):
        log_share = answer[k] - top  # of the most probable class
        share = np.exp(log_share)
        total += share
        squares += share * share
        if share > 0:
            surprise -= share * log_share
            power_surprise -= share * share * log_share
    maximum, margin = 1 / total, (1 - np.exp(runner_up - top)) / total
    entropy = np.log(total) + surprise / total
    power_entropy = np.log(squares) + 2 * power_surprise / squares

    weight, bias = weights[plan[GATE] :], weights[plan[GATE_BIAS] :]
    gate = bias[0]
    if width == 0:
        gate += weight[0] * maximum + weight[1] * entropy + weight[2] * power_entropy + weight[3] * margin
    else:
        t, scale = carry[LOG_LAM], np.float32(1 / np.log(max(classes, 2)))
        gate += t * (bias[1] + t * bias[2])
        gate += (weight[0] + t * weight[4]) * _log_certainty(1 - maximum)
        gate += (weight[1] + t * weight[5]) * _log_certainty(scale * entropy)
        gate += (weight[2] + t * weight[6]) * _log_certainty(scale * power_entropy)
        gate += (weight[3] + t * weight[7]) * _log_certainty(1 - margin)
        first, second = weights[plan[FIRST] :], weights[plan[SECOND] :]
        for n in range(width):
            value = weights[plan[OF_EXIT] + n] + weights[plan[OF_LAM] + n] * t
            value += first[4 * n] * maximum + first[4 * n + 1] * entropy
            value += first[4 * n + 2] * power_entropy + first[4 * n + 3] * margin
            state[n] = max(value, np.float32(0))
        for n in range(width):
            value = weights[plan[SECOND_BIAS] + n]
            for m in range(width):
                value += second[n * width + m] * state[m]
            gate += weights[plan[LAST] + n] * max(value, np.float32(0))
    gate = 1 / (1 + np.exp(-gate))

    remaining = carry[REMAINING]
    if plan[FORM] == MIN:
        mass = min(gate, remaining)
    elif plan[FORM] == CUMULATIVE:
        mass = max(gate - (1 - remaining), np.float32(0))
    else:
        mass = gate * remaining
    left = remaining - mass
    carry[REMAINING] = left
    threshold = weights[plan[THRESHOLD]]
    if plan[MEDIAN]:
        return 1 - left > threshold
    return remaining <= 0 or mass / remaining > threshold


@njit(**_OPTIONS)
def pool(pixels, class_token, weights, plan, carry, feature):
    """What an exit reads of maps ``(B, H, W, C)`` and class tokens ``(B or 0, C)``, into ``feature (B, d + H)``."""
    rows = pixels.reshape(pixels.shape[0], pixels.shape[1], pixels.shape[2] * pixels.shape[3])
    band, cell = np.empty(rows.shape[2], np.float32), np.empty(pixels.shape[3], np.float32)
    for b in range(len(rows)):
        token = class_token[b] if len(class_token) else cell
        _pool(rows[b], token, weights, plan, carry[b], band, cell, feature[b])


@njit(**_OPTIONS)
def answer(read, weights, plan, carry, leaves):
    """From the products ``read (B, H + K)`` on: answers into ``carry``, and into ``leaves (B or 0,)``, if it has room,
    who leaves. Returns how many."""
    state, count = np.empty(plan[GATE_WIDTH], np.float32), 0
    for b in range(len(read)):
        _answer(read[b], weights, plan, carry[b])
        if len(leaves):
            leaves[b] = _leaves(weights, plan, carry[b], state)
            count += leaves[b]
    return count


@njit(**_OPTIONS)
def whole(pixels, class_token, weights, plan, carry, leaves):
    """``pool``, the product and ``answer``, sample by sample."""
    size, outputs = plan[FEATURE], plan[WIDTH] + plan[CLASSES]
    rows = pixels.reshape(pixels.shape[0], pixels.shape[1], pixels.shape[2] * pixels.shape[3])
    band, cell = np.empty(rows.shape[2], np.float32), np.empty(pixels.shape[3], np.float32)
    feature, read = np.empty(size, np.float32), np.empty(outputs, np.float32)
    state, count = np.empty(plan[GATE_WIDTH], np.float32), 0
    weight = weights[plan[WEIGHT] :]
    for b in range(len(rows)):
        token = class_token[b] if len(class_token) else cell
        _pool(rows[b], token, weights, plan, carry[b], band, cell, feature)
        for n in range(outputs):
            value = np.float32(0)
            for d in range(size):
                value += weight[n * size + d] * feature[d]
            read[n] = value + weights[plan[BIAS] + n]
        _answer(read, weights, plan, carry[b])
        if len(leaves):
            leaves[b] = _leaves(weights, plan, carry[b], state)
            count += leaves[b]
    return count
