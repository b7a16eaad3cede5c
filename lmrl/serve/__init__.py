"""An OpenAI-compatible HTTP server of a policy: for people (`lmrl serve`), and for the programs of agent tasks.

http.py moves bytes within limits, protocol.py reads requests and writes answers, model.py goes from messages to tokens and back,
sessions.py records what a program has the policy say, app.py joins them.
"""
