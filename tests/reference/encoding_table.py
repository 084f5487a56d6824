"""Prints the table of types in docs/quantizing.md; writes tests/golden/encoding_table.json for the pictures of it.

The demo's matrices, encoded once more in each type: bits per weight, seconds to encode them all, and the perplexity of
a text that the importance matrix does not come from, without it and with it. Both are prose that every Python has; some
15 minutes on two cores:

    python tests/reference/encoding_table.py
"""

import json
import time
from pathlib import Path

import jaxllm
from jaxllm.calibrate import calibrate
from jaxllm.encodings import ENCODINGS
from jaxllm.perplexity import perplexity

GOLDEN = Path(__file__).parents[1] / "golden" / "encoding_table.json"
TYPES = """q8_0 q6_k q5_k q4_k q3_k q2_k q4_0 q4_1 q5_0 q5_1 iq4_nl iq4_xs iq3_s iq3_xxs iq2_s iq2_xs iq2_xxs iq1_m
    hqq8 hqq4 hqq3 hqq2 afq8 afq6 afq4 afq3 fp8 fp8_block f8q8 mxfp8 mxfp4 nvfp4 nf4 fp4 int8 int4"""
HELPED = {name for name, type in ENCODINGS.items() if type.uses_importance}


def texts() -> tuple[str, str]:
    """What is calibrated on, and what is measured."""
    from pydoc_data.topics import topics

    prose = "\n\n".join(topics[name] for name in sorted(topics))
    return prose[:100_000], prose[300_000:310_000]


def main() -> None:
    calibration, measured = texts()
    options = {"dtype": "float32", "weights": "packed", "progress": False}
    model = jaxllm.load("demo", **options)
    begun = time.perf_counter()
    model.logits([[1, 2, 3]])
    known = calibrate(model, calibration)
    print(f"calibrated in {time.perf_counter() - begun:.0f} s", flush=True)
    plain = perplexity(model, measured)
    rows = []
    for type in TYPES.split():
        row = {"type": type}
        for key, imatrix in (("plain", None), ("helped", known)):
            if (imatrix is None and ENCODINGS[type].needs_importance) or (imatrix is not None and type not in HELPED):
                continue
            jaxllm.load("demo", quantize=type, imatrix=imatrix, **options)  # compiles
            begun = time.perf_counter()
            model = jaxllm.load("demo", quantize=type, imatrix=imatrix, **options)
            matrices = [p.encoded for p in model.placed if len(p.declaration.shape) > 1]
            row["bits"] = round(8 * sum(w.nbytes for w in matrices) / sum(w.shape[0] * w.shape[1] for w in matrices), 2)
            row[f"{key} seconds"] = round(time.perf_counter() - begun, 1)
            row[key] = round(perplexity(model, measured), 2)
        rows.append(row)
        print(row, flush=True)
    GOLDEN.write_text(json.dumps({"file": round(plain, 2), "rows": rows}, indent=1) + "\n")
    print(table(rows, plain))


def table(rows: list[dict], plain: float) -> str:
    lines = ["| type | bits per weight | seconds | perplexity | with an importance matrix |", "|---|---|---|---|---|"]
    lines.append(f"| as in the file (Q4_1, Q8_0) | 5.74 | | {plain:.2f} | |")
    for row in sorted(rows, key=lambda row: -row["bits"]):
        seconds = row.get("plain seconds", row.get("helped seconds"))
        cells = (f"{row[key]:.2f}" if key in row else "" for key in ("plain", "helped"))
        lines.append(f"| {row['type']} | {row['bits']:.2f} | {seconds} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
