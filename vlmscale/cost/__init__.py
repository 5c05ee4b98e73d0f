"""What training and inference cost: analytic parameters and FLOPs."""
