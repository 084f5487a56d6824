"""Tokens per second while several answers are computed at a time in one process: one line of JSON.

    python batch_speed.py jaxllm --model demo --batch 8
    python batch_speed.py llama.cpp --model FILE.gguf --batch 8     # with a Python that has llama-cpp-python

Each sequence has a random prompt of its own. Decoding is measured over steps in which every sequence gets a token; the
median of some rounds, after one that warms up.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable


def jaxllm_round(model: str, batch: int, prefill: int, decode: int) -> Callable[[list[list[int]]], float]:
    import jaxllm
    from jaxllm.engine.engine import Engine

    loaded = jaxllm.load(model, progress=False)

    def measure(prompts: list[list[int]]) -> float:
        engine = Engine(loaded, batch, prefill + 2 * decode)
        answers = [engine.add(prompt, 2 * decode - 1, eos_ids=(), temperature=0.0) for prompt in prompts]
        while not all(answer.completion.tokens for answer in answers):
            engine.step()
        before, begun = sum(len(answer.completion.tokens) for answer in answers), time.perf_counter()
        while sum(len(answer.completion.tokens) for answer in answers) < before + batch * decode:
            engine.step()
        got = sum(len(answer.completion.tokens) for answer in answers) - before
        return got / (time.perf_counter() - begun)

    return measure


def llama_cpp_round(model: str, batch: int, prefill: int, decode: int) -> Callable[[list[list[int]]], float]:
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_seq_max = batch * (prefill + decode + 8), batch
    options.n_batch = options.n_ubatch = 512
    options.n_threads = options.n_threads_batch = os.cpu_count()
    context = llama_cpp.llama_init_from_model(loaded, options)
    tokens = llama_cpp.llama_batch_init(max(prefill, batch), 0, 1)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))

    def run(rows: list[tuple[int, int, int, bool]]) -> None:
        """Token, position, sequence, whether its logits are wanted, of each."""
        tokens.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            tokens.token[i], tokens.pos[i], tokens.logits[i] = token, position, wanted
            tokens.n_seq_id[i], tokens.seq_id[i][0] = 1, sequence
        if llama_cpp.llama_decode(context, tokens):
            raise RuntimeError("llama_decode failed")

    def best(i: int) -> int:
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocabulary,)).argmax())

    def measure(prompts: list[list[int]]) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        newest = []
        for sequence, prompt in enumerate(prompts):
            run([(token, i, sequence, i == prefill - 1) for i, token in enumerate(prompt)])
            newest.append(best(prefill - 1))
        begun = time.perf_counter()
        for step in range(decode):
            run([(token, prefill + step, sequence, True) for sequence, token in enumerate(newest)])
            newest = [best(i) for i in range(batch)]
        return batch * decode / (time.perf_counter() - begun)

    return measure


ENGINES = {"jaxllm": jaxllm_round, "llama.cpp": llama_cpp_round}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("engine", choices=ENGINES)
    p.add_argument("--model", required=True)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--prefill", type=int, default=32)
    p.add_argument("--decode", type=int, default=48)
    p.add_argument("--rounds", type=int, default=4)
    args = p.parse_args()
    measure, rng = ENGINES[args.engine](args.model, args.batch, args.prefill, args.decode), random.Random(0)
    rates = [
        measure([[rng.randrange(1000, 40000) for _ in range(args.prefill)] for _ in range(args.batch)])
        for _ in range(args.rounds + 1)
    ][1:]
    print(json.dumps({"engine": args.engine, "batch": args.batch, "tok_s": round(statistics.median(rates), 1)}))


if __name__ == "__main__":
    main()
