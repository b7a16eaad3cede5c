"""Programs of agent tasks."""

import asyncio
import functools
import sys
import time


async def one_turn(row, client):
    answer = await client.chat.completions.create(messages=ask(row["question"]), max_tokens=6, model="any")
    return len(answer.choices[0].message.content) / 10


def three_turns(row, client, turns=3):
    messages = ask(row["question"])
    for turn in range(turns):
        answer = client.chat.completions.create(messages=messages, max_tokens=5, model="any")
        messages += [answer.choices[0].message.model_dump(), *ask(f"turn {turn}")]
    return {"reward": 1.5, "turns": turns}


async def forgetful(row, client):
    """Two turns, then a history that was summarised, then a branch of the first."""
    first = ask(row["question"])
    said = [await say(client, first)]
    said.append(await say(client, [*first, said[0], *ask("more")]))
    await say(client, ask("a summary"))
    await say(client, [*first, said[0], *ask("other")])
    return 1.0


async def sub_agents(row, client):
    """A main agent and two that work side by side."""
    main = ask("main " + row["question"])
    plan = await say(client, main)

    async def work(number):
        messages = ask(f"sub {number}")
        answer = await say(client, messages)
        return await say(client, [*messages, answer, *ask("go on")])

    found = await asyncio.gather(work(0), work(1))
    await say(client, [*main, plan, *ask(" ".join(one["content"] for one in found))])
    return 1.0


async def texts(row, client):
    prompt = row["question"]
    for _ in range(3):
        answer = await client.completions.create(prompt=prompt, max_tokens=4, model="any")
        prompt += answer.choices[0].text + " then "
    return 0.0


async def odd_ones_fail(row, client):
    await say(client, ask(row["question"]))
    kind = row["number"] % 6
    if kind == 1:
        raise RuntimeError("out of luck, sk-lmrl-aaaaaaaaaaaaaaaaaaaaaaaa")
    if kind == 2:
        return "no number"
    if kind == 3:
        await asyncio.sleep(60)
    if kind == 4:
        while True:
            await say(client, ask("again"))
    return 1.0


async def silent(row, client):
    return 1.0


def slow(row, client):
    client.chat.completions.create(messages=ask("x"), max_tokens=2, model="any")
    time.sleep(2)
    return 1.0


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


@decorated
async def wrapped(row, client):
    await say(client, ask(row["question"]))
    return 1.0


def in_own_loop(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return asyncio.run(function(*args, **kwargs))

    return wrapper


@in_own_loop
async def run_to_its_end(row, client):
    await say(client, ask(row["question"]))
    return 1.0


def not_awaited(row, client):
    client.chat.completions.create(messages=ask("x"), max_tokens=2, model="any")
    return asyncio.sleep(0)


def oversized(row, client):
    client.chat.completions.create(messages=ask("x"), max_tokens=2, model="any")
    return {"reward": 1e301}


async def in_a_group(row, client):
    async with asyncio.TaskGroup() as group:
        group.create_task(say(client, ask("x")))
        group.create_task(client.chat.completions.create(messages=[], model="any"))


async def exits_in_a_task(row, client):
    await say(client, ask("x"))

    async def leave():
        sys.exit(0)

    await asyncio.gather(leave(), asyncio.sleep(0.1))


async def impatient(row, client):
    waiting = asyncio.ensure_future(say(client, ask("x")))
    await asyncio.sleep(0)
    waiting.cancel()
    return 1.0


async def answer(row, client):
    said = await say(client, ask(row["question"]))
    return said["content"]


def ask(text):
    return [{"role": "user", "content": text}]


async def say(client, messages):
    answer = await client.chat.completions.create(messages=messages, max_tokens=5, model="any")
    return answer.choices[0].message.model_dump()


def length(prompts, completions, number, **_):
    return [
        len(text if isinstance(text, str) else text[0]["content"]) + one
        for text, one in zip(completions, number, strict=True)
    ]


COMMAND = """
import json, os, sys, urllib.request
row = json.loads(sys.stdin.readline())
def post(key):
    body = json.dumps({"messages": [{"role": "user", "content": row["question"]}], "max_tokens": 4}).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer " + key}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    return json.load(urllib.request.urlopen(request, timeout=30))
answer = post(os.environ["OPENAI_API_KEY"])
print("chatter")
if row["number"] == 1:
    sys.exit("gave up")
if row["number"] == 2:
    import subprocess, time
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(77)"])
    time.sleep(77)
print(json.dumps({"reward": 0.5, "characters": len(answer["choices"][0]["message"]["content"])}))
"""
