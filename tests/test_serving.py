"""The server as OpenAI's own client sees it, with a tiny model."""

import json

import numpy as np
import pytest
from live_server import CHAT, EOS, SAY, serving
from tiny_chat import TOKENS, write_chat


@pytest.fixture(scope="module")
def model(tmp_path_factory, load_once):
    return load_once(write_chat(tmp_path_factory.mktemp("serving") / "tiny.gguf"), dtype="float32")


@pytest.fixture(scope="module")
def live(model):
    with serving(model) as live:
        yield live


@pytest.fixture(scope="module")
def client(live):
    with live.client as client:
        yield client


# Chat.


def test_a_chat_is_answered_as_in_python(client, model):
    answer = client.chat.completions.create(model="tiny", messages=SAY, max_tokens=24, temperature=0)
    expected = model.chat(SAY, max_new_tokens=24, temperature=0)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason == "length"
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    prompt = len(model.encode(SAY))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        prompt,
        24,
        prompt + 24,
    )


def test_a_stream_says_the_same_and_ends_with_its_usage(client, model):
    arguments = {"model": "tiny", "messages": SAY, "max_completion_tokens": 24, "seed": 3, "temperature": 1.5}
    whole = client.chat.completions.create(**arguments)
    *chunks, last = client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 24)
    assert whole.choices[0].message.content == model.chat(SAY, 24, seed=3, temperature=1.5).text
    assert {chunk.id for chunk in chunks} == {last.id}


def test_choices_differ_and_a_seed_repeats_them(client):
    arguments = {"model": "tiny", "messages": SAY, "max_tokens": 12, "n": 3, "temperature": 1, "seed": 5}
    first, again = (client.chat.completions.create(**arguments) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens == 36
    parts = ["", "", ""]
    for chunk in client.chat.completions.create(**arguments, stream=True):
        parts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert parts == texts
    assert (
        first.choices[0].message.content
        != client.chat.completions.create(**arguments | {"seed": 6}).choices[0].message.content
    )


def test_log_probabilities_of_every_token(client):
    arguments = {
        "model": "tiny",
        "messages": SAY,
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    answer = client.chat.completions.create(**arguments).choices[0]
    tokens = answer.logprobs.content
    assert [len(token.top_logprobs) for token in tokens] == [3] * 6
    # Greedy: the token is the most likely one, and bytes of tokens are those of the text.
    assert all((t.token, t.logprob) == (t.top_logprobs[0].token, t.top_logprobs[0].logprob) for t in tokens)
    assert all(t.logprob < 0 and t.top_logprobs[1].logprob <= t.logprob for t in tokens)
    assert bytes(b for t in tokens for b in t.bytes).decode(errors="replace") == answer.message.content
    streamed = [
        token
        for chunk in client.chat.completions.create(**arguments, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    np.testing.assert_allclose([t.logprob for t in streamed], [t.logprob for t in tokens], rtol=1e-5)


def test_a_bias_and_a_stop(client):
    fields = {"model": "tiny", "messages": SAY, "max_tokens": 9, "temperature": 0}
    biased = client.chat.completions.create(**fields, logit_bias={TOKENS.index("A"): 100})
    assert biased.choices[0].message.content == "A" * 9
    stopped = client.chat.completions.create(**fields, logit_bias={TOKENS.index("A"): 100}, stop=["AAA"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("", "stop")
    ended = client.chat.completions.create(**fields, logit_bias={EOS: 100})
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage.completion_tokens == 1


def test_parts_of_messages_and_unused_fields(live, client):
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "something."}]
    fields = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**fields, messages=SAY)
    split = client.chat.completions.create(
        **fields, messages=[{"role": "user", "content": parts}], user="me", store=False
    )
    assert split.choices == whole.choices
    assert split.usage.prompt_tokens == whole.usage.prompt_tokens
    assistant = whole.choices[0].message.model_dump()  # as clients send it back, with everything that is in it
    client.chat.completions.create(**fields, messages=[*SAY, assistant, *SAY])


# Structured answers and tools.

SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}


def test_json(client):
    fields = {"model": "tiny", "messages": SAY, "temperature": 2, "seed": 1}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    answer = client.chat.completions.create(**fields, response_format=form).choices[0]
    assert json.loads(answer.message.content)["n"] in (1, 2)
    assert answer.finish_reason == "stop"
    # Any object: a comma or another byte of a string comes often, its end seldom; so the bias ends it.
    bias = {TOKENS.index(token): 30 for token in '"}'}
    answer = client.chat.completions.create(**fields, response_format={"type": "json_object"}, logit_bias=bias).choices[
        0
    ]
    assert isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "look"}}], ids=["any", "named"]
)
def test_a_tool_that_has_to_be_called(client, choice):
    fields = {"model": "tiny", "messages": SAY, "tools": [TOOL], "tool_choice": choice, "temperature": 1, "seed": 2}
    answer = client.chat.completions.create(**fields).choices[0]
    calls = answer.message.tool_calls
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    assert {(call.type, call.function.name) for call in calls} == {("function", "look")}
    assert all(json.loads(call.function.arguments)["n"] in (1, 2) for call in calls)
    assert len({call.id for call in calls}) == len(calls) == (len(calls) if choice == "required" else 1)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    streamed = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.index for call in streamed] == list(range(len(calls)))
    assert [call.function.arguments for call in streamed] == [call.function.arguments for call in calls]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # And the next turn, with what the tool said.
    turns = [
        *SAY,
        answer.message.model_dump(exclude_none=True),
        *({"role": "tool", "tool_call_id": call.id, "content": "3"} for call in calls),
    ]
    client.chat.completions.create(model="tiny", messages=turns, tools=[TOOL], max_tokens=3)


# The other endpoints.


def test_texts_are_continued(client, model):
    fields = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    expected = [completion.text for completion in model.generate(["one", "two"], 6, temperature=0)]
    assert client.completions.create(prompt="one", **fields).choices[0].text == expected[0]
    both = client.completions.create(prompt=["one", "two"], n=2, echo=True, **fields)
    assert [c.text for c in both.choices] == ["one" + expected[0]] * 2 + ["two" + expected[1]] * 2
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (6, 24)
    ids = client.completions.create(prompt=model.encode("two"), logprobs=2, **fields).choices[0]
    assert ids.text == expected[1]
    assert [len(top) for top in ids.logprobs.top_logprobs] == [2] * 6
    assert ids.logprobs.text_offset[0] == 0
    streamed = list(client.completions.create(prompt="two", stream=True, **fields))
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected[1]
    assert len(client.completions.create(model="tiny", prompt="x").choices[0].logprobs or ()) == 0


def test_responses(client, model):
    fields = {"model": "tiny", "input": SAY[0]["content"], "max_output_tokens": 24, "temperature": 0}
    answer = client.responses.create(**fields)
    text = model.chat(SAY, 24, temperature=0).text
    assert (answer.output_text, answer.status) == (text, "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(model.encode(SAY)), 24)
    with client.responses.stream(**fields) as stream:  # the client puts the events together, and checks them
        kinds = [event.type for event in stream]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert (kinds.count("response.output_text.delta") > 1, kinds[-1]) == (True, "response.incomplete")
    raw = list(client.responses.create(**fields, stream=True))
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    assert raw[-1].response.output_text == text
    turns = [{"role": "user", "content": "x"}, *(item.model_dump() for item in answer.output), *SAY]
    again = client.responses.create(model="tiny", instructions="Be short.", input=turns, max_output_tokens=1)
    expected = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "x"}]
    expected += [{"role": "assistant", "content": text}, *SAY]
    assert again.usage.input_tokens == len(model.encode(expected))


def test_responses_with_tools_and_schemas(client):
    # With a seed, because a text in an argument may go on until no room is left.
    fields = {"model": "tiny", "input": "Say something.", "temperature": 1, "extra_body": {"seed": 1}}
    tool = {"type": "function", **TOOL["function"], "strict": True}
    answer = client.responses.create(**fields, tools=[tool], tool_choice="required")
    call = answer.output[0]
    assert (answer.status, call.type, call.name) == ("completed", "function_call", "look")
    raw = list(
        client.responses.create(**fields, tools=[tool], tool_choice={"type": "function", "name": "look"}, stream=True)
    )
    [done] = [event for event in raw if event.type == "response.function_call_arguments.done"]
    assert json.loads(done.arguments)["n"] in (1, 2)
    turns = [*SAY, call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "7"}]
    client.responses.create(model="tiny", input=turns, tools=[tool], max_output_tokens=2)
    form = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}
    assert json.loads(client.responses.create(**fields, text=form).output_text)["n"] in (1, 2)


def test_models_health_and_metrics(live, client, model):
    [listed] = client.models.list().data
    assert (listed.id, listed.max_model_len) == ("tiny", live.worker.engine.capacity)
    assert client.models.retrieve("tiny").summary == str(model.summary())
    assert live.request("GET", "/health")[::2] == (200, b'{"status":"ok"}')
    client.chat.completions.create(**CHAT)
    text = live.request("GET", "/metrics")[2].decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['jaxllm_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(values["jaxllm_generated_tokens_total"]) >= 4
    assert values["jaxllm_live"] == "0.0"
