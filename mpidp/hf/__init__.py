"""Import and export of LLaMA-family models in Hugging Face's format (docs/huggingface.md)."""
