"""Put what `bench.step` and `bench.trainer` measured into the card of speed.

    python -m scripts.bench.trainer --json model_cards/speed/trainer_cpu.json
    python -m scripts.bench.step --dtypes float32 --optimizers "fused AdamW" --rounds 15 --json model_cards/speed/cpu_fused_float32.json
    python -m scripts.docs.speed_table

A test holds the card equal to the files.
"""

import json

from scripts.docs.readme_section import ROOT, write_section

SPEED = ROOT / "model_cards" / "speed"
RESULTS = SPEED / "cpu_fused_float32.json"
TRAINER = SPEED / "trainer_cpu.json"
CARD = SPEED / "README.md"
KIND = "fused AdamW"


def speed_table() -> str:
    """Marginal costs of every way, a column for each list of shapes, and how long a whole training took."""
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
    row = json.loads(TRAINER.read_text(encoding="utf-8"))["rows"]["adaptive"]
    low, high = row["quartiles"]
    lines += [
        "",
        f"A whole `Trainer.train()` of a ViT-tiny took {row['ratio']:.3f} of the stock one's time "
        f"(quartiles {low:.3f} to {high:.3f}, {len(row['ratios'])} pairs, [file]({TRAINER.name})).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    write_section("speed", speed_table(), CARD)
