"""The simulator and planner: what speculation will bring on hardware that one does not have yet.

Entry points: `plan.plan`, `plan.plan_paper`, `plan.plan_run`, `validate.validate`, `calibrate.fit_engine`; text rows in
`render`. Needs numpy only and imports in well under a second.
"""
