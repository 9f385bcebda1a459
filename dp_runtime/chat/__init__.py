"""Chats: messages to a prompt, and what the model answers to reasoning, text and tool calls."""
