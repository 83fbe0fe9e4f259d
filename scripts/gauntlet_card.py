"""Write the gauntlet's card from its figures: `verdicts.json`, and `before.json` of the rules as they were until 2026-11-28.

hf-adaclip gauntlet --json > model_cards/gauntlet/verdicts.json
hf-adaclip gauntlet --plot model_cards/gauntlet/gauntlet.png
python -m scripts.gauntlet_card
"""

import json

from hf_adaclip.audit.gauntlet import percent, spike, steps
from hf_adaclip.audit.trials import TRIALS
from scripts.readme_section import ROOT

FOLDER = ROOT / "model_cards" / "gauntlet"

HEAD = """# The gauntlet: norms whose story is known

Every rule is run over the same made-up series of gradient norms (`hf-adaclip gauntlet`, {seeds} seeds, {noise} noise). No model is trained
here. Written by `python -m scripts.gauntlet_card`; the numbers are in [verdicts.json](verdicts.json).

## Calm, spikes, a lasting rise, a decay

Norms are 0.3 with 15 % spread; the static threshold is 1. A spike is 100 times the norm. `adaptive` is held to: at most 0.1 % altered when
calm, spikes applied at no more than 1.35 times the level, a threefold rise accepted within 10 steps.

| rule | altered when calm | first spike | second spike | 3x rise accepted | altered in decay |
| --- | --- | --- | --- | --- | --- |
"""

MIDDLE = """
![the story of each rule](gauntlet.png)

## Streams that real runs have

`before` is `adaptive` as it was. The bar is that of `adaptive`. The other rules are kept as published, with the faults that this shows:
most follow growth without end, and most cut a second source of data for good.

"""

FOOT = """
`before` for the other rules: norms of 1e-8 and 1e-40 were altered in 100 % of steps by all but `static` and `zscore`, and a constant norm
by `percentile` and `mean_sd` in 100 % and by `quantile` in 0.9 %. Torch's 1e-6 was added to norms that are not of order 1.
"""


def card() -> str:
    """The card as Markdown."""
    recorded = json.loads((FOLDER / "verdicts.json").read_text(encoding="utf-8"))
    before = json.loads((FOLDER / "before.json").read_text(encoding="utf-8"))
    verdicts = recorded["verdicts"]
    lines = [HEAD.format(seeds=recorded["seeds"], noise=recorded["noise"]).rstrip("\n")]
    for name, v in verdicts.items():
        rise, calm, decay = float(v["accepted_after"]), percent(v["altered_calm"]), percent(v["altered_decay"])
        first, second = spike(v["first_spike"]), spike(v["second_spike"])
        lines.append(
            f"| `{name}` | {calm} | {first} | {second} | {'at once' if rise < 1 else steps(rise)} | {decay} |"
        )
    lines += [MIDDLE.rstrip("\n"), ""]
    others = [name for name in verdicts if name != "adaptive"]
    lines.append("| stream | figure | bar | before | `adaptive` | " + " | ".join(f"`{n}`" for n in others) + " |")
    lines.append("| --- " * (5 + len(others)) + "|")
    for trial in TRIALS:
        found = [before["adaptive"], verdicts["adaptive"]["streams"], *(verdicts[n]["streams"] for n in others)]
        cells = " | ".join(f"{float(figures[trial.name]):.3g}" for figures in found)
        lines.append(f"| {trial.name} | {trial.figure} | {trial.bar:g} | {cells} |")
    return "\n".join(lines) + "\n" + FOOT


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(card(), encoding="utf-8")
