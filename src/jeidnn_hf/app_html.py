"""What the page of `app.py` draws, as HTML and SVG: the answer, every exit, the accuracy-cost curve. No gradio here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, isclose
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .app import Answer, ExitView
    from .curve import AccuracyCostCurve

NO_CURVE = (
    "There is no accuracy-cost curve beside this model. <code>jeidnn evaluate RUN</code> and then "
    "<code>jeidnn card RUN/MODEL</code> write <code>curve.json</code> from test images."
)

STYLE = """<style>
.jeidnn {--accent: #c2410c; --line: #2563eb; --faint: rgba(128, 128, 128, .22); font-size: 14px; line-height: 1.4}
.jeidnn h3 {margin: 0 0 4px; font-size: 22px; font-weight: 600}
.jeidnn p {margin: 2px 0}
.jeidnn .accent {color: var(--accent); font-weight: 600}
.jeidnn .note {opacity: .72; font-size: 12.5px}
.jeidnn .chip {display: inline-block; padding: 1px 10px; margin: 3px 4px 0 0; border-radius: 12px}
.jeidnn .chip, .jeidnn .bar {background: var(--faint)}
.jeidnn svg {width: 100%; height: auto; display: block}
.jeidnn svg text {fill: currentColor; font-size: 12px; paint-order: stroke; stroke-width: 4px}
.jeidnn svg text {stroke: var(--background-fill-primary, white)}
.jeidnn table {width: 100%; border-collapse: collapse; font-size: 12.5px; line-height: 1.25; margin: 0}
.jeidnn th {text-align: left; font-weight: 600; padding: 2px 6px; border: 0; border-bottom: 1px solid var(--faint)}
.jeidnn td {padding: 2px 6px; border: 0; white-space: nowrap}
.jeidnn td.thinks {max-width: 0; width: 99%; overflow: hidden; text-overflow: ellipsis}
.jeidnn .number {text-align: right; font-variant-numeric: tabular-nums}
.jeidnn tr.taken td {background: rgba(234, 88, 12, .16)}
.jeidnn tr.skipped td {opacity: .42}
.jeidnn .bar {display: inline-block; width: 34px; height: 8px; margin-right: 6px; border-radius: 4px}
.jeidnn .bar i {display: block; height: 8px; border-radius: 4px; background: var(--line)}
#picture img {width: 100%; height: 100%; object-fit: contain}
#lam input[type="number"], #lam .min_value, #lam .max_value {display: none}
</style>"""


def wrapped(*parts: str) -> str:
    """Parts of the page, in its style."""
    return f'{STYLE}<div class="jeidnn">{"".join(parts)}</div>'


def answer_html(answer: Answer | None) -> str:
    """The label, the exit taken and what was saved; before there is a picture, what to do."""
    if answer is None:
        return wrapped('<h3 id="jeidnn-label">Drop a picture</h3><p>Every exit says what it thinks of it.</p>')
    taken = answer.exits[answer.exit - 1]
    label, probability = taken.top[0]
    return wrapped(
        f'<h3 id="jeidnn-label">{escape(label)}, {probability:.1%}</h3>',
        f'<p>Left at <span id="jeidnn-exit" class="accent">exit {answer.exit} of {len(answer.exits)}</span>, '
        f'at λ = <span id="jeidnn-lam">{answer.lam:.4g}</span>.</p>',
        f'<p>Spent <span id="jeidnn-cost" class="accent">{answer.mul_adds / 1e6:,.1f} M</span> Mul-Adds, '
        f"{taken.share:.3f} of the backbone's {answer.backbone_mul_adds / 1e6:,.1f} M.</p><p>{_saved(taken.share)}</p>",
    )


def _saved(share: float) -> str:
    if share < 1:
        return f'Saved <span class="accent">{1 - share:.1%}</span>.'
    return f"Nothing saved: {share - 1:.1%} more than the backbone, for the exits and gates."


def set_html(answer: Answer | None) -> str:
    """The prediction set, or why there is none."""
    if answer is None:
        return ""
    if answer.prediction_set is None:
        return wrapped(f'<p id="jeidnn-set" class="note">{escape(answer.set_note)}</p>')
    chips = "".join(f'<span class="chip">{escape(label)}</span>' for label in answer.prediction_set)
    return wrapped(f'<div id="jeidnn-set">{chips or "(empty)"}</div>', f'<p class="note">{escape(answer.set_note)}</p>')


def exits_html(answer: Answer | None, gates: str) -> str:
    """A row for each exit; ``gates`` says how their values decide."""
    if answer is None:
        return ""
    rows = "".join(_exit_row(number, view, answer.exit) for number, view in enumerate(answer.exits, start=1))
    head = "<th>exit</th><th>cost</th><th>likeliest classes</th><th>gate</th>"
    is_early = answer.exit < len(answer.exits)
    tail = "; the grey exits, shown for comparison, do not run." if is_early else "; here every exit runs."
    return wrapped(
        f'<table id="jeidnn-exits"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>',
        f'<p class="note">{escape(gates)}{tail}</p>',
    )


def _exit_row(number: int, view: ExitView, taken: int) -> str:
    kind = "taken" if number == taken else "skipped" if number > taken else "passed"
    first, *others = view.top
    thinks = f"{_bar(first[1])}{escape(first[0])} {first[1]:.0%}"
    thinks += "".join(f' <span class="note">· {escape(label)} {p:.0%}</span>' for label, p in others)
    gate = "the rest" if view.gate is None else f"{_bar(view.gate)}{view.gate:.2f}"
    return (
        f'<tr class="{kind}"><td class="number">{number}</td><td class="number">{view.share:.3f}</td>'
        f'<td class="thinks">{thinks}</td><td>{gate}</td></tr>'
    )


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width: {100 * min(max(share, 0), 1):.0f}%"></i></span>'


# ---- the curve

_WIDTH, _HEIGHT = 480, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 14, 44


def curve_html(curve: AccuracyCostCurve | None, lam: float, cost: float | None = None) -> str:
    """The measured points, joined, the point at ``lam`` and, as a vertical line, what the picture at hand has cost.

    The costs are shares of the backbone's Mul-Adds.
    """
    if curve is None:
        return wrapped(f'<p id="jeidnn-no-curve" class="note">{NO_CURVE}</p>')
    backbone = curve.backbone_accuracy
    accuracies = [*curve.accuracy, *([] if backbone is None else [backbone])]
    across = _ticks(0, max(1.0, *curve.normalised_mul_adds, cost or 0))
    up = _ticks(min(accuracies), max(accuracies))

    def x(share: float) -> float:
        return _LEFT + (share - across[0]) / (across[-1] - across[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(accuracy: float) -> float:
        return _HEIGHT - _BOTTOM - (accuracy - up[0]) / (up[-1] - up[0]) * (_HEIGHT - _TOP - _BOTTOM)

    bottom, parts = _HEIGHT - _BOTTOM, []
    for tick in across:
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
    for tick in up:
        parts.append(_line(x(across[0]), y(tick), x(across[-1]), y(tick), 'stroke="currentColor" opacity=".13"'))
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:g}</text>')
    middle = (x(across[0]) + x(across[-1])) / 2
    title = "mean Mul-Adds per picture (share of the backbone's)"
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{title}</text>')
    centre = (_TOP + bottom) / 2
    parts.append(
        f'<text x="13" y="{centre}" text-anchor="middle" transform="rotate(-90 13 {centre})">'
        f"{escape(curve.role)} accuracy (%)</text>"
    )
    if backbone is not None:
        dotted = 'stroke="currentColor" stroke-dasharray="2 4" opacity=".7"'
        parts.append(_line(x(across[0]), y(backbone), x(across[-1]), y(backbone), dotted))
        end = f'x="{x(across[-1]) - 4:.1f}" y="{y(backbone) - 7:.1f}" text-anchor="end"'
        parts.append(f'<text {end} opacity=".8">frozen backbone</text>')
    points = [(x(share), y(a)) for share, a in zip(curve.normalised_mul_adds, curve.accuracy, strict=True)]
    joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    parts.append(f'<polyline points="{joined}" fill="none" stroke="var(--line)" stroke-width="1.8"/>')
    parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="var(--line)"/>' for px, py in points]
    if cost is not None:
        style = 'id="jeidnn-picture" stroke="var(--accent)" stroke-dasharray="6 4"'
        parts.append(_line(x(cost), _TOP, x(cost), bottom, style))
        anchor, shift = ("end", -6) if cost > 0.55 * across[-1] else ("start", 6)
        parts.append(
            f'<text x="{x(cost) + shift:.1f}" y="{bottom - 8}" text-anchor="{anchor}" style="fill: var(--accent)">'
            "this picture</text>"
        )
    if point := curve.at(lam):
        px, py = x(point[0]), y(point[1])
        parts.append(
            f'<circle id="jeidnn-point" cx="{px:.1f}" cy="{py:.1f}" r="7" fill="var(--accent)" stroke="white" '
            'stroke-width="2"/>'
        )
    view = f'<svg id="jeidnn-curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    return wrapped(view, f'<p id="jeidnn-average" class="note">{_average(curve, lam)}</p>')


def _average(curve: AccuracyCostCurve, lam: float) -> str:
    images = f"{curve.num_samples:,} {escape(curve.role)} images of {escape(curve.dataset)}"
    point = curve.at(lam)
    if point is None:
        return f"λ = {lam:.4g} is outside of what was measured on {images}."
    how = "" if any(isclose(lam, known, rel_tol=1e-6) for known in curve.lam) else ", on the line between two points"
    return f"On average at λ = {lam:.4g}: accuracy {point[1]:.2%} at {point[0]:.3f} of the Mul-Adds; {images}{how}."


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers, the first not above ``low`` and the last not below ``high``."""
    span = max(high - low, 1e-3)
    step = next(step for step in _steps() if span / step <= 6)
    first, last = floor(low / step + 1e-9), max(ceil(high / step - 1e-9), floor(low / step + 1e-9) + 1)
    return [round(step * number, 10) for number in range(first, last + 1)]


def _steps() -> Sequence[float]:
    return [factor * 10.0**power for power in range(-6, 3) for factor in (1, 2, 5)]


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'
