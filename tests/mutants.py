"""Shows that the suite notices what must never happen: each mutant is a mistake, put into a copy of the tree.

    python tests/mutants.py            # all of them; exit code 1 if one survives
    python tests/mutants.py cache      # those whose name has "cache" in it

A mutant survives if the tests that are named for it pass. It does not fit any more if what it replaces is not found
exactly once in its file; then it has to be adapted, or the mistake cannot be made there any longer.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """A mistake: in `file`, `new` instead of `old`. `tests` are arguments of pytest, of which one must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


GENERATION = "tests/test_generation.py"
FUZZ = ("tests/test_fuzz.py", "--full", "-k", "damage_is")  # the harness, for a minute
MUTANTS = [
    Mutant(
        "the same random numbers at every step",
        "jaxllm/drawing.py",
        "at.drawn[rows] + j, vocab)",
        "0 * at.drawn[rows] + j, vocab)",
        (GENERATION, "-k", "new_key"),
    ),
    Mutant(
        "a conversation's cache is reused without comparing tokens",
        "jaxllm/engine/slots.py",
        "return min(at, end)",
        "return end",
        (GENERATION, "-k", "keeps_what_is_equal"),
    ),
    Mutant(
        "a conversation's cache is never reused",
        "jaxllm/engine/slots.py",
        "return same if can_rewind(slot.length, same) else 0",
        "return 0",
        (GENERATION, "-k", "only_what_is_new"),
    ),
    Mutant(
        "a ring is taken back further than it remembers",
        "jaxllm/layers/cache.py",
        "length - to <= size - window",
        "True",
        ("tests/test_cache.py", "-k", "goes_back"),
    ),
    Mutant(
        "router logits in the activations' dtype",
        "jaxllm/layers/experts.py",
        "self.route(self.gate(tokens, jnp.float32), bias)",
        "self.route(self.gate(tokens).astype(jnp.float32), bias)",
        ("tests/test_experts.py", "-k", "router_logits"),
    ),
    Mutant(
        "matrices are dequantized whether or not they fit into memory",
        "jaxllm/loading.py",
        "on_cpu and size < psutil.virtual_memory().available / 2",
        "on_cpu",
        (GENERATION, "-k", "half_of_the_memory"),
    ),
    Mutant(
        "the cache is not donated",
        "jaxllm/programs.py",
        "out_shardings=shardings, donate_argnums=donated)",
        "out_shardings=shardings)",
        (GENERATION, "-k", "donated"),
    ),
    Mutant(
        "a token reads all experts",
        "jaxllm/bench.py",
        "nbytes = nbytes * moe.num_experts_per_tok // p.declaration.shape[0]",
        "pass",
        (GENERATION, "-k", "routed_to"),
    ),
    Mutant(
        "a token reads the embedding table",
        "jaxllm/bench.py",
        'p.name == "embed_tokens.weight" and not model.config.tie_word_embeddings',
        "False",
        (GENERATION, "-k", "token_reads"),
    ),
    Mutant(
        "the table of formats says that AWQ is looked up on fewer devices",
        "docs/formats.md",
        "| AWQ | 1, 2, 4, 8 |",
        "| AWQ | 1, 2, 4 |",
        ("tests/test_readme.py", "-k", "AWQ"),
    ),
    Mutant(
        "a norm over all heads counts heads of zeros",
        "jaxllm/layers/norm.py",
        "head_dim * int((placed >= 0).sum())",
        "head_dim * len(placed)",
        ("tests/test_hf.py", "-k", "olmo2 and logits"),
    ),
    Mutant(
        "layers with a window rotate as the others do",
        "jaxllm/models/gemma/model.py",
        "c.rope if window is None else c.local_rope",
        "c.rope",
        ("tests/test_hf.py", "-k", "gemma3 and logits"),
    ),
    Mutant(
        "norms are written as another kind of file had them",
        "jaxllm/models/gemma/names.py",
        "config.norm_offset - 1.0",
        "0.0",
        ("tests/test_exporting.py", "-k", "gemma3"),
    ),
    Mutant(
        "a sparse gate's statistics count zeros that pad it",
        "jaxllm/models/gemma3n/model.py",
        "keepdims=True) / self.size for y",
        "keepdims=True) / y.shape[-1] for y",
        ("tests/test_gemma3n.py", "-k", "meshes"),
    ),
    Mutant(
        "a layer whose cache others read keeps only its own window",
        "jaxllm/models/gemma3n/model.py",
        "            shared=i in map(c.keys_from, range(len(c.layers))),\n",
        "",
        ("tests/test_gemma3n.py", "-k", "chunks"),
    ),
    Mutant(
        "a slice keeps the per-layer embeddings of the first layers",
        "jaxllm/models/gemma3n/matformer.py",
        "for i in kept])",
        "for i in range(len(kept))])",
        ("tests/test_gemma3n.py", "-k", "transformers_slice"),
    ),
    Mutant(
        "sums over devices in the activations' dtype",
        "jaxllm/parallel.py",
        "ys = jax.lax.psum(ys, in_axis)",
        "ys = jax.lax.psum([y.astype(jnp.bfloat16) for y in ys], in_axis)",
        ("tests/test_quantized_layers.py", "-k", "multiplies_as and gptq-4"),
    ),
    Mutant(
        "RMSNorm in the activations' dtype",
        "kernels/norm.py",
        "wide = x.astype(jnp.float32)",
        "wide = x.astype(jnp.bfloat16).astype(jnp.float32)",
        ("tests/test_hf.py", "-k", "logits and qwen2-"),
    ),
    Mutant(
        "a bias is added on every device",
        "jaxllm/parallel.py",
        "first = jax.lax.axis_index(TP) == 0",
        "first = jax.lax.axis_index(TP) >= 0",
        ("tests/test_gpt_oss.py", "-k", "logits_and_tokens"),
    ),
    Mutant(
        "g_idx is off by one",
        "jaxllm/checkpoint/integer_schemes.py",
        "in_groups=(index + 1).astype(np.int32)",
        "in_groups=np.maximum(index, 1).astype(np.int32)",
        ("tests/test_quantized.py", "-k", "bit_for_bit and gptq"),
    ),
    Mutant(
        "a sliding window is one position too wide",
        "jaxllm/layers/attention.py",
        "self.score_cap, self.sliding_window = score_cap, sliding_window",
        "self.score_cap, self.sliding_window = score_cap, sliding_window and sliding_window + 1",
        ("tests/test_hf.py", "-k", "logits and mistral"),
    ),
    Mutant(
        "chat templates outside their sandbox",
        "jaxllm/confined_process.py",
        "from jinja2.sandbox import ImmutableSandboxedEnvironment",
        "from jinja2 import Environment as ImmutableSandboxedEnvironment",
        ("tests/test_tokenizer.py", "-k", "outside"),
    ),
    Mutant(
        "lengths in a file are believed",
        "jaxllm/checkpoint/gguf.py",
        "self._advance(nbytes)\n        taken = self.opened.read(nbytes)\n        if len(taken) < nbytes:",
        "self.offset += nbytes\n        taken = self.opened.read(nbytes)\n        if nbytes < 0:",
        FUZZ,
    ),
    Mutant(
        "a link leads out of its checkpoint",
        "jaxllm/files.py",
        "if not (real.is_relative_to(folder) or real.is_relative_to(blobs)):",
        "if False:",
        FUZZ,
    ),
    Mutant(
        "a chat template has all the time",
        "jaxllm/confined_process.py",
        "resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))",
        "del limit",
        FUZZ,
    ),
    Mutant(
        "a request's answers are not counted before they are made",
        "jaxllm/serving/app.py",
        "        self._worker.check_room(body.answers)\n",
        "",
        ("tests/test_serving_refusals.py", "-k", "counted_before"),
    ),
    Mutant(
        "a client may take for ever over its headers",
        "jaxllm/serving/connection.py",
        '        self._set("headers", HEADERS)\n',
        "",
        ("tests/test_serving_attacks.py", "-k", "holds_no_connection"),
    ),
    Mutant(
        "where connections are many, nobody makes room",
        "jaxllm/serving/connection.py",
        "if len(self.connections) > MOST:",
        "if False:",
        ("tests/test_serving_attacks.py", "-k", "makes_room"),
    ),
    Mutant(
        "a grammar that explodes is compiled without a limit of time",
        "jaxllm/structured_trial.py",
        "    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))\n",
        "",
        ("tests/test_structured.py", "-k", "cannot_be_followed", "-x"),
    ),
    Mutant(
        "padding of the vocabulary may be drawn where a grammar binds",
        "jaxllm/structured.py",
        "out[len(words) :] = 0",
        "pass",
        ("tests/test_structured.py", "-k", "any_text", "-x"),
    ),
    Mutant(
        "text shown before it is known not to be a tag",
        "jaxllm/serving/tags.py",
        " - _overlap(held, self._tag)",
        "",
        ("tests/test_answer_parts.py", "-k", "do_not_depend"),
    ),
    Mutant(
        "blocks of keys before a window are read",
        "kernels/flash/blocks.py",
        "seen &= keys[:, None] > low - sliding_window",
        "pass",
        ("tests/test_kernels_pallas.py", "-k", "nobody"),
    ),
]


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass although the mistake is there."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info"), symlinks=True)
        text = (tree / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.name}: {mutant.old!r} is {text.count(mutant.old)} times in {mutant.file}")
        (tree / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        if not (tree / "jaxllm" / "kernels").exists():  # the copy's own, not those that are installed
            (tree / "jaxllm" / "kernels").symlink_to("../kernels")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
        done = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True)
        if done.returncode not in (0, 1) or not done.stdout:
            said = (done.stdout or done.stderr).decode()[-2000:]
            raise SystemExit(f"{mutant.name}: pytest ended with {done.returncode}\n{said}")
        return done.returncode == 0


def main() -> None:
    wanted = [m for m in MUTANTS if all(word in m.name for word in sys.argv[1:])]
    alive = []
    for mutant in wanted:
        alive += [mutant.name] if survives(mutant) else []
        print(f"{'SURVIVES' if mutant.name in alive else 'caught'}: {mutant.name}", flush=True)
    sys.exit(f"{len(alive)} of {len(wanted)} mutants survive" if alive else 0)


if __name__ == "__main__":
    main()
