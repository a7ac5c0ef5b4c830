"""Measures of a trained model. Each is a function of arrays or of a model, and knows nothing of training."""
