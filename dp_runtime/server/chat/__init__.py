"""Chats over HTTP: messages to a prompt of the engine, its outputs to messages."""
