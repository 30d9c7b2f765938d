"""The simulator against published and measured numbers."""
