"""Put the marginal costs that `bench_step` measured into the README.

    python -m scripts.bench_step --dtypes float32 --optimizers "fused AdamW" --rounds 15 --json model_cards/speed/cpu_fused_float32.json
    python -m scripts.speed_table

A test holds the README equal to the file.
"""

import json

from scripts.readme_section import ROOT, write_section

RESULTS = ROOT / "model_cards" / "speed" / "cpu_fused_float32.json"
KIND = "fused AdamW"


def speed_table() -> str:
    """Marginal costs of every way, a column for each list of shapes."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    chosen = [r for r in results if r["optimizer"] == KIND and r["dtype"] == "float32"]
    head = [f"{r['shape']} ({r['parameters'] / 1e6:.0f} M, {r['tensors']} tensors)" for r in chosen]
    lines = ["| marginal cost | " + " | ".join(head) + " |", "| --- |" + " --- |" * len(head)]
    for name in chosen[0]["rows"]:
        if name == "step alone":
            continue
        cells = [r["rows"][name] for r in chosen]
        lines.append(
            f"| {name} | " + " | ".join(f"{c['marginal']:.2f} ± {c['marginal_spread']:.2f}" for c in cells) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    write_section("speed", speed_table())
