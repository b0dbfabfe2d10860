"""Texts, prompts, questions and the batches made of them."""
