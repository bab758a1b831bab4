"""Imports and exports models of Llama and other families in Hugging Face's format (docs/huggingface.md)."""
