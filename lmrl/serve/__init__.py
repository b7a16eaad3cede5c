"""An OpenAI-compatible HTTP server of a policy: for people (`lmrl serve`), and for the programs of agent tasks.

http.py transfers bytes within limits, requests.py parses requests, answers.py writes answers, model.py converts messages to
tokens and back, sessions.py records the policy's answers to a program, app.py connects these.
"""
