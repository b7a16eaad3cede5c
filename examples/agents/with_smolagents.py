"""A smolagents agent (pip install 'smolagents[openai]') that writes code, unchanged except for the address.

task: {agent: examples/agents/with_smolagents.py:coder, data: tasks.jsonl}     # rows: prompt, answer
"""

from smolagents import CodeAgent, OpenAIServerModel


def coder(row, client, steps=3):
    model = OpenAIServerModel(model_id="policy", api_base=str(client.base_url), api_key=client.api_key)
    agent = CodeAgent(tools=[], model=model, max_steps=steps, verbosity_level=0)
    return float(str(agent.run(row["prompt"])).strip() == row["answer"])
