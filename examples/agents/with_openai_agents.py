"""Agents of OpenAI's Agents SDK (pip install openai-agents), unchanged except for the client, which calls the policy.

task: {agent: examples/agents/with_openai_agents.py:calculator, data: tasks.jsonl}     # rows: prompt, answer
"""

import asyncio

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled

set_tracing_disabled(True)


@function_tool
def mul(a: int, b: int) -> int:
    """Multiply."""
    return a * b


async def calculator(row, client):
    """One agent with a tool."""
    model = OpenAIChatCompletionsModel(model="policy", openai_client=client)
    agent = Agent(name="calculator", instructions="Use the tool.", tools=[mul], model=model)
    result = await Runner.run(agent, row["prompt"])
    return {"reward": float(str(result.final_output).strip() == row["answer"]), "items": len(result.new_items)}


async def committee(row, client):
    """Two concurrent sub-agents, and a third agent that chooses between their answers."""
    model = OpenAIChatCompletionsModel(model="policy", openai_client=client)
    members = [Agent(name=name, instructions=f"You are {name}.", model=model) for name in ("A", "B")]
    found = await asyncio.gather(*[Runner.run(member, row["prompt"]) for member in members])
    chair = Agent(name="chair", instructions="Choose.", model=model)
    result = await Runner.run(chair, " or ".join(str(one.final_output) for one in found))
    return float(str(result.final_output).strip() == row["answer"])
