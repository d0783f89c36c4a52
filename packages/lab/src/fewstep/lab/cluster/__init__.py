"""Experiments, targets and samples on a SLURM cluster: what submits them, what runs on the nodes, what watches."""
