"""Asks a server as users of OpenAI's interface do: by the Python package `openai`.

    openai_client.py BASE_URL KEY MODEL

Prints the answer to one question, asked whole and as a stream, so that the caller can compare it with its own.
"""

import asyncio
import json
import sys

import openai

base_url, key, model = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
question = dict(model=model, messages=[{"role": "user", "content": "Who is there?"}], seed=7, max_completion_tokens=12)


def refused(kind, code, call):
    """The call must be refused with this kind of error."""
    try:
        call()
    except kind as error:
        assert error.code == code, (error.code, error)
        return
    raise AssertionError(f"{kind.__name__} was expected")


# Which model there is.
assert [listed.id for listed in client.models.list()] == [model]
assert client.models.retrieve(model).owned_by == "lockstep"

# An answer whole, and the same as a stream.
whole = client.chat.completions.create(**question)
[choice] = whole.choices
assert whole.object == "chat.completion" and choice.message.role == "assistant"
assert choice.finish_reason in ("stop", "length")
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

text, usage, finish = "", None, None
for chunk in client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}):
    assert chunk.id.startswith("chatcmpl-") and chunk.object == "chat.completion.chunk"
    for part in chunk.choices:
        text += part.delta.content or ""
        finish = part.finish_reason or finish
    usage = chunk.usage or usage
assert (text, finish, usage) == (choice.message.content, choice.finish_reason, whole.usage)

# The answer goes back as it came, and the conversation goes on.
more = [*question["messages"], choice.message, {"role": "user", "content": "Go on."}]
client.chat.completions.create(**{**question, "messages": more}, temperature=0, top_p=0.9, extra_body={"top_k": 5})

# Texts continued.
completion = client.completions.create(model=model, prompt=["In the", "And the"], n=2, max_tokens=5, echo=True, seed=1)
assert [part.index for part in completion.choices] == [0, 1, 2, 3]
assert [part.text[:6] for part in completion.choices] == ["In the", "In the", "And th", "And th"]
streamed = client.completions.create(model=model, prompt="In the", max_tokens=5, seed=1, stream=True)
assert "In the" + "".join(chunk.choices[0].text for chunk in streamed) == completion.choices[0].text

# What is refused.
tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
refused(openai.BadRequestError, "unsupported_parameter", lambda: client.chat.completions.create(**question, tools=tools))
refused(openai.NotFoundError, "model_not_found", lambda: client.models.retrieve("another"))
long = {**question, "messages": [{"role": "user", "content": "word " * 5000}]}
refused(openai.BadRequestError, "context_length_exceeded", lambda: client.chat.completions.create(**long))
stranger = openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0)
refused(openai.AuthenticationError, "invalid_api_key", lambda: stranger.models.list())


async def many():
    """The same question, asked many times at once."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0)
    answers = await asyncio.gather(*(client.chat.completions.create(**question) for _ in range(20)))
    return {answer.choices[0].message.content for answer in answers}


# What else is computed at the same time changes no answer.
assert asyncio.run(many()) == {choice.message.content}
print(json.dumps(choice.message.content))
