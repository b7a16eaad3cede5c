"""Tasks that a program plays: any code that talks to an OpenAI-compatible address.

client.py is what programs are given, programs.py runs them, play.py makes episodes of what they had the policy say.
"""

from lmrl.agents.client import APIError, AsyncClient, Client

__all__ = ["APIError", "AsyncClient", "Client"]
