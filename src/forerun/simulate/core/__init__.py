"""Hardware, model shapes, operators, and what a decode step, a rollout and an RL step cost. Needs numpy at import."""
