"""Models of the LLaMA family as Hugging Face writes them: in and out (docs/huggingface.md)."""
