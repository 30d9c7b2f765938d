"""The simulator and planner: what speculation will bring, before it is run or on hardware that one does not have yet.

`core` prices a step on some hardware, `plan` answers for recipes and finished runs, `validation` compares both with
published and measured numbers and fits the constants that ship in `core/data/`. Imports point downward, in that order;
all take plain data and import in well under a second.
"""
