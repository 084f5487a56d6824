"""Tokens that an answer of the demo gets in a step when some are guessed, on a repetitive and on an ordinary text.

python speculation.py
"""

import time

import jaxllm

LIST = "apples, pears, plums, cherries, grapes, lemons, melons, figs, dates, olives"
PROMPTS = {
    "repetitive": f"{LIST}\n" * 5 + "apples, pears, plums,",
    "ordinary": "Once upon a time, in a small town by the sea, there lived",
}


def measure(model: jaxllm.LanguageModel, prompt: str, drafter: object, temperature: float) -> tuple[list[int], str]:
    engine = jaxllm.Engine(model, 1, 512, drafter)
    for _ in range(2):  # the first one compiles
        before, begun = engine.stats.steps, time.perf_counter()
        answer = engine.add(prompt, 96, eos_ids=(), temperature=temperature, seed=1)
        while engine.busy:
            engine.step()
        seconds, steps = time.perf_counter() - begun, engine.stats.steps - before
    tokens = answer.completion.tokens
    return tokens, f"{(len(tokens) - 1) / steps:.2f} tokens a step, {len(tokens) / seconds:.0f} tokens/s"


def main() -> None:
    model = jaxllm.load("demo", progress=False)
    smaller = jaxllm.load("demo", quantize="q2_k", progress=False)
    drafters = {"none": None, "lookup": jaxllm.PromptLookup(), "the demo in Q2_K": jaxllm.DraftModel(smaller)}
    for text, prompt in PROMPTS.items():
        for temperature in (0.0, 0.7):
            expected = None
            for name, drafter in drafters.items():
                tokens, said = measure(model, prompt, drafter, temperature)
                expected = expected or tokens
                print(f"{text}, temperature {temperature}, {name}: {said}, same text: {tokens == expected}", flush=True)


if __name__ == "__main__":
    main()
