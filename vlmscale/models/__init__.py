"""Pure Linen modules; they know nothing of data, training or files."""
