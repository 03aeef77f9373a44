"""What a proof takes for granted: one sentence per place, and of the softmaxes under a finite mask what ``validate`` measures."""

from collections.abc import Iterator

from tpcompile.axes import NEG_INF
from tpcompile.passes.axesmap import AxesMap
from tpcompile.passes.facts import Facts
from tpcompile.passes.rules import Held
from tpcompile.program import Bound, Program, where_of

UNDERFLOW = 104
"""exp(-104) is 0 in float32."""


def assumptions(program: Program, axes: AxesMap, facts: Facts) -> Iterator[str]:
    """What the proof took for granted, one sentence per place."""
    if program.sites:
        yield "activations are finite: 0 * x is 0"
    yield from (f"{program.placeholders()[name]} holds 0 and 1 only, and 1 at position 0" for name in sorted(program.bits))
    for call in axes.calls.values():
        if call.factors is None or NEG_INF not in call.factors.folds.values():
            continue
        place = where_of(call.node)
        if call.node in facts.attended:
            yield f"{place.short} ({place.module}): every row has a key that is not masked"
        for factor in call.factors.folds:
            masked = facts.masked(call, factor)
            finite = [value.hi for value in masked.values() if value.hi != NEG_INF]
            if finite and call.rule is not None and call.rule.held is Held.SAME:
                yield f"{place.short} ({place.module}): the largest living value is above {max(finite):.0f}"
            elif finite:
                limit = -max(finite) - UNDERFLOW
                yield (
                    f"{place.short} ({place.module}): masked keys lie {UNDERFLOW} below the largest logit of their row; "
                    f"they do where living logits spread less than {limit:.0f} about 0"
                )


def bounds(program: Program, axes: AxesMap, facts: Facts) -> Iterator[Bound]:
    """Every softmax that hides dropped keys by a finite number."""
    for call in axes.calls.values():
        if call.factors is None or NEG_INF not in call.factors.folds.values() or call.rule is None or call.rule.held is Held.SAME:
            continue
        logits = call.operands[0]
        factor, batch = next(iter(call.factors.folds)), axes.batch_dims(logits)
        dim = next(call.of(0, factor))
        masked = {cls: value.hi for cls, value in facts.masked(call, factor).items() if value.hi != NEG_INF}
        if masked and axes.is_token(logits, dim):
            queries = [d for d in axes.token_dims(logits) if d != dim]
            yield Bound(
                logits.name, dim, batch[0] if batch else None, queries[0] if queries else None,
                program.sites[max(masked) - 1].keep, -max(masked.values()) - UNDERFLOW, where_of(call.node),
            )  # fmt: skip
