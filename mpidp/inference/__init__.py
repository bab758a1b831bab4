"""Inference: load a trained model, generate text, score texts and multiple-choice questions."""
