# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Teach a packed model an answer format
#
# Fine-tuning with LoRA: small matrices beside the large ones are trained, and the large ones stay what they are, here
# 4-bit blocks. The demo model is to answer questions about capitals in JSON. It sees 40 examples, and is tried on
# countries that it has not seen. (On two cores this takes some minutes.)

# %%
import json
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt

import jaxllm

CAPITALS = """France Paris, Spain Madrid, Italy Rome, Germany Berlin, Austria Vienna, Greece Athens, Portugal Lisbon,
Ireland Dublin, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Poland Warsaw,
Hungary Budapest, Belgium Brussels, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Nigeria Abuja, Ghana
Accra, Morocco Rabat, Tunisia Tunis, China Beijing, Japan Tokyo, Thailand Bangkok, Vietnam Hanoi,
Indonesia Jakarta, Nepal Kathmandu, Iran Tehran, Iraq Baghdad, Canada Ottawa, Cuba Havana, Peru Lima,
Chile Santiago, Ecuador Quito, Bolivia Sucre, Uruguay Montevideo, Australia Canberra, Bulgaria Sofia,
Romania Bucharest, Russia Moscow, Ukraine Kyiv, Syria Damascus, Lebanon Beirut, Jordan Amman, Venezuela
Caracas, Colombia Bogota, Cyprus Nicosia"""
pairs = [pair.split() for pair in CAPITALS.split(",")]


def example(country, capital):
    question = {"role": "user", "content": f"What is the capital of {country}?"}
    answer = {"role": "assistant", "content": json.dumps({"country": country, "capital": capital})}
    return {"messages": [question, answer]}


learned, unseen = pairs[:40], pairs[40:]
model = jaxllm.load("demo", max_seq_len=256, dtype="float32", progress=False)

# %% [markdown]
# ## Before


# %%
def tried(model):
    """How many answers are JSON with the right keys, and how many name the right capital, in whatever form."""
    formed = right = 0
    for country, capital in unseen:
        text = str(model.chat(example(country, capital)["messages"][:1], max_new_tokens=24))
        try:
            said = json.loads(text)
        except json.JSONDecodeError:
            said = None
        formed += isinstance(said, dict) and said.keys() == {"country", "capital"}
        right += capital in text
    print(f"{formed} of {len(unseen)} answers have the format, {right} name the right capital. The last one: {text}")
    return formed


assert tried(model) == 0

# %% [markdown]
# ## Training
#
# Loss counts on answers only: what the chat template puts around them, and questions, are read and not learned.

# %%
folder = Path(mkdtemp()) / "capitals"
done = jaxllm.finetune(
    model,
    [example(*pair) for pair in learned],
    folder,
    evaluation=[example(*pair) for pair in unseen],
    rank=8,
    steps=24,
    batch=4,
    learning_rate=4e-4,
    evaluate_every=6,
    progress=False,
)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(range(1, len(done.losses) + 1), done.losses, label="40 countries that are learned")
axis.plot(*zip(*done.evaluations, strict=True), "o-", label=f"{len(unseen)} that are not")
axis.set(xlabel="step", ylabel="loss")
axis.legend()
plt.show()

# %% [markdown]
# ## After
#
# The adapter is attached to the model. It answers in the format now; which capitals it knows is another matter, and
# forty examples do not change that. Taken off, the model is what it was.

# %%
assert tried(model) > 0
print(model.adapters)

# %% [markdown]
# ## Kept
#
# What was written is what PEFT writes: it fits the same model in any other file too, whatever its types.

# %%
for file in sorted(folder.iterdir()):
    print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB")
again = jaxllm.load("demo", max_seq_len=256, dtype="float32", adapters=[folder], progress=False)
print(again.chat(example("France", "Paris")["messages"][:1], max_new_tokens=24))
