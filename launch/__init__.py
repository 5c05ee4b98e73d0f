"""Running sweeps: which cells are left, where they run, what came of them."""
