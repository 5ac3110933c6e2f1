"""Find the schedule that just meets a budget: multiply-adds, a speed-up or milliseconds.

`space` enumerates schedules and computes their cost, `latency` predicts their time on this machine, `search` finds the
schedule that changes a model's outputs least; `planner` combines them.
"""

from laconic.planning.budget import Target as Target
from laconic.planning.planner import plan as plan
from laconic.planning.result import Plan as Plan
