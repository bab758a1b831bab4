"""What a trained model is used for: its loading, text that goes on, questions that are scored."""
