"""Measures of a trained model.

Each measure is a function of arrays or of a model. None of them depends on how the model was
trained.
"""
