"""Three garbled documents in a corpus: the stock Trainer is set back, ours names them, goes back, and goes on without them.

python scripts/incident_demo.py                             # half a minute on one CPU thread, no download
python scripts/incident_demo.py --output_dir runs/mine

A small Llama learns bytes of a made-up text, document after document as they stand in the file. Three documents of it are what a scan gives
that was read wrongly: letters without sense. All runs have the same weights to begin with, the same settings and number of steps:

    clean   the stock Trainer on the corpus without them
    stock   the stock Trainer on the corpus
    ours    AdaptiveClipTrainer with `on_trouble="rewind"` on the corpus

Writes `incident_demo.json` and `incident_demo.png`; the run of ours keeps its ledger, its incidents and `skip_batches.json` in `ours/`.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipTrainer
from hf_adaclip.incidents.skip_list import read_skip_list

BLOCK: Final = 64  # bytes in a row
BATCH: Final = 8
STEPS: Final = 260
BEFORE: Final = 200  # steps before the first of the garbled documents
GARBLED: Final = 3
ROWS_OF_ONE: Final = 32
HELD_OUT: Final = 160
RATE: Final = 1.5e-2
# Clipping alone, so that nothing but going back makes the difference.
SETTINGS: Final = AdaptiveClipConfig.resolve("guard").replace(
    on_trouble="rewind",
    snapshot_steps=5,
    divergence_spreads=4.0,
    divergence_steps=3,
    incident_spike=4.0,
)

_WHO: Final = ("the cat", "a dog", "my sister", "the old man", "our teacher", "the queen", "a sailor", "the baker")
_DOES: Final = ("sees", "likes", "finds", "carries", "paints", "wants", "sells", "hides")
_WHAT: Final = (
    *("a red boat", "the small house", "an apple", "two books"),
    *("the blue door", "a warm coat", "the long road", "some bread"),
)
_WHERE: Final = (
    *("in the garden", "near the river", "at night", "after lunch"),
    *("by the sea", "on the hill", "before dawn", "in town"),
)


class Corpus(NamedTuple):
    """Rows of `BLOCK` bytes.

    Attributes:
        rows: In the order of the file.
        documents: Which garbled document a row is of, counted from 0; None for all others.
    """

    rows: list[bytes]
    documents: list[int | None]


class Bytes:
    """Decodes token ids that are bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("latin-1")


def make_text(rows: int) -> list[bytes]:
    """Sentences of a small grammar, three to a document."""
    draw = random.Random(0)
    found: list[bytes] = []
    while len(found) < rows:
        sentences = [" ".join(map(draw.choice, (_WHO, _DOES, _WHAT, _WHERE))) + "." for _ in range(3)]
        found += _blocks(" ".join(sentences))
    return found[:rows]


def _blocks(text: str) -> list[bytes]:
    return [text[i : i + BLOCK].encode() for i in range(0, len(text) - BLOCK + 1, BLOCK)]


def make_corpora() -> tuple[Corpus, Corpus, list[bytes]]:
    """The clean corpus, the one with garbled documents, and text that is held out."""
    need = STEPS * BATCH
    text = make_text(need + HELD_OUT)
    draw = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz ."
    garbled = [
        (row, document)
        for document in range(GARBLED)
        for row in _blocks("".join(draw.choice(letters) for _ in range(ROWS_OF_ONE * BLOCK)))
    ]
    at = BEFORE * BATCH
    rows = [*text[:at], *(row for row, _ in garbled), *text[at:need]]
    owners: list[int | None] = [*[None] * at, *(document for _, document in garbled), *[None] * (need - at)]
    return Corpus(text[:need], [None] * need), Corpus(rows[:need], owners[:need]), text[need:]


def _dataset(rows: list[bytes]) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(row), "labels": list(row)} for row in rows]


def train(kind: Any, corpus: Corpus, held_out: list[bytes], folder: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    """One run: the Trainer, and its losses."""
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=BLOCK,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=32,
        learning_rate=RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = kind(
        model=model, args=arguments, train_dataset=_dataset(corpus.rows), eval_dataset=_dataset(held_out), **more
    )
    trainer.remove_callback(PrinterCallback)
    begun = time.monotonic()
    trainer.train()
    losses = [round(float(row["loss"]), 4) for row in trainer.state.log_history if "loss" in row]
    return trainer, {
        "eval_loss": round(float(trainer.evaluate()["eval_loss"]), 4),
        "seconds": round(time.monotonic() - begun, 1),
        "losses": losses,
    }


def named(trainer: Any, corpus: Corpus) -> list[dict[str, Any]]:
    """What the incidents of a run say of the garbled documents."""
    found: dict[int, dict[str, Any]] = {}
    for incident in trainer.clipper.incidents:
        [indices] = incident.facts["batch"]["indices"]
        with (incident.folder / incident.facts["batch"]["text"]).open(encoding="utf-8") as lines:
            texts = {e["sample"]: e["text"] for e in map(json.loads, lines) if e["field"] == "input_ids"}
        for place, index in enumerate(indices):
            document = corpus.documents[index]
            if document is not None:
                facts = found.setdefault(document, {"document": document, "steps": [], "samples": [], "text": ""})
                facts["samples"].append(index)
                facts["text"] = facts["text"] or texts[place]
                if incident.step not in facts["steps"]:
                    facts["steps"].append(incident.step)
    return [found[document] for document in sorted(found)]


def run(output: Path) -> dict[str, Any]:
    """All three runs; returns what `incident_demo.json` holds."""
    clean, spoilt, held_out = make_corpora()
    arms = {
        "clean": train(Trainer, clean, held_out, output / "clean")[1],
        "stock": train(Trainer, spoilt, held_out, output / "stock")[1],
    }
    trainer, arms["ours"] = train(
        AdaptiveClipTrainer, spoilt, held_out, output / "ours", clip=SETTINGS, processing_class=Bytes()
    )
    left_out = sorted(read_skip_list(output / "ours").steps)
    return {
        "steps": STEPS,
        "learning_rate": RATE,
        "max_grad_norm": 1.0,
        "garbled": {
            "documents": GARBLED,
            "samples": [i for i, document in enumerate(spoilt.documents) if document is not None],
            "steps": [BEFORE, BEFORE + GARBLED * ROWS_OF_ONE // BATCH - 1],
        },
        "arms": arms,
        "named": named(trainer, spoilt),
        "rewinds": [rewound._asdict() for rewound in trainer.clipper.rewinder.history],
        "left_out": left_out,
        "stock_over_clean": round(arms["stock"]["eval_loss"] / arms["clean"]["eval_loss"], 3),
        "ours_over_clean": round(arms["ours"]["eval_loss"] / arms["clean"]["eval_loss"], 3),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """The three losses; behind them where the garbled documents stand."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    first, last = result["garbled"]["steps"]
    axes.axvspan(first, last + 1, color="0.9", label="garbled documents")
    for name, colour in (("stock", "tab:red"), ("ours", "tab:blue"), ("clean", "0.3")):
        arm = result["arms"][name]
        axes.plot(arm["losses"], color=colour, linewidth=1.2, label=f"{name} (held out: {arm['eval_loss']:.2f})")
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title="Three garbled documents in a corpus")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/incident_demo"), help="Folder to write to.")
    output = parser.parse_args(argv).output_dir
    if (output / "ours").exists():
        parser.error(f"--output_dir must be a new folder, but {output} holds the runs of a demo.")
    torch.set_num_threads(1)
    result = run(output)
    (output / "incident_demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, output / "incident_demo.png")
    losses = {name: arm["eval_loss"] for name, arm in result["arms"].items()}
    print(f"Loss on held-out text: {losses['clean']} clean, {losses['stock']} stock, {losses['ours']} ours.")
    for document in result["named"]:
        print(f"Garbled document {document['document']}: steps {document['steps']}, {document['text'][:40]!r}...")
    left_out = result["left_out"]
    what = f"steps {left_out[0]}-{left_out[-1]} left out" if left_out else "nothing left out"
    print(f"Went back {len(result['rewinds'])} time(s); {what}.")
    return result


if __name__ == "__main__":
    main()
