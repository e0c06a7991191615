"""
The strategies: pure functions over arrays, each with its parameters, its version and its lookback.

A strategy looks at windows and marks the bars on which it has an opinion. Its ``lookback`` is how many bars it
must see to decide about the last of them: older ones change its indicators by less than 1e-12 of their value
(measured with pasts up to a hundred times as high or a thousand times as wild). Comparisons use a relative
tolerance of 1e-9, so that the same bars give the same opinion however much history came with them.
"""

from collections.abc import Mapping

from signals.logic.strategies.breakout import BREAKOUT
from signals.logic.strategies.flow import FLOW
from signals.logic.strategies.marks import LastMark, Marks, opinion_at, said
from signals.logic.strategies.registered import Params, Strategy
from signals.logic.strategies.trend import TREND

STRATEGIES: Mapping[str, Strategy] = {s.name: s for s in (*TREND, *BREAKOUT, *FLOW)}

__all__ = ["STRATEGIES", "LastMark", "Marks", "Params", "Strategy", "opinion_at", "said"]
