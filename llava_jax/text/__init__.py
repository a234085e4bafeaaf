"""Conversations as text and as token ids: templates, chat templates, tokenization."""
