"""The run folder and what is written into it: metrics and their definitions, timeline, environment."""
