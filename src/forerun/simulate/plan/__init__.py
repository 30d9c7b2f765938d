"""The planner: a recipe or a finished run in, predicted times and speed-ups out."""
