"""The simulator against published and measured numbers, and the constants that ship from them."""
