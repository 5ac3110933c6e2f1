"""Budgets: multiply-adds, a speed-up or milliseconds, turned into the schedule that just meets them.

`space` knows which schedules there are and what they cost, `latency` what that is in time on this machine, `search` which of
them changes a model's answers least; `planner` brings them together.
"""

from laconic.planning.budget import Target as Target
from laconic.planning.planner import plan as plan
from laconic.planning.result import Plan as Plan
