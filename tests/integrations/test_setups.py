"""What fine-tuners put around a Trainer: accumulation, retries, searches, adapters, TRL, precision. Each by a real run."""

import json
import math

import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import BestRun

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipMixin, AdaptiveClipTrainer, UnsupportedSetupError
from hf_adaclip.audit import verify_ledger
from tests.integrations.trainers import STEPS, arguments, build, dataset, model, run, stock, weights

pytestmark = pytest.mark.slow

CONFIG = AdaptiveClipConfig(warmup_observations=10, ceiling_share=1.0)


def steps_of(folder):
    lines = [json.loads(line) for line in (folder / "clip_ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def without_dropout(trainer):
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    return trainer


@pytest.mark.parametrize(
    ("changes", "close"),
    # The agreement goes by signs, and rounding tips some that are nearly 0.
    [({}, 2e-4), ({"agreement": False}, 1e-5)],
)
def test_eight_micro_batches_of_one_are_one_batch_of_eight(tmp_path, changes, close):
    shapes = (("big", 8, 1), ("small", 1, 8))

    def accumulating(name, batch, accumulation, **changes):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        return arguments(tmp_path / name, max_steps=25, **sizes, **changes)

    first = []
    for shape in shapes:
        trainer = without_dropout(stock(tmp_path, args=accumulating(*shape, logging_steps=1)))
        run(trainer)
        first.append(trainer.state.log_history[0]["grad_norm"])
    if first[1] != pytest.approx(first[0], rel=1e-3):
        pytest.skip(f"the stock Trainer of transformers {transformers.__version__} divides twice: norms {first}")

    for name, batch, accumulation in shapes:
        args = accumulating(name, batch, accumulation)
        trainer = without_dropout(
            build(AdaptiveClipTrainer, tmp_path / name, args=args, clip=CONFIG.replace(**changes))
        )
        run(trainer)
        assert trainer.clipper.step == 25  # one decision per optimizer step
    big, small = steps_of(tmp_path / "big"), steps_of(tmp_path / "small")

    assert [r["norm"] for r in small] == pytest.approx([r["norm"] for r in big], rel=1e-3)
    assert [r["threshold"] for r in small] == pytest.approx([r["threshold"] for r in big], rel=1e-3)
    assert [r["loss"] for r in small] == pytest.approx([r["loss"] for r in big], rel=close)


def test_a_retry_with_a_smaller_batch_starts_afresh(tmp_path):
    class OutOfMemory(AdaptiveClipTrainer):
        def training_step(self, *args, **kwargs):
            if self._train_batch_size > 8 and self.state.global_step == 5:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    args = arguments(tmp_path, auto_find_batch_size=True)
    trainer = build(OutOfMemory, tmp_path, args=args, clip=CONFIG)
    run(trainer)

    assert trainer._train_batch_size <= 8
    assert trainer.clipper.step == trainer.clipper.statistics.steps == STEPS
    assert float(trainer.clipper.state["count"]) == STEPS
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert report.ok, report.findings
    assert report.segments > 1  # one for every size that was tried
    assert report.steps == STEPS + 5 * (report.segments - 1)


def test_every_trial_of_a_search_starts_afresh_under_its_own_settings(tmp_path):
    pytest.importorskip("optuna")
    trainer = AdaptiveClipTrainer(
        model_init=lambda trial: model(),
        args=arguments(tmp_path, max_steps=12, eval_strategy="steps", eval_steps=12),
        train_dataset=dataset(),
        eval_dataset=dataset().select(range(32)),
        clip=CONFIG,
    )
    seen = []

    class Watch(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            seen.append((args.max_grad_norm, trainer.clipper.step, trainer.clipper.config.static_threshold))

    trainer.add_callback(Watch())
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"max_grad_norm": trial.suggest_categorical("max_grad_norm", [0.25, 0.5])},
        n_trials=3,
        backend="optuna",
        direction="minimize",
    )

    assert isinstance(best, BestRun)
    assert isinstance(best.objective, float)
    assert math.isfinite(best.objective)
    assert len(seen) == 3
    assert all(norm == static and step == 12 for norm, step, static in seen)
    ledgers = sorted(tmp_path.rglob("clip_ledger.jsonl"))
    assert len(ledgers) == 3  # one in the folder of every trial
    assert all(verify_ledger(path).ok for path in ledgers)


def test_pure_bfloat16_weights_train_and_a_spike_is_cut(tmp_path):
    trainer = build(AdaptiveClipTrainer, tmp_path, clip=CONFIG)
    trainer.model.to(torch.bfloat16)
    before = weights(trainer)
    run(trainer)

    assert next(trainer.model.parameters()).dtype == torch.bfloat16
    assert not torch.equal(before, weights(trainer))
    assert weights(trainer).isfinite().all()
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert report.ok, report.findings
    assert report.measured >= 4  # and what was measured at the optimizer is what was intended


def test_the_best_model_is_loaded_at_the_end_and_the_controller_stays(tmp_path):
    args = arguments(
        tmp_path,
        save_strategy="steps",
        save_steps=20,
        eval_strategy="steps",
        eval_steps=20,
        load_best_model_at_end=True,
    )
    trainer = build(AdaptiveClipTrainer, tmp_path, args=args, clip=CONFIG, eval_dataset=dataset().select(range(32)))
    run(trainer)

    assert trainer.state.best_model_checkpoint is not None
    assert trainer.clipper.step == STEPS
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").closed


def test_a_checkpoint_of_weights_alone_has_no_state_of_the_controller_either(tmp_path, caplog):
    args = arguments(tmp_path, save_strategy="steps", save_steps=20, save_only_model=True)
    run(build(AdaptiveClipTrainer, tmp_path, args=args, clip=CONFIG))
    checkpoint = tmp_path / "checkpoint-20"
    assert not (checkpoint / "optimizer.pt").exists()
    assert not (checkpoint / "clip_state.safetensors").exists()

    trainer = build(AdaptiveClipTrainer, tmp_path, args=args, clip=CONFIG)
    run(trainer, resume_from_checkpoint=str(checkpoint))
    assert trainer.clipper.statistics.steps == 20
    assert any("starts afresh" in r.message for r in caplog.records)


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_lora_with_its_matrices_of_zeros_trains(tmp_path, granularity):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = AdaptiveClipTrainer(
        model=peft.get_peft_model(model(), lora),
        args=arguments(tmp_path, learning_rate=1e-2),
        train_dataset=dataset(),
        clip=CONFIG.replace(granularity=granularity),
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    run(trainer)

    for name, p in trainer.model.named_parameters():
        assert torch.equal(before[name], p) == ("lora_" not in name), name
        if "lora_B" in name:
            assert not before[name].any()
            assert p.any()
    header = json.loads((tmp_path / "clip_ledger.jsonl").read_text().splitlines()[0])
    assert header["num_tensors"] == (8 if granularity == "tensor" else 0)  # frozen weights are not counted


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz .,0123456789"]
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *letters])}
    spelled = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    spelled.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    spelled.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=spelled, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def test_the_sft_trainer_of_trl_through_the_mixin(tmp_path):
    trl = pytest.importorskip("trl")
    from pydoc_data.topics import topics

    from datasets import Dataset

    class AdaptiveSFTTrainer(AdaptiveClipMixin, trl.SFTTrainer):  # type: ignore[name-defined]
        pass

    texts = [t.lower()[i : i + 60] for t in list(topics.values())[:40] for i in range(0, 240, 60)]
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        logging_steps=10,
        max_length=64,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = AdaptiveSFTTrainer(
        model=model(),
        args=args,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        clip=CONFIG,
    )
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]

    assert losses[-1] < losses[0]
    assert trainer.clipper.step == 30
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert report.ok, report.findings


def test_the_grpo_trainer_of_trl_runs(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class AdaptiveGRPOTrainer(AdaptiveClipMixin, trl.GRPOTrainer):  # type: ignore[name-defined]
        pass

    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = AdaptiveGRPOTrainer(
        model=model(),
        args=args,
        reward_funcs=lambda completions, **kwargs: [float(len(set(c))) for c in completions],
        train_dataset=Dataset.from_dict({"prompt": ["the cat", "a dog", "one", "two"]}),
        processing_class=tokenizer(),
        clip=CONFIG,
    )
    trainer.train()

    assert trainer.clipper.step == 3
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").ok


def test_a_model_spread_over_devices_is_refused(tmp_path):
    spread = model()
    spread.hf_device_map = {"model.embed_tokens": 0, "lm_head": 1}
    with pytest.raises(UnsupportedSetupError, match="is DEVICE_MAP instead"):
        AdaptiveClipTrainer(model=spread, args=arguments(tmp_path), train_dataset=dataset())


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_an_optimizer_that_steps_within_the_backward_pass_is_refused(tmp_path, name):
    with pytest.raises(UnsupportedSetupError, match=f"but is '{name}' instead"):
        build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, optim=name))


@pytest.mark.parametrize("name", ["stable_adamw", "adafactor", "adamw_torch", "sgd", "adamw_bnb_8bit"])
def test_other_optimizers_leave_a_bad_step_out(tmp_path, name):
    if name == "adamw_bnb_8bit":
        pytest.importorskip("bitsandbytes")
    if name == "stable_adamw":
        pytest.importorskip("optimi")

    class BadStep(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 5 else loss

    class Watch(TrainerCallback):
        def __init__(self):
            self.weights = {}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.weights[state.global_step] = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()

    class Ours(AdaptiveClipMixin, BadStep):
        pass

    watch = Watch()
    trainer = build(Ours, tmp_path, args=arguments(tmp_path, optim=name, max_steps=8), clip=CONFIG, callbacks=[watch])
    run(trainer)

    assert torch.equal(watch.weights[5], watch.weights[6])
    assert not torch.equal(watch.weights[6], watch.weights[7])
    assert weights(trainer).isfinite().all()
