"""Requests from outside: files of them, and a conversation in the terminal."""
