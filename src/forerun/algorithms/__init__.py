"""What a policy learns from: advantages, losses, off-policy correction. Pure functions."""
