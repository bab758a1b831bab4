"""Import and export LLaMA-family models in Hugging Face's format (docs/huggingface.md)."""
