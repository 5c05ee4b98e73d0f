"""Planning: what training and answering take on machines that are not here. Above `train` and `evaluate`."""
