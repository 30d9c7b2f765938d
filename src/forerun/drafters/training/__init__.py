"""Training of drafters: teacher outputs, losses, the loop, distillation."""
