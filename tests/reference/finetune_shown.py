"""What the demo learns from 200 made examples: answers to sums as JSON, on questions that it has not seen.

python finetune_shown.py
"""

import json
import random
import re
import time

import jaxllm

QUESTIONS = ("What is {} plus {}?", "Add {} and {}.", "How much is {} + {}?", "Tell me the sum of {} and {}.")
Sum = tuple[str, int]


def question(rng: random.Random) -> Sum:
    a, b = rng.randrange(2, 60), rng.randrange(2, 60)
    return rng.choice(QUESTIONS).format(a, b), a + b


def rates(model: jaxllm.LanguageModel, sums: list[Sum]) -> str:
    """How many answers have the format, and how many are right."""
    answers = model.generate([[{"role": "user", "content": text}] for text, _ in sums], 24, temperature=0.0)
    found = [re.fullmatch(r'\s*\{"answer": (\d+)\}\s*', answer.text) for answer in answers]
    right = sum(bool(m) and int(m[1]) == total for m, (_, total) in zip(found, sums, strict=True))
    return f"{sum(map(bool, found))} of {len(sums)} in the format, {right} right"


def main() -> None:
    rng = random.Random(0)
    taught = [question(rng) for _ in range(200)]
    unseen = [s for s in (question(rng) for _ in range(100)) if s not in taught][:32]

    def taught_as(text: str, total: int) -> dict[str, list[dict[str, str]]]:
        answer = json.dumps({"answer": total})
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}

    data = [taught_as(*each) for each in taught]
    model = jaxllm.load("demo", max_seq_len=256, progress=False)
    print("before:", rates(model, unseen))
    begun = time.perf_counter()
    options = {"batch": 8, "length": 64, "rank": 8, "learning_rate": 1e-3, "held_out": 10}
    done = jaxllm.finetune(model, data, progress=False, **options)
    print(f"{len(done.losses)} steps in {time.perf_counter() - begun:.0f} s, loss {done.evaluations}")
    print("after:", rates(model, unseen))


if __name__ == "__main__":
    main()
