"""Loads a trained model, generates text with it, and scores texts and multiple-choice questions."""
