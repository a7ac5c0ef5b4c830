"""Training: options, the loop, checkpoints, and the run folder.

Nothing is imported here, so that the options can be read without torch.
"""
