"""Tasks that a program plays: any code that talks to an OpenAI-compatible address.

client.py is the client that programs get, programs.py runs the programs, play.py turns their requests into episodes.
"""

from lmrl.agents.client import APIError, AsyncClient, Client

__all__ = ["APIError", "AsyncClient", "Client"]
