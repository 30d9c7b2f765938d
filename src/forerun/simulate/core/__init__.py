"""Hardware, model shapes, operators, and the cost of a decode step, a rollout and an RL step. numpy only."""
