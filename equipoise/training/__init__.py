"""Training: the loop, what a stage descends with, checkpoints, and the job that makes a run."""
