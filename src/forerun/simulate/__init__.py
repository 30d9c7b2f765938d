"""The simulator and planner: what speculation will bring, before it is run or on hardware that one does not have yet.

Entry points: `recipes.plan_recipe`, `run.plan_run`, `plan.plan`, `plan.plan_paper`, `predict.predict_recipe` and
`predict.compare`, `calibrate.read_cost_table`, `validate.validate`; text rows in `render`. Takes plain data, needs
numpy only and imports in well under a second.
"""
